package wire

import (
	"bytes"
	"encoding/base64"
	"reflect"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"muster/internal/fleet"
)

// Limits of what a device may say, in bytes. The broker cuts packets at 64 KiB before muster sees them.
const (
	MaxPayload  = 16 << 10 // any message on muster.up
	MaxText     = 128      // any free text inside one
	MaxDepth    = 16       // nesting of a state document
	MaxCSR      = 4 << 10  // DER of a certificate request
	QuietBudget = 150      // payload that every real client can receive (esp32.md §7)
)

// MaxSpread is the longest OTAOffer.Spread, in seconds.
const MaxSpread = 900

// maxRevision bounds Hello.Revision: ESP-IDF keeps it in 16 bits.
const maxRevision = 1<<16 - 1

// Hello is the first message of each session. Field names are short because PubSubClient's whole packet must fit 256
// bytes (esp32.md §7).
type Hello struct {
	Version       string       `json:"v"`             // firmware version that runs
	Image         fleet.Hash   `json:"img"`           // image hash that runs (esp32.md §0.2)
	Hardware      string       `json:"hw,omitempty"`  // board revision, the product's own words
	Chip          string       `json:"chip,omitzero"` // esp32, esp32s3, …
	SecureVersion uint32       `json:"sv,omitzero"`   // eFuse anti-rollback counter
	Boot          string       `json:"boot,omitzero"` // why the device started
	Serial        fleet.Serial `json:"ser,omitzero"`  // certificate in use; empty on the fallback
	Buffer        int          `json:"buf,omitzero"`  // largest MQTT packet it can receive, bytes; 0 = unknown
	Bundle        int64        `json:"tb,omitzero"`   // version of the trust bundle that it trusts; 0 = that of its making
	Revision      int          `json:"rev,omitzero"`  // silicon revision × 100, as ESP-IDF counts: v3.1 is 301; 0 = unknown

	// What boot-previous-slot would start. A device whose packet has no room for it leaves both out.
	Previous              fleet.Hash `json:"prev,omitzero"` // image hash in the passive OTA slot
	PreviousSecureVersion uint32     `json:"psv,omitzero"`  // secure version of that image
}

// OTAStep is how far a device is with an update.
type OTAStep string

// Steps of an update that a device reports. Success is not among them: only a hello with the new image proves it.
const (
	StepAccepted    OTAStep = "accepted"
	StepDownloading OTAStep = "downloading"
	StepDownloaded  OTAStep = "downloaded"
	StepInstalled   OTAStep = "installed" // written and selected; the device restarts next
	StepRebooting   OTAStep = "rebooting" // restarts now
	StepVerifying   OTAStep = "verifying" // the new image runs and tests itself; the bootloader still goes back if it fails
	StepFailed      OTAStep = "failed"
	StepRejected    OTAStep = "rejected"
	StepRolledBack  OTAStep = "rolled-back"
)

// OTAReport is a device's word on the job it was given.
type OTAReport struct {
	Job     fleet.RolloutID `json:"job"`
	Step    OTAStep         `json:"step"`
	Percent int             `json:"pct,omitzero"` // 0 to 100, of the download
	Error   string          `json:"err,omitzero"` // why, for failed, rejected and rolled-back
}

// CertReport is what a device says about certificates: exactly one field is set.
type CertReport struct {
	CSR   []byte       `json:"csr,omitempty"` // PKCS #10, DER, base64 on the wire (RFC 2986)
	Have  fleet.Serial `json:"ok,omitzero"`   // stored; the device will use it from the next connect on
	Error string       `json:"err,omitzero"`  // could not store it
}

// OTAOffer is the doorbell of an update: what to fetch and how to check it. It fits QuietBudget for job ids of up to
// 24 bytes (fleet.MaxRolloutIDLen) and versions of 8.
type OTAOffer struct {
	Job     fleet.RolloutID `json:"job"`
	Version string          `json:"v"`
	Size    int64           `json:"n"`   // bytes
	SHA256  []byte          `json:"sha"` // 32 bytes, base64 on the wire
	Path    string          `json:"p"`   // on the device API, port 8443 (or 8444 from the fallback)

	// Spread is how long, in seconds, the device waits at most before it fetches: it picks the time at random, so that
	// those that got the offer together do not fetch together. At most MaxSpread; 0 = at once.
	Spread int `json:"in,omitzero"`
}

// CertOp says what a message on dn/cert asks for.
type CertOp string

