package app

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bbolt "go.etcd.io/bbolt"

	"muster/internal/access"
	"muster/internal/config"
	"muster/internal/store/bolt"
)

func trailOf(t *testing.T, c config.Config) (es []access.Entry) {
	t.Helper()
	db, err := bolt.Open(c.Path(fileStore), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.View(t.Context(), func(tx *bolt.Tx) error { es, err = tx.AuditEntries(0, 0); return err }); err != nil {
		t.Fatal(err)
	}
	return es
}

func record(t *testing.T, c config.Config, what ...string) {
	t.Helper()
	db, err := bolt.Open(c.Path(fileStore), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, w := range what {
		if err := db.Update(t.Context(), func(tx *bolt.Tx) error { return tx.Audit(access.Entry{At: time.Now(), Who: "alice", What: w}) }); err != nil {
			t.Fatal(err)
		}
	}
}

// The trail goes on after a restore, its chain holds, and it says what happened.
func TestARestoreIsOnRecord(t *testing.T) {
	c := config.Config{DataDir: t.TempDir()}
	record(t, c, "one", "two")
	copied := filepath.Join(t.TempDir(), "b")
	if _, err := Backup(t.Context(), c, copied); err != nil {
		t.Fatal(err)
	}
	record(t, c, "three")
	end := trailOf(t, c)[2]
	if _, err := Restore(t.Context(), c, copied, time.Now()); err != nil {
		t.Fatal(err)
	}
	es := trailOf(t, c)
	if len(es) != 3 || es[1].What != "two" || es[2].What != "store.restore" || es[2].On != "b" || !strings.Contains(es[2].Details, fmt.Sprintf("entry 3, hash %s", end.Hash)) {
		t.Errorf("%+v", es)
	}
	if found, err := Fsck(t.Context(), c); err != nil || len(found) > 0 {
		t.Errorf("fsck: %v, %v", found, err)
	}
}

// A broken trail is backed up, since it is evidence, and does not come back unnoticed.
func TestABrokenTrailIsBackedUpAndNotRestored(t *testing.T) {
	c := config.Config{DataDir: t.TempDir()}
	record(t, c, "one", "two", "three")
	raw, err := bbolt.Open(c.Path(fileStore), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Update(func(b *bbolt.Tx) error { return b.Bucket([]byte("audit")).Delete([]byte{0, 0, 0, 0, 0, 0, 0, 2}) })
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "b")
	if _, err := Backup(t.Context(), c, copied); err != nil {
		t.Fatal(err)
	}
	if found, err := Fsck(t.Context(), c); err != nil || len(found) == 0 || !strings.Contains(found[0], "entry 2 is missing") {
		t.Errorf("fsck: %v, %v", found, err)
	}
	if _, err := Restore(t.Context(), c, copied, time.Now()); err == nil || !strings.Contains(err.Error(), "nothing was changed: audit: entry 2 is missing") {
		t.Errorf("restore: %v", err)
	}
}
