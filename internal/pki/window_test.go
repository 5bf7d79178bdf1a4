package pki

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

func TestWindowOfNinetyDays(t *testing.T) {
	day := 24 * time.Hour
	c := Certificate{NotBefore: day0.Add(-time.Hour), IntendedAt: day0, NotAfter: day0.Add(90 * day)}
	w := c.Window()
	if !w.Start.Equal(day0.Add(60*day)) || !w.End.Equal(day0.Add(69*day)) {
		t.Errorf("window is %s to %s", w.Start, w.End)
	}
}

// A lifetime of minutes, as in a demonstration: the hour of backdating must not open the window before the issue.
func TestWindowOfMinutes(t *testing.T) {
	c := Certificate{Device: "d1", NotBefore: day0.Add(-time.Hour), IntendedAt: day0, NotAfter: day0.Add(2 * time.Minute)}
	if c.Due(day0) || c.Due(day0.Add(79*time.Second)) {
		t.Error("due before two thirds of its life")
	}
	if !c.Due(day0.Add(93 * time.Second)) {
		t.Error("not due after the window")
	}
}

func TestRenewAtIsInTheWindowAndStable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(int64(time.Second), int64(10*365*24*time.Hour)).Draw(t, "life"))
		id := fleet.DeviceID(rapid.StringMatching(`[a-z0-9]{1,40}`).Draw(t, "device"))
		c := Certificate{Device: id, NotBefore: day0, NotAfter: day0.Add(life)}
		at, w := RenewAt(c, id), c.Window()
		if at.Before(w.Start) || at.After(w.End) || at.After(c.NotAfter) {
			t.Fatalf("%s is not in %s to %s", at, w.Start, w.End)
		}
		if !at.Equal(RenewAt(c, id)) {
			t.Fatal("another look gave another moment")
		}
		if c.Due(at.Add(-1)) || !c.Due(at) {
			t.Fatal("Due and RenewAt disagree")
		}
	})
}

// The fleet must not ask all at once: no tenth of the window may hold more than twice its share.
func TestRenewAtSpreadsTheFleet(t *testing.T) {
	const n = 5000
	c := Certificate{NotBefore: day0, NotAfter: day0.Add(90 * 24 * time.Hour)}
	w := c.Window()
	var tenth [10]int
	for i := range n {
		d := RenewAt(c, fleet.DeviceID(fmt.Sprint("pump-", i))).Sub(w.Start)
		tenth[int(d*10/w.End.Sub(w.Start))]++
	}
	for i, got := range tenth {
		if got < n/20 || got > n/5 {
			t.Errorf("tenth %d holds %d of %d devices", i, got, n)
		}
	}
}

func TestDither(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(0, int64(10*365*24*time.Hour)).Draw(t, "life"))
		s := fleet.Serial(rapid.StringMatching(`[1-9a-f][0-9a-f]{0,39}`).Draw(t, "serial"))
		got := Dither(life, s)
		if got > life || got < life-life/20 || got != Dither(life, s) {
			t.Fatalf("%s became %s", life, got)
		}
	})
}

func TestWithin(t *testing.T) {
	issuer := Validity{day0, day0.Add(100 * time.Hour)}
	for _, c := range []struct{ from, to, wantFrom, wantTo time.Duration }{
		{time.Hour, 10 * time.Hour, time.Hour, 10 * time.Hour},
		{-time.Hour, 10 * time.Hour, 0, 10 * time.Hour},
		{time.Hour, 200 * time.Hour, time.Hour, 100 * time.Hour},
		{time.Hour + time.Millisecond, 10*time.Hour + 999*time.Millisecond, time.Hour, 10 * time.Hour},
	} {
		got := Validity{day0.Add(c.from), day0.Add(c.to)}.Within(issuer)
		if !got.NotBefore.Equal(day0.Add(c.wantFrom)) || !got.NotAfter.Equal(day0.Add(c.wantTo)) {
			t.Errorf("%s to %s became %s to %s", c.from, c.to, got.NotBefore, got.NotAfter)
		}
	}
}
