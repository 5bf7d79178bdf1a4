package access_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"
	bbolt "go.etcd.io/bbolt"

	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
)

// auditKeys are two keys for all tests of the process: musterd's, and one that took its place.
var auditKeys = sync.OnceValue(func() (out [2]*ecdsa.PrivateKey) {
	for i := range out {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		out[i] = k
	}
	return out
})

// ledger is a store with its trail.
type ledger struct {
	t     *testing.T
	path  string
	db    *bolt.DB
	trail *access.Trail
	log   *bytes.Buffer
}

func newLedger(t *testing.T) *ledger {
	t.Helper()
	l := &ledger{t: t, path: filepath.Join(t.TempDir(), "muster.db")}
	l.open(0)
	return l
}

func (l *ledger) open(key int) {
	l.t.Helper()
	var err error
	if l.db, err = bolt.Open(l.path, bolt.Options{NoSync: true}); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = l.db.Close() })
	l.sign(key)
}

func (l *ledger) sign(key int) {
	l.t.Helper()
	var err error
	l.log = &bytes.Buffer{}
	l.trail, err = access.NewTrail(access.TrailConfig{
		Update: func(ctx context.Context, f func(access.TrailTx) error) error {
			return l.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(access.TrailTx) error) error {
			return l.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Signer: auditKeys()[key], Log: slog.New(slog.NewTextHandler(l.log, nil)),
	})
	if err != nil {
		l.t.Fatal(err)
	}
	if err := l.trail.Register(context.Background(), day); err != nil {
		l.t.Fatal(err)
	}
}

func (l *ledger) write(n int, at time.Time) {
	l.t.Helper()
	err := l.db.Update(context.Background(), func(tx *bolt.Tx) error {
		for i := range n {
			if err := tx.Audit(access.Entry{At: at.Add(time.Duration(i) * time.Second), Who: "alice", What: "test", On: fmt.Sprint(i)}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *ledger) checkpoint() audit.SignedCheckpoint {
	l.t.Helper()
	c, err := l.trail.Checkpoint(context.Background(), day, "alice")
	if err != nil {
		l.t.Fatal(err)
	}
	return c
}

func (l *ledger) export(r access.Range) []byte {
	l.t.Helper()
	var out []byte
	if err := l.trail.Export(context.Background(), r, func(b []byte) error { out = append(out, b...); return nil }); err != nil {
		l.t.Fatal(err)
	}
	return out
}

// raw does to the file what muster never does.
func (l *ledger) raw(do func(*bbolt.Tx) error) {
	l.t.Helper()
	if err := l.db.Close(); err != nil {
		l.t.Fatal(err)
	}
	b, err := bbolt.Open(l.path, 0o600, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := errors.Join(b.Update(do), b.Close()); err != nil {
		l.t.Fatal(err)
	}
	if l.db, err = bolt.Open(l.path, bolt.Options{NoSync: true}); err != nil {
		l.t.Fatal(err)
	}
	db := l.db
	l.t.Cleanup(func() { _ = db.Close() })
}

func (l *ledger) verify(text []byte, w *audit.SignedCheckpoint) (audit.Verdict, error) {
	l.t.Helper()
	k, err := audit.NewKey(auditKeys()[0].Public(), day)
	if err != nil {
		l.t.Fatal(err)
	}
	ring, err := audit.ParseKeyring(k.PEM())
	if err != nil {
		l.t.Fatal(err)
	}
	if w == nil {
		return audit.VerifyExport(bytes.NewReader(text), ring, nil)
	}
	c, err := audit.OpenCheckpoint(w.JWS, ring)
	if err != nil {
		l.t.Fatal(err)
	}
	return audit.VerifyExport(bytes.NewReader(text), ring, &c)
}

func at(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

// change rewrites entry seq in the file; relink makes all hashes from it on anew, as one who knows how can.
func change(b *bbolt.Tx, seq uint64, relink bool, f func(*access.Entry)) error {
	bucket := b.Bucket([]byte("audit"))
	var head audit.Head
	for n := seq; ; n++ {
		raw := bucket.Get(at(n))
		if raw == nil {
			return nil
		}
		var e access.Entry
		if err := json.Unmarshal(raw, &e); err != nil {
			return err
		}
		if n == seq {
			head = audit.Head{Seq: e.Seq - 1, Hash: e.Prev}
			f(&e)
		}
		if relink {
			e = head.Link(e)
			head = audit.Head{Seq: e.Seq, Hash: e.Hash}
		}
		raw, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if err := bucket.Put(at(n), raw); err != nil || !relink {
			return err
		}
	}
}

// Whatever is done to the file of the store is found by whoever verifies an export with the key, and by fsck where it has
// the means; it names the entry.
func TestTamperingWithTheStoreIsFound(t *testing.T) {
	bucket := func(b *bbolt.Tx, name string) *bbolt.Bucket { return b.Bucket([]byte(name)) }
	for name, c := range map[string]struct {
		do   func(*bbolt.Tx) error
		fsck string // what it says; empty: it cannot know
		kept bool   // only a checkpoint that was kept elsewhere shows it
		says string
		seq  uint64
	}{
		"changed": {do: func(b *bbolt.Tx) error {
			return change(b, 3, false, func(e *access.Entry) { e.Who = "bob" })
		}, fsck: "entry 3 was changed", says: "entry 3 was changed", seq: 3},
		"changed and linked anew": {do: func(b *bbolt.Tx) error {
			return change(b, 3, true, func(e *access.Entry) { e.Who = "bob" })
		}, fsck: "it vouches for another past", says: "rewritten", seq: 7},
		"removed": {do: func(b *bbolt.Tx) error { return bucket(b, "audit").Delete(at(3)) }, fsck: "entry 3 is missing", says: "entry 3 is missing", seq: 3},
		"the end removed": {do: func(b *bbolt.Tx) error {
			return errors.Join(bucket(b, "audit").Delete(at(14)), bucket(b, "audit").Delete(at(13)))
		}, fsck: "14 entries were written", says: "entries 13 to 14 are missing", seq: 13},
		"the end removed, with its count": {do: func(b *bbolt.Tx) error {
			return errors.Join(bucket(b, "audit").Delete(at(14)), bucket(b, "audit").Delete(at(13)), bucket(b, "audit").SetSequence(12))
		}, fsck: "a checkpoint vouches for entry 14", says: "entries 13 to 14 are missing: a checkpoint vouches", seq: 13},
		"the end removed, with its count and checkpoint": {do: func(b *bbolt.Tx) error {
			return errors.Join(bucket(b, "audit").Delete(at(14)), bucket(b, "audit").Delete(at(13)), bucket(b, "audit").SetSequence(12), bucket(b, "audit-checkpoints").Delete(at(14)))
		}, kept: true, says: "your checkpoint", seq: 13},
		"inserted": {do: func(b *bbolt.Tx) error {
			return bucket(b, "audit").Put(at(15), []byte(`{"seq":15,"at":"2030-01-01T00:00:00Z","who":"eve","what":"x"}`))
		}, fsck: "entry 15 was changed", says: "entry 15 was changed", seq: 15},
		"a checkpoint forged": {do: func(b *bbolt.Tx) error {
			s, err := audit.SignCheckpoint(audit.Checkpoint{Origin: "x", Seq: 7, At: day}, auditKeys()[1])
			if err != nil {
				return err
			}
			raw, err := json.Marshal(s)
			return errors.Join(err, bucket(b, "audit-checkpoints").Put(at(7), raw))
		}, fsck: "not among the keys", says: "not among the keys", seq: 7},
		"begun anew": {do: func(b *bbolt.Tx) error { return b.Bucket([]byte("meta")).Delete([]byte("audit-genesis")) }, fsck: "beginning of the audit trail"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLedger(t) // entry 1: the key
			l.write(5, day)
			l.checkpoint() // 7
			l.write(6, day)
			held := l.checkpoint() // 14
			l.raw(c.do)
			found, err := l.db.Check(t.Context())
			if said := strings.Join(found, "\n"); err != nil || !strings.Contains(said, c.fsck) || (c.fsck == "") != (said == "") {
				t.Errorf("fsck: %q, %v", said, err)
			}
			if c.says == "" {
				return
			}
			var w *audit.SignedCheckpoint
			if c.kept {
				if _, err := l.verify(l.export(access.Range{}), nil); err != nil {
					t.Errorf("it shows without a checkpoint: %v", err)
				}
				w = &held
			}
			_, err = l.verify(l.export(access.Range{}), w)
			if b, ok := errors.AsType[*audit.Broken](err); !ok || b.Seq != c.seq || !strings.Contains(b.Msg, c.says) {
				t.Errorf("verify: %v", err)
			}
		})
	}
}

// What is broken since the last checkpoint is not signed: a signature would make it look sound.
func TestABrokenTrailIsNotSigned(t *testing.T) {
	for name, do := range map[string]func(*bbolt.Tx) error{
		"changed": func(b *bbolt.Tx) error { return change(b, 9, false, func(e *access.Entry) { e.Who = "bob" }) },
		"removed": func(b *bbolt.Tx) error { return b.Bucket([]byte("audit")).Delete(at(9)) },
		"changed before the checkpoint": func(b *bbolt.Tx) error {
			return change(b, 7, true, func(e *access.Entry) { e.Who = "bob" })
		},
		"cut off before it": func(b *bbolt.Tx) error {
			for n := range uint64(4) {
				if err := b.Bucket([]byte("audit")).Delete(at(7 + n)); err != nil {
					return err
				}
			}
			return b.Bucket([]byte("audit")).SetSequence(6)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLedger(t)
			l.write(5, day)
			before := l.checkpoint() // 7
			l.write(3, day)
			l.raw(do)
			if _, err := l.trail.Checkpoint(t.Context(), day, "bob"); !isBroken(err) {
				t.Errorf("got %v", err)
			}
			cs, err := l.trail.Checkpoints(t.Context(), 0, 0)
			if err != nil || len(cs) != 1 || cs[0] != before {
				t.Errorf("%+v, %v", cs, err)
			}
			if s, err := l.trail.State(t.Context()); err != nil || s.Failures != 1 {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

// A key that took the place of another is on record, and at odds with the pinned one.
func TestAnotherKeyShows(t *testing.T) {
	l := newLedger(t)
	l.write(3, day)
	l.checkpoint()
	l.sign(0) // a restart with the same key is none
	if ks, err := l.trail.Keys(t.Context()); err != nil || len(ks) != 1 {
		t.Fatalf("%+v, %v", ks, err)
	}
	l.sign(1)
	second := l.checkpoint()
	ks, err := l.trail.Keys(t.Context())
	if err != nil || len(ks) != 2 || ks[1].ID != second.KeyID {
		t.Fatalf("%+v, %v", ks, err)
	}
	text := l.export(access.Range{})
	if !bytes.Contains(text, []byte(`"what":"audit.key","on":"`+second.KeyID+`"`)) {
		t.Error("it is not on record")
	}
	if _, err := l.verify(text, nil); err == nil || !strings.Contains(err.Error(), "not among the keys") {
		t.Errorf("with the pinned key: %v", err)
	}
	if v, err := audit.VerifyExport(bytes.NewReader(text), nil, nil); err != nil || v.Pinned || len(v.Keys) != 2 {
		t.Errorf("with the keys that it names: %+v, %v", v, err)
	}
}

// A copy of the store that was put back is an honest trail, only an old one: who kept a later checkpoint sees it.
func TestAnOlderBackupShows(t *testing.T) {
	l := newLedger(t)
	l.write(3, day)
	l.checkpoint()
	var copied bytes.Buffer
	if _, err := l.db.Backup(&copied); err != nil {
		t.Fatal(err)
	}
	l.write(3, day)
	held := l.checkpoint()
	if err := l.db.Close(); err != nil {
		t.Fatal(err)
	}
	old := &ledger{t: t, path: filepath.Join(t.TempDir(), "muster.db")}
	if err := os.WriteFile(old.path, copied.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	old.open(0)
	if _, err := old.verify(old.export(access.Range{}), nil); err != nil {
		t.Errorf("as it is: %v", err)
	}
	if _, err := old.verify(old.export(access.Range{}), &held); err == nil || !strings.Contains(err.Error(), "missing: your checkpoint") {
		t.Errorf("against the checkpoint: %v", err)
	}
	old.write(9, day) // time goes on, and the number is reached again
	old.checkpoint()
	if _, err := old.verify(old.export(access.Range{}), &held); err == nil || !strings.Contains(err.Error(), "rewritten") {
		t.Errorf("later: %v", err)
	}
}

// Parts of the trail, by time and by number, over several pages.
func TestParts(t *testing.T) {
	l := newLedger(t)
	l.write(700, day)                  // 2 to 701
	l.checkpoint()                     // 702
	l.write(700, day.Add(2*time.Hour)) // 703 to 1402
	l.checkpoint()                     // 1403
	l.write(10, day.Add(4*time.Hour))
	for name, c := range map[string]struct {
		r                   access.Range
		first, last, signed uint64
	}{
		"all":             {access.Range{}, 1, 1413, 1403},
		"after an entry":  {access.Range{After: 1000}, 1001, 1413, 1403},
		"until":           {access.Range{Until: day.Add(time.Hour)}, 1, 702, 702},
		"since":           {access.Range{Since: day.Add(2*time.Hour + 2*time.Minute)}, 703 + 60, 1413, 1403},
		"since and until": {access.Range{Since: day.Add(time.Minute), Until: day.Add(time.Hour)}, 1, 702, 702},
		"the end":         {access.Range{After: 1402}, 1403, 1413, 1403},
	} {
		v, err := l.verify(l.export(c.r), nil)
		if err != nil || v.First != c.first || v.Last != c.last || v.SignedTo != c.signed || !v.Whole {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	if err := l.trail.Export(t.Context(), access.Range{After: 5000}, func([]byte) error { t.Error("something came"); return nil }); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("after what is not there: %v", err)
	}
	stop := errors.New("full")
	if err := l.trail.Export(t.Context(), access.Range{}, func([]byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("who takes it fails: %v", err)
	}
}

// Checkpoints come by themselves: at the start, after so many entries, after a while, and at the end.
func TestCheckpointsByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLedger(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		var reports []error
		go func() { done <- l.trail.Run(ctx, func(err error) { reports = append(reports, err) }) }()
		state := func() access.TrailState {
			t.Helper()
			synctest.Wait()
			s, err := l.trail.State(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		if s := state(); s.SignedTo != 1 {
			t.Errorf("at the start: %+v", s)
		}
		l.write(10, day)
		time.Sleep(time.Minute)
		if s := state(); s.SignedTo != 1 || s.Unsigned != 10 {
			t.Errorf("a minute later: %+v", s)
		}
		l.write(access.CheckpointEntries, day)
		time.Sleep(time.Minute)
		if s := state(); s.Unsigned != 0 {
			t.Errorf("after many entries: %+v", s)
		}
		l.write(1, day)
		time.Sleep(access.CheckpointAge + time.Minute)
		if s := state(); s.Unsigned != 0 {
			t.Errorf("after an hour: %+v", s)
		}
		n := len(checkpoints(t, l))
		time.Sleep(3 * access.CheckpointAge)
		if got := len(checkpoints(t, l)); got != n {
			t.Errorf("%d checkpoints while nothing was written", got-n)
		}
		l.write(2, day)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if s := state(); s.Unsigned != 0 || s.Failures != 0 {
			t.Errorf("at the end: %+v", s)
		}
		for _, err := range reports {
			if err != nil {
				t.Errorf("reported: %v", err)
			}
		}
		cs := checkpoints(t, l)
		if !strings.Contains(l.log.String(), cs[len(cs)-1].JWS) {
			t.Error("the last checkpoint is not in the log")
		}
	})
}

func checkpoints(t *testing.T, l *ledger) []audit.SignedCheckpoint {
	t.Helper()
	cs, err := l.trail.Checkpoints(t.Context(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	return cs
}

func isBroken(err error) bool {
	e, ok := errors.AsType[*fleet.Error](err)
	return ok && e.Kind == fleet.Conflict && e.Code == "audit_broken"
}
