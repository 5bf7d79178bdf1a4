package recovery

import (
	"container/list"
	"errors"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"muster/internal/fleet"
)

// maxTracked is how many devices the limiter remembers; the one not heard of for longest is forgotten first.
const maxTracked = 10_000

var (
	errDevice = errors.New("over the device's limit")
	errFleet  = errors.New("over the fleet's limit")
)

// limiter bounds what devices ask on the fallback: each by itself, and all together. Its memory is bounded.
type limiter struct {
	perHour int

	mu      sync.Mutex
	fleet   *rate.Limiter                    // guarded by mu
	devices map[fleet.DeviceID]*list.Element // guarded by mu; of *tracked
	order   list.List                        // guarded by mu; the latest in front
}

type tracked struct {
	id      fleet.DeviceID
	limiter *rate.Limiter
	last    time.Time // of the newest message that was judged
	verdict error
}

func newLimiter(perSecond rate.Limit, perHour int) *limiter {
	burst := max(1, int(perSecond*5))
	return &limiter{perHour: perHour, fleet: rate.NewLimiter(perSecond, burst), devices: map[fleet.DeviceID]*list.Element{}}
}

// allow returns nil if a message of id that came at time at is within the limits, else errDevice or errFleet. Asked again
// about the same message it says the same: a transaction may run more than once.
func (l *limiter) allow(id fleet.DeviceID, at time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.track(id)
	if t.last.Equal(at) {
		return t.verdict
	}
	t.last = at
	switch {
	case !t.limiter.AllowN(at, 1):
		t.verdict = errDevice
	case !l.fleet.AllowN(at, 1):
		t.verdict = errFleet
	default:
		t.verdict = nil
	}
	return t.verdict
}

// track returns what is known of id. l.mu must be held.
func (l *limiter) track(id fleet.DeviceID) *tracked {
	if e := l.devices[id]; e != nil {
		l.order.MoveToFront(e)
		return e.Value.(*tracked)
	}
	if l.order.Len() >= maxTracked {
		oldest := l.order.Back()
		delete(l.devices, l.order.Remove(oldest).(*tracked).id)
	}
	t := &tracked{id: id, limiter: rate.NewLimiter(rate.Every(time.Hour/time.Duration(l.perHour)), l.perHour)}
	l.devices[id] = l.order.PushFront(t)
	return t
}
