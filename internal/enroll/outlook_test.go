package enroll_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/access"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
)

// habit gives a device sessions that came so far apart, the last of them at last.
func (r *rig) habit(id fleet.DeviceID, last time.Time, gap time.Duration, n int) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		st, err := tx.Status(id)
		if err != nil {
			return err
		}
		for i := range n {
			st.Began(last.Add(-time.Duration(n-1-i) * gap))
		}
		st.LastSeen = last
		return tx.PutStatus(st)
	})
}

func TestForecastSaysWhoWhenAndWhy(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	start := time.Now()
	for _, id := range []fleet.DeviceID{"daily", "monthly", "gone", "boxed", "ended", "off"} {
		r.addDevice(id)
	}
	for _, id := range []fleet.DeviceID{"daily", "monthly", "gone", "boxed", "off"} {
		r.enrolled(start, id)
	}
	r.enrolled(start.Add(-100*day), "ended")
	at := start.Add(40 * day)
	r.habit("daily", at.Add(-time.Hour), day, 20)
	r.habit("monthly", at.Add(-20*day), 31*day, 2)
	r.habit("gone", at.Add(-30*day), day, 10)
	r.do(func(tx *bolt.Tx) error { return tx.PutStatus(fleet.Status{Device: "boxed"}) })
	if err := r.disable(at, "off"); err != nil {
		t.Fatal(err)
	}
	f, err := r.e.Forecast(t.Context(), at, enroll.ForecastOptions{Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, row := range f.Rows {
		got = append(got, string(row.Device)+" "+string(row.Outlook))
		if row.Why == "" || row.Serial == "" {
			t.Errorf("%s: no reason, or no serial", row.Device)
		}
	}
	slices.Sort(got[1 : len(got)-1])
	if want := []string{"ended locked-out", "boxed locking-out", "gone locking-out", "monthly at-risk"}; !slices.Equal(got, want) || f.Devices != 5 || f.Counts[pki.Renews] != 1 || f.More {
		t.Errorf("got %v, %+v", got, f.Counts)
	}
	if f, err = r.e.Forecast(t.Context(), at, enroll.ForecastOptions{Limit: 1, Within: 10 * day}); err != nil || len(f.Rows) != 1 || f.Rows[0].Device != "ended" || f.Counts[pki.Renews] != 4 {
		t.Errorf("within ten days: %+v, %v", f, err)
	}
	if f, err = r.e.Forecast(t.Context(), at, enroll.ForecastOptions{Limit: 2}); err != nil || len(f.Rows) != 2 || !f.More {
		t.Errorf("with a limit: %+v, %v", f, err)
	}
	if _, err := r.e.Forecast(t.Context(), at, enroll.ForecastOptions{}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("no limit: %v", err)
	}
}

func TestFleetStatusCountsEachDeviceOnce(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	start := time.Now()
	for i := range 600 { // more than one transaction of the walk reads
		r.addDevice(fleet.DeviceID(fmt.Sprintf("bare-%03d", i)))
	}
	for _, id := range []fleet.DeviceID{"old", "new", "twice", "off"} {
		r.addDevice(id)
	}
	r.enrolled(start.Add(-70*day), "old")
	r.enrolled(start, "new")
	r.enrolled(start.Add(-70*day), "twice")
	r.enrolled(start, "off")
	r.next(start, "twice", pki.ViaMQTT) // its new one counts
	if err := r.disable(start, "off"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.e.RenewPass(t.Context(), start, enroll.RenewOptions{Devices: []fleet.DeviceID{"old"}}); err != nil {
		t.Fatal(err)
	}
	s, err := r.e.FleetStatus(t.Context(), start)
	if err != nil {
		t.Fatal(err)
	}
	total := s.Ended.Devices + s.Later.Devices
	for _, h := range s.Horizons {
		total += h.Devices
	}
	// The rig's own device has no certificate either.
	if total != 3 || s.Horizons[2].Devices != 1 || s.Horizons[2].First != "old" || s.Horizons[3].Devices != 2 || s.Barred != 1 || s.Without != 601 {
		t.Errorf("%+v", s)
	}
	if s.Due != 1 || s.Asked != 1 || !s.Oldest.Equal(start) {
		t.Errorf("due %d, asked %d since %s", s.Due, s.Asked, s.Oldest)
	}
}

func TestTermsThatLockDevicesOutAreRefused(t *testing.T) {
	r := newRig(t, enroll.Policy{MaxLockOut: 0.1})
	at := time.Now()
	for i := range 20 {
		id := fleet.DeviceID(fmt.Sprintf("dev-%02d", i))
		r.addDevice(id)
		r.enrolled(at, id)
		gap := day
		if i < 3 {
			gap = 12 * day // fine with 90 days, not with 30
		}
		r.habit(id, at, gap, 5)
	}
	terms := pki.Terms{Lifetime: 30 * day, Grace: day}
	i, refused, err := r.e.TryPolicy(t.Context(), at, terms)
	if err != nil || !refused || i.Devices != 20 || i.Lost != 3 || !slices.Equal(i.Sample, []fleet.DeviceID{"dev-00", "dev-01", "dev-02"}) {
		t.Fatalf("tried: %+v, %v, %v", i, refused, err)
	}
	_, _, err = r.e.SetPolicy(t.Context(), at, terms, false, "ops")
	e, _ := err.(*fleet.Error)
	if e == nil || e.Code != enroll.CodeLockOut || !strings.Contains(e.Msg, "3 of 20 devices") {
		t.Fatalf("got %v", err)
	}
	if p, err := r.e.CertificatePolicy(t.Context()); err != nil || p.Lifetime != 90*day {
		t.Fatalf("the refused terms are in force: %+v, %v", p, err)
	}
	// Longer locks nobody out, and force does it anyway.
	for _, do := range []struct {
		life  time.Duration
		force bool
	}{{120 * day, false}, {30 * day, true}} {
		p, _, err := r.e.SetPolicy(t.Context(), at, pki.Terms{Lifetime: do.life, Grace: day}, do.force, "ops")
		if err != nil || p.Lifetime != do.life || p.By != "ops" {
			t.Fatalf("%s: %+v, %v", do.life, p, err)
		}
	}
	r.addDevice("later")
	c := r.enrolled(at, "later")
	if life := c.NotAfter.Sub(at); life > 30*day || life < 28*day {
		t.Errorf("a certificate issued under the new terms holds %s", life)
	}
	if _, _, err := r.e.SetPolicy(t.Context(), at, pki.Terms{Lifetime: time.Second, Grace: 0}, true, "ops"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("under the least lifetime: %v", err)
	}
	n := 0
	for _, entry := range r.audited() {
		if entry.What == "certificate.policy" && entry.Who == "ops" {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d changes are on record, want 2", n)
	}
}

// A change of the settings is a proposal like any other, and a refused one does not keep musterd from starting.
func TestSettingsThatLockDevicesOutDoNotComeIntoForce(t *testing.T) {
	r := newRig(t, enroll.Policy{Lifetime: 90 * day})
	at := time.Now()
	adopt := func(life time.Duration) pki.Policy {
		t.Helper()
		p, err := r.with(enroll.Policy{Lifetime: life}).AdoptSettings(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if p := adopt(90 * day); p.Lifetime != 90*day || p.Why != "" {
		t.Fatalf("at first: %+v", p)
	}
	r.enrolled(at, dev)
	r.habit(dev, at, 12*day, 5)
	if p := adopt(30 * day); p.Lifetime != 90*day || p.Refused.Lifetime != 30*day || !strings.Contains(p.Why, "1 of 1 devices") {
		t.Fatalf("a lifetime that locks out: %+v", p)
	}
	before := len(r.audited())
	if p := adopt(30 * day); p.Lifetime != 90*day || len(r.audited()) != before {
		t.Errorf("at the next start it is said again in the trail: %+v", p)
	}
	if p := adopt(60 * day); p.Lifetime != 60*day || p.Why != "" {
		t.Errorf("one that does not: %+v", p)
	}
	// What an operator set stays, as long as the settings do not change.
	if _, _, err := r.with(enroll.Policy{Lifetime: 60 * day}).SetPolicy(t.Context(), at, pki.Terms{Lifetime: 75 * day}, false, "ops"); err != nil {
		t.Fatal(err)
	}
	if p := adopt(60 * day); p.Lifetime != 75*day || p.By != "ops" {
		t.Errorf("after an operator's change: %+v", p)
	}
}

func TestRenewalsAreSpreadOverAWindow(t *testing.T) {
	r := newRig(t, enroll.Policy{AskAgain: 48 * time.Hour})
	at := time.Now()
	for i := range 50 {
		id := fleet.DeviceID(fmt.Sprintf("dev-%02d", i))
		r.addDevice(id)
		r.enrolled(at, id)
	}
	o := enroll.RenewOptions{All: true, Over: 24 * time.Hour, By: "ops"}
	got, err := r.e.RenewPass(t.Context(), at, o)
	if err != nil || got.Spread != 50 || len(got.Asked) != 0 {
		t.Fatalf("%+v, %v", got, err)
	}
	asked := 0
	for hour := 6; hour <= 24; hour += 6 {
		got, err := r.e.RenewPass(t.Context(), at.Add(time.Duration(hour)*time.Hour), enroll.RenewOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(got.Asked); n < 4 || n > 30 {
			t.Errorf("%d were asked in the six hours before hour %d", n, hour)
		}
		asked += len(got.Asked)
	}
	if asked != 50 {
		t.Errorf("%d of 50 were asked within the window", asked)
	}
	for _, bad := range []enroll.RenewOptions{{Over: time.Hour}, {All: true, Over: -1}} {
		if _, err := r.e.RenewPass(t.Context(), at, bad); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// audited returns the whole trail.
func (r *rig) audited() (out []access.Entry) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		var err error
		out, err = tx.AuditEntries(0, 100_000)
		return err
	})
	return out
}
