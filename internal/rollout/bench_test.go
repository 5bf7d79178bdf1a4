package rollout

import (
	"fmt"
	"testing"
	"time"

	"muster/internal/fleet"
)

// huge returns a running rollout of n targets without making their rows: Step must not need them.
func huge(b *testing.B, n int) Rollout {
	b.Helper()
	r, err := New(Spec{ID: "r1", Release: release, Plan: Plan{Stages: []Stage{{Count: 1}, {Percent: 10}, {Percent: 100}}, MaxInFlight: 1000, MaxFailures: 100}, By: "ada"}, epoch)
	if err != nil {
		b.Fatal(err)
	}
	r.Targets, r.Total.Pending = n, n
	if r, _, _, err = Step(r, nil, Started{At: epoch, Who: "ada"}); err != nil {
		b.Fatal(err)
	}
	return r
}

// BenchmarkGrantToSuccess is the four steps of one device: asked, downloading, installed, confirmed. Its cost must not
// depend on the number of targets.
func BenchmarkGrantToSuccess(b *testing.B) {
	for _, n := range []int{100, 10_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			start := huge(b, n)
			j := Job{Rollout: "r1", Device: "d1", Rank: Rank("r1", "d1"), Rev: 1, State: Pending, StateAt: epoch}
			at := epoch.Add(time.Second)
			events := []Event{
				Asked{At: at, Device: "d1"},
				Reported{At: at, Device: "d1", Report: ReportDownloading, Percent: 50},
				Reported{At: at, Device: "d1", Report: ReportInstalled, Percent: 100},
				Confirmed{At: at.Add(time.Second), Device: "d1", Session: at.Add(time.Second)},
			}
			b.ReportAllocs()
			for b.Loop() {
				r, rows := start, []Job{j}
				for _, ev := range events {
					var err error
					if r, rows, _, err = Step(r, rows, ev); err != nil || len(rows) != 1 {
						b.Fatal(err, len(rows))
					}
				}
				if r.Total.Succeeded != 1 {
					b.Fatal(r.Total)
				}
			}
		})
	}
}

func BenchmarkRefused(b *testing.B) {
	r := huge(b, 1_000_000)
	r.Plan.MaxInFlight = 0
	rows := []Job{{Rollout: "r1", Device: "d1", State: Pending}}
	var ev Event = Asked{At: epoch, Device: "d1"}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, fx, err := Step(r, rows, ev); err != nil || len(fx) != 1 {
			b.Fatal(err, fx)
		}
	}
}

func BenchmarkRank(b *testing.B) {
	b.ReportAllocs()
	var sum uint64
	for b.Loop() {
		sum += Rank("spring-release", fleet.DeviceID("boiler-000123"))
	}
	if sum == 0 {
		b.Fatal("no rank")
	}
}
