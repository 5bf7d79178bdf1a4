package rollout

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

func codes(ds []Decision) (cs []Code) {
	for _, d := range ds {
		cs = append(cs, d.Code)
	}
	return cs
}

// The whole of a good rollout, as its history tells it: approved text.
func TestGoodRollout(t *testing.T) {
	p := Plan{Stages: []Stage{{Count: 1}, {Percent: 25}, {Percent: 100}}, Soak: time.Hour}
	w := begun(t, 10, p)
	for w.r.State == Running {
		w.succeed(w.offer(w.r.Room(w.at, nil))...)
		w.tick(w.r.Total.Pending)
		w.pass(time.Hour)
		w.tick(w.r.Total.Pending)
	}
	const want = `
00:00:00 started by ada
00:00:00 stage 1 of 3 is open: up to 1 of 10 devices
00:00:01 stage 1 is done: 1 succeeded; it soaks for 1h0m0s
01:00:01 stage 2 of 3 is open: up to 3 of 10 devices
01:00:02 stage 2 is done: 2 succeeded; it soaks for 1h0m0s
02:00:02 stage 3 of 3 is open: up to 10 of 10 devices
02:00:03 stage 3 is done: 7 succeeded; it soaks for 1h0m0s
03:00:03 every target is finished: 10 succeeded
`
	var b strings.Builder
	b.WriteByte('\n')
	for _, d := range w.history {
		text := d.Text
		fmt.Fprintf(&b, "%s %s\n", d.At.Format(time.TimeOnly), text)
	}
	if b.String() != want {
		t.Errorf("got %s", b.String())
	}
	if len(w.alerts) != 0 || w.r.EndedAt.IsZero() || w.r.Sweep != "" {
		t.Errorf("alerts %v, ended %v, sweep %q", w.alerts, w.r.EndedAt, w.r.Sweep)
	}
}

// The limit is on failures, of any kind, in the whole rollout; the one above it halts.
func TestFailureLimit(t *testing.T) {
	kinds := map[string]func(*world, fleet.DeviceID){
		"failed":      func(w *world, d fleet.DeviceID) { w.fail(d) },
		"rejected":    func(w *world, d fleet.DeviceID) { w.report(d, ReportRejected, 0) },
		"rolled-back": func(w *world, d fleet.DeviceID) { w.report(d, ReportRolledBack, 0) },
		"reverted": func(w *world, d fleet.DeviceID) {
			w.report(d, ReportInstalled, 100)
			w.pass(time.Second)
			w.must(Reverted{At: w.at, Device: d, Session: w.at})
		},
		"timed-out": func(w *world, d fleet.DeviceID) {
			w.at = w.jobs[d].Deadline
			w.tick(OnlineUnknown)
		},
	}
	for name, fail := range kinds {
		for _, limit := range []int{0, 1, 2, 5} {
			t.Run(fmt.Sprintf("%s, %d tolerated", name, limit), func(t *testing.T) {
				w := begun(t, 20, percent(100).with(tolerate(limit)))
				for n := 1; n <= limit; n++ {
					fail(w, w.offer(1)[0])
					w.want(Running, 1)
				}
				if len(w.alerts) != 0 {
					t.Fatalf("alerts %v", w.alerts)
				}
				d := w.offer(1)[0]
				fail(w, d)
				w.want(Halted, 1)
				if w.r.Code != FailureLimit || len(w.alerts) != 1 || !strings.Contains(w.alerts[0], string(d)) {
					t.Errorf("code %s, alerts %q", w.r.Code, w.alerts)
				}
				if why := w.ask(w.order(Pending)[0]); why != NotRunning {
					t.Errorf("halted, and answers %q", why)
				}
			})
		}
	}
}

// Failures of earlier stages count.
func TestFailureLimitSpansStages(t *testing.T) {
	w := begun(t, 10, percent(20, 50, 100).with(tolerate(1)))
	ids := w.offer(2)
	w.fail(ids[0])
	w.succeed(ids[1])
	w.want(Running, 2)
	w.fail(w.offer(1)[0])
	w.want(Halted, 2)
}

