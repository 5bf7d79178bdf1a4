package bolt_test

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	bbolt "go.etcd.io/bbolt"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
)

// A file that the first schema wrote, with a rollout in the middle of its second stage and a draft, is brought to today's:
// nothing is lost, every invariant holds, and the rollout can go on.
func TestUpgradeOfTheFirstSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "muster.db")
	unzip(t, "testdata/schema1.db.gz", path)
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	found, err := db.Check(t.Context())
	if err != nil || len(found) > 0 {
		t.Fatalf("fsck: %v %v", found, err)
	}
	err = db.View(t.Context(), func(tx *bolt.Tx) error {
		r, err := tx.Rollout("spring")
		if err != nil {
			return err
		}
		if r.State != rollout.Running || r.Stage != 2 || r.Targets != 10 || r.Failures != 1 || r.Verdicts != (rollout.Verdicts{Succeeded: 1, Failed: 1}) {
			t.Errorf("got %+v", r)
		}
		want := rollout.Counts{Pending: 5, Accepted: 1, Installed: 1, Offered: 1, Succeeded: 1, Failed: 1}
		if r.Total != want {
			t.Errorf("got %+v, want %+v", r.Total, want)
		}
		ready := 0
		if err := tx.Ready("spring", 3, func(rollout.Job) (bool, error) { ready++; return true, nil }); err != nil {
			return err
		}
		if live, err := tx.LiveRollouts(); err != nil || len(live) != 1 || live[0] != "spring" {
			t.Errorf("live: %v %v", live, err)
		}
		offered := 0
		jobs, err := tx.Jobs("spring", "", 0)
		if err != nil {
			return err
		}
		for _, j := range jobs {
			if j.State == rollout.Offered {
				offered++
				if a, ok, err := tx.ActiveJob(j.Device); err != nil || !ok || a.Rollout != "spring" {
					t.Errorf("active job of %s: %v %v %v", j.Device, a.Rollout, ok, err)
				}
			}
		}
		if offered != 1 || ready == 0 {
			t.Errorf("%d offered, %d ready", offered, ready)
		}
		_, err = tx.Rollout(fleet.RolloutID("autumn"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A store that was written before there was an index of renewals gets one.
func TestTheIndexOfRenewalsIsMadeForAnOlderStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "muster.db")
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	update(t, db, func(tx *bolt.Tx) error {
		for i, s := range []pki.State{pki.Issued, pki.Active, pki.Superseded, pki.Revoked} {
			id := fleet.DeviceID(fmt.Sprint("d", i))
			if err := tx.PutDevice(fleet.Device{ID: id}); err != nil {
				return err
			}
			if err := tx.PutCertificate(cert(fleet.Serial(fmt.Sprint("a", i)), id, s, day.Add(90*24*time.Hour))); err != nil {
				return err
			}
		}
		return nil
	})
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Update(func(b *bbolt.Tx) error { return b.DeleteBucket([]byte("certs-due")) }); err != nil {
		t.Fatal(err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	if db, err = bolt.Open(path, bolt.Options{}); err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if found, err := db.Check(t.Context()); err != nil || len(found) > 0 {
		t.Fatalf("fsck: %v %v", found, err)
	}
	err = db.View(t.Context(), func(tx *bolt.Tx) error {
		for at, want := range map[int]int{59: 0, 70: 2} {
			if list, err := tx.CertificatesDue(day.Add(time.Duration(at)*24*time.Hour), 0); err != nil || len(list) != want {
				t.Errorf("on day %d %d are due, want %d: %v", at, len(list), want, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func unzip(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	z, err := gzip.NewReader(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, z); err != nil {
		t.Fatal(err)
	}
}
