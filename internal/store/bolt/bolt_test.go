package bolt_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bbolt "go.etcd.io/bbolt"

	"muster/internal/access"
	"muster/internal/admission"
	"muster/internal/downlink"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/uplink"
)

var day = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func update(t *testing.T, db *bolt.DB, f func(*bolt.Tx) error) {
	t.Helper()
	if err := db.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func cert(serial fleet.Serial, dev fleet.DeviceID, state pki.State, end time.Time) pki.Certificate {
	return pki.Certificate{
		Serial: serial, Device: dev, State: state, KeyHash: fleet.Hash(strings.Repeat("ab", 32)),
		Chain: [][]byte{{1}}, IntendedAt: day, NotAfter: end,
	}
}

func TestAWriterWithAnOldRevisionIsRefused(t *testing.T) {
	db := storetest.Open(t)
	update(t, db, func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d1"}) })
	err := db.Update(t.Context(), func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d1"}) })
	if !fleet.Is(err, fleet.Conflict) {
		t.Errorf("adding d1 twice: %v", err)
	}
	update(t, db, func(tx *bolt.Tx) error {
		d, err := tx.Device("d1")
		if err != nil {
			return err
		}
		d.Hardware = "rev-b"
		return tx.PutDevice(d)
	})
	err = db.Update(t.Context(), func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d1", Rev: 1}) })
	if !fleet.Is(err, fleet.Conflict) {
		t.Errorf("writing over revision 2 with 1: %v", err)
	}
	_ = db.View(t.Context(), func(tx *bolt.Tx) error {
		if d, err := tx.Device("d1"); err != nil || d.Hardware != "rev-b" || d.Rev != 2 {
			t.Errorf("got %+v, %v", d, err)
		}
		if _, err := tx.Device("d2"); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("unknown device: %v", err)
		}
		return nil
	})
}

// What lets a device in is told to the watchers after each commit that may have changed it, never for one that failed.
func TestWatchersHearOfCredentialsAfterTheCommit(t *testing.T) {
	db := storetest.Open(t)
	var heard []admission.Record
	db.WatchCredentials(func(r admission.Record) { heard = append(heard, r) })
	update(t, db, func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: "d1", Current: "a1", Next: "a2"}); err != nil {
			return err
		}
		if err := tx.PutCertificate(cert("a1", "d1", pki.Active, day)); err != nil {
			return err
		}
		return tx.PutCertificate(cert("a2", "d1", pki.Issued, day))
	})
	want := [2]admission.Certificate{{Serial: "a1", NotAfter: day}, {Serial: "a2", NotAfter: day}}
	if len(heard) != 1 || heard[0].Certificates != want {
		t.Fatalf("heard %+v", heard)
	}
	update(t, db, func(tx *bolt.Tx) error {
		c, err := tx.Certificate("a1")
		if err != nil {
			return err
		}
		if err := c.Become(pki.Revoked, day); err != nil {
			return err
		}
		return tx.PutCertificate(c)
	})
	if len(heard) != 2 || heard[1].Certificates[0].Serial != "" || heard[1].Certificates[1].Serial != "a2" {
		t.Fatalf("after the revocation of a1: %+v", heard)
	}
	_ = db.Update(t.Context(), func(tx *bolt.Tx) error {
		_ = tx.PutDevice(fleet.Device{ID: "d2"})
		return fmt.Errorf("no")
	})
	if len(heard) != 2 {
		t.Error("heard of a transaction that did not commit")
	}
	n := 0
	if err := db.Credentials(t.Context(), func(r admission.Record) { n++ }); err != nil || n != 1 {
		t.Errorf("%d records, %v", n, err)
	}
}