func TestHaltWaitsForDevicesInFlight(t *testing.T) {
	w := begun(t, 10, percent(100))
	ids := w.offer(3)
	w.fail(ids[0])
	w.want(Halting, 1)
	if why := w.ask(ids[1]); why != "" {
		t.Errorf("a device in flight is refused its own grant: %s", why)
	}
	if why := w.ask(w.order(Pending)[0]); why != NotRunning {
		t.Errorf("halting, and answers %q", why)
	}
	if w.r.Room(w.at, nil) != 0 {
		t.Errorf("room for %d", w.r.Room(w.at, nil))
	}
	if _, err := w.step(ResumedBy{At: w.at, Who: "bob"}); !fleet.Is(err, fleet.Conflict) || !strings.Contains(err.Error(), "2 devices in flight") {
		t.Errorf("resumed while halting: %v", err)
	}
	w.succeed(ids[1])
	w.want(Halting, 1)
	w.at = w.jobs[ids[2]].Deadline
	w.tick(5)
	w.want(Halted, 1)
	if w.r.Code != FailureLimit || w.r.Total.TimedOut != 1 || len(w.alerts) != 1 {
		t.Errorf("code %s, %+v, %d alerts", w.r.Code, w.r.Total, len(w.alerts))
	}
}

// By resuming, the operator takes the failures on himself: they are shown, and the limit counts afresh.
func TestResumeAfterHalt(t *testing.T) {
	w := begun(t, 20, percent(50, 100).with(tolerate(1)))
	ids := w.offer(5)
	w.fail(ids[:2]...)
	w.succeed(ids[2:]...)
	w.want(Halted, 1)
	if fx := w.must(ResumedBy{At: w.at, Who: "bob"}); !slices.Equal(has[WakeAt](fx), []WakeAt{{w.at}}) {
		t.Errorf("%+v", fx)
	}
	if w.r.Failures != 0 || w.r.Total.Failed != 2 || w.r.Quota() != 10 {
		t.Fatalf("failures %d, total %d, quota %d", w.r.Failures, w.r.Total.Failed, w.r.Quota())
	}
	w.fail(w.offer(1)...)
	w.want(Running, 1)
	// A late success of the first round is no credit for this one.
	w.succeed(ids[0])
	if w.r.Failures != 1 || w.r.Total.Failed != 2 {
		t.Fatalf("failures %d, total %d", w.r.Failures, w.r.Total.Failed)
	}
	w.fail(w.offer(1)...)
	w.want(Halted, 1)
}

// An empty canary never passes.
func TestStageNeedsASuccess(t *testing.T) {
	p := Plan{Stages: []Stage{{Count: 2}, {Count: 4}, {Percent: 100}}, MaxFailures: 50}
	w := begun(t, 10, p)
	w.tick(0) // nobody is online
	w.pass(1000 * time.Hour)
	w.tick(0)
	w.want(Running, 1)

	w.fail(w.offer(1)...)
	w.tick(0) // there is quota left for a device that comes online
	w.want(Running, 1)
	w.fail(w.offer(1)...)
	w.want(Halted, 1)
	if w.r.Code != NoSuccess || len(w.alerts) != 1 {
		t.Fatalf("code %s, %d alerts", w.r.Code, len(w.alerts))
	}

	// The operator lets the stage try as many others, again and again.
	for round := 1; round <= 2; round++ {
		w.must(ResumedBy{At: w.at, Who: "bob"})
		w.tick(0)
		w.want(Running, 1)
		if w.r.Room(w.at, nil) != 2 {
			t.Fatalf("round %d: room for %d", round, w.r.Room(w.at, nil))
		}
		w.fail(w.offer(2)...)
		w.want(Halted, 1)
	}
	w.must(ResumedBy{At: w.at, Who: "bob"})
	w.succeed(w.offer(2)...)
	// Stage 2 would open 4 devices, but 8 had their turn.
	w.want(Running, 3)
	if got := codes(w.history[len(w.history)-2:]); !slices.Equal(got, []Code{StagePassed, StageOpened}) {
		t.Errorf("history ends with %v", got)
	}
	if w.r.Room(w.at, nil) != 2 {
		t.Errorf("room for %d", w.r.Room(w.at, nil))
	}
}