// What muster says on dn/cert.
const (
	CertRenew CertOp = "renew" // send a CSR
	CertPush  CertOp = "cert"  // here is your certificate
	CertPart  CertOp = "part"  // a slice of a CertPush that does not fit the device's buffer
	CertNo    CertOp = "no"    // the request was refused, or waits for an operator; see Why
)

// CertOrder is a message on dn/cert.
type CertOrder struct {
	Op       CertOp       `json:"op"`
	Serial   fleet.Serial `json:"ser,omitzero"`  // CertPush
	Chain    [][]byte     `json:"crt,omitempty"` // CertPush: leaf, then intermediate; DER, base64 on the wire
	Password string       `json:"pw,omitzero"`   // CertPush on the fallback: replaces the one used now
	Tag      string       `json:"t,omitzero"`    // CertPart: the first 8 hex digits of the SHA-256 of the whole message
	Index    int          `json:"i,omitzero"`    // CertPart: from 0
	Count    int          `json:"of,omitzero"`   // CertPart: how many
	Data     []byte       `json:"d,omitempty"`   // CertPart: slice of the JSON of the whole message
	Why      string       `json:"why,omitzero"`  // CertNo: wait, refused, …
	Retry    int          `json:"in,omitzero"`   // CertNo, CertRenew: seconds after which asking again makes sense
	By       int64        `json:"by,omitzero"`   // CertRenew: end of the window, seconds since 1970 (RFC 9773: past = at once)
}

// CmdOp is a command to a device.
type CmdOp string

// What muster says on dn/cmd.
const (
	CmdHello    CmdOp = "hello" // the answer to a hello: the server's time
	CmdReboot   CmdOp = "reboot"
	CmdPrevious CmdOp = "boot-previous-slot"
	CmdReport   CmdOp = "report"
	CmdTrust    CmdOp = "trust" // fetch the trust bundle; see Bundle
)

// Cmd is a message on dn/cmd.
type Cmd struct {
	Op   CmdOp `json:"op"`
	Time int64 `json:"t,omitzero"` // CmdHello: Unix seconds; most devices have no clock

	// CmdPrevious, both or neither: the rollout to which the device reports on up/ota, and the image hash that the passive
	// slot must hold, 32 bytes, base64 on the wire. A device that runs that image already has nothing to do; one whose
	// passive slot holds another, or one whose secure version is below the eFuse counter, says rejected.
	Job   fleet.RolloutID `json:"job,omitzero"`
	Image []byte          `json:"img,omitempty"`

	// CmdTrust: version of the trust bundle at PathTrust. A device that has it, or a newer one, has nothing to do.
	Bundle int64 `json:"tb,omitzero"`
}

// PathTrust is where the device API serves the signed trust bundle, on both listeners.
const PathTrust = "/trust"

// strict is how everything from outside is read: no unknown or duplicate names, exact case, valid UTF-8 (faults.md §7.2).
var strict = json.JoinOptions(json.RejectUnknownMembers(true))

// decode reads one JSON value of at most MaxPayload bytes and nothing after it.
func decode[T any](b []byte) (T, error) {
	var v, zero T
	if len(b) > MaxPayload {
		return zero, fleet.Errorf(fleet.Invalid, "message longer than %d bytes", MaxPayload)
	}
	if len(bytes.TrimSpace(b)) == 0 || bytes.Equal(bytes.TrimSpace(b), []byte("null")) {
		return zero, fleet.Errorf(fleet.Invalid, "empty message")
	}
	if err := json.Unmarshal(b, &v, strict); err != nil {
		return zero, fleet.Wrap(fleet.Invalid, err, "not the JSON that api/asyncapi.yaml describes")
	}
	return v, nil
}

// decodeStruct is decode for a message of fixed members. The JSON package reads null as "leave the member as it is"; here
// a member is there or it is not.
func decodeStruct[T any](b []byte) (T, error) {
	v, err := decode[T](b)
	if err == nil && bytes.Contains(b, []byte("null")) && holds(b, func(t jsontext.Token) bool { return t.Kind() == 'n' }) {
		var zero T
		return zero, fleet.Errorf(fleet.Invalid, "a member is null: leave out what there is not")
	}
	return v, err
}

// holds reports whether is is true of a token of the valid JSON value b.
func holds(b []byte, is func(jsontext.Token) bool) bool {
	d := jsontext.NewDecoder(bytes.NewReader(b))
	for {
		t, err := d.ReadToken()
		if err != nil {
			return false
		}
		if is(t) {
			return true
		}
	}
}

