package cli_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"muster/api"
	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/store/bolt"
)

// note puts lines on record as the use cases do.
func (d *desk) note(what ...string) {
	d.t.Helper()
	for _, w := range what {
		if err := d.DB.Update(d.ctx, func(tx *bolt.Tx) error { return tx.Audit(access.Entry{At: time.Now(), Who: "alice", What: w}) }); err != nil {
			d.t.Fatal(err)
		}
	}
}

// An auditor's life: the key is pinned, checkpoints are kept, the trail is verified in musterd and from a file, and
// whatever is done to it shows, with the entry where it begins.
func TestAudit(t *testing.T) {
	d := sit(t, nil)
	path := func(name string) string { return filepath.Join(d.dir, name) }
	key, kept, file := path("audit.pub.pem"), path("kept"), path("trail.ndjson")
	d.note("one", "two", "three")

	d.fails(2, "no checkpoint vouches", "audit", "verify")
	first := decode[api.Checkpoint](d, "audit", "checkpoint", "--out", path("first"))
	has(t, d.run("audit", "keys", "--out", key), "KEY", "SINCE")
	s := d.try("audit", "verify")
	if s.code != 0 || !strings.Contains(s.out, "intact: entries 1 to") || !strings.Contains(s.err, "pin it with --key") {
		t.Errorf("%+v", s)
	}
	s = d.try("audit", "verify", "--key", key, "--keep", kept)
	if s.code != 0 || s.err != "" || read(t, kept) != read(t, path("first")) {
		t.Errorf("%+v; kept %s", s, read(t, kept))
	}
	has(t, s.out, "intact: entries 1 to")
	d.note("four", "five")
	has(t, d.run("audit", "verify", "--key", key, "--keep", kept), "your checkpoint of entry", "not yet: 2 entries")
	d.run("audit", "checkpoint")
	d.run("audit", "verify", "--key", key, "--keep", kept)
	if read(t, kept) == read(t, path("first")) {
		t.Error("the newer checkpoint was not kept")
	}

	has(t, d.run("audit", "verify", "--key", key, "--keep", kept, "--new"), "intact: nothing came after")
	d.note("six")
	has(t, d.run("audit", "verify", "--key", key, "--keep", kept, "--new"), "not yet: 1 entry since", "your checkpoint of entry")
	d.fails(2, "give --keep or --checkpoint", "audit", "verify", "--new")

	has(t, d.run("audit", "export", "--out", file), "wrote entries 1 to", "2 checkpoints")
	d.fails(2, "exists already", "audit", "export", "--out", file)
	d.fails(2, "--since: use a day", "audit", "export", "--out", path("x"), "--since", "spring")
	has(t, d.run("audit", "verify", file, "--key", key, "--checkpoint", path("first")), "intact")
	d.in = d.run("audit", "export", "--out", "-", "--since", "24h")
	has(t, d.run("audit", "verify", "-", "--key", key), "intact")

	text := read(t, file)
	lines := strings.SplitAfter(text, "\n")
	entry := func(what string) int {
		for i, l := range lines {
			if strings.Contains(l, `"what":"`+what+`"`) {
				return i
			}
		}
		t.Fatalf("no entry %s", what)
		return 0
	}
	without := func(from, to int) string { return strings.Join(lines[:from], "") + strings.Join(lines[to:], "") }
	end := len(lines) - 2 // and an empty one
	for name, c := range map[string]struct {
		text, says string
		code       int
	}{
		"changed":   {strings.Replace(text, `"what":"two"`, `"what":"too"`, 1), "was changed", 1},
		"missing":   {without(entry("two"), entry("two")+1), "is missing", 1},
		"swapped":   {strings.Join(lines[:entry("one")], "") + lines[entry("two")] + lines[entry("one")] + strings.Join(lines[entry("two")+1:], ""), "missing", 1},
		"cut short": {strings.Join(lines[:end], ""), "cut short", 2},
		"no export": {"hello\n", "line 1 is not a line of an audit export", 2},
		"empty":     {"", "empty", 2},
	} {
		d.fails(c.code, c.says, "audit", "verify", d.file("bad", c.text), "--key", key)
		if c.code == 1 {
			var f struct {
				Result string      `json:"result"`
				Entry  uint64      `json:"entry"`
				Fault  audit.Fault `json:"fault"`
			}
			if s := d.try("audit", "verify", path("bad"), "--key", key, "--output", "json"); s.code != 1 || json.Unmarshal([]byte(s.out), &f) != nil || f.Result != "broken" || f.Entry == 0 || f.Fault == "" {
				t.Errorf("%s: %+v %+v", name, s, f)
			}
		}
	}

	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := audit.NewKey(other.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	d.fails(1, "not among the keys", "audit", "verify", "--key", d.file("foreign", string(foreign.PEM())))
	d.fails(2, "not among the keys", "audit", "verify", "--key", path("foreign"), "--checkpoint", kept)
	d.fails(2, "no public key", "audit", "verify", "--key", d.file("none", "hello"))
	d.fails(2, "no such file", "audit", "verify", "--checkpoint", path("none-such"))
	d.fails(2, "not a JWS", "audit", "verify", "--keep", path("none"))

	// A trail that has lost the kept checkpoint, but not its entries, is sound, and the kept one stays.
	newest := read(t, kept)
	at := entry("audit.checkpoint")
	for i := range lines {
		if strings.HasPrefix(lines[i], `{"checkpoint"`) {
			at = i
		}
	}
	d.run("audit", "verify", d.file("fewer", without(at, at+1)), "--key", key, "--keep", kept)
	if read(t, kept) != newest {
		t.Error("an older checkpoint was kept")
	}

	// The end is cut off, and all that is left agrees with itself: only what the auditor kept shows it.
	cut := strings.Join(lines[:entry("four")], "")
	cut += fmt.Sprintf(`{"end":{"seq":%d,"hash":"%s"}}`+"\n", first.Seq, first.Hash)
	d.run("audit", "verify", d.file("cut", cut), "--key", key)
	d.fails(1, "your checkpoint of", "audit", "verify", path("cut"), "--key", key, "--keep", kept)
}

// A backup that was restored has lost what came after it; who kept a checkpoint sees that.
func TestAuditOfARestoredBackup(t *testing.T) {
	d := sit(t, nil)
	key, kept := filepath.Join(d.dir, "key"), filepath.Join(d.dir, "kept")
	d.note("one")
	d.run("audit", "keys", "--out", key)
	d.run("audit", "checkpoint")
	before := d.run("audit", "export", "--out", "-")
	d.note("revoked")
	d.run("audit", "checkpoint", "--out", kept)
	d.in = before
	d.run("audit", "verify", "-", "--key", key)
	d.in = before
	s := d.try("audit", "verify", "-", "--key", key, "--keep", kept)
	if s.code != 1 || !strings.Contains(s.err, "missing: your checkpoint") || !strings.Contains(s.err, "hint: a restored backup") {
		t.Errorf("%+v", s)
	}
	if read(t, kept) == "" {
		t.Error("the checkpoint was lost")
	}
	// A musterd whose trail does not reach the checkpoint says so at once.
	other := sit(t, nil)
	other.note("something")
	other.run("audit", "checkpoint")
	other.fails(1, "the checkpoint that you hold is of", "audit", "verify", "--checkpoint", kept)
	for i := range 3 {
		d.note(fmt.Sprint(i))
	}
	d.run("audit", "checkpoint", "--out", kept)
	other.fails(1, "is missing: your checkpoint vouches for it", "audit", "verify", "--checkpoint", kept, "--new")
}

func TestAuditWithoutMusterd(t *testing.T) {
	d := sit(t, nil)
	d.env["MUSTER_URL"] = "https://127.0.0.1:1"
	d.fails(2, "cannot be reached", "audit", "verify")
	d.env["MUSTER_TOKEN"] = ""
	d.fails(2, "", "audit", "verify")
}