// A resume gives no extra devices where none are needed.
func TestNoExtraWithoutNeed(t *testing.T) {
	w := begun(t, 10, percent(30, 100)) // halts by its limit with a success, and with quota left
	ids := w.offer(2)
	w.succeed(ids[0])
	w.fail(ids[1])
	w.want(Halted, 1)
	w.must(ResumedBy{At: w.at, Who: "bob"})
	if w.r.Stages[0].Extra != 0 || w.r.Room(w.at, nil) != 1 {
		t.Errorf("extra %d, room %d", w.r.Stages[0].Extra, w.r.Room(w.at, nil))
	}
	w.fail(w.offer(1)...)
	w.want(Halted, 1)
	w.must(ResumedBy{At: w.at, Who: "bob"}) // the quota is used, one has succeeded
	if w.r.Stages[0].Extra != 0 {
		t.Errorf("extra %d", w.r.Stages[0].Extra)
	}
	w.tick(7)
	w.want(Running, 2)

	w = begun(t, 10, percent(20, 100)) // no success yet, and quota left
	w.fail(w.offer(1)...)
	w.must(ResumedBy{At: w.at, Who: "bob"})
	if w.r.Stages[0].Extra != 0 || w.r.Room(w.at, nil) != 1 {
		t.Errorf("extra %d, room %d", w.r.Stages[0].Extra, w.r.Room(w.at, nil))
	}
}

// A halt that an operator must judge says what happened, in numbers: approved text.
func TestBadRollout(t *testing.T) {
	p := Plan{Stages: []Stage{{Count: 3}, {Percent: 100}}, MaxFailures: 3}
	w := begun(t, 10, p)
	ids := w.offer(3)
	w.report(ids[0], ReportRejected, 0)
	w.report(ids[1], ReportRolledBack, 0)
	w.at = w.jobs[ids[2]].Deadline
	w.tick(7)
	w.must(ResumedBy{At: w.at, Who: "bob"})
	w.must(Excluded{At: w.at, Device: w.order(Pending)[0], Why: "removed"})
	w.fail(w.offer(2)...)
	w.fail(w.offer(1)...)
	w.must(ResumedBy{At: w.at, Who: "bob"})
	w.must(AbortedBy{At: w.at, Who: "bob"})
	const want = `
running -> running stage-opened: stage 1 of 2 is open: up to 3 of 10 devices
running -> halting no-success: no device of stage 1 succeeded: 0 succeeded, 1 rejected, 1 rolled back, 1 timed out
halting -> halted drained: no device of stage 1 succeeded: 0 succeeded, 1 rejected, 1 rolled back, 1 timed out
halted -> running resumed: resumed by bob after 3 failures; stage 1 may try 3 devices
running -> halting no-success: no device of stage 1 succeeded: 0 succeeded, 3 failed, 1 rejected, 1 rolled back, 1 timed out
halting -> halted drained: no device of stage 1 succeeded: 0 succeeded, 3 failed, 1 rejected, 1 rolled back, 1 timed out
halted -> running resumed: resumed by bob after 3 failures; stage 1 may try 3 devices
running -> aborted aborted: aborted by bob
`
	var b strings.Builder
	b.WriteByte('\n')
	for _, d := range w.history[1:] {
		fmt.Fprintf(&b, "%s -> %s %s: %s\n", d.From, d.To, d.Code, d.Text)
	}
	if b.String() != want {
		t.Errorf("got %s", b.String())
	}
	if got := w.alerts[0]; got != "rollout r1 halts in stage 1 of 2: no device of stage 1 succeeded: 0 succeeded, 1 rejected, 1 rolled back, 1 timed out" {
		t.Errorf("alert %q", got)
	}
}

