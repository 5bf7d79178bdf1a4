package audit_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"pgregory.net/rapid"

	"muster/internal/audit"
	"muster/internal/fleet"
)

var day = time.Date(2030, 1, 1, 0, 0, 0, 123456789, time.UTC)

// keys are two keys for all tests of the process: of ours, and of somebody else.
var keys = sync.OnceValue(func() (out [2]*ecdsa.PrivateKey) {
	for i := range out {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		out[i] = k
	}
	return out
})

func ring(t testing.TB, which ...int) audit.Keyring {
	t.Helper()
	var text []byte
	for _, i := range which {
		k, err := audit.NewKey(keys()[i].Public(), day)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, k.PEM()...)
	}
	r, err := audit.ParseKeyring(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// trail is an audit trail to be tampered with.
type trail struct {
	genesis audit.Genesis
	entries []audit.Entry
	points  map[uint64]string // checkpoints by number
}

// record makes a trail of n entries with a checkpoint after each of those numbers.
func record(t testing.TB, n int, signed ...uint64) *trail {
	t.Helper()
	tr := &trail{genesis: audit.Genesis{Origin: "here", At: day}, points: map[uint64]string{}}
	for i := range n {
		tr.entries = append(tr.entries, audit.Entry{At: day.Add(time.Duration(i) * time.Second), Who: "alice", What: "device.disable", On: fmt.Sprint("d", i), Details: "line " + fmt.Sprint(i)})
	}
	tr.link(0)
	for _, s := range signed {
		tr.sign(t, s, 0)
	}
	return tr
}

// link chains the entries from index i on as somebody would who can write the store, but has no key.
func (tr *trail) link(i int) {
	h := tr.genesis.Head()
	if i > 0 {
		h = audit.Head{Seq: tr.entries[i-1].Seq, Hash: tr.entries[i-1].Hash}
	}
	for ; i < len(tr.entries); i++ {
		e := h.Link(tr.entries[i])
		tr.entries[i], h = e, audit.Head{Seq: e.Seq, Hash: e.Hash}
	}
}

func (tr *trail) sign(t testing.TB, seq uint64, key int) audit.Checkpoint {
	t.Helper()
	c := audit.Checkpoint{Origin: tr.genesis.Origin, Seq: seq, Hash: tr.entries[seq-1].Hash, At: day.Add(time.Hour)}
	s, err := audit.SignCheckpoint(c, keys()[key])
	if err != nil {
		t.Fatal(err)
	}
	tr.points[seq] = s.JWS
	return c
}

// lines is an honest export of what the trail now holds.
func (tr *trail) lines() (out []audit.ExportLine) {
	out = append(out, audit.ExportLine{Genesis: &tr.genesis})
	var last audit.Head
	for i := range tr.entries {
		e := &tr.entries[i]
		out, last = append(out, audit.ExportLine{Entry: e}), audit.Head{Seq: e.Seq, Hash: e.Hash}
		if p := tr.points[e.Seq]; p != "" {
			out = append(out, audit.ExportLine{Checkpoint: p})
		}
	}
	return append(out, audit.ExportLine{End: &last})
}

func (tr *trail) export(t testing.TB) []byte { return text(t, tr.lines()) }

func text(t testing.TB, lines []audit.ExportLine) (out []byte) {
	t.Helper()
	for _, l := range lines {
		var err error
		if out, err = l.Append(out); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestAnUntouchedTrailIsIntact(t *testing.T) {
	tr := record(t, 10, 4, 8)
	v, err := audit.VerifyExport(bytes.NewReader(tr.export(t)), ring(t, 0), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := audit.Verdict{
		Origin: "here", First: 1, Last: 10, Hash: string(tr.entries[9].Hash), ChainedAt: day, Checkpoints: 2,
		SignedTo: 8, SignedAt: day.Add(time.Hour), UnsignedAt: tr.entries[8].At,
		Whole: true, Pinned: true, Keys: ring(t, 0).IDs(), Newest: tr.points[8],
	}
	if !reflect.DeepEqual(v, want) {
		t.Errorf("got  %+v\nwant %+v", v, want)
	}
}

// What somebody may do who can write the store, and knows how the chain is made, but has no key.
func TestTamperingIsFound(t *testing.T) {
	for name, c := range map[string]struct {
		do      func(*testing.T, *trail)
		witness bool // needs the checkpoint of entry 8 that the verifier kept
		seq     uint64
		fault   audit.Fault
	}{
		"changed":      {do: func(_ *testing.T, tr *trail) { tr.entries[4].Who = "bob" }, seq: 5, fault: audit.Changed},
		"changed time": {do: func(_ *testing.T, tr *trail) { tr.entries[4].At = tr.entries[4].At.Add(time.Nanosecond) }, seq: 5, fault: audit.Changed},
		"changed, with its hash": {do: func(_ *testing.T, tr *trail) {
			e := &tr.entries[4]
			e.Details = ""
			e.Hash = audit.HashEntry(e.Prev, *e)
		}, seq: 6, fault: audit.Unlinked},
		"changed, all hashes after it made anew":    {do: func(_ *testing.T, tr *trail) { tr.entries[4].Who = "bob"; tr.link(4) }, seq: 8, fault: audit.Forked},
		"changed, all anew, the checkpoint dropped": {do: func(_ *testing.T, tr *trail) { tr.entries[4].Who = "bob"; tr.link(4); delete(tr.points, 8) }, witness: true, seq: 8, fault: audit.Forked},
		"changed, all anew, signed by another key":  {do: func(t *testing.T, tr *trail) { tr.entries[4].Who = "bob"; tr.link(4); tr.sign(t, 8, 1) }, seq: 8, fault: audit.Signature},
		"dropped":      {do: func(_ *testing.T, tr *trail) { tr.entries = slices.Delete(tr.entries, 4, 5) }, seq: 5, fault: audit.Missing},
		"some dropped": {do: func(_ *testing.T, tr *trail) { tr.entries = slices.Delete(tr.entries, 4, 7) }, seq: 5, fault: audit.Missing},
		"dropped, the rest numbered and linked anew": {do: func(_ *testing.T, tr *trail) { tr.entries = slices.Delete(tr.entries, 4, 5); tr.link(4) }, seq: 8, fault: audit.Forked},
		"the first dropped":                          {do: func(_ *testing.T, tr *trail) { tr.entries = tr.entries[1:] }, seq: 1, fault: audit.Missing},
		"reordered":                                  {do: func(_ *testing.T, tr *trail) { tr.entries[4], tr.entries[5] = tr.entries[5], tr.entries[4] }, seq: 5, fault: audit.Missing},
		"reordered, numbers exchanged": {do: func(_ *testing.T, tr *trail) {
			a, b := &tr.entries[4], &tr.entries[5]
			*a, *b = *b, *a
			a.Seq, b.Seq = 5, 6
		}, seq: 5, fault: audit.Changed},
		"reordered and linked anew": {do: func(_ *testing.T, tr *trail) { tr.entries[4], tr.entries[5] = tr.entries[5], tr.entries[4]; tr.link(4) }, seq: 8, fault: audit.Forked},
		"one twice":                 {do: func(_ *testing.T, tr *trail) { tr.entries = slices.Insert(tr.entries, 5, tr.entries[4]) }, seq: 5, fault: audit.Disordered},
		"inserted": {do: func(_ *testing.T, tr *trail) {
			tr.entries = slices.Insert(tr.entries, 5, audit.Entry{Seq: 6, At: day, Who: "eve"})
		}, seq: 6, fault: audit.Changed},
		"inserted and linked anew": {do: func(_ *testing.T, tr *trail) {
			tr.entries = slices.Insert(tr.entries, 5, audit.Entry{At: day, Who: "eve"})
			tr.link(5)
		}, seq: 8, fault: audit.Forked},
		"end cut off before a checkpoint":  {do: func(_ *testing.T, tr *trail) { tr.entries = tr.entries[:7]; tr.points[7] = tr.points[8] }, seq: 8, fault: audit.Missing},
		"end cut off with its checkpoint":  {do: func(_ *testing.T, tr *trail) { tr.entries = tr.entries[:7] }, witness: true, seq: 8, fault: audit.Missing},
		"begun anew":                       {do: func(_ *testing.T, tr *trail) { tr.genesis.At = day.Add(time.Second); tr.link(0) }, seq: 4, fault: audit.Forked},
		"begun anew without the old start": {do: func(_ *testing.T, tr *trail) { tr.entries = tr.entries[2:]; tr.link(0) }, seq: 4, fault: audit.Forked},
		"another trail":                    {do: func(_ *testing.T, tr *trail) { tr.genesis.Origin = "there"; tr.link(0) }, witness: true, seq: 0, fault: audit.Forked},
		"another trail's checkpoint": {do: func(t *testing.T, tr *trail) {
			o := record(t, 4)
			o.genesis.Origin = "there"
			o.link(0)
			o.sign(t, 4, 0)
			tr.points[4] = o.points[4]
		}, seq: 4, fault: audit.Forked},
		"a checkpoint of nothing":                           {do: func(_ *testing.T, tr *trail) { tr.points[4] = "x" }, seq: 4, fault: audit.Signature},
		"a checkpoint at the wrong place":                   {do: func(_ *testing.T, tr *trail) { tr.points[9] = tr.points[8] }, seq: 8, fault: audit.Disordered},
		"adopted entries that were not there when it began": {do: func(_ *testing.T, tr *trail) { tr.genesis.Adopted = 3 }, seq: 1, fault: audit.Unlinked},
	} {
		t.Run(name, func(t *testing.T) {
			tr := record(t, 10, 4, 8)
			held := audit.Checkpoint{Origin: "here", Seq: 8, Hash: tr.entries[7].Hash, At: day}
			c.do(t, tr)
			var w *audit.Checkpoint
			if c.witness {
				if _, err := audit.VerifyExport(bytes.NewReader(tr.export(t)), ring(t, 0), nil); err != nil && name != "another trail" {
					t.Errorf("without the witness it is found already: %v", err)
				}
				w = &held
			}
			_, err := audit.VerifyExport(bytes.NewReader(tr.export(t)), ring(t, 0), w)
			b, ok := errors.AsType[*audit.Broken](err)
			if !ok || b.Seq != c.seq || b.Fault != c.fault {
				t.Errorf("got %v (%+v), want %s at %d", err, b, c.fault, c.seq)
			}
		})
	}
}

// What cannot be judged is neither intact nor broken.
func TestWhatCannotBeJudged(t *testing.T) {
	tr := record(t, 6, 4)
	all := strings.SplitAfter(string(tr.export(t)), "\n")
	for name, c := range map[string]struct {
		text string
		ring audit.Keyring
		says string
	}{
		"empty":              {"", ring(t, 0), "empty"},
		"cut short":          {strings.Join(all[:5], ""), ring(t, 0), "cut short after entry 4"},
		"cut within a line":  {strings.Join(all, "")[:300], ring(t, 0), "line 2"},
		"no genesis":         {strings.Join(all[1:], ""), ring(t, 0), "begins with its genesis"},
		"two of them":        {all[0] + strings.Join(all, ""), ring(t, 0), "begins with its genesis"},
		"no key":             {strings.Join(all, ""), nil, "without a key"},
		"something after it": {strings.Join(all, "") + all[1], ring(t, 0), "after the end"},
		"unknown member":     {all[0] + `{"note":"x"}` + "\n", ring(t, 0), "line 2"},
		"two members":        {all[0] + `{"checkpoint":"x","end":{"seq":0,"hash":""}}` + "\n", ring(t, 0), "line 2"},
		"a long line":        {all[0] + strings.Repeat("x", audit.MaxExportLine+1) + "\n", ring(t, 0), "line 2 is longer"},
		"late from":          {all[0] + all[1] + `{"from":{"seq":1,"hash":""}}`, ring(t, 0), "second line"},
	} {
		_, err := audit.VerifyExport(strings.NewReader(c.text), c.ring, nil)
		if u, ok := errors.AsType[*audit.Unsure](err); !ok || !strings.Contains(u.Msg, c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	unsigned := record(t, 3)
	if _, err := audit.VerifyExport(bytes.NewReader(unsigned.export(t)), ring(t, 0), nil); err == nil || !strings.Contains(err.Error(), "no checkpoint vouches") {
		t.Errorf("no checkpoint: %v", err)
	}
	gone := append(slices.Clone(tr.lines()[:5]), audit.ExportLine{End: &audit.Head{Seq: 6, Hash: tr.entries[5].Hash}})
	if _, err := audit.VerifyExport(bytes.NewReader(text(t, gone)), ring(t, 0), nil); err == nil || !strings.Contains(err.Error(), "entries 5 to 6 are missing at the end") {
		t.Errorf("the end says more: %v", err)
	}
}

// A part of the trail is verified by the checkpoint after it: it vouches for what precedes it, too.
func TestAPartIsVerifiable(t *testing.T) {
	tr := record(t, 10, 4, 8)
	part := func(after int) []byte {
		l := []audit.ExportLine{{Genesis: &tr.genesis}, {From: &audit.Head{Seq: uint64(after), Hash: tr.entries[after-1].Hash}}}
		for _, x := range tr.lines() {
			if x.Entry != nil && x.Entry.Seq > uint64(after) || x.End != nil {
				l = append(l, x)
			}
			if x.Checkpoint != "" && l[len(l)-1].Entry != nil {
				l = append(l, x)
			}
		}
		return text(t, l)
	}
	v, err := audit.VerifyExport(bytes.NewReader(part(5)), ring(t, 0, 1), nil)
	if err != nil || v.First != 6 || v.Last != 10 || v.SignedTo != 8 || v.Checkpoints != 1 {
		t.Errorf("%+v, %v", v, err)
	}
	held := audit.Checkpoint{Origin: "here", Seq: 4, Hash: tr.entries[3].Hash, At: day}
	if v, err = audit.VerifyExport(bytes.NewReader(part(4)), ring(t, 0), &held); err != nil || v.WitnessedTo != 4 {
		t.Errorf("from the witness on: %+v, %v", v, err)
	}
	if _, err = audit.VerifyExport(bytes.NewReader(part(5)), ring(t, 0), &held); err == nil || !strings.Contains(err.Error(), "export from there") {
		t.Errorf("the witness lies before it: %v", err)
	}
	// What stood before the part cannot be replaced either.
	tr.entries[2].Who = "bob"
	tr.link(2)
	if _, err = audit.VerifyExport(bytes.NewReader(part(5)), ring(t, 0), nil); err == nil || !strings.Contains(err.Error(), "rewritten") {
		t.Errorf("another past: %v", err)
	}
}

// Without a key of the caller's the signatures are checked with those that the export names, and the verdict says so.
func TestTheKeysOfTheExportProveOnlyThatItAgreesWithItself(t *testing.T) {
	tr := record(t, 6, 4)
	named := func(which ...int) []byte {
		l := tr.lines()
		for _, i := range which {
			k, err := audit.NewKey(keys()[i].Public(), day)
			if err != nil {
				t.Fatal(err)
			}
			l = slices.Insert(l, 1, audit.ExportLine{Key: &k})
		}
		return text(t, l)
	}
	v, err := audit.VerifyExport(bytes.NewReader(named(0, 1)), nil, nil)
	if err != nil || v.Pinned || v.SignedTo != 4 || len(v.Keys) != 2 {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err = audit.VerifyExport(bytes.NewReader(named(0, 1)), ring(t, 0), nil); err != nil || !v.Pinned || len(v.Keys) != 1 {
		t.Errorf("with a key of the caller's: %+v, %v", v, err)
	}
	if _, err = audit.VerifyExport(bytes.NewReader(named(1)), nil, nil); err == nil || !strings.Contains(err.Error(), "not among the keys") {
		t.Errorf("not the key that signed: %v", err)
	}
	// Whoever exchanges the key makes all of it anew, and that agrees with itself: only the pinned key shows it.
	held := audit.Checkpoint{Origin: "here", Seq: 4, Hash: tr.entries[3].Hash, At: day}
	tr.entries[1].Who = "bob"
	tr.link(1)
	tr.sign(t, 4, 1)
	if v, err = audit.VerifyExport(bytes.NewReader(named(1)), nil, nil); err != nil || v.Pinned {
		t.Errorf("the key was exchanged: %+v, %v", v, err)
	}
	for name, c := range map[string]struct {
		ring    audit.Keyring
		witness *audit.Checkpoint
		fault   audit.Fault
	}{"a pinned key": {ring(t, 0), nil, audit.Signature}, "a checkpoint that was kept": {nil, &held, audit.Forked}} {
		_, err := audit.VerifyExport(bytes.NewReader(named(1)), c.ring, c.witness)
		if b, ok := errors.AsType[*audit.Broken](err); !ok || b.Seq != 4 || b.Fault != c.fault {
			t.Errorf("%s: %v", name, err)
		}
	}
	wrong, err := audit.NewKey(keys()[0].Public(), day)
	if err != nil {
		t.Fatal(err)
	}
	wrong.ID = "x"
	for name, l := range map[string][]audit.ExportLine{
		"an id that is not the key's": slices.Insert(tr.lines(), 1, audit.ExportLine{Key: &wrong}),
		"no key":                      slices.Insert(tr.lines(), 1, audit.ExportLine{Key: &audit.Key{ID: "x", PublicKey: []byte("x")}}),
		"after the first entry":       slices.Insert(tr.lines(), 2, audit.ExportLine{Key: &wrong}),
	} {
		if _, err := audit.VerifyExport(bytes.NewReader(text(t, l)), nil, nil); err == nil {
			t.Errorf("%s is taken", name)
		} else if _, ok := errors.AsType[*audit.Unsure](err); !ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestACheckpointIsStrict(t *testing.T) {
	tr := record(t, 4)
	c := tr.sign(t, 4, 0)
	good := tr.points[4]
	if got, err := audit.OpenCheckpoint(good, ring(t, 0)); err != nil || got.Seq != 4 || got.Hash != c.Hash || !got.At.Equal(c.At) || got.KeyID == "" {
		t.Errorf("%+v, %v", got, err)
	}
	part := strings.Split(good, ".")
	b64 := base64.RawURLEncoding.EncodeToString
	head := func(s string) string { return b64([]byte(s)) + "." + part[1] + "." + part[2] }
	kid := ring(t, 0).IDs()[0]
	for name, bad := range map[string]string{
		"nothing":       "",
		"two parts":     part[0] + "." + part[1],
		"no signature":  part[0] + "." + part[1] + ".",
		"other payload": part[0] + "." + b64([]byte(`{"origin":"here"}`)) + "." + part[2],
		"padded":        good + "=",
		"line feed":     good + "\n",
		"alg none":      head(`{"alg":"none","kid":"` + kid + `","typ":"` + audit.CheckpointType + `"}`),
		"other type":    head(`{"alg":"ES256","kid":"` + kid + `","typ":"JWT"}`),
		"more header":   head(`{"alg":"ES256","kid":"` + kid + `","typ":"` + audit.CheckpointType + `","b64":false}`),
		"long":          strings.Repeat("A", audit.MaxCheckpoint+1),
	} {
		if _, err := audit.OpenCheckpoint(bad, ring(t, 0)); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := audit.OpenCheckpoint(good, ring(t, 1)); err == nil || !strings.Contains(err.Error(), "not among the keys") {
		t.Errorf("another key: %v", err)
	}
	// Whatever else the key signed, such as a manifest, is no checkpoint.
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: keys()[0], KeyID: kid}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.RawURLEncoding.DecodeString(part[1])
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Sign(raw)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := other.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.OpenCheckpoint(compact, ring(t, 0)); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("a signature for something else: %v", err)
	}
}

func TestKeysThatAreNone(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.NewKey(p384.Public(), day); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("P-384: %v", err)
	}
	if _, err := audit.SignCheckpoint(audit.Checkpoint{}, p384); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("signed by P-384: %v", err)
	}
	k, err := audit.NewKey(keys()[0].Public(), day)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"nothing": "", "text": "hello", "another block": strings.ReplaceAll(string(k.PEM()), "PUBLIC", "PRIVATE"),
		"more after it": string(k.PEM()) + "x", "damaged": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
	} {
		if _, err := audit.ParseKeyring([]byte(bad)); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// The encoding is fixed: these hashes were computed from its description by another program.
func TestTheEncodingIsAsDescribed(t *testing.T) {
	g := audit.Genesis{Origin: "here", At: time.Unix(1, 2), Adopted: 3}
	e := audit.Entry{Seq: 1, At: time.Unix(-1, 5), Who: "alice", What: "über", On: "", Details: "x"}
	if got := g.Hash(); got != wantGenesis {
		t.Errorf("genesis %s", got)
	}
	if got := audit.HashEntry("ab", e); got != wantEntry {
		t.Errorf("entry %s", got)
	}
}

func TestNoTwoEntriesHashAlike(t *testing.T) {
	word := rapid.SampledFrom([]string{"", "a", "b", "ab", "\x00", "a\x00"})
	gen := rapid.Custom(func(t *rapid.T) audit.Entry {
		return audit.Entry{Seq: rapid.Uint64Range(1, 3).Draw(t, "seq"), At: time.Unix(rapid.Int64Range(0, 2).Draw(t, "at"), 0).UTC(), Who: word.Draw(t, "who"), What: word.Draw(t, "what"), On: word.Draw(t, "on"), Details: word.Draw(t, "details")}
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := gen.Draw(t, "a"), gen.Draw(t, "b")
		if (a == b) != (audit.HashEntry("p", a) == audit.HashEntry("p", b)) {
			t.Fatalf("%+v and %+v", a, b)
		}
	})
}

// Whatever is recorded, the export of it reads back as it was hashed, and no line is too long for a verifier.
func TestWhateverIsRecordedCanBeExported(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tr := &trail{genesis: audit.Genesis{Origin: "here", At: day}, points: map[uint64]string{}}
		text := rapid.OneOf(rapid.String(), rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 50), func(b []byte) string { return string(b) }),
			rapid.Map(rapid.IntRange(0, 20_000), func(n int) string { return strings.Repeat("\x01", n) }), rapid.Map(rapid.IntRange(0, 9000), func(n int) string { return strings.Repeat("ü", n) }))
		for range rapid.IntRange(1, 5).Draw(t, "n") {
			at := time.Unix(rapid.Int64Range(-1<<33, 1<<33).Draw(t, "s"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns"))
			tr.entries = append(tr.entries, audit.Entry{At: at.In(time.FixedZone("", 3600)), Who: text.Draw(t, "who"), What: text.Draw(t, "what"), On: text.Draw(t, "on"), Details: text.Draw(t, "details")})
		}
		tr.link(0)
		var out []byte
		for _, l := range tr.lines() {
			before := len(out)
			var err error
			if out, err = l.Append(out); err != nil {
				t.Fatal(err)
			}
			if len(out)-before > audit.MaxExportLine {
				t.Fatalf("a line of %d bytes", len(out)-before)
			}
		}
		if _, err := audit.VerifyExport(bytes.NewReader(out), nil, nil); err == nil || !strings.Contains(err.Error(), "the chain is intact") {
			t.Fatal(err)
		}
	})
}

// Any single changed byte of an export is found, or changes nothing that the export says.
func TestAnyFlippedByteIsFound(t *testing.T) {
	tr := record(t, 6, 3, 6)
	good := tr.export(t)
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		v, err := audit.VerifyExport(bytes.NewReader(bad), ring(t, 0), nil)
		if err == nil {
			t.Fatalf("byte %d of %d (%q): %+v", i, len(good), good[max(0, i-20):min(len(good), i+20)], v)
		}
	}
}

// Whatever is done to the past of a kept checkpoint, by somebody who can link everything anew and drop or move checkpoints
// but has no key: it is found, and nothing before the place where it was done is blamed.
func TestNoPastOfAKeptCheckpointCanBeChanged(t *testing.T) {
	known := ring(t, 0)
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(2, 12).Draw(rt, "entries")
		kept := rapid.IntRange(1, n).Draw(rt, "kept")
		tr := record(t, n)
		held := audit.Checkpoint{Origin: "here", Seq: uint64(kept), Hash: tr.entries[kept-1].Hash, At: day}
		i := rapid.IntRange(0, kept-1).Draw(rt, "at")
		switch what := rapid.SampledFrom([]string{"change", "remove", "insert", "swap", "cut"}).Draw(rt, "what"); what {
		case "change":
			tr.entries[i].Details += "!"
		case "remove":
			tr.entries = slices.Delete(tr.entries, i, i+1)
		case "insert":
			tr.entries = slices.Insert(tr.entries, i, audit.Entry{Seq: uint64(i) + 1, At: day, Who: "eve", What: "x"})
		case "swap":
			j := rapid.IntRange(0, n-1).Filter(func(j int) bool { return j != i }).Draw(rt, "with")
			tr.entries[i], tr.entries[j] = tr.entries[j], tr.entries[i]
			i = min(i, j)
		case "cut":
			tr.entries = tr.entries[:i]
		}
		if rapid.Bool().Draw(rt, "linked anew") {
			tr.link(0)
		}
		if len(tr.entries) == 0 {
			return // an export without entries has no last line to make
		}
		_, err := audit.VerifyExport(bytes.NewReader(tr.export(t)), known, &held)
		if b, ok := errors.AsType[*audit.Broken](err); !ok || b.Seq < uint64(i)+1 {
			rt.Fatalf("done at %d: %v", i+1, err)
		}
	})
}

func FuzzVerifyExport(f *testing.F) {
	tr := record(f, 5, 3, 5)
	f.Add(tr.export(f))
	f.Add([]byte("{\"genesis\":{\"origin\":\"x\",\"at\":\"2030-01-01T00:00:00Z\"}}\n{\"from\":{\"seq\":18446744073709551615,\"hash\":\"\"}}\n{\"entry\":{\"seq\":0}}\n"))
	f.Add([]byte("{}\n\n"))
	named, err := audit.NewKey(keys()[0].Public(), day)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text(f, slices.Insert(tr.lines(), 1, audit.ExportLine{Key: &named})))
	known := ring(f, 0)
	f.Fuzz(func(t *testing.T, raw []byte) {
		v, err := audit.VerifyExport(bytes.NewReader(raw), known, nil)
		if err != nil {
			return
		}
		if v.SignedTo == 0 || v.First > v.Last+1 {
			t.Errorf("taken: %+v", v)
		}
	})
}

func BenchmarkVerifyExport(b *testing.B) {
	tr := record(b, 10_000, 5000, 10_000)
	text, known := tr.export(b), ring(b, 0)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := audit.VerifyExport(bytes.NewReader(text), known, nil); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(text))/10_000, "B/entry")
}
