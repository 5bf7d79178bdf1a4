package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"time"

	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// An export is a stream of lines (NDJSON, application/x-ndjson), each a JSON object with one member that says what it is:
//
//	{"genesis":{"origin":…,"at":…,"adopted":…}}       first
//	{"from":{"seq":…,"hash":…}}                       second, if the export does not begin at the first entry: what precedes it
//	{"key":{"id":…,"public_key":…,"since":…}}         each key that signs checkpoints or once did: whoever made the export says so
//	{"entry":{"seq":…,…,"prev":…,"hash":…}}           in order
//	{"checkpoint":"<JWS>"}                            right after the entry that it names
//	{"end":{"seq":…,"hash":…}}                        last: the stream was not cut short

// MaxExportLine is the longest line of an export, in bytes.
const MaxExportLine = 64 << 10

// ExportLine is a line of an export. Exactly one member is set.
type ExportLine struct {
	Genesis    *Genesis `json:"genesis,omitempty"`
	From       *Head    `json:"from,omitempty"`
	Key        *Key     `json:"key,omitempty"`
	Entry      *Entry   `json:"entry,omitempty"`
	Checkpoint string   `json:"checkpoint,omitempty"`
	End        *Head    `json:"end,omitempty"`
}

// Append appends l and a line feed to b.
func (l ExportLine) Append(b []byte) ([]byte, error) {
	raw, err := json.Marshal(l, json.Deterministic(true))
	if err != nil {
		return b, fleet.Wrap(fleet.Internal, err, "a line of the audit trail cannot be encoded")
	}
	return append(append(b, raw...), '\n'), nil
}

func (l ExportLine) members() int {
	n := 0
	for _, set := range []bool{l.Genesis != nil, l.From != nil, l.Key != nil, l.Entry != nil, l.Checkpoint != "", l.End != nil} {
		if set {
			n++
		}
	}
	return n
}

// Verdict is what a Verifier found out about a trail that is intact.
type Verdict struct {
	Origin      string    `json:"origin"`
	First       uint64    `json:"first"`                 // number of the first entry that was checked
	Last        uint64    `json:"last"`                  // and of the last
	Hash        string    `json:"hash"`                  // of the last
	Adopted     uint64    `json:"adopted,omitempty"`     // entries up to this one were there before the chain was begun …
	ChainedAt   time.Time `json:"chained_at"`            // … at this time
	Whole       bool      `json:"whole"`                 // the export has its last line
	Checkpoints int       `json:"checkpoints"`           // that were checked
	SignedTo    uint64    `json:"signed_to"`             // number of the last entry that a checkpoint vouches for; 0: none
	SignedAt    time.Time `json:"signed_at,omitzero"`    // time of that checkpoint
	UnsignedAt  time.Time `json:"unsigned_at,omitzero"`  // time of the first entry after it
	WitnessedTo uint64    `json:"witnessed_to,omitzero"` // number of the last entry that the caller's own checkpoint vouches for
	Pinned      bool      `json:"pinned"`                // the signatures were checked with keys of the caller, not with those that the export names
	Keys        []string  `json:"keys"`                  // ids of the keys that they were checked with
	Newest      string    `json:"newest,omitempty"`      // the checkpoint of SignedTo, as it is signed: to be kept
}

// Unsure is the error of a trail of which neither can be said that it is intact nor that it is broken.
type Unsure struct{ Msg string }

func (u *Unsure) Error() string { return u.Msg }

func unsure(format string, a ...any) error { return &Unsure{fmt.Sprintf(format, a...)} }

// Verifier checks an export line by line, in memory that does not grow with it.
type Verifier struct {
	ring    Keyring
	witness *Checkpoint

	line    int
	genesis *Genesis
	head    Head
	from    uint64 // number of the entry before the first
	ended   bool
	seen    bool // the witness's entry has been reached
	last    uint64
	v       Verdict
}

