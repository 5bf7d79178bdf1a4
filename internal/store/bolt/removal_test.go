package bolt_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

func TestDropDevice(t *testing.T) {
	db := storetest.Open(t)
	var gone []fleet.DeviceID
	db.WatchRemovals(func(id fleet.DeviceID) { gone = append(gone, id) })
	at := time.Now()
	c := pki.Certificate{Serial: "a1", Device: "pump-7", State: pki.Active, KeyHash: "k", Chain: [][]byte{{1}, {2}}, NotAfter: at.Add(time.Hour)}
	update(t, db, func(tx *bolt.Tx) error {
		for _, id := range []fleet.DeviceID{"pump-7", "pump-70"} {
			if err := tx.PutDevice(fleet.Device{ID: id, Product: "pump"}); err != nil {
				return err
			}
			if err := tx.PutRequest(pki.Request{ID: string(id), Device: id, State: pki.Waiting}); err != nil {
				return err
			}
			if err := tx.PutStatus(fleet.Status{Device: id, Online: true, Vhost: wire.VhostDevices}); err != nil {
				return err
			}
			if err := tx.PutPenalty(id, rollout.Penalty{Until: at}); err != nil {
				return err
			}
		}
		return tx.PutCertificate(c)
	})
	if gone != nil {
		t.Fatalf("%v are gone", gone)
	}
	update(t, db, func(tx *bolt.Tx) error { return tx.DropDevice("pump-7") })
	if found, err := db.Check(t.Context()); err != nil || len(found) != 1 || !strings.Contains(found[0], "a1 is active") {
		t.Errorf("a certificate that works and has no device: %v, %v", found, err)
	}
	c.State, c.RevokedAt = pki.Revoked, at
	update(t, db, func(tx *bolt.Tx) error {
		if err := tx.PutCertificate(c); err != nil {
			return err
		}
		return tx.DropDevice("pump-7") // again
	})
	if !slices.Contains(gone, "pump-7") || slices.Contains(gone, "pump-70") {
		t.Errorf("%v are gone", gone)
	}
	update(t, db, func(tx *bolt.Tx) error {
		if _, err := tx.Device("pump-7"); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("it is there: %v", err)
		}
		if st, err := tx.Status("pump-7"); err != nil || st.Online || tx.Online("pump-7") || !tx.Online("pump-70") {
			t.Errorf("%+v, %v", st, err)
		}
		if list, err := tx.Requests(); err != nil || len(list) != 1 || list[0].Device != "pump-70" {
			t.Errorf("%v, %v", list, err)
		}
		if p, err := tx.Penalty("pump-7"); err != nil || !p.Until.IsZero() {
			t.Errorf("%+v, %v", p, err)
		}
		return nil
	})
	if found, err := db.Check(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("%v, %v", found, err)
	}
}

func TestListsAndMassRevocationsAreChecked(t *testing.T) {
	db := storetest.Open(t)
	at := time.Now()
	put := func(l pki.List, m pki.MassRevocation) error {
		return db.Update(t.Context(), func(tx *bolt.Tx) error {
			return errors.Join(tx.PutRevocationList(l), tx.PutMassRevocation(m))
		})
	}
	good := pki.List{Issuer: "00ff", Number: 2, DER: []byte{1}, At: at, Next: at.Add(time.Hour)}
	if err := put(good, pki.MassRevocation{Issuer: "00ff", By: "ops", Since: at}); err != nil {
		t.Fatal(err)
	}
	if found, err := db.Check(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("%v, %v", found, err)
	}
	if err := put(good, pki.MassRevocation{Issuer: "00ff", By: "ops", Since: at}); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("the same number again: %v", err)
	}
	good.Number, good.Next = 3, at
	if err := put(good, pki.MassRevocation{Issuer: "00ff", Since: at}); err != nil {
		t.Fatal(err)
	}
	if found, err := db.Check(t.Context()); err != nil || len(found) != 2 {
		t.Errorf("%v, %v", found, err)
	}
	if err := db.Update(t.Context(), func(tx *bolt.Tx) error { // what storetest checks at the end
		good.Number, good.Next = 4, at.Add(time.Hour)
		return errors.Join(tx.PutRevocationList(good), tx.PutMassRevocation(pki.MassRevocation{Issuer: "00ff", By: "ops", Since: at}))
	}); err != nil {
		t.Fatal(err)
	}
}
