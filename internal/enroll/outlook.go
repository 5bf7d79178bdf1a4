package enroll

import (
	"context"
	"slices"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// walkBatch is how many devices one transaction of a walk over the fleet reads: writers wait for no walk.
const walkBatch = 512

// walk calls f for every device that holds a live or ended certificate and is not barred, in id order, with the newest
// certificate that it could connect with.
func (e *Enroller) walk(ctx context.Context, f func(tx Tx, dev fleet.Device, c pki.Certificate) error) error {
	return e.everyDevice(ctx, func(tx Tx, dev fleet.Device) error {
		if isBarred(dev) { // locked out on purpose
			return nil
		}
		c, err := newestUsable(tx, dev)
		if err != nil || c.Serial == "" {
			return err
		}
		return f(tx, dev, c)
	})
}

func isBarred(dev fleet.Device) bool { return dev.Disabled || dev.RecoveryOff != "" }

// everyDevice calls f for every device, in id order and in short transactions.
func (e *Enroller) everyDevice(ctx context.Context, f func(tx Tx, dev fleet.Device) error) error {
	var after fleet.DeviceID
	for {
		var n int
		err := e.c.View(ctx, func(tx Tx) error {
			list, err := tx.Devices(after, walkBatch)
			if err != nil {
				return err
			}
			if n = len(list); n > 0 {
				after = list[n-1].ID
			}
			for _, dev := range list {
				if err := f(tx, dev); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil || n < walkBatch {
			return err
		}
	}
}

// newestUsable is newestLive, or else the expired certificate of a slot: the one by which its device is locked out.
func newestUsable(tx Tx, dev fleet.Device) (pki.Certificate, error) {
	live, err := newestLive(tx, dev)
	if err != nil || live.Serial != "" || dev.Current == "" {
		return live, err
	}
	c, err := tx.Certificate(dev.Current)
	if err != nil || c.State != pki.Expired {
		return pki.Certificate{}, err
	}
	return c, nil
}

// horizons are the bounds by which FleetStatus sorts, shortest first. What holds longer is in none.
var horizons = [...]time.Duration{24 * time.Hour, 7 * 24 * time.Hour, 30 * 24 * time.Hour, 90 * 24 * time.Hour}

// Horizon counts devices whose newest certificate ends within a time, and not within a shorter one of the list.
type Horizon struct {
	Within  time.Duration
	Devices int
	First   fleet.DeviceID // whose certificate ends soonest; empty if there is none
	end     time.Time
}

// FleetStatus is the fleet by the time that its certificates have left.
type FleetStatus struct {
	Ended    Horizon // Within is 0
	Horizons []Horizon
	Later    Horizon // Within is 0: no bound

	Due     int       // of all, whose moment of renewal has come
	Asked   int       // of those, that were asked and have no new certificate yet
	Oldest  time.Time // since when the one that was asked first has been; zero if nobody was
	Barred  int       // disabled or revoked: not counted above
	Without int       // devices that were never given a certificate
}

// FleetStatus counts. It reads the whole fleet, in short transactions.
func (e *Enroller) FleetStatus(ctx context.Context, at time.Time) (FleetStatus, error) {
	s := FleetStatus{Horizons: make([]Horizon, len(horizons))}
	for i, w := range horizons {
		s.Horizons[i].Within = w
	}
	err := e.everyDevice(ctx, func(tx Tx, dev fleet.Device) error {
		if isBarred(dev) {
			s.Barred++
			return nil
		}
		c, err := newestUsable(tx, dev)
		if err != nil {
			return err
		}
		if c.Serial == "" {
			s.Without++
			return nil
		}
		s.add(at, dev, c)
		return nil
	})
	return s, err
}

// add counts a device by its newest certificate.
func (s *FleetStatus) add(at time.Time, dev fleet.Device, c pki.Certificate) {
	left := c.NotAfter.Sub(at)
	h := &s.Later
	if left <= 0 {
		h = &s.Ended
	} else if i := slices.IndexFunc(horizons[:], func(w time.Duration) bool { return left <= w }); i >= 0 {
		h = &s.Horizons[i]
	}
	h.Devices++
	if h.First == "" || c.NotAfter.Before(h.end) {
		h.First, h.end = dev.ID, c.NotAfter
	}
	if left > 0 && c.Due(at) {
		s.Due++
	}
	if dev.RenewSince.IsZero() {
		return
	}
	s.Asked++
	if s.Oldest.IsZero() || dev.RenewSince.Before(s.Oldest) {
		s.Oldest = dev.RenewSince
	}
}

// ForecastOptions bound a forecast.
type ForecastOptions struct {
	Within time.Duration // lock-outs that come within; 0: whenever
	Limit  int           // rows; the worst and soonest first
}

// DeviceForecast is the row of a device in a forecast.
type DeviceForecast struct {
	Device fleet.DeviceID
	Serial fleet.Serial
	pki.Prediction
	LastSeen time.Time // zero: never
	Online   bool
	Fallback bool // it has a password for the fallback: locked out at the front, it can still come back by itself
}

// FleetForecast says who will be locked out.
type FleetForecast struct {
	Devices int // with a certificate
	Counts  map[pki.Outlook]int
	Rows    []DeviceForecast // all but those that renew
	More    bool             // Limit left some out
}

// severity orders outlooks, the worst first.
var severity = []pki.Outlook{pki.LockedOut, pki.WillLockOut, pki.AtRisk, pki.Renews}

// maxForecast is how many rows a forecast keeps in memory.
const maxForecast = 10_000

// Forecast joins each device's certificate with its habit of being there, and says which devices will be locked out, when
// and why. It reads the whole fleet, in short transactions.
func (e *Enroller) Forecast(ctx context.Context, at time.Time, o ForecastOptions) (FleetForecast, error) {
	if o.Limit < 1 || o.Limit > maxForecast {
		return FleetForecast{}, fleet.Errorf(fleet.Invalid, "limit: use 1 to %d", maxForecast)
	}
	out := FleetForecast{Counts: map[pki.Outlook]int{}}
	err := e.walk(ctx, func(tx Tx, dev fleet.Device, c pki.Certificate) error {
		st, err := tx.Status(dev.ID)
		if err != nil {
			return err
		}
		p := pki.Forecast(at, c, habitOf(dev, st))
		out.Devices++
		if p.Outlook != pki.Renews && o.Within > 0 && p.At.After(at.Add(o.Within)) {
			p.Outlook = pki.Renews // not within the time that was asked for
		}
		out.Counts[p.Outlook]++
		if p.Outlook == pki.Renews {
			return nil
		}
		out.Rows = append(out.Rows, DeviceForecast{Device: dev.ID, Serial: c.Serial, Prediction: p, LastSeen: st.LastSeen, Online: st.Online, Fallback: len(dev.Passwords) > 0})
		if len(out.Rows) >= 2*maxForecast {
			out.trim(o.Limit)
		}
		return nil
	})
	out.trim(o.Limit)
	return out, err
}

// trim keeps the worst and soonest rows.
func (f *FleetForecast) trim(limit int) {
	slices.SortStableFunc(f.Rows, func(a, b DeviceForecast) int {
		if d := slices.Index(severity, a.Outlook) - slices.Index(severity, b.Outlook); d != 0 {
			return d
		}
		return a.At.Compare(b.At)
	})
	if len(f.Rows) > limit {
		f.Rows, f.More = slices.Clone(f.Rows[:limit]), true
	}
}

func habitOf(dev fleet.Device, st fleet.Status) pki.Habit {
	return pki.Habit{Online: st.Online, LastSeen: st.LastSeen, Sessions: st.Sessions, Asked: dev.RenewSince}
}