// The last stage needs no success: nothing comes after it.
func TestLastStageMayFailWithinTheLimit(t *testing.T) {
	w := begun(t, 2, percent(100).with(tolerate(2)))
	w.fail(w.offer(2)...)
	w.want(Completed, 1)
}

// Offline devices neither hold a stage up nor pass it.
func TestOfflineDevicesDoNotHoldAStage(t *testing.T) {
	w := begun(t, 10, percent(50, 100).with(soak(time.Hour)))
	w.succeed(w.offer(2)...) // of 5
	w.want(Running, 1)
	w.tick(OnlineUnknown) // nobody knows who is online: no judgement
	if !w.r.Stages[0].DoneAt.IsZero() {
		t.Fatal("a stage was judged without knowing who is online")
	}
	w.tick(1)
	if !w.r.Stages[0].DoneAt.IsZero() {
		t.Fatal("a stage is done with candidates online")
	}
	fx := w.tick(0)
	if w.r.Stages[0].DoneAt.IsZero() || !has[WakeAt](fx)[0].At.Equal(w.at.Add(time.Hour)) {
		t.Fatalf("not soaking: %+v", fx)
	}

	// While it soaks, those that come back wait.
	w.pass(time.Hour - time.Nanosecond)
	back := w.order(Pending)[0]
	if why := w.ask(back); why != Soaking || w.r.Room(w.at, nil) != 0 {
		t.Errorf("soaking, and answers %q, room %d", why, w.r.Room(w.at, nil))
	}
	w.tick(3)
	w.want(Running, 1)
	w.pass(time.Nanosecond)
	w.tick(3)
	w.want(Running, 2)
	// Then they have their turn under the gate that is open: the unused quota is not lost.
	if w.r.Room(w.at, nil) != 8 || w.ask(back) != "" || w.jobs[back].Stage != 2 {
		t.Errorf("room %d, %+v", w.r.Room(w.at, nil), w.jobs[back])
	}
}

func TestOfflineGrace(t *testing.T) {
	const grace = 48 * time.Hour
	p := percent(100).with(func(p *Plan) { p.OfflineGrace = grace })
	w := begun(t, 5, p)
	w.succeed(w.offer(2)...)
	w.tick(0)
	w.pass(grace - time.Nanosecond)
	w.tick(0)
	w.want(Running, 1)

	// A device comes back in time: it is granted, and the wait begins anew.
	back := w.offer(1)[0]
	w.pass(time.Minute)
	w.tick(0)
	w.want(Running, 1)
	w.succeed(back)
	w.tick(0)
	w.pass(grace - time.Nanosecond)
	w.tick(0)
	w.want(Running, 1)
	// So does one that is online and was not offered yet.
	w.tick(1)
	w.pass(time.Nanosecond)
	w.tick(0)
	w.pass(grace - time.Nanosecond)
	w.tick(0)
	w.want(Running, 1)
	w.tick(OnlineUnknown) // not knowing does not end the wait
	w.pass(time.Nanosecond)
	w.tick(OnlineUnknown) // nor does it complete anything
	w.want(Running, 1)
	w.tick(0)
	w.want(Completed, 1)
	if w.r.Code != OfflineSkipped || w.r.Sweep != Skipped || w.r.Total.Pending != 2 {
		t.Fatalf("code %s, sweep %q, %+v", w.r.Code, w.r.Sweep, w.r.Total)
	}
	if why := w.ask(w.order(Pending)[0]); why != NotRunning {
		t.Errorf("completed, and answers %q", why)
	}
	w.sweep()
	if w.r.Total.Skipped != 2 || w.r.Total.Succeeded != 3 {
		t.Errorf("%+v", w.r.Total)
	}
	for _, d := range w.order(Skipped) {
		if w.jobs[d].Cause.Kind != WasOffline || w.jobs[d].Cause.Text == "" {
			t.Errorf("%s: %+v", d, w.jobs[d].Cause)
		}
	}
}

