package rollout

import (
	"time"

	"github.com/robfig/cron/v3"
)

// Window says when devices may be granted the release: from each time that Cron names, for Length. The zero Window is
// always open.
type Window struct {
	Cron      string        // five fields: minute, hour, day of month, month, day of week
	Length    time.Duration // up to a week
	Zone      string        // IANA name of the time zone; empty: UTC. The caller looks it up and passes the location
	ZoneLabel string        // a device with this label has its own zone
}

// MaxWindow is the longest window.
const MaxWindow = 7 * 24 * time.Hour

// Set reports whether there is a window.
func (w Window) Set() bool { return w != Window{} }

// PerDevice reports whether the window may be open for one device and closed for another.
func (w Window) PerDevice() bool { return w.ZoneLabel != "" }

func (w Window) validate() error {
	if !w.Set() {
		return nil
	}
	if _, err := cron.ParseStandard(w.Cron); err != nil {
		return invalid("window: cron is not five fields like \"0 2 * * 1-5\": minute, hour, day of month, month, day of week")
	}
	if w.Length < time.Minute || w.Length > MaxWindow {
		return invalid("window: length is %v; use 1m to %v", w.Length, MaxWindow)
	}
	if len(w.Zone) > 64 || len(w.ZoneLabel) > 63 {
		return invalid("window: zone is an IANA name like Europe/Berlin, zone_label the key of a label")
	}
	if w.next(time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC), time.UTC).IsZero() {
		return invalid("window: cron names a day that never comes")
	}
	return nil
}

// Open reports whether the window is open at time at in zone (nil: UTC), and when to ask again: it cannot change before.
// Daylight saving is cron's: a window whose hour is skipped does not open that day.
func (w Window) Open(at time.Time, zone *time.Location) (open bool, change time.Time) {
	if !w.Set() {
		return true, zero
	}
	if zone == nil {
		zone = time.UTC
	}
	t := w.next(at.Add(-w.Length), zone) // the first opening whose end is still to come
	if !t.IsZero() && !t.After(at) {
		return true, t.Add(w.Length)
	}
	return false, t
}

func (w Window) next(after time.Time, zone *time.Location) time.Time {
	s, err := cron.ParseStandard(w.Cron)
	if err != nil {
		return zero
	}
	t := s.Next(after.In(zone))
	if t.IsZero() {
		return zero
	}
	return t.UTC()
}