func TestCertificatesAreFoundByDeviceKeyEndAndIntent(t *testing.T) {
	db := storetest.Open(t)
	update(t, db, func(tx *bolt.Tx) error {
		for _, d := range []fleet.DeviceID{"d1", "d10"} { // one id is a prefix of the other
			if err := tx.PutDevice(fleet.Device{ID: d}); err != nil {
				return err
			}
		}
		for i, c := range []pki.Certificate{
			cert("a1", "d1", pki.Active, day.Add(3*time.Hour)), cert("a2", "d1", pki.Intended, day.Add(time.Hour)),
			cert("b1", "d10", pki.Issued, day.Add(2*time.Hour)), cert("b2", "d10", pki.Revoked, day),
		} {
			c.IntendedAt = day.Add(time.Duration(i) * time.Second)
			if err := tx.PutCertificate(c); err != nil {
				return err
			}
		}
		return nil
	})
	serials := func(cs []pki.Certificate, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		var s []string
		for _, c := range cs {
			s = append(s, string(c.Serial))
		}
		return strings.Join(s, " ")
	}
	_ = db.View(t.Context(), func(tx *bolt.Tx) error {
		for _, row := range []struct{ what, got, want string }{
			{"of d1", serials(tx.CertificatesOf("d1")), "a1 a2"},
			{"by key", serials(tx.CertificatesByKey(fleet.Hash(strings.Repeat("ab", 32)))), "a1 a2 b1 b2"},
			{"intended", serials(tx.IntendedCertificates(10)), "a2"},
			{"ending in 3 h", serials(tx.CertificatesEnding(day.Add(3*time.Hour), 10)), "b1"},
			{"ending later", serials(tx.CertificatesEnding(day.Add(4*time.Hour), 10)), "b1 a1"},
			{"ending later, one", serials(tx.CertificatesEnding(day.Add(4*time.Hour), 1)), "b1"},
		} {
			if row.got != row.want {
				t.Errorf("%s: %s, want %s", row.what, row.got, row.want)
			}
		}
		return nil
	})
	err := db.Update(t.Context(), func(tx *bolt.Tx) error { return tx.PutCertificate(cert("a1", "d10", pki.Issued, day)) })
	if !fleet.Is(err, fleet.Conflict) {
		t.Errorf("a serial changed its device: %v", err)
	}
}

func TestAReleaseNeverChangesItsImage(t *testing.T) {
	db := storetest.Open(t)
	sha := fleet.Hash(strings.Repeat("0123456789abcdef", 4))
	rel := firmware.Release{Manifest: firmware.Manifest{Product: "lamp", Version: "1.0.0", SHA256: sha}}
	update(t, db, func(tx *bolt.Tx) error { return tx.PutRelease(rel) })
	update(t, db, func(tx *bolt.Tx) error { return tx.PutRelease(rel) })
	rel.SHA256 = fleet.Hash(strings.Repeat("f", 64))
	if err := db.Update(t.Context(), func(tx *bolt.Tx) error { return tx.PutRelease(rel) }); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("another image: %v", err)
	}
}

func TestTheOutboxKeepsItsOrder(t *testing.T) {
	db := storetest.Open(t)
	update(t, db, func(tx *bolt.Tx) error {
		for i := range 300 {
			if err := tx.Enqueue(downlink.Entry{Device: fleet.DeviceID(fmt.Sprint("d", i))}); err != nil {
				return err
			}
		}
		return nil
	})
	update(t, db, func(tx *bolt.Tx) error { return tx.DropOutbox([]uint64{1, 3, 3}) })
	_ = db.View(t.Context(), func(tx *bolt.Tx) error {
		es, err := tx.Outbox(3)
		if err != nil || len(es) != 3 || es[0].Device != "d1" || es[1].Device != "d3" || es[2].Seq != 5 {
			t.Errorf("%+v, %v", es, err)
		}
		return nil
	})
}

func TestTheQuarantineIsBounded(t *testing.T) {
	db := storetest.Open(t)
	update(t, db, func(tx *bolt.Tx) error {
		for range uplink.MaxQuarantined + 5 {
			if err := tx.Quarantine(uplink.Quarantined{Reason: "x"}); err != nil {
				return err
			}
		}
		return nil
	})
	_ = db.View(t.Context(), func(tx *bolt.Tx) error {
		qs, err := tx.Quarantined(0, 0)
		if err != nil || len(qs) != uplink.MaxQuarantined || qs[0].Seq != 6 {
			t.Errorf("%d entries, %v", len(qs), err)
		}
		return nil
	})
}

func TestTokensAreFoundByNameAndSecret(t *testing.T) {
	db := storetest.Open(t)
	h := fleet.Hash(strings.Repeat("a", 64))
	update(t, db, func(tx *bolt.Tx) error { return tx.PutToken(access.Token{Name: "ci", SHA256: h}) })
	err := db.Update(t.Context(), func(tx *bolt.Tx) error {
		return tx.PutToken(access.Token{Name: "ci", SHA256: fleet.Hash(strings.Repeat("b", 64))})
	})
	if !fleet.Is(err, fleet.Conflict) {
		t.Errorf("the name was taken over: %v", err)
	}
	update(t, db, func(tx *bolt.Tx) error {
		if tok, err := tx.TokenBySHA256(h); err != nil || tok.Name != "ci" {
			t.Errorf("%+v, %v", tok, err)
		}
		return tx.DeleteToken("ci")
	})
	_ = db.View(t.Context(), func(tx *bolt.Tx) error {
		if _, err := tx.TokenBySHA256(h); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("a deleted token: %v", err)
		}
		return nil
	})
}

