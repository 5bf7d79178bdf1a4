package cli_test

import (
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
)

func TestRecoveryFirmware(t *testing.T) {
	d := sit(t, nil)
	d.release("1.1.0")
	err := d.DB.Update(t.Context(), func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: "lamp-1", Product: "lamp"}); err != nil {
			return err
		}
		return tx.PutDevice(fleet.Device{ID: "lamp-2", Product: "lamp"})
	})
	if err != nil {
		t.Fatal(err)
	}
	err = d.DB.Update(t.Context(), func(tx *bolt.Tx) error {
		return tx.PutStatus(fleet.Status{Device: "lamp-1", Vhost: "fallback", Version: "2.0.0"})
	})
	if err != nil {
		t.Fatal(err)
	}
	d.fails(5, "rollout", "recovery", "firmware", "lamp-2", "1.1.0") // it was never on the fallback
	d.fails(3, "", "recovery", "firmware", "lamp-1", "9.9.9")
	d.fails(3, "", "recovery", "firmware", "nobody", "1.1.0")
	d.fails(2, "", "recovery", "firmware", "lamp-1")
	d.fails(2, "", "recovery", "firmware", "lamp-1", "1.1.0", "--cancel")
	has(t, d.run("recovery", "firmware", "lamp-1", "1.1.0"), "lamp-1 gets 1.1.0")
	has(t, d.run("recovery", "firmware"), "lamp-1", "1.1.0", "t-admin", "not yet")
	if rs := decode[[]api.Repair](d, "recovery", "firmware"); len(rs) != 1 || rs[0].Job == "" || rs[0].Offers != 0 {
		t.Errorf("%+v", rs)
	}
	has(t, d.run("recovery", "firmware", "lamp-1", "--cancel"), "nothing is ordered")
	d.fails(3, "", "recovery", "firmware", "lamp-1", "--cancel")
	if rs := decode[[]api.Repair](d, "recovery", "firmware"); len(rs) != 0 {
		t.Errorf("%+v", rs)
	}
}