// encode cannot fail on the types of this package; a failure is a fault of the program. Bytes that are no UTF-8 become
// U+FFFD.
func encode(v any) []byte {
	b, err := json.Marshal(v, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		panic("wire: " + err.Error())
	}
	return b
}

// DecodeHello reads up/hello. All errors of the Decode functions are of kind Invalid and hold no raw input.
func DecodeHello(b []byte) (Hello, error) {
	h, err := decodeStruct[Hello](b)
	if err != nil {
		return Hello{}, err
	}
	if _, err := fleet.ParseHash(string(h.Image)); err != nil {
		return Hello{}, fleet.Wrap(fleet.Invalid, err, "hello: img is not 64 lower-case hex digits")
	}
	if h.Serial != "" {
		if _, err := fleet.ParseSerial(string(h.Serial)); err != nil {
			return Hello{}, fleet.Wrap(fleet.Invalid, err, "hello: ser is not a serial")
		}
	}
	if h.Version == "" {
		return Hello{}, fleet.Errorf(fleet.Invalid, "hello: v is missing")
	}
	for _, m := range [...]struct{ name, text string }{{"v", h.Version}, {"hw", h.Hardware}, {"chip", h.Chip}, {"boot", h.Boot}} {
		if !plainText(m.text) {
			return Hello{}, notPlain("hello", m.name)
		}
	}
	if h.Bundle < 0 || h.Bundle >= 1<<53 {
		return Hello{}, fleet.Errorf(fleet.Invalid, "hello: tb is not the version of a trust bundle")
	}
	if h.Revision < 0 || h.Revision > maxRevision {
		return Hello{}, fleet.Errorf(fleet.Invalid, "hello: rev is not between 0 and %d", maxRevision)
	}
	if h.Previous != "" {
		if _, err := fleet.ParseHash(string(h.Previous)); err != nil {
			return Hello{}, fleet.Wrap(fleet.Invalid, err, "hello: prev is not 64 lower-case hex digits")
		}
	}
	if h.Buffer < 0 || h.Buffer > 1<<20 {
		return Hello{}, fleet.Errorf(fleet.Invalid, "hello: buf is not between 0 and %d", 1<<20)
	}
	return h, nil
}

// DecodeOTA reads up/ota.
func DecodeOTA(b []byte) (OTAReport, error) {
	r, err := decodeStruct[OTAReport](b)
	if err != nil {
		return OTAReport{}, err
	}
	if _, err := fleet.ParseRolloutID(string(r.Job)); err != nil {
		return OTAReport{}, fleet.Wrap(fleet.Invalid, err, "ota: job is not a job id")
	}
	switch r.Step {
	case StepAccepted, StepDownloading, StepDownloaded, StepInstalled, StepRebooting, StepVerifying, StepFailed, StepRejected, StepRolledBack:
	default:
		return OTAReport{}, fleet.Errorf(fleet.Invalid, "ota: step is none of those in api/asyncapi.yaml")
	}
	if r.Percent < 0 || r.Percent > 100 {
		return OTAReport{}, fleet.Errorf(fleet.Invalid, "ota: pct is not between 0 and 100")
	}
	if !plainText(r.Error) {
		return OTAReport{}, notPlain("ota", "err")
	}
	return r, nil
}

// DecodeCert reads up/cert.
func DecodeCert(b []byte) (CertReport, error) {
	r, err := decodeStruct[CertReport](b)
	if err != nil {
		return CertReport{}, err
	}
	set := 0
	for _, is := range []bool{len(r.CSR) > 0, r.Have != "", r.Error != ""} {
		if is {
			set++
		}
	}
	if set != 1 {
		return CertReport{}, fleet.Errorf(fleet.Invalid, "cert: set exactly one of csr, ok and err")
	}
	if len(r.CSR) > MaxCSR {
		return CertReport{}, fleet.Errorf(fleet.Invalid, "cert: csr is longer than %d bytes", MaxCSR)
	}
	if r.Have != "" {
		if _, err := fleet.ParseSerial(string(r.Have)); err != nil {
			return CertReport{}, fleet.Wrap(fleet.Invalid, err, "cert: ok is not a serial")
		}
	}
	if !plainText(r.Error) {
		return CertReport{}, notPlain("cert", "err")
	}
	return r, nil
}