// NewVerifier returns a Verifier that believes the keys of ring; nil are those that the export names, which proves no more
// than that it agrees with itself. witness, if not nil, is a checkpoint that the caller has kept and verified: the trail must
// contain what it vouches for.
func NewVerifier(ring Keyring, witness *Checkpoint) *Verifier {
	v := &Verifier{ring: ring, witness: witness}
	v.v.Pinned, v.v.Keys = ring != nil, ring.IDs()
	return v
}

// VerifyExport reads a whole export. The error is a *Broken, an *Unsure, or what r says.
func VerifyExport(r io.Reader, ring Keyring, witness *Checkpoint) (Verdict, error) {
	v := NewVerifier(ring, witness)
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 4096), MaxExportLine)
	for lines.Scan() {
		if err := v.Line(lines.Bytes()); err != nil {
			return v.v, err
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return v.v, unsure("line %d is longer than %d bytes", v.line+1, MaxExportLine)
	}
	if err := lines.Err(); err != nil {
		return v.v, err
	}
	return v.Finish()
}

// Line takes the next line, without its line feed. The error is a *Broken or an *Unsure.
func (v *Verifier) Line(raw []byte) error {
	v.line++
	if len(raw) > MaxExportLine {
		return unsure("line %d is longer than %d bytes", v.line, MaxExportLine)
	}
	var l ExportLine
	if err := json.Unmarshal(raw, &l, json.RejectUnknownMembers(true)); err != nil || l.members() != 1 {
		return unsure("line %d is not a line of an audit export", v.line)
	}
	switch {
	case v.ended:
		return unsure("line %d stands after the end of the export", v.line)
	case (l.Genesis != nil) != (v.genesis == nil):
		return unsure("line %d: an export begins with its genesis, and has one", v.line)
	case l.Genesis != nil:
		return v.begin(*l.Genesis)
	case l.From != nil:
		return v.startAt(*l.From)
	case l.Key != nil:
		return v.key(*l.Key)
	case l.Entry != nil:
		return v.entry(*l.Entry)
	case l.Checkpoint != "":
		return v.checkpoint(l.Checkpoint)
	}
	return v.end(*l.End)
}

func (v *Verifier) begin(g Genesis) error {
	if g.Origin == "" || g.At.IsZero() {
		return unsure("line %d: the genesis lacks its origin or its time", v.line)
	}
	v.genesis, v.head = &g, g.Head()
	v.v.Origin, v.v.Adopted, v.v.ChainedAt, v.v.First = g.Origin, g.Adopted, g.At, 1
	if v.witness != nil && v.witness.Origin != g.Origin {
		return Break(0, Forked, "this is the trail %q, the checkpoint that you hold is of %q", g.Origin, v.witness.Origin)
	}
	return nil
}

func (v *Verifier) startAt(h Head) error {
	if v.line != 2 || h.Seq == 0 {
		return unsure("line %d: where an export begins is said once, in its second line", v.line)
	}
	if v.witness != nil && v.witness.Seq < h.Seq {
		return unsure("the export begins after entry %d, and the checkpoint that you hold is of entry %d: export from there, or all of it", h.Seq, v.witness.Seq)
	}
	v.head, v.from, v.v.First = h, h.Seq, h.Seq+1
	return v.look()
}

// maxKeys is how many keys of its own an export may name.
const maxKeys = 1000

func (v *Verifier) key(k Key) error {
	if v.head.Seq != v.from || len(v.ring) > maxKeys {
		return unsure("line %d: keys stand before the first entry, and are at most %d", v.line, maxKeys)
	}
	if v.v.Pinned {
		return nil
	}
	ring, err := ParseKeyring(k.PEM())
	if err != nil || ring[k.ID] == nil {
		return unsure("line %d is not a public key with its id", v.line)
	}
	if v.ring == nil {
		v.ring = Keyring{}
	}
	maps.Copy(v.ring, ring)
	v.v.Keys = v.ring.IDs()
	return nil
}

