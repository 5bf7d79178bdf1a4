package rollout

import (
	"testing"
	"time"
)

// A pace that grows with each success lets nobody in before the new pace allows it.
func TestGrowthBringsNoEarlyGrant(t *testing.T) {
	p := percent(100).with(func(p *Plan) { p.Pace = Pace{Base: 1, Factor: 2, Every: 1, PerMinute: 4} })
	w := begun(t, 20, p)
	var grants []time.Duration
	for w.at.Sub(epoch) < 5*time.Minute && len(w.order(Pending)) > 0 {
		d := w.order(Pending)[0]
		if w.ask(d) == "" {
			grants = append(grants, w.at.Sub(epoch))
			w.succeed(d)
			continue
		}
		w.pass(time.Second)
	}
	want := []time.Duration{0, 31 * time.Second, 47 * time.Second, 62 * time.Second}
	for i, at := range want {
		if got := grants[i]; got < at-2*time.Second || got > at+3*time.Second {
			t.Errorf("grant %d at %v, want %v; all: %v", i, got, at, grants[:6])
		}
	}
	for i := range grants {
		n := 0
		for _, at := range grants[i:] {
			if at-grants[i] < time.Minute {
				n++
			}
		}
		if n > 5 {
			t.Errorf("%d grants in the minute from %v on", n, grants[i])
		}
	}
}
