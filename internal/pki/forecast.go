package pki

import (
	"fmt"
	"time"
)

// Habit is what is known of when a device is there.
type Habit struct {
	Online   bool
	LastSeen time.Time   // zero: never
	Sessions []time.Time // when its newest sessions began, oldest first
	Asked    time.Time   // since when it is asked to renew; zero: it is not
}

// Outlook says whether a device will be locked out.
type Outlook string

// Outlooks, from good to bad.
const (
	Renews      Outlook = "renews"      // it is there often enough to renew in time
	AtRisk      Outlook = "at-risk"     // it may miss its window
	WillLockOut Outlook = "locking-out" // nothing says that it will come in time
	LockedOut   Outlook = "locked-out"  // its certificate has ended
)

// Prediction is what Forecast says of a device.
type Prediction struct {
	Outlook Outlook
	At      time.Time // when it is or was locked out: the end of its certificate
	Why     string    // in words
}

// Bounds of Forecast.
const (
	patience  = 24 * time.Hour     // a connected device that was asked for longer does not renew
	newcomer  = 7 * 24 * time.Hour // a device of which one session is known may be away so long before it counts as gone
	tooLong   = 2                  // times its longest absence: then it is not coming back as it used to
	nearlyOut = 10                 // a tenth of the life left is no time for trouble
)

// Forecast says whether the device that holds c, its newest live certificate, will renew it in time, by when it used to be
// there. What a device never did before, such as breaking, it cannot know.
func Forecast(at time.Time, c Certificate, h Habit) Prediction {
	p := Prediction{Outlook: Renews, At: c.NotAfter}
	say := func(o Outlook, format string, a ...any) Prediction {
		p.Outlook, p.Why = o, fmt.Sprintf(format, a...)
		return p
	}
	if !at.Before(c.NotAfter) {
		return say(LockedOut, "its certificate ended on %s", day(c.NotAfter))
	}
	if h.LastSeen.IsZero() && !h.Online {
		return say(WillLockOut, "it has never connected; its certificate ends on %s", day(c.NotAfter))
	}
	opens := c.Window().Start
	if opens.Before(at) {
		opens = at
	}
	chance := c.NotAfter.Sub(opens) // in which it must be there
	past := h.longestAbsence()
	if h.Online {
		asked := at.Sub(h.Asked)
		switch {
		case h.Asked.IsZero() || asked < patience:
		case c.NotAfter.Sub(at) < c.NotAfter.Sub(c.NotBefore)/nearlyOut:
			return say(WillLockOut, "it is connected, but has been asked to renew for %s and sends no request", span(asked))
		default:
			return say(AtRisk, "it is connected, but has been asked to renew for %s and sends no request", span(asked))
		}
		if past >= chance {
			return say(AtRisk, "it was away for %s before; it must be there once between %s and %s", span(past), day(opens), day(c.NotAfter))
		}
		return p
	}
	away := at.Sub(h.LastSeen)
	switch {
	case past == 0 && away > newcomer:
		return say(WillLockOut, "it has been away for %s, and one session of it is known", span(away))
	case past > 0 && away > tooLong*past:
		return say(WillLockOut, "it has been away for %s, far longer than ever before (%s)", span(away), span(past))
	case max(past, away) >= chance:
		return say(AtRisk, "it is away for up to %s; it must be there once between %s and %s", span(max(past, away)), day(opens), day(c.NotAfter))
	}
	return p
}

// longestAbsence returns the longest time between the beginnings of two sessions that followed one another: an upper bound
// of how long it was away.
func (h Habit) longestAbsence() time.Duration {
	var longest time.Duration
	for i := 1; i < len(h.Sessions); i++ {
		longest = max(longest, h.Sessions[i].Sub(h.Sessions[i-1]))
	}
	return longest
}

// Survives reports whether a device with that habit would renew certificates of a lifetime in time, if it went away for as
// long as it ever did at the worst moment: just before its window opens, with a third of the life left.
func (h Habit) Survives(at time.Time, lifetime time.Duration) bool {
	absence := h.longestAbsence()
	if !h.Online && !h.LastSeen.IsZero() {
		absence = max(absence, at.Sub(h.LastSeen))
	}
	return absence < lifetime/3
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04") }

// span shows a time in its largest unit that says something.
func span(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", int(d/(24*time.Hour)))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%d hours", int(d/time.Hour))
	case d >= 2*time.Minute:
		return fmt.Sprintf("%d minutes", int(d/time.Minute))
	}
	return fmt.Sprintf("%d seconds", int(d/time.Second))
}