func (v *Verifier) entry(e Entry) error {
	head, err := v.head.Next(e)
	if err != nil {
		return err
	}
	v.head = head
	if v.v.UnsignedAt.IsZero() {
		v.v.UnsignedAt = e.At
	}
	return v.look()
}

// look compares the trail with the witness when it comes by its entry.
func (v *Verifier) look() error {
	w := v.witness
	if w == nil || v.seen || w.Seq != v.head.Seq {
		return nil
	}
	v.seen = true
	if w.Hash != v.head.Hash {
		return Break(w.Seq, Forked, "the trail was rewritten: entry %d is not the one that your checkpoint of %s vouches for", w.Seq, w.At.Format(time.RFC3339))
	}
	v.signed(*w)
	v.v.WitnessedTo = w.Seq
	return nil
}

func (v *Verifier) checkpoint(text string) error {
	c, err := OpenCheckpoint(text, v.ring)
	if err != nil {
		return Break(v.head.Seq, Signature, "after entry %d: %s", v.head.Seq, err.Error())
	}
	switch {
	case c.Origin != v.genesis.Origin:
		return Break(v.head.Seq, Forked, "after entry %d stands a checkpoint of another trail, %q", v.head.Seq, c.Origin)
	case c.Seq > v.head.Seq:
		return Break(v.head.Seq+1, Missing, "%s missing: a checkpoint vouches for them", Span(v.head.Seq+1, c.Seq))
	case c.Seq < v.head.Seq || c.Seq == v.last && v.last > 0:
		return Break(c.Seq, Disordered, "the checkpoint of entry %d stands after entry %d, or twice", c.Seq, v.head.Seq)
	case c.Hash != v.head.Hash:
		return Break(c.Seq, Forked, "the trail was rewritten: entry %d is not the one that the checkpoint of %s vouches for", c.Seq, c.At.Format(time.RFC3339))
	}
	v.last = c.Seq
	v.v.Checkpoints++
	if v.ring != nil {
		v.signed(c)
		v.v.Newest = text
	}
	return nil
}

// signed notes that c, whose signature was checked, vouches for the trail as it was read so far.
func (v *Verifier) signed(c Checkpoint) {
	v.v.SignedTo, v.v.SignedAt, v.v.UnsignedAt = c.Seq, c.At, time.Time{}
}

func (v *Verifier) end(h Head) error {
	v.ended, v.v.Whole = true, true
	if h.Seq > v.head.Seq {
		return Break(v.head.Seq+1, Missing, "%s missing at the end", Span(v.head.Seq+1, h.Seq))
	}
	if h != v.head {
		return Break(v.head.Seq, Changed, "the export ends with entry %d, and its last line says otherwise", v.head.Seq)
	}
	return nil
}

// Finish says what was found out. It is an *Unsure if the export was cut short, or if no signature vouches for any of it.
func (v *Verifier) Finish() (Verdict, error) {
	v.v.Last, v.v.Hash = v.head.Seq, string(v.head.Hash)
	switch w := v.witness; {
	case v.genesis == nil:
		return v.v, unsure("the export is empty")
	case !v.ended:
		return v.v, unsure("the export was cut short after entry %d: its last line is missing; export again", v.head.Seq)
	case w != nil && w.Seq > v.head.Seq:
		return v.v, Break(v.head.Seq+1, Missing, "%s missing: your checkpoint of %s vouches for them, and the trail ends with entry %d", Span(v.head.Seq+1, w.Seq), w.At.Format(time.RFC3339), v.head.Seq)
	case v.ring == nil:
		return v.v, unsure("the chain is intact, but without a key its signatures cannot be checked: whoever can write the trail can make it anew")
	case v.v.SignedTo == 0:
		return v.v, unsure("the chain is intact, but no checkpoint vouches for any of it: whoever can write the trail can make it anew")
	}
	return v.v, nil
}
