package est

import (
	"sync"

	"golang.org/x/time/rate"
)

// maxKept is how many names a limiter remembers in each of its two generations.
const maxKept = 10_000

// limiter is a token bucket for each of many names, in bounded memory: when a generation is full it becomes the old one,
// and what was not asked for during a whole generation is forgotten.
type limiter struct {
	per   rate.Limit
	burst int

	mu       sync.Mutex
	now, old map[string]*rate.Limiter // guarded by mu
}

func newLimiter(per float64, burst int) *limiter {
	return &limiter{per: rate.Limit(per), burst: burst, now: map[string]*rate.Limiter{}}
}

// allow reports whether name is within its budget, and uses one of it up.
func (l *limiter) allow(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.now[name]
	if !ok {
		if b, ok = l.old[name]; !ok {
			b = rate.NewLimiter(l.per, l.burst)
		}
		if len(l.now) >= maxKept {
			l.old, l.now = l.now, map[string]*rate.Limiter{}
		}
		l.now[name] = b
	}
	return b.Allow()
}