// The soak is kept even when it is longer than the grace.
func TestGraceIsNotShorterThanSoak(t *testing.T) {
	p := percent(100).with(soak(10 * time.Hour)).with(func(p *Plan) { p.OfflineGrace = time.Hour })
	w := begun(t, 2, p)
	w.succeed(w.offer(1)...)
	w.tick(0)
	w.pass(10*time.Hour - 1)
	w.tick(0)
	w.want(Running, 1)
	w.pass(1)
	w.tick(0)
	w.want(Completed, 1)
}

func TestSoak(t *testing.T) {
	w := begun(t, 4, percent(25, 100).with(soak(time.Hour)))
	only := w.offer(1)[0]
	w.succeed(only)
	done := w.at
	w.pass(time.Hour - 1)
	w.tick(3)
	w.want(Running, 1)
	w.pass(1)
	fx := w.tick(3)
	w.want(Running, 2)
	if !slices.Equal(has[WakeAt](fx), []WakeAt{{w.at}}) { // there is room now
		t.Errorf("%+v", fx)
	}
	if st := w.r.Stages[0]; !st.DoneAt.Equal(done) || !st.ClosedAt.Equal(w.at) || !w.r.Stages[1].OpenedAt.Equal(w.at) {
		t.Errorf("%+v", w.r.Stages)
	}
	w.succeed(w.offer(3)...)
	w.pass(time.Hour - 1)
	w.tick(0)
	w.want(Running, 2) // the last stage soaks too
	w.pass(1)
	w.tick(0)
	w.want(Completed, 2)
	if !w.r.Stages[1].ClosedAt.Equal(w.at) || !w.r.EndedAt.Equal(w.at) {
		t.Errorf("%+v", w.r)
	}
}

// A success that is taken back during the soak is a failure; here it was the only success.
func TestRevertDuringSoak(t *testing.T) {
	for _, c := range []struct {
		quota int
		state State
		code  Code
	}{{1, Halted, NoSuccess}, {2, Running, OperatorStarted}} {
		p := Plan{Stages: []Stage{{Count: c.quota}, {Percent: 100}}, MaxFailures: 5, Soak: time.Hour}
		w := begun(t, 9, p)
		d := w.offer(1)[0]
		w.succeed(d)
		w.tick(0)
		w.pass(time.Minute)
		fx := w.must(Reverted{At: w.at, Device: d, Session: w.at})
		w.wantJob(d, RolledBack)
		w.want(c.state, 1)
		if c.state == Running && (w.history[len(w.history)-1].Code != StageReopened || !slices.Equal(has[WakeAt](fx), []WakeAt{{w.at}})) {
			t.Errorf("%+v", fx)
		}
		if w.r.Code != c.code || w.r.Failures != 1 || !w.r.Stages[0].DoneAt.IsZero() && c.state == Running {
			t.Errorf("quota %d: code %s, failures %d, %+v", c.quota, w.r.Code, w.r.Failures, w.r.Stages[0])
		}
		w.pass(time.Hour)
		w.tick(0)
		w.want(c.state, 1)
		if c.state == Running && w.r.Room(w.at, nil) != 1 {
			t.Errorf("room for %d", w.r.Room(w.at, nil))
		}
	}
}

