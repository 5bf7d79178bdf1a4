package simdev

import (
	"testing"
	"time"
)

var (
	certA = door{side: sideA}
	certB = door{side: sideB}
	pwA   = door{true, sideA}
	pwB   = door{true, sideB}
)

var t0 = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

var policy = Policy{Refusals: 3, After: time.Hour, NewTries: 2}

// step is an expected door, and what happens there after a while.
type step struct {
	want     door
	after    time.Duration
	o        outcome
	fallback bool // the device goes to the fallback now
}

func walk(t *testing.T, d *doors, steps []step) {
	t.Helper()
	at := t0
	for i, s := range steps {
		got, ok := d.next()
		if !ok || got != s.want {
			t.Fatalf("step %d: tries %+v, want %+v", i, got, s.want)
		}
		at = at.Add(s.after)
		if why := d.note(at, got, s.o); (why != "") != s.fallback {
			t.Fatalf("step %d: fallback %q, want %v", i, why, s.fallback)
		}
	}
}

func TestDoors(t *testing.T) {
	one, two := []side{sideA}, []side{sideA, sideB}
	for _, c := range []struct {
		name             string
		slots, passwords []side
		steps            []step
	}{
		{"an outage is no reason", one, one, []step{
			{certA, 0, unreachable, false}, {certA, time.Hour, unreachable, false}, {certA, 24 * time.Hour, unreachable, false}, {certA, 0, opened, false}, {certA, 0, opened, false},
		}},
		{"an alert about the only certificate", one, one, []step{{certA, 0, refused, true}, {pwA, 0, opened, false}, {pwA, 0, barren, false}, {certA, 0, refused, false}, {pwA, 0, opened, false}}},
		{"an alert: the other certificate first", two, one, []step{{certA, 0, refused, false}, {certB, 0, opened, false}, {certB, 0, opened, false}}},
		{"alerts about both", two, two, []step{{certA, 0, refused, false}, {certB, 0, refused, true}, {pwA, 0, denied, false}, {pwB, 0, opened, false}}},
		{"often, but not long enough", one, one, []step{{certA, 0, denied, false}, {certA, time.Minute, denied, false}, {certA, time.Minute, denied, false}, {certA, time.Minute, denied, false}}},
		{"long, but not often enough", one, one, []step{{certA, 0, denied, false}, {certA, 2 * time.Hour, denied, false}, {certA, time.Minute, denied, true}, {pwA, 0, opened, false}}},
		{"success starts afresh", one, one, []step{{certA, 0, denied, false}, {certA, time.Hour, denied, false}, {certA, 0, opened, false}, {certA, time.Hour, denied, false}, {certA, time.Minute, denied, false}}},
		{"denied: both certificates in turn", two, one, []step{{certA, 0, denied, false}, {certB, time.Hour, denied, false}, {certA, time.Hour, denied, true}, {pwA, 0, opened, false}}},
		{"no password: goes on for ever", one, nil, []step{{certA, 0, refused, false}, {certA, time.Hour, denied, false}, {certA, time.Hour, denied, false}, {certA, time.Hour, denied, false}, {certA, 0, opened, false}}},
		{"no certificate at all", nil, one, []step{{pwA, 0, unreachable, false}, {pwA, 0, denied, false}, {pwA, 0, opened, false}}},
		{"revoked: refused at every door, in turn", two, two, []step{
			{certA, 0, denied, false}, {certB, time.Hour, denied, false}, {certA, time.Hour, denied, true},
			{pwA, 0, denied, false}, {pwB, 0, denied, false}, {certB, 0, denied, false}, {certA, 0, denied, false}, {pwA, 0, denied, false},
		}},
		{"fallback unreachable: a certificate is tried now and then", one, one, []step{
			{certA, 0, refused, true}, {pwA, 0, unreachable, false}, {pwA, 0, unreachable, false}, {pwA, 0, unreachable, false}, {certA, 0, unreachable, false}, {pwA, 0, unreachable, false},
		}},
	} {
		t.Run(c.name, func(t *testing.T) { walk(t, newDoors(policy, c.slots, c.passwords), c.steps) })
	}
}

func TestNewCertificateThatDoesNotWork(t *testing.T) {
	d := newDoors(policy, []side{sideA}, []side{sideA})
	walk(t, d, []step{{certA, 0, opened, false}})
	d.stored(sideB)
	walk(t, d, []step{{certB, 0, unreachable, false}, {certB, 0, denied, false}, {certB, 0, denied, false}, {certA, 0, opened, false}, {certA, 0, opened, false}})
	d.stored(sideB)
	walk(t, d, []step{{certB, 0, refused, false}, {certA, 0, opened, false}})
	d.stored(sideB)
	walk(t, d, []step{{certB, 0, opened, false}, {certB, 0, opened, false}})
}

func TestCertificateFromTheFallback(t *testing.T) {
	d := newDoors(policy, []side{sideA}, []side{sideA})
	walk(t, d, []step{{certA, 0, refused, true}, {pwA, 0, opened, false}})
	d.stored(sideB)
	walk(t, d, []step{{certB, 0, denied, false}, {certB, 0, denied, false}, {pwA, 0, opened, false}})
	d.stored(sideB)
	walk(t, d, []step{{certB, 0, refused, false}, {pwA, 0, opened, false}})
	d.stored(sideB)
	walk(t, d, []step{{certB, 0, opened, false}, {certB, 0, denied, false}, {certA, time.Minute, denied, false}})
}

func TestNoWayIn(t *testing.T) {
	if w, ok := newDoors(policy, nil, nil).next(); ok {
		t.Fatalf("%+v", w)
	}
}
