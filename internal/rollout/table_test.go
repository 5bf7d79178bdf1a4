package rollout

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

// The tables are approved by eye; a change to them must show in the diff.
func TestRolloutTransitions(t *testing.T) {
	const want = `
draft -> scheduled running aborted
scheduled -> running aborted
running -> paused halting rolling-back completed aborted
paused -> running halting rolling-back aborted
halting -> halted rolling-back aborted
halted -> running rolling-back aborted
rolling-back -> aborted rolled-back
completed -> rolling-back
aborted -> rolling-back
rolled-back .
`
	if got := table(States(), State.Next); got != want {
		t.Errorf("got %s", got)
	}
	for _, s := range States() {
		if only := slices.Equal(s.Next(), []State{RollingBack}) || len(s.Next()) == 0; s.Final() != only {
			t.Errorf("%s: final is %v", s, s.Final())
		}
	}
}

func TestJobTransitions(t *testing.T) {
	const want = `
pending -> offered cancelled skipped
waiting -> offered succeeded failed rejected rolled-back timed-out went-dark cancelled
offered -> waiting accepted downloading downloaded installed rebooting verifying succeeded failed rejected rolled-back timed-out cancelled
accepted -> waiting downloading downloaded installed rebooting verifying succeeded failed rejected rolled-back timed-out cancelled
downloading -> waiting downloaded installed rebooting verifying succeeded failed rejected rolled-back timed-out cancelled
downloaded -> waiting installed rebooting verifying succeeded failed rejected rolled-back timed-out cancelled
installed -> waiting rebooting verifying succeeded failed rejected rolled-back timed-out went-dark cancelled
rebooting -> waiting verifying succeeded failed rejected rolled-back timed-out went-dark cancelled
verifying -> succeeded failed rolled-back went-dark cancelled
succeeded -> rolled-back
failed -> waiting succeeded
rejected -> waiting succeeded
rolled-back -> waiting
timed-out -> waiting succeeded
went-dark -> waiting succeeded
cancelled -> succeeded
skipped .
`
	if got := table(JobStates(), JobState.Next); got != want {
		t.Errorf("got %s", got)
	}
}

// A job changes state a bounded number of times: a path that returns to where it was goes through waiting, and each turn of
// it is an attempt, a floor or an operator's word.
func TestJobsCycleOnlyThroughWaiting(t *testing.T) {
	var walk func(s JobState, seen []JobState)
	walk = func(s JobState, seen []JobState) {
		if slices.Contains(seen, s) {
			t.Fatalf("cycle: %v %s", seen, s)
		}
		for _, n := range s.Next() {
			if n != Waiting {
				walk(n, append(slices.Clone(seen), s))
			}
		}
	}
	for _, s := range JobStates() {
		walk(s, nil)
	}
}

func TestStatesAreClosed(t *testing.T) {
	if len(next) != len(states) || len(jobNext) != len(jobStates) {
		t.Errorf("%d states, %d in the table; %d job states, %d in the table", len(states), len(next), len(jobStates), len(jobNext))
	}
	var c Counts
	sum, flying, failures := 0, 0, 0
	for i, s := range jobStates {
		*c.at(s) += i + 1 // a counter of its own for each
		sum += i + 1
		if s.InFlight() {
			flying += i + 1
		}
		if s.Failure() {
			failures += i + 1
		}
	}
	var v Verdicts
	for i, s := range jobStates {
		if c.Of(s) != i+1 {
			t.Errorf("%s shares its counter", s)
		}
		kinds := 0
		for _, is := range []bool{s.Open(), s.InFlight(), s.Finished()} {
			if is {
				kinds++
			}
		}
		if kinds != 1 || s.Failure() && !s.Finished() {
			t.Errorf("%s: open, in flight or finished, and one of them", s)
		}
		if (v.of(s) != nil) != (s == Succeeded || s.Failure()) {
			t.Errorf("%s: a verdict is a success or a failure", s)
		}
	}
	if c.Sum() != sum || c.InFlight() != flying || c.Failures() != failures {
		t.Errorf("sum %d, in flight %d, failures %d", c.Sum(), c.InFlight(), c.Failures())
	}
	if State("").Known() || JobState("").Known() || JobState("").Finished() || (Counts{}).Of("nonsense") != 0 {
		t.Error("the zero state is known")
	}
}