// After a halt the soak starts again; after a pause it goes on.
func TestSoakAfterResume(t *testing.T) {
	w := begun(t, 8, percent(50, 100).with(soak(time.Hour)))
	ids := w.offer(4)
	w.succeed(ids...)
	w.pass(30 * time.Minute)
	w.must(PausedBy{At: w.at, Who: "bob"})
	w.pass(29 * time.Minute)
	w.must(ResumedBy{At: w.at, Who: "bob"})
	w.want(Running, 1)
	w.must(Reverted{At: w.at, Device: ids[0], Session: w.at})
	w.want(Halted, 1)
	w.must(ResumedBy{At: w.at, Who: "bob"})
	w.pass(59 * time.Minute)
	w.tick(4)
	w.want(Running, 1)
	w.pass(time.Minute)
	w.tick(4)
	w.want(Running, 2)

	w = begun(t, 8, percent(50, 100).with(soak(time.Hour)))
	w.succeed(w.offer(4)...)
	w.pass(30 * time.Minute)
	w.must(PausedBy{At: w.at, Who: "bob"})
	w.pass(time.Hour)
	w.tick(4)
	w.want(Paused, 1) // no stage opens while it is paused
	w.must(ResumedBy{At: w.at, Who: "bob"})
	w.want(Running, 2)
}

func TestPause(t *testing.T) {
	w := begun(t, 6, percent(100).with(tolerate(1)))
	ids := w.offer(4)
	w.must(PausedBy{At: w.at, Who: "bob"})
	if fx := w.must(ResumedBy{At: w.at, Who: "bob"}); !slices.Equal(has[WakeAt](fx), []WakeAt{{w.at}}) {
		t.Errorf("%+v", fx)
	}
	w.must(PausedBy{At: w.at, Who: "bob"})
	if why := w.ask(w.order(Pending)[0]); why != NotRunning || w.r.Room(w.at, nil) != 0 {
		t.Errorf("paused, and answers %q, room %d", why, w.r.Room(w.at, nil))
	}
	if why := w.ask(ids[0]); why != "" {
		t.Errorf("a device in flight is refused its own grant: %s", why)
	}
	w.report(ids[0], ReportDownloading, 10)
	w.succeed(ids[0])
	w.fail(ids[1])
	w.want(Paused, 1)
	w.at = w.jobs[ids[2]].Deadline // deadlines run, and the limit is watched
	w.tick(2)
	w.want(Halted, 1)
	if w.r.Failures != 3 {
		t.Errorf("%d failures", w.r.Failures)
	}
}

func TestAbort(t *testing.T) {
	w := begun(t, 30, percent(100).with(tolerate(9)))
	ids := w.offer(5)
	w.succeed(ids[0])
	w.fail(ids[1])
	fx := w.must(AbortedBy{At: w.at, Who: "bob"})
	w.want(Aborted, 1)
	withdrawn := has[Withdraw](fx)
	if len(withdrawn) != 3 || !slices.IsSortedFunc(withdrawn, func(a, b Withdraw) int { return strings.Compare(string(a.Device), string(b.Device)) }) {
		t.Fatalf("withdrawn: %v", withdrawn)
	}
	if w.r.Sweep != Cancelled || w.r.Total.Pending != 25 {
		t.Fatalf("sweep %q, %+v", w.r.Sweep, w.r.Total)
	}
	w.sweep()
	if want := (Counts{Succeeded: 1, Failed: 1, Cancelled: 28}); w.r.Total != want {
		t.Errorf("%+v", w.r.Total)
	}
	if c := w.jobs[ids[2]].Cause; c.Kind != ByAbort || c.Text != "aborted by bob" {
		t.Errorf("%+v", c)
	}
	// A device that finishes anyway is recorded; one that was never granted is not.
	w.succeed(ids[2])
	w.wantJob(ids[2], Succeeded)
	if !w.jobs[ids[2]].Late {
		t.Error("not late")
	}
	for d, j := range w.jobs {
		if j.Stage == 0 {
			w.succeed(d)
			w.wantJob(d, Cancelled)
		}
	}
}

