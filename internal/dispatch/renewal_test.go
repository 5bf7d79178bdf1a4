package dispatch_test

import (
	"fmt"
	"testing"
	"time"

	"muster/internal/dispatch"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

const day = 24 * time.Hour

// certified gives n connected devices a certificate each, and a policy of 90 days.
func (w *world) certified(n int) {
	w.fleet(n, n)
	w.update(func(tx *bolt.Tx) error {
		t := pki.Terms{Lifetime: 90 * day, Grace: day}
		if err := tx.PutCertificatePolicy(pki.Policy{Terms: t, Settings: t}); err != nil {
			return err
		}
		for i := range n {
			id := fleet.DeviceID(fmt.Sprint("d", i))
			if err := w.give(tx, id, "0", w.now); err != nil {
				return err
			}
		}
		return nil
	})
}

// give makes the current certificate of a device, asked for at a time.
func (w *world) give(tx *bolt.Tx, id fleet.DeviceID, generation string, at time.Time) error {
	s := fleet.Serial("a" + generation + fmt.Sprintf("%x", string(id)))
	c := pki.Certificate{Serial: s, Device: id, State: pki.Active, KeyHash: fleet.Hash(s), Chain: [][]byte{{1}}, IntendedAt: at, NotBefore: at, NotAfter: at.Add(90 * day)}
	d, err := tx.Device(id)
	if err != nil {
		return err
	}
	if d.Current != "" {
		old, err := tx.Certificate(d.Current)
		if err != nil {
			return err
		}
		old.State = pki.Superseded
		if err := tx.PutCertificate(old); err != nil {
			return err
		}
	}
	if err := tx.PutCertificate(c); err != nil {
		return err
	}
	d.Current, d.RenewSince, d.RenewAsked = s, time.Time{}, time.Time{}
	return tx.PutDevice(d)
}

func (w *world) step(id fleet.DeviceID, r rollout.Report) {
	w.update(func(tx *bolt.Tx) error { return w.d.Renewing(tx, w.now, id, r) })
}

// connects has a device connect with a new certificate, or with the one it has.
func (w *world) connects(id fleet.DeviceID, fresh bool, generation string) {
	w.now = w.now.Add(time.Second)
	w.update(func(tx *bolt.Tx) error {
		if fresh {
			if err := w.give(tx, id, generation, w.now); err != nil {
				return err
			}
		}
		d, err := tx.Device(id)
		if err != nil {
			return err
		}
		return w.d.Session(tx, w.now, id, d.Current)
	})
}

func (w *world) dev(id fleet.DeviceID) (d fleet.Device) {
	w.update(func(tx *bolt.Tx) (err error) { d, err = tx.Device(id); return err })
	return d
}

func TestCertificatesGoOutInStages(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.certified(4)
	p := atOnce()
	p.Stages = []rollout.Stage{{Count: 1}, {Percent: 100}}
	w.make(dispatch.Spec{ID: "r", Plan: p, Renewal: &dispatch.Renewal{Lifetime: 30 * day}})
	w.pass(time.Second)
	canary := w.flying("r")
	if len(canary) != 1 || w.dev(canary[0]).RenewSince.IsZero() {
		t.Fatalf("%v are asked", canary)
	}
	w.update(func(tx *bolt.Tx) error {
		life, ok, err := w.d.RenewalTerms(tx, canary[0])
		if err != nil || !ok || life != 30*day {
			t.Errorf("the canary gets %s, %v, %v", life, ok, err)
		}
		for i := range 4 {
			if id := fleet.DeviceID(fmt.Sprint("d", i)); id != canary[0] {
				if _, ok, err := w.d.RenewalTerms(tx, id); ok || err != nil {
					t.Errorf("%s has terms of its own before its turn: %v", id, err)
				}
			}
		}
		return nil
	})
	for _, r := range []rollout.Report{rollout.ReportAccepted, rollout.ReportDownloading, rollout.ReportInstalled} {
		w.step(canary[0], r)
	}
	w.pass(time.Second)
	if got := w.flying("r"); len(got) != 1 {
		t.Errorf("%v are in flight before the canary is proven", got)
	}
	w.connects(canary[0], true, "1")
	w.pass(time.Second)
	rest := w.flying("r")
	if len(rest) != 3 {
		t.Fatalf("then %v", rest)
	}
	for _, id := range rest {
		w.connects(id, true, "1")
	}
	w.pass(time.Second)
	r := w.get("r")
	if r.State != rollout.Completed || r.Total.Succeeded != 4 {
		t.Fatalf("%s, %+v", r.State, r.Total)
	}
	w.update(func(tx *bolt.Tx) error {
		p, ok, err := tx.CertificatePolicy()
		if err != nil || !ok || p.Lifetime != 30*day {
			t.Errorf("the policy says %+v, %v", p, err)
		}
		return nil
	})
}

// It said that it stored the new certificate, and comes back with the old one: it cannot use it.
func TestADeviceThatFallsBackToItsOldCertificateHaltsTheRollout(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.certified(3)
	p := atOnce()
	p.Stages = []rollout.Stage{{Count: 1}, {Percent: 100}}
	w.make(dispatch.Spec{ID: "r", Plan: p, Renewal: &dispatch.Renewal{Lifetime: 30 * day}})
	w.pass(time.Second)
	canary := w.flying("r")[0]
	w.connects(canary, false, "") // a flap before it has anything new is no failure
	w.pass(time.Second)
	if r := w.get("r"); r.Total.Failures() != 0 {
		t.Fatalf("%+v", r.Total)
	}
	w.step(canary, rollout.ReportInstalled)
	w.connects(canary, false, "")
	w.pass(time.Second)
	r := w.get("r")
	if r.State != rollout.Halted || r.Total.RolledBack != 1 || r.Total.Pending != 2 {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
	w.update(func(tx *bolt.Tx) error {
		if p, _, err := tx.CertificatePolicy(); err != nil || p.Lifetime != 90*day {
			t.Errorf("the policy says %s, %v", p.Lifetime, err)
		}
		return nil
	})
}

func TestWhoHasNoCertificateIsSkippedAndAbortAsksNobodyAnyMore(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.certified(2)
	w.add("extra", nil)
	w.make(dispatch.Spec{ID: "r", Plan: atOnce(), Renewal: &dispatch.Renewal{}})
	w.pass(time.Second)
	r := w.get("r")
	if r.Total.Skipped != 1 || r.Total.InFlight() != 2 {
		t.Fatalf("%+v", r.Total)
	}
	if _, err := w.d.Abort(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []fleet.DeviceID{"d0", "d1"} {
		if !w.dev(id).RenewSince.IsZero() {
			t.Errorf("%s is still asked", id)
		}
	}
}

func TestARolloutOfCertificatesHasNoWayBack(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.certified(1)
	p := atOnce()
	p.Rollback = rollout.RollbackPlan{Previous: true}
	if _, err := w.d.Create(t.Context(), w.now, dispatch.Spec{ID: "r", Product: "lamp", Plan: p, Renewal: &dispatch.Renewal{}}, "op"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("got %v", err)
	}
}
