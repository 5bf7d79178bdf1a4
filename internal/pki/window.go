package pki

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"muster/internal/fleet"
)

// Window is when a certificate should be renewed, in the manner of RFC 9773 (ARI): a device is asked at some stable
// moment of it.
type Window struct {
	Start time.Time `json:"start"` // two thirds of its life
	End   time.Time `json:"end"`   // a tenth of its life later
}

// RenewalWindow returns when a certificate that works from from until notAfter should be renewed.
func RenewalWindow(from, notAfter time.Time) Window {
	life := max(0, notAfter.Sub(from))
	return Window{Start: from.Add(life / 3 * 2), End: from.Add(life/3*2 + life/10)}
}

// Window returns when c should be renewed. Its life counts from when it was asked for, not from the backdated NotBefore:
// for a short-lived one that hour would open the window before it was issued.
func (c Certificate) Window() Window {
	if c.Suggested != (Window{}) {
		return c.Suggested
	}
	from := c.NotBefore
	if c.IntendedAt.After(from) {
		from = c.IntendedAt
	}
	return RenewalWindow(from, c.NotAfter)
}

// RenewAt returns the moment of c's window at which this device is due. It is the same at each look and spread evenly
// over the fleet.
func RenewAt(c Certificate, device fleet.DeviceID) time.Time {
	w := c.Window()
	return w.Start.Add(spread(string(device), w.End.Sub(w.Start)))
}

// Suggest returns the window that spreads renewals over so much time from at on, and ends in time for c: a twentieth of
// its life before its end. It is empty, at once, if there is no time left.
func (c Certificate) Suggest(at time.Time, over time.Duration) Window {
	end := at.Add(over)
	if last := c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 20); end.After(last) {
		end = last
	}
	if end.Before(at) {
		end = at
	}
	return Window{Start: at, End: end}
}

// Due reports whether c should be renewed at time at.
func (c Certificate) Due(at time.Time) bool { return !at.Before(RenewAt(c, c.Device)) }

// Dither returns lifetime shortened by up to a twentieth, by a hash of serial: devices enrolled on the same day must not
// all expire on the same day (pki.md §2.1).
func Dither(lifetime time.Duration, serial fleet.Serial) time.Duration {
	return lifetime - spread(string(serial), lifetime/20)
}

// spread maps s evenly to [0, over).
func spread(s string, over time.Duration) time.Duration {
	if over <= 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(s))
	return time.Duration(binary.BigEndian.Uint64(sum[:]) % uint64(over))
}

// Validity is when a certificate holds; both ends count (RFC 5280 §4.1.2.5).
type Validity struct{ NotBefore, NotAfter time.Time }

// Within returns v cut to what issuer allows, in whole seconds, as certificates keep them.
func (v Validity) Within(issuer Validity) Validity {
	out := Validity{v.NotBefore.UTC().Truncate(time.Second), v.NotAfter.UTC().Truncate(time.Second)}
	if out.NotBefore.Before(issuer.NotBefore) {
		out.NotBefore = issuer.NotBefore.UTC()
	}
	if out.NotAfter.After(issuer.NotAfter) {
		out.NotAfter = issuer.NotAfter.UTC()
	}
	return out
}
