package access

import (
	"sync"
	"time"
)

// Bounds of failed attempts. A token cannot be guessed, so these only keep a flood from filling the log.
const (
	failBurst = 20              // failures in a row from one address
	failEvery = 3 * time.Second // one more each
	failPeers = 4096            // addresses that are remembered
)

// limiter counts failures of each address in a bucket that leaks: burst at once, one more per every.
type limiter struct {
	burst int
	every time.Duration
	max   int

	mu    sync.Mutex
	until map[string]time.Time // when the address's failures will all have leaked away
}

func newLimiter(burst int, every time.Duration, max int) *limiter {
	return &limiter{burst: burst, every: every, max: max, until: map[string]time.Time{}}
}

// allow notes a failure of from, and reports whether it is still within its bounds.
func (l *limiter) allow(at time.Time, from string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	end, known := l.until[from]
	if !known && len(l.until) >= l.max {
		l.forget(at)
	}
	if end.Before(at) {
		end = at
	}
	if end.Add(l.every).Sub(at) > time.Duration(l.burst)*l.every {
		return false
	}
	l.until[from] = end.Add(l.every)
	return true
}

// forget drops the addresses whose failures have leaked away; if that makes no room, all of them: the bound on memory is
// worth more than a perfect count. The caller holds mu.
func (l *limiter) forget(at time.Time) {
	for k, end := range l.until {
		if !end.After(at) {
			delete(l.until, k)
		}
	}
	if len(l.until) >= l.max {
		clear(l.until)
	}
}