// What operators may ask for in each state, as approved text: ok, or the kind of the refusal.
func TestOperatorEvents(t *testing.T) {
	const want = `
             add       approve   start     pause     resume    advance   retry     abort     rollback
draft        ok        conflict  ok        conflict  conflict  conflict  conflict  ok        conflict
scheduled    conflict  conflict  conflict  conflict  conflict  conflict  conflict  ok        conflict
running      conflict  conflict  conflict  ok        conflict  conflict  ok        ok        ok
paused       conflict  conflict  conflict  conflict  ok        conflict  ok        ok        ok
halting      conflict  conflict  conflict  conflict  conflict  conflict  conflict  ok        ok
halted       conflict  conflict  conflict  conflict  ok        conflict  ok        ok        ok
rolling-back conflict  conflict  conflict  conflict  conflict  conflict  conflict  conflict  conflict
completed    conflict  conflict  conflict  conflict  conflict  conflict  conflict  conflict  ok
aborted      conflict  conflict  conflict  conflict  conflict  conflict  conflict  conflict  ok
rolled-back  conflict  conflict  conflict  conflict  conflict  conflict  conflict  conflict  conflict
`
	var b strings.Builder
	b.WriteString("\n             add       approve   start     pause     resume    advance   retry     abort     rollback\n")
	for _, s := range States() {
		fmt.Fprintf(&b, "%-12s", s)
		for i := range 9 {
			w := inState(t, s)
			ev := []Event{
				Added{At: w.at, Targets: targets("new")}, ApprovedBy{At: w.at, Who: "bob"}, Started{At: w.at, Who: "bob"},
				PausedBy{At: w.at, Who: "bob"}, ResumedBy{At: w.at, Who: "bob"}, AdvancedBy{At: w.at, Who: "bob"},
				RetriedBy{At: w.at, Who: "bob"}, AbortedBy{At: w.at, Who: "bob"}, RollbackBy{At: w.at, Who: "bob"},
			}[i]
			word := "ok"
			if _, err := w.step(ev); err != nil {
				word = string(fleet.KindOf(err))
				if !strings.Contains(err.Error(), "rollout r1 is "+string(s)) {
					t.Errorf("%T in %s: %v", ev, s, err)
				}
			}
			fmt.Fprintf(&b, " %-9s", word)
		}
		b.WriteByte('\n')
	}
	if got := trimLines(b.String()); got != want {
		t.Errorf("got %s", got)
	}
}

// inState returns a rollout of three devices that came to s by events alone.
func inState(t *testing.T, s State) *world {
	t.Helper()
	p := percent(100).with(tolerate(0))
	p.Rollback.Version = "1.0.0"
	if s == Scheduled {
		p.StartAt = epoch.Add(time.Hour)
	}
	w := draft(t, 3, p)
	if s == Draft {
		return w
	}
	w.must(Started{At: w.at, Who: "ada"})
	switch s {
	case Running:
		w.offer(1)
	case Paused:
		w.offer(1)
		w.must(PausedBy{At: w.at, Who: "ada"})
	case Halting:
		w.fail(w.offer(2)[0])
	case Halted:
		w.fail(w.offer(1)[0])
	case Completed:
		w.succeed(w.offer(3)...)
	case Aborted:
		w.offer(1)
		w.must(AbortedBy{At: w.at, Who: "ada"})
	case RollingBack:
		w.offer(1)
		w.must(RollbackBy{At: w.at, Who: "ada"})
	case RolledBackAll:
		w.succeed(w.offer(3)...)
		w.must(RollbackBy{At: w.at, Who: "ada"})
		w.must(RollbackEnded{At: w.at, Completed: true})
	}
	if w.r.State != s {
		t.Fatalf("%s, want %s", w.r.State, s)
	}
	return w
}

func table[S ~string](all []S, next func(S) []S) string {
	var b strings.Builder
	b.WriteByte('\n')
	for _, s := range all {
		if len(next(s)) == 0 {
			fmt.Fprintf(&b, "%s .\n", s)
			continue
		}
		fmt.Fprintf(&b, "%s ->", s)
		for _, n := range next(s) {
			fmt.Fprintf(&b, " %s", n)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func trimLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}
