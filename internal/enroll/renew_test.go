package enroll_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

func TestRenewPass(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	start := time.Now()
	// Enrolled a day after one another, so they end so.
	var ids []fleet.DeviceID
	for i := range 5 {
		id := fleet.DeviceID(fmt.Sprintf("dev-%d", i))
		ids = append(ids, id)
		r.addDevice(id)
		r.enrolled(start.Add(time.Duration(i)*10*day), id)
	}
	pass := func(at time.Time, o enroll.RenewOptions) enroll.Renewals {
		t.Helper()
		got, err := r.e.RenewPass(t.Context(), at, o)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	r.outbox()
	if got := pass(start.Add(40*day), enroll.RenewOptions{}); got.Due != 0 || len(got.Asked) != 0 {
		t.Errorf("before any window: %+v", got)
	}
	// On day 82, the windows of devices 0 (closed by day 69), 1 (day 79) are past; that of 2 opens on day 80 at the latest by 89.
	at := start.Add(79 * day)
	r.online(ids[1], r.device(ids[1]).Current)
	dry := pass(at, enroll.RenewOptions{DryRun: true})
	if !slices.Equal(dry.Asked[:2], ids[:2]) || dry.Offline != len(dry.Asked)-1 || !r.device(ids[0]).RenewSince.IsZero() {
		t.Errorf("dry run: %+v", dry)
	}
	r.wantOutbox()
	limited := pass(at, enroll.RenewOptions{Limit: 1})
	if !slices.Equal(limited.Asked, ids[:1]) || !limited.More || limited.Offline != 1 {
		t.Errorf("with a limit, nearest expiry first: %+v", limited)
	}
	r.wantOutbox() // it is offline: it hears when it says hello
	full := pass(at.Add(time.Minute), enroll.RenewOptions{})
	if !slices.Contains(full.Asked, ids[1]) || slices.Contains(full.Asked, ids[0]) || full.Already != 1 || full.More {
		t.Errorf("the rest: %+v", full)
	}
	r.wantOutbox([3]string{"renew", wire.VhostDevices, ""})
	again := pass(at.Add(2*time.Minute), enroll.RenewOptions{})
	if len(again.Asked) != 0 || again.Already != full.Already+len(full.Asked) {
		t.Errorf("at once again: %+v", again)
	}
	since := r.device(ids[0]).RenewSince
	later := pass(at.Add(7*time.Hour), enroll.RenewOptions{})
	if !slices.Contains(later.Asked, ids[0]) || !r.device(ids[0]).RenewSince.Equal(since) {
		t.Errorf("after the pause: %+v", later)
	}
	// Once it has a new one under way, it is not due any more.
	s := r.next(at.Add(8*time.Hour), ids[0], pki.ViaMQTT)
	if got := pass(at.Add(20*time.Hour), enroll.RenewOptions{}); slices.Contains(got.Asked, ids[0]) {
		t.Errorf("asked although a new certificate waits for it: %+v", got)
	}
	r.connected(at.Add(20*time.Hour), ids[0], s)
	if d := r.device(ids[0]); !d.RenewSince.IsZero() || !d.RenewAsked.IsZero() {
		t.Error("the promotion did not end the renewal")
	}
}

func TestRenewPassByName(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	for _, id := range []fleet.DeviceID{"bare", "off", "revoked", "ended"} {
		r.addDevice(id)
	}
	r.enrolled(at, dev)
	r.enrolled(at, "off")
	r.enrolled(at.Add(-100*day), "ended")
	if err := r.disable(at, "off"); err != nil {
		t.Fatal(err)
	}
	r.do(func(tx *bolt.Tx) error {
		d, err := tx.Device("revoked")
		d.RecoveryOff = "revoked"
		if err != nil {
			return err
		}
		return tx.PutDevice(d)
	})
	got, err := r.e.RenewPass(t.Context(), at, enroll.RenewOptions{Devices: []fleet.DeviceID{dev, "bare", "off", "revoked", "ended", dev}, By: "ops"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Asked, []fleet.DeviceID{dev}) || len(got.Skipped) != 4 {
		t.Errorf("%+v", got)
	}
	for _, s := range got.Skipped {
		if s.Why == "" {
			t.Errorf("%s: no reason", s.Device)
		}
	}
	if _, err := r.e.RenewPass(t.Context(), at, enroll.RenewOptions{Devices: []fleet.DeviceID{"nobody"}}); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("unknown: %v", err)
	}
	for _, o := range []enroll.RenewOptions{{All: true, Within: time.Hour}, {Within: -1}, {Limit: -1}, {All: true, Devices: []fleet.DeviceID{dev}}} {
		if _, err := r.e.RenewPass(t.Context(), at, o); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestRenewPassWithinAndAll(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	r.enrolled(at, dev)
	for within, want := range map[time.Duration]int{80 * day: 0, 91 * day: 1} {
		got, err := r.e.RenewPass(t.Context(), at, enroll.RenewOptions{Within: within, DryRun: true})
		if err != nil || len(got.Asked) != want {
			t.Errorf("within %s: %+v, %v", within, got, err)
		}
	}
	// All, in more than one transaction.
	for i := range 300 {
		id := fleet.DeviceID(fmt.Sprintf("all-%d", i))
		r.addDevice(id)
		r.do(func(tx *bolt.Tx) error {
			s := fleet.Serial(fmt.Sprintf("1%031x", i))
			if err := tx.PutCertificate(pki.Certificate{Serial: s, Device: id, State: pki.Active, Chain: [][]byte{{1}}, NotAfter: at.Add(90 * day), KeyHash: fleet.Hash(s)}); err != nil {
				return err
			}
			d, err := tx.Device(id)
			d.Current = s
			if err != nil {
				return err
			}
			return tx.PutDevice(d)
		})
	}
	got, err := r.e.RenewPass(t.Context(), at, enroll.RenewOptions{All: true})
	if err != nil || len(got.Asked) != 301 || got.Due != 301 {
		t.Errorf("all: %d asked, %v", len(got.Asked), err)
	}
}
