package brokerauth

import (
	"sync"
	"time"

	"muster/internal/fleet"
)

// Rate is a budget that refills: Burst at once, then one each Every.
type Rate struct {
	Burst int
	Every time.Duration
}

// PerMinute returns the Rate of n a minute, all of them at once if they come so.
func PerMinute(n int) Rate { return Rate{Burst: n, Every: time.Minute / time.Duration(max(n, 1))} }

// PerSecond returns the Rate of n a second with a burst of five seconds' worth.
func PerSecond(n int) Rate { return Rate{Burst: 5 * n, Every: time.Second / time.Duration(max(n, 1))} }

// Limits are the budgets of a Limiter. A zero Rate means the default.
type Limits struct {
	DeviceLogins   Rate // right passwords of one device; default 10 a minute
	Logins         Rate // right passwords of all devices; default 200 a second
	DeviceFailures Rate // wrong passwords for one device; default 10 a minute
	Failures       Rate // wrong passwords for all devices; default 20 a second
	MaxDevices     int  // devices whose budgets are remembered, at least; default 32768, about 5 MB
}

func (l Limits) withDefaults() Limits {
	set := func(r *Rate, d Rate) {
		if r.Burst <= 0 || r.Every <= 0 {
			*r = d
		}
	}
	set(&l.DeviceLogins, PerMinute(10))
	set(&l.Logins, PerSecond(200))
	set(&l.DeviceFailures, PerMinute(10))
	set(&l.Failures, PerSecond(20))
	if l.MaxDevices <= 0 {
		l.MaxDevices = 32 << 10
	}
	return l
}

// Limiter bounds how often the fallback is used. Its memory is bounded.
//
// The password is compared before the limit is looked at, and right and wrong ones have budgets of their own. So nobody
// locks a device out by guessing for it: wrong passwords never touch the budget of the right one. Comparing is safe,
// because a password has 256 random bits and a comparison costs less than a microsecond. What the limits bound is what an
// attempt sets in motion behind it: log and audit lines of guessing (a wrong one over the budget is counted, and not
// reported one by one), and sessions, certificates and take-overs of someone who does have the password, above all of a
// device in a loop. Who holds the password can use up that device's budget and no other's, and the broker's take-over
// of sessions would let him disturb that device anyway; the remedy is a new password or closing the fallback to it.
type Limiter struct {
	limits Limits
	start  time.Time // all times are counted from here

	mu               sync.Mutex
	logins, failures tat
	deviceLogins     generations
	deviceFailures   generations
}

// NewLimiter returns a Limiter with full budgets.
func NewLimiter(l Limits) *Limiter {
	return &Limiter{limits: l.withDefaults(), start: time.Now()}
}

// Login takes one right password of a device from the budgets and reports whether they had one left.
func (l *Limiter) Login(id fleet.DeviceID, at time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.take(&l.deviceLogins, id, &l.logins, l.limits.DeviceLogins, l.limits.Logins, at)
}

// Failure takes one wrong password for a registered device from the budgets and reports whether they had one left.
func (l *Limiter) Failure(id fleet.DeviceID, at time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.take(&l.deviceFailures, id, &l.failures, l.limits.DeviceFailures, l.limits.Failures, at)
}

// take spends from both budgets or from none, so that one device over its own does not use up everyone's.
func (l *Limiter) take(g *generations, id fleet.DeviceID, all *tat, perDevice, total Rate, at time.Time) bool {
	now := tat(at.Sub(l.start))
	one := g.get(id)
	nextOne, ok1 := one.spend(now, perDevice)
	nextAll, ok2 := all.spend(now, total)
	if !ok1 || !ok2 {
		return false
	}
	*all = nextAll
	g.put(id, nextOne, now, perDevice, l.limits.MaxDevices)
	return true
}

// tat is a budget as the time when it is full again (the theoretical arrival time of the generic cell rate algorithm):
// one number, and the zero value is a full budget.
type tat time.Duration

func (t tat) spend(now tat, r Rate) (tat, bool) {
	next := max(t, now) + tat(r.Every)
	if next-now > tat(r.Every)*tat(r.Burst) {
		return t, false
	}
	return next, true
}

// generations remembers budgets that are not full. When the young generation is full, or as old as the time in which any
// budget refills, it becomes the old one and the old one is forgotten: what is lost that way was full again, unless more
// than MaxDevices devices come within that time.
type generations struct {
	young, old map[fleet.DeviceID]tat
	since      tat
}

func (g *generations) get(id fleet.DeviceID) tat {
	if t, ok := g.young[id]; ok {
		return t
	}
	return g.old[id]
}

func (g *generations) put(id fleet.DeviceID, t, now tat, r Rate, limit int) {
	_, known := g.young[id]
	if g.young == nil || now-g.since > tat(r.Every)*tat(r.Burst) || !known && len(g.young) >= limit {
		g.old, g.young, g.since = g.young, map[fleet.DeviceID]tat{}, now
	}
	g.young[id] = t
}
