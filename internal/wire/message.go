package wire

import (
	"bytes"
	"encoding/base64"
	"strings"
	"time"
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
}

// OTAStep is how far a device is with an update.
type OTAStep string

// Steps of an update that a device reports. Success is not among them: only a hello with the new image proves it.
const (
	StepAccepted    OTAStep = "accepted"
	StepDownloading OTAStep = "downloading"
	StepDownloaded  OTAStep = "downloaded"
	StepInstalled   OTAStep = "installed" // written and selected; the device restarts next
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
// 24 bytes.
type OTAOffer struct {
	Job     fleet.RolloutID `json:"job"`
	Version string          `json:"v"`
	Size    int64           `json:"n"`   // bytes
	SHA256  []byte          `json:"sha"` // 32 bytes, base64 on the wire
	Path    string          `json:"p"`   // on the device API, port 8443 (or 8444 from the fallback)
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
	Tag      string       `json:"t,omitzero"`    // CertPart: which message it is a slice of
	Index    int          `json:"i,omitzero"`    // CertPart: from 0
	Count    int          `json:"of,omitzero"`   // CertPart: how many
	Data     []byte       `json:"d,omitempty"`   // CertPart: slice of the JSON of the whole message
	Why      string       `json:"why,omitzero"`  // CertNo: wait, refused, …
	Retry    int          `json:"in,omitzero"`   // CertNo: seconds after which asking again makes sense
}

// CmdOp is a command to a device.
type CmdOp string

// What muster says on dn/cmd.
const (
	CmdHello    CmdOp = "hello" // the answer to a hello: the server's time
	CmdReboot   CmdOp = "reboot"
	CmdPrevious CmdOp = "boot-previous-slot"
	CmdReport   CmdOp = "report"
)

// Cmd is a message on dn/cmd.
type Cmd struct {
	Op   CmdOp `json:"op"`
	Time int64 `json:"t,omitzero"` // CmdHello: Unix seconds; most devices have no clock
}

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

// encode cannot fail on the types of this package; a failure is a fault of the program.
func encode(v any) []byte {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		panic("wire: " + err.Error())
	}
	return b
}

// DecodeHello reads up/hello. All errors of the Decode functions are of kind Invalid and hold no raw input.
func DecodeHello(b []byte) (Hello, error) {
	h, err := decode[Hello](b)
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
	for name, s := range map[string]string{"v": h.Version, "hw": h.Hardware, "chip": h.Chip, "boot": h.Boot} {
		if !plainText(s) {
			return Hello{}, fleet.Errorf(fleet.Invalid, "hello: %s is longer than %d bytes or holds control characters", name, MaxText)
		}
	}
	if h.Buffer < 0 || h.Buffer > 1<<20 {
		return Hello{}, fleet.Errorf(fleet.Invalid, "hello: buf is not between 0 and %d", 1<<20)
	}
	return h, nil
}

// DecodeOTA reads up/ota.
func DecodeOTA(b []byte) (OTAReport, error) {
	r, err := decode[OTAReport](b)
	if err != nil {
		return OTAReport{}, err
	}
	if _, err := fleet.ParseRolloutID(string(r.Job)); err != nil {
		return OTAReport{}, fleet.Wrap(fleet.Invalid, err, "ota: job is not a job id")
	}
	switch r.Step {
	case StepAccepted, StepDownloading, StepDownloaded, StepInstalled, StepFailed, StepRejected, StepRolledBack:
	default:
		return OTAReport{}, fleet.Errorf(fleet.Invalid, "ota: step is none of those in api/asyncapi.yaml")
	}
	if r.Percent < 0 || r.Percent > 100 {
		return OTAReport{}, fleet.Errorf(fleet.Invalid, "ota: pct is not between 0 and 100")
	}
	if !plainText(r.Error) {
		return OTAReport{}, fleet.Errorf(fleet.Invalid, "ota: err is longer than %d bytes or holds control characters", MaxText)
	}
	return r, nil
}

// DecodeCert reads up/cert.
func DecodeCert(b []byte) (CertReport, error) {
	r, err := decode[CertReport](b)
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
		return CertReport{}, fleet.Errorf(fleet.Invalid, "cert: err is longer than %d bytes or holds control characters", MaxText)
	}
	return r, nil
}

// DecodeState reads up/state: a JSON object, nested at most MaxDepth deep, whose members replace those of the last
// known state (RFC 7396: null removes).
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
	if err := v.Canonicalize(); err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "state: not JSON that can be stored")
	}
	return v, nil
}

// DecodeOffer, DecodeCertOrder and DecodeCmd are the device's side of the codec.
func DecodeOffer(b []byte) (OTAOffer, error) { return decode[OTAOffer](b) }

// DecodeCertOrder reads dn/cert.
func DecodeCertOrder(b []byte) (CertOrder, error) { return decode[CertOrder](b) }

// DecodeCmd reads dn/cmd.
func DecodeCmd(b []byte) (Cmd, error) { return decode[Cmd](b) }

// Encode writes any message of this package.
func Encode[T Hello | OTAReport | CertReport | OTAOffer | CertOrder | Cmd](v T) []byte {
	return encode(v)
}

// HelloAnswer is what muster answers to a hello at time at.
func HelloAnswer(at time.Time) []byte { return encode(Cmd{Op: CmdHello, Time: at.Unix()}) }

// plainText reports whether s is at most MaxText bytes of printable text.
func plainText(s string) bool {
	return len(s) <= MaxText && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r == utf8.RuneError })
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
// topic, packet id (MQTT 3.1.1 §3.3).
func packetOverhead(topic string) int { return 1 + 3 + 2 + len(topic) + 2 }

// Budget returns the largest payload, in bytes, that may be sent unasked on topic to a device whose hello named a
// receive buffer of buffer bytes (0 if it named none).
func Budget(topic string, buffer int) int {
	if buffer == 0 {
		return QuietBudget
	}
	return max(0, buffer-packetOverhead(topic))
}

// SplitCert returns order as one payload if it fits budget, else as CertPart payloads that each do. It returns an
// Unprocessable error where not even a slice of 16 bytes fits.
func SplitCert(order CertOrder, budget int) ([][]byte, error) {
	whole := encode(order)
	if len(whole) <= budget {
		return [][]byte{whole}, nil
	}
	tag := string(order.Serial[:min(8, len(order.Serial))])
	frame := len(encode(CertOrder{Op: CertPart, Tag: tag, Index: 999, Count: 999, Data: []byte{0}})) - 4
	slice := base64.StdEncoding.DecodedLen((budget - frame) / 4 * 4)
	if slice < 16 {
		return nil, fleet.Errorf(fleet.Unprocessable, "the device's receive buffer leaves %d bytes for a payload, too few even for a slice of a certificate", budget)
	}
	count := (len(whole) + slice - 1) / slice
	if count > 999 {
		return nil, fleet.Errorf(fleet.Unprocessable, "the certificate would take %d slices", count)
	}
	out := make([][]byte, 0, count)
	for i := range count {
		part := whole[i*slice : min(len(whole), (i+1)*slice)]
		out = append(out, encode(CertOrder{Op: CertPart, Tag: tag, Index: i, Count: count, Data: part}))
	}
	return out, nil
}