// DecodeState reads up/state: a JSON object, nested at most MaxDepth deep, whose members replace those of the last
// known state (RFC 7396: null removes). It returns it without insignificant space; numbers stay as the device wrote them,
// because not every integer of a device fits a float64.
func DecodeState(b []byte) (jsontext.Value, error) {
	v, err := decode[jsontext.Value](b)
	if err != nil {
		return nil, err
	}
	if v.Kind() != '{' {
		return nil, fleet.Errorf(fleet.Invalid, "state: not a JSON object")
	}
	if depth(v) > MaxDepth {
		return nil, fleet.Errorf(fleet.Invalid, "state: nested deeper than %d", MaxDepth)
	}
	if bytes.Contains(v, []byte(`\u0000`)) && holds(v, func(t jsontext.Token) bool { return t.Kind() == '"' && strings.Contains(t.String(), "\x00") }) {
		return nil, fleet.Errorf(fleet.Invalid, "state: a string holds the character NUL, which databases cannot keep")
	}
	if err := v.Compact(); err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "state: not JSON that can be stored")
	}
	return v, nil
}

// DecodeOffer reads dn/ota: the device's side of the codec, as are DecodeCertOrder and DecodeCmd.
func DecodeOffer(b []byte) (OTAOffer, error) {
	o, err := decodeStruct[OTAOffer](b)
	if err != nil {
		return OTAOffer{}, err
	}
	if _, err := fleet.ParseRolloutID(string(o.Job)); err != nil {
		return OTAOffer{}, fleet.Wrap(fleet.Invalid, err, "ota: job is not a job id")
	}
	switch {
	case o.Version == "" || !plainText(o.Version):
		return OTAOffer{}, notPlain("ota", "v")
	case o.Size < 1:
		return OTAOffer{}, fleet.Errorf(fleet.Invalid, "ota: n is not a size in bytes")
	case len(o.SHA256) != 32:
		return OTAOffer{}, fleet.Errorf(fleet.Invalid, "ota: sha does not have 32 bytes")
	case !strings.HasPrefix(o.Path, "/") || strings.HasPrefix(o.Path, "//") || !plainText(o.Path) || strings.ContainsAny(o.Path, ` \`):
		return OTAOffer{}, fleet.Errorf(fleet.Invalid, "ota: p is not an absolute path of at most %d bytes", MaxText)
	case o.Spread < 0 || o.Spread > MaxSpread:
		return OTAOffer{}, fleet.Errorf(fleet.Invalid, "ota: in is not between 0 and %d seconds", MaxSpread)
	}
	return o, nil
}

// DecodeCertOrder reads dn/cert. Members that do not belong to the op are refused.
func DecodeCertOrder(b []byte) (CertOrder, error) {
	o, err := decodeStruct[CertOrder](b)
	if err != nil {
		return CertOrder{}, err
	}
	want := CertOrder{Op: o.Op} // o without the members that other ops have
	whole := true
	switch o.Op {
	case CertRenew:
		want.Retry, want.By = o.Retry, o.By
		whole = o.Retry >= 0 && o.By >= 0
	case CertPush:
		want.Serial, want.Chain, want.Password = o.Serial, o.Chain, o.Password
		_, err := fleet.ParseSerial(string(o.Serial))
		whole = err == nil && len(o.Chain) > 0 && plainText(o.Password)
	case CertPart:
		want.Tag, want.Index, want.Count, want.Data = o.Tag, o.Index, o.Count, o.Data
		whole = o.usableSlice()
	case CertNo:
		want.Why, want.Retry = o.Why, o.Retry
		whole = o.Why != "" && plainText(o.Why) && o.Retry >= 0
	default:
		return CertOrder{}, fleet.Errorf(fleet.Invalid, "cert: op is none of those in api/asyncapi.yaml")
	}
	if !whole || !reflect.DeepEqual(o, want) {
		return CertOrder{}, fleet.Errorf(fleet.Invalid, "cert: a member that this op needs is missing or wrong, or there is one that it does not have")
	}
	return o, nil
}

// DecodeCmd reads dn/cmd. Ops beyond the constants are user-defined; a device ignores those that it does not know.
func DecodeCmd(b []byte) (Cmd, error) {
	c, err := decodeStruct[Cmd](b)
	if err != nil {
		return Cmd{}, err
	}
	if c.Op == "" || !plainText(string(c.Op)) {
		return Cmd{}, notPlain("cmd", "op")
	}
	if c.Time < 0 {
		return Cmd{}, fleet.Errorf(fleet.Invalid, "cmd: t is not a time after 1970")
	}
	if c.Bundle < 0 || c.Bundle >= 1<<53 || (c.Bundle > 0) != (c.Op == CmdTrust) {
		return Cmd{}, fleet.Errorf(fleet.Invalid, "cmd: tb is a version and goes with %s", CmdTrust)
	}
	if c.Job == "" && len(c.Image) == 0 {
		return c, nil
	}
	if c.Op != CmdPrevious {
		return Cmd{}, fleet.Errorf(fleet.Invalid, "cmd: job and img belong to %s alone", CmdPrevious)
	}
	if _, err := fleet.ParseRolloutID(string(c.Job)); err != nil {
		return Cmd{}, fleet.Wrap(fleet.Invalid, err, "cmd: job is not a job id")
	}
	if len(c.Image) != 32 {
		return Cmd{}, fleet.Errorf(fleet.Invalid, "cmd: img does not have 32 bytes")
	}
	return c, nil
}

// Encode writes any message of this package.
func Encode[T Hello | OTAReport | CertReport | OTAOffer | CertOrder | Cmd](v T) []byte {
	return encode(v)
}

// Within writes the offer for a budget of so many bytes: a spread that makes it too long is shortened by a digit or more,
// and left out in the end. The result can still be longer than the budget where all else is.
func (o OTAOffer) Within(budget int) []byte {
	b := encode(o)
	for _, most := range [...]int{99, 9, 0} {
		if len(b) <= budget {
			break
		}
		o.Spread = min(o.Spread, most)
		b = encode(o)
	}
	return b
}

// HelloAnswer is what muster answers to a hello at time at.
func HelloAnswer(at time.Time) []byte { return encode(Cmd{Op: CmdHello, Time: at.Unix()}) }

// plainText reports whether s is at most MaxText bytes of printable text: nothing that moves the cursor, or the direction
// of writing, of the terminal on which an operator reads it.
func plainText(s string) bool {
	return len(s) <= MaxText && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// notPlain is the error where plainText is false of a member that a message needs or has.
func notPlain(message, member string) error {
	return fleet.Errorf(fleet.Invalid, "%s: %s is missing, longer than %d bytes or holds characters that cannot be printed", message, member, MaxText)
}

// depth returns how deep the valid JSON value v is nested.
func depth(v jsontext.Value) int {
	d := jsontext.NewDecoder(bytes.NewReader(v))
	deepest := 0
	for {
		if _, err := d.ReadToken(); err != nil {
			return deepest
		}
		deepest = max(deepest, d.StackDepth())
	}
}

// packetOverhead is what MQTT adds to a payload on topic: fixed header with a length of up to 3 bytes, topic length,
// topic, packet id, and the length of no properties (MQTT 3.1.1 §3.3, MQTT 5 §3.3.2.3).
func packetOverhead(topic string) int { return 1 + 3 + 2 + len(topic) + 2 + 1 }

// Budget returns the largest payload, in bytes, that may be sent unasked on topic to a device whose hello named a
// receive buffer of buffer bytes (0 if it named none).
func Budget(topic string, buffer int) int {
	if buffer == 0 {
		return QuietBudget
	}
	return max(0, buffer-packetOverhead(topic))
}

// MaxSlices is the largest number of CertPart messages for one CertPush.
const MaxSlices = 999

// SplitCert returns order as one payload if it fits budget, else as CertPart payloads that each do. It returns an
// Unprocessable error where not even a slice of 16 bytes fits. The tag of the slices is a digest of the whole: the same
// certificate may be sent again with another password, and half of one must not be joined to half of the other.
func SplitCert(order CertOrder, budget int) ([][]byte, error) {
	whole := encode(order)
	if len(whole) <= budget {
		return [][]byte{whole}, nil
	}
	tag := tagOf(whole)
	frame := len(encode(CertOrder{Op: CertPart, Tag: tag, Index: MaxSlices, Count: MaxSlices, Data: []byte{0}})) - 4
	slice := base64.StdEncoding.DecodedLen((budget - frame) / 4 * 4)
	if slice < 16 {
		return nil, fleet.Errorf(fleet.Unprocessable, "the device's receive buffer leaves %d bytes for a payload, too few even for a slice of a certificate", budget)
	}
	count := (len(whole) + slice - 1) / slice
	if count > MaxSlices {
		return nil, fleet.Errorf(fleet.Unprocessable, "the certificate would take %d slices", count)
	}
	out := make([][]byte, 0, count)
	for i := range count {
		part := whole[i*slice : min(len(whole), (i+1)*slice)]
		out = append(out, encode(CertOrder{Op: CertPart, Tag: tag, Index: i, Count: count, Data: part}))
	}
	return out, nil
}
