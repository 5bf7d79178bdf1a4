// Package storetest gives tests a real store in a folder of their own and checks it when they end.
package storetest

import (
	"context"
	"path/filepath"
	"testing"

	"muster/internal/store/bolt"
)

// Open opens a new store in a folder of the test. When the test ends, it is checked (fsck) and closed.
func Open(t testing.TB) *bolt.DB {
	t.Helper()
	return Reopen(t, filepath.Join(t.TempDir(), "muster.db"))
}

// Reopen is Open for a given file, for tests of a restart. The test may close it before its end.
func Reopen(t testing.TB, path string) *bolt.DB {
	t.Helper()
	db, err := bolt.Open(path, bolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !db.IsOpen() {
			return
		}
		findings, err := db.Check(context.Background())
		if err != nil {
			t.Errorf("store check: %v", err)
		}
		for _, f := range findings {
			t.Errorf("store check: %s", f)
		}
		if err := db.Close(); err != nil {
			t.Errorf("store: %v", err)
		}
	})
	return db
}
