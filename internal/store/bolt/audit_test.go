package bolt_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

// chain returns the whole trail, after it was followed from its beginning.
func chain(db *bolt.DB) (g audit.Genesis, es []access.Entry, err error) {
	err = db.View(context.Background(), func(tx *bolt.Tx) (err error) {
		if g, err = tx.AuditGenesis(); err == nil {
			es, err = tx.AuditEntries(0, 0)
		}
		return err
	})
	head := g.Head()
	for _, e := range es {
		if err == nil {
			head, err = head.Next(e)
		}
	}
	return g, es, err
}

// A store from before the chain: what is there is linked as it is, and an entry says that it was not linked before.
func TestTheTrailOfAnOlderStoreIsChained(t *testing.T) {
	path := filepath.Join(t.TempDir(), "muster.db")
	unzip(t, "testdata/schema2.db.gz", path)
	var began audit.Genesis
	for range 2 { // the second time nothing is migrated
		db := storetest.Reopen(t, path)
		g, es, err := chain(db)
		if err != nil {
			t.Fatal(err)
		}
		last := es[len(es)-1]
		if g.Adopted < 9 || g.Adopted != last.Seq-1 || last.What != "audit.chain" || !strings.HasPrefix(last.Details, fmt.Sprint(g.Adopted)+" entries") {
			t.Errorf("%+v, last %+v", g, last)
		}
		if began.Origin != "" && began != g {
			t.Errorf("it began as %+v and now is %+v", began, g)
		}
		began = g
		if e := es[1]; e.Who != "alice" || e.On != "d1" || !strings.Contains(e.Details, "line 0 <&> \u2028") || e.At.Format("15:04:05.000000000Z07:00") != "08:00:00.123456789Z" {
			t.Errorf("an old entry is now %+v", e)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Two new stores have different beginnings: no entry of one passes for one of the other.
func TestEveryTrailHasItsOwnBeginning(t *testing.T) {
	var got [2]audit.Genesis
	for i := range got {
		g, es, err := chain(storetest.Open(t))
		if err != nil || len(es) != 0 || g.Origin == "" || g.Adopted != 0 {
			t.Fatalf("%+v, %v, %v", g, es, err)
		}
		got[i] = g
	}
	if got[0].Hash() == got[1].Hash() {
		t.Error("they are alike")
	}
}

// Many writers at once: one chain, in the order of the commits, without gaps.
func TestConcurrentWritersMakeOneChain(t *testing.T) {
	db := storetest.Open(t)
	const writers, each = 8, 20
	var wait sync.WaitGroup
	for w := range writers {
		wait.Go(func() {
			for i := range each {
				err := db.Update(t.Context(), func(tx *bolt.Tx) error {
					return errors.Join(tx.Audit(access.Entry{At: day, Who: fmt.Sprint(w), What: "a", On: fmt.Sprint(i)}), tx.Audit(access.Entry{At: day, Who: fmt.Sprint(w), What: "b", On: fmt.Sprint(i)}))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	_, es, err := chain(db)
	if err != nil || len(es) != 2*writers*each {
		t.Fatalf("%d entries, %v", len(es), err)
	}
	for i := 0; i < len(es); i += 2 {
		if es[i].What != "a" || es[i+1].What != "b" || es[i].Who != es[i+1].Who || es[i].On != es[i+1].On {
			t.Errorf("entries %d and %d are not of one transaction", i+1, i+2)
		}
	}
}

// Whatever commits, fails or is closed in between: the trail is what was committed, in order, and its chain holds.
func TestTheTrailIsWhatWasCommitted(t *testing.T) {
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		path := filepath.Join(dir, fmt.Sprint(run))
		db, err := bolt.Open(path, bolt.Options{NoSync: true})
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		broken := errors.New("it does not commit")
		var want []string
		for i := range rapid.IntRange(1, 12).Draw(rt, "transactions") {
			var mine []string
			fails := rapid.Bool().Draw(rt, "fails")
			err := db.Update(context.Background(), func(tx *bolt.Tx) error {
				for j := range rapid.IntRange(0, 3).Draw(rt, "entries") {
					mine = append(mine, fmt.Sprintf("%d.%d", i, j))
					if err := tx.Audit(access.Entry{At: day, Who: "alice", What: "test", On: mine[j]}); err != nil {
						return err
					}
				}
				if fails {
					return broken
				}
				return nil
			})
			if fails != errors.Is(err, broken) {
				rt.Fatal(err)
			}
			if !fails {
				want = append(want, mine...)
			}
			if rapid.IntRange(0, 4).Draw(rt, "restart") == 0 {
				if err := db.Close(); err != nil {
					rt.Fatal(err)
				}
				if db, err = bolt.Open(path, bolt.Options{NoSync: true}); err != nil {
					rt.Fatal(err)
				}
			}
		}
		_, es, err := chain(db)
		if err != nil {
			rt.Fatal(err)
		}
		var got []string
		for _, e := range es {
			got = append(got, e.On)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			rt.Fatalf("got %v, want %v", got, want)
		}
		if found, err := db.Check(context.Background()); err != nil || len(found) > 0 {
			rt.Fatalf("fsck: %v %v", found, err)
		}
	})
}