func TestASecondProcessIsRefused(t *testing.T) {
	db := storetest.Open(t)
	_, err := bolt.Open(db.Path(), bolt.Options{LockTimeout: time.Millisecond})
	if err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("got %v", err)
	}
}

func TestAStoreOfANewerMusterIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.db")
	b, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = b.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucket([]byte("meta"))
		if err != nil {
			return err
		}
		return meta.Put([]byte("schema"), binary.BigEndian.AppendUint64(nil, bolt.SchemaVersion+1))
	})
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	if _, err := bolt.Open(path, bolt.Options{}); err == nil || !strings.Contains(err.Error(), "newer muster") {
		t.Errorf("got %v", err)
	}
}

func TestABackupTakenInUseIsAWholeStore(t *testing.T) {
	db := storetest.Open(t)
	update(t, db, func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d1"}) })
	var copy bytes.Buffer
	if _, err := db.Backup(&copy); err != nil {
		t.Fatal(err)
	}
	update(t, db, func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d2"}) })
	path := filepath.Join(t.TempDir(), "copy.db")
	if err := os.WriteFile(path, copy.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	restored := storetest.Reopen(t, path)
	_ = restored.View(t.Context(), func(tx *bolt.Tx) error {
		ds, err := tx.Devices("", 0)
		if err != nil || len(ds) != 1 || ds[0].ID != "d1" {
			t.Errorf("%+v, %v", ds, err)
		}
		return nil
	})
}

func TestADamagedFileIsRefusedWithAnInstruction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.db")
	if err := os.WriteFile(path, bytes.Repeat([]byte("garbage!"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bolt.Open(path, bolt.Options{}); err == nil || !strings.Contains(err.Error(), "restore it from a backup") {
		t.Errorf("got %v", err)
	}
}

// fsck finds what no transaction of ours would write.
func TestCheckFindsWhatMustNotBe(t *testing.T) {
	raw := func(t *testing.T, path string, f func(*bbolt.Tx) error) {
		b, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if err := b.Update(f); err != nil {
			t.Fatal(err)
		}
	}
	for name, row := range map[string]struct {
		damage func(*bbolt.Tx) error
		want   string
	}{
		"slot without its certificate": {func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("devices")).Put([]byte("d1"), []byte(`{"id":"d1","rev":1,"current":"ff"}`))
		}, "slot holds serial ff"},
		"index key without a record": {func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("jobs-active")).Put([]byte("d9"), []byte("r"))
		}, "belongs to no record"},
		"record without its index key": {func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("tokens")).Put([]byte("x"), []byte(`{"name":"x","sha256":"aa"}`))
		}, "keys are missing"},
		"enrolment of nobody": {func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("enrolments")).Put([]byte("d9"), []byte(`{"device":"d9","sha256":"aa","by":"ops"}`))
		}, "no such device"},
		"unreadable record": {func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("certs")).Put([]byte("a1"), []byte(`{`))
		}, "record"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "m.db")
			db, err := bolt.Open(path, bolt.Options{NoSync: true})
			if err != nil {
				t.Fatal(err)
			}
			db.Close()
			raw(t, path, row.damage)
			db, err = bolt.Open(path, bolt.Options{NoSync: true})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			found, err := db.Check(t.Context())
			if err != nil || !slices.ContainsFunc(found, func(s string) bool { return strings.Contains(s, row.want) }) {
				t.Errorf("found %q, %v; want %q", found, err, row.want)
			}
		})
	}
}

func TestAWriterThatGaveUpWritesNothing(t *testing.T) {
	db := storetest.Open(t)
	entered, leave, done := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		done <- db.Update(context.Background(), func(*bolt.Tx) error { close(entered); <-leave; return nil })
	}()
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := db.Update(ctx, func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d1"}) })
	if !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("got %v", err)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
	_ = db.View(t.Context(), func(tx *bolt.Tx) error {
		if _, err := tx.Device("d1"); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("got %v", err)
		}
		return nil
	})
}