// An abort with rows that the caller did not pass: their devices hold no grant any more, whatever their row says.
func TestAbortLeavesNoGrant(t *testing.T) {
	w := begun(t, 3, percent(100))
	d := w.offer(1)[0]
	r, _, _, err := Step(w.r, nil, AbortedBy{At: w.at, Who: "bob"})
	if err != nil || r.Sweep != Cancelled {
		t.Fatalf("%v, sweep %q", err, r.Sweep)
	}
	w.r = r
	if why := w.ask(d); why != NotRunning {
		t.Errorf("aborted, and answers %q", why)
	}
	w.succeed(d)
	if w.jobs[d].State != Succeeded || !w.jobs[d].Late {
		t.Errorf("%+v", w.jobs[d])
	}
	w.sweep()
}

func TestAbortADraft(t *testing.T) {
	w := draft(t, 3, percent(100))
	w.must(AbortedBy{At: w.at, Who: "bob"})
	w.sweep()
	w.want(Aborted, 0)
	if w.r.Total.Cancelled != 3 {
		t.Errorf("%+v", w.r.Total)
	}
	empty, err := New(Spec{ID: "r2", Release: release, Plan: Plan{}, By: "ada"}, epoch)
	if err != nil {
		t.Fatal(err)
	}
	if empty, _, _, err = Step(empty, nil, AbortedBy{At: epoch}); err != nil || empty.Sweep != "" || Check(empty) != nil {
		t.Errorf("%v, sweep %q, %v", err, empty.Sweep, Check(empty))
	}
}

// When the whole target has had its turn or was taken out, the stages left are not opened.
func TestNothingLeftToOpen(t *testing.T) {
	w := begun(t, 4, percent(50, 75, 100).with(soak(time.Hour)))
	for _, d := range w.order(Pending)[2:] {
		w.must(Excluded{At: w.at, Device: d, Why: "removed"})
	}
	w.succeed(w.offer(2)...)
	w.want(Running, 1)
	w.pass(time.Hour)
	w.tick(0)
	w.want(Completed, 1)
	if w.r.Total.Skipped != 2 {
		t.Errorf("%+v", w.r.Total)
	}
}

// A stage that rounds to the devices of the one before adds none, and is passed over.
func TestStagePassedOver(t *testing.T) {
	w := begun(t, 3, percent(1, 2, 30, 100))
	w.succeed(w.offer(1)...)
	w.want(Running, 4)
	if w.r.Room(w.at, nil) != 2 {
		t.Errorf("room for %d", w.r.Room(w.at, nil))
	}
}

func TestCaps(t *testing.T) {
	p := Plan{Stages: []Stage{{Count: 4}, {Percent: 100}}, MaxInFlight: 3, MaxFailures: 9}
	w := begun(t, 10, p)
	if w.r.Room(w.at, nil) != 3 {
		t.Fatalf("room for %d", w.r.Room(w.at, nil))
	}
	ids := w.offer(3)
	if why := w.ask(w.order(Pending)[0]); why != CapFull || w.r.Room(w.at, nil) != 0 {
		t.Errorf("3 in flight, and answers %q, room %d", why, w.r.Room(w.at, nil))
	}
	w.succeed(ids[0])
	if w.r.Room(w.at, nil) != 1 {
		t.Errorf("room for %d", w.r.Room(w.at, nil))
	}
	w.offer(1)
	w.fail(ids[1])
	if why := w.ask(w.order(Pending)[0]); why != StageFull || w.r.Room(w.at, nil) != 0 {
		t.Errorf("quota used, and answers %q, room %d", why, w.r.Room(w.at, nil))
	}
}

// Room is never more than there are devices.
func TestRoomIsBoundedByTargets(t *testing.T) {
	w := begun(t, 3, percent(100))
	if w.r.Room(w.at, nil) != 3 {
		t.Errorf("room for %d", w.r.Room(w.at, nil))
	}
	w.must(Excluded{At: w.at, Device: w.order(Pending)[0]})
	if w.r.Room(w.at, nil) != 2 {
		t.Errorf("room for %d", w.r.Room(w.at, nil))
	}
}
