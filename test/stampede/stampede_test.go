package main

import (
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/simdev"
)

// The small variant of make stampede: everything is as much shorter as the outage is.
func TestOutageOfTheAuthBackend(t *testing.T) {
	timing := simdev.DefaultTiming()
	timing.KeepAlive, timing.TelemetryEvery, timing.Spread = 10*time.Second, 4*time.Second, time.Second // the broker forgets what it asked after 3 s
	timing.BackoffBase, timing.BackoffCap = 1500*time.Millisecond, 5*time.Second
	timing.Fallback = simdev.Policy{Refusals: timing.Fallback.Refusals, After: 2 * time.Minute, NewTries: timing.Fallback.NewTries}
	r, err := Run(t.Context(), Options{Dir: t.TempDir() + "/world", Devices: 50, Outage: 7 * time.Second, Timing: timing, Say: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	r.Print(&b, timing.BackoffCap)
	t.Logf("\n%s", &b)
	if err := r.Check(timing.BackoffCap); err != nil {
		t.Error(err)
	}
	if r.Refused == 0 || len(r.Back) < r.Thrown {
		t.Errorf("%d refusals, %d of %d back", r.Refused, len(r.Back), r.Thrown)
	}
}

func TestReportTellsWhatMustNotHappen(t *testing.T) {
	evenly := func(n int) (out []time.Duration) {
		for i := range n {
			out = append(out, time.Duration(i)*time.Second)
		}
		return out
	}
	good := Report{Devices: 100, Thrown: 100, Back: evenly(100)}
	if err := good.Check(100 * time.Second); err != nil || good.Crowd(100*time.Second) > 0.12 {
		t.Errorf("%v, crowd %.2f", err, good.Crowd(100*time.Second))
	}
	for want, r := range map[string]Report{
		"fallback":  {Devices: 100, Thrown: 100, Back: evenly(100), Fallbacks: 1},
		"lost":      {Devices: 100, Thrown: 100, Back: evenly(99), Lost: []fleet.DeviceID{"cow-1"}},
		"back-off":  {Devices: 100, Thrown: 100, Back: make([]time.Duration, 100)},
		"too short": {Devices: 100, Thrown: 3, Back: evenly(3)},
	} {
		if err := r.Check(100 * time.Second); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
