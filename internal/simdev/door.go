package simdev

import (
	"fmt"
	"slices"
	"time"
)

// door is a way in: a certificate slot at the front, or a password at the fallback.
type door struct {
	fallback bool
	side     side // of the certificate, or of the password
}

// outcome is how an attempt at a door ended.
type outcome int

const (
	opened      outcome = iota
	unreachable         // nobody said anything about the credential: network, server, server's certificate
	refused             // a TLS alert about the certificate: final, but for a mistake of the other side
	denied              // the broker's "bad user name or password" or "not authorized": passing trouble until it lasts
	barren              // of the fallback: a session that brought no certificate
)

// Policy is when a device goes to the fallback. A device that goes too soon turns an outage of muster into a storm of the
// whole fleet on the fallback; one that never goes stays out (DESIGN §9).
type Policy struct {
	Refusals int           // denied at least so often in a row,
	After    time.Duration // over at least so long, with the broker reachable
	NewTries int           // so many attempts with a new certificate before the old one is tried again
}

// doors decides which way in to try next. It is a pure state machine: it starts nothing and reads no clock.
type doors struct {
	policy    Policy
	slots     []side // that hold a certificate, in the order of trying
	passwords []side // newest first

	bad        map[side]bool // refused by an alert since the last success
	denials    int           // in a row, of any slot
	since      time.Time     // of the first of them
	fresh      side          // slot of a certificate that has not been used yet
	freshFails int

	recovering bool   // sent to the fallback, and not let in by a certificate since
	probes     []side // attempts with certificates before the fallback is tried again
	password   int    // index of the one to try next
	fails      int    // of the fallback in a row
}

func newDoors(p Policy, slots, passwords []side) *doors {
	return &doors{policy: p, slots: slots, passwords: passwords, bad: map[side]bool{}}
}

// next returns the door to try; false if there is none at all.
func (d *doors) next() (door, bool) {
	switch {
	case len(d.passwords) > 0 && (len(d.slots) == 0 || d.recovering && len(d.probes) == 0):
		return door{true, d.passwords[d.password%len(d.passwords)]}, true
	case len(d.probes) > 0:
		return door{side: d.probes[0]}, true
	case len(d.slots) == 0:
		return door{}, false
	}
	for _, s := range d.slots {
		if !d.bad[s] {
			return door{side: s}, true
		}
	}
	return door{side: d.slots[0]}, true
}

// note takes the outcome of an attempt at time at. It returns why the device goes to the fallback now, if it does.
func (d *doors) note(at time.Time, w door, o outcome) (fallback string) {
	switch {
	case w.fallback:
		d.noteFallback(o)
	case o == opened:
		d.through(w.side)
	case d.recovering:
		d.noteProbe(w.side, o)
	case o == refused:
		return d.noteRefused(w.side)
	case o == denied:
		return d.noteDenied(at, w.side)
	}
	return ""
}

// through: a certificate opened the door; whatever was before is over.
func (d *doors) through(s side) {
	d.front(s)
	*d = doors{policy: d.policy, slots: d.slots, passwords: d.passwords, bad: map[side]bool{}}
}

func (d *doors) noteRefused(s side) string {
	d.bad[s] = true
	d.freshOver(s)
	if slices.ContainsFunc(d.slots, func(s side) bool { return !d.bad[s] }) {
		return "" // the other one first
	}
	if len(d.passwords) == 0 {
		d.bad = map[side]bool{}
		return ""
	}
	return d.recover("no certificate is accepted")
}

func (d *doors) noteDenied(at time.Time, s side) string {
	if d.denials == 0 {
		d.since = at
	}
	d.denials++
	if d.fresh == s {
		d.freshFails++
	}
	if d.fresh != s || d.freshFails >= d.policy.NewTries {
		d.freshOver(s)
		d.back(s)
	}
	if d.denials < d.policy.Refusals || at.Sub(d.since) < d.policy.After || len(d.passwords) == 0 {
		return ""
	}
	return d.recover(fmt.Sprintf("refused %d times over %s", d.denials, at.Sub(d.since).Round(time.Second)))
}

func (d *doors) recover(why string) string {
	d.recovering, d.probes, d.fails = true, nil, 0
	d.denials, d.fresh = 0, ""
	return why
}

// noteProbe: a certificate was tried between two visits to the fallback. An alert is final for its slot.
func (d *doors) noteProbe(s side, o outcome) {
	if len(d.probes) > 0 {
		d.probes = d.probes[1:]
	}
	if o == refused {
		d.probes = slices.DeleteFunc(d.probes, func(p side) bool { return p == s })
	}
}

// noteFallback: certificates are tried again between two visits, because what was wrong may have been put right.
func (d *doors) noteFallback(o outcome) {
	switch o {
	case opened:
		d.fails = 0
		return
	case refused, denied:
		d.password++
		d.fails++
		if d.fails%max(len(d.passwords), 1) != 0 {
			return // the other password first
		}
	case unreachable:
		d.fails++
		if d.fails%3 != 0 {
			return
		}
	}
	d.recovering = true
	d.probes = slices.Clone(d.slots)
}

// stored: slot s holds a new certificate, which is tried next.
func (d *doors) stored(s side) {
	d.front(s)
	d.bad[s] = false
	d.fresh, d.freshFails = s, 0
	if d.recovering {
		d.probes = slices.Repeat([]side{s}, max(d.policy.NewTries, 1))
	}
}

// freshOver: s is not new any more.
func (d *doors) freshOver(s side) {
	if d.fresh == s {
		d.fresh, d.freshFails = "", 0
	}
}

func (d *doors) front(s side) {
	d.slots = append([]side{s}, slices.DeleteFunc(slices.Clone(d.slots), func(o side) bool { return o == s })...)
}

func (d *doors) back(s side) {
	d.slots = append(slices.DeleteFunc(slices.Clone(d.slots), func(o side) bool { return o == s }), s)
}
