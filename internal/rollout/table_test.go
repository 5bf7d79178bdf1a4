package rollout

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"muster/internal/fleet"
)

// The tables are approved by eye; a change to them must show in the diff.
func TestRolloutTransitions(t *testing.T) {
	const want = `
draft -> running aborted
running -> paused halting completed aborted
paused -> running halting aborted
halting -> halted aborted
halted -> running aborted
completed .
aborted .
`
	if got := table(States(), State.Next); got != want {
		t.Errorf("got %s", got)
	}
	for _, s := range States() {
		if s.Final() != (len(s.Next()) == 0) {
			t.Errorf("%s: final is %v", s, s.Final())
		}
	}
}

func TestJobTransitions(t *testing.T) {
	const want = `
pending -> granted cancelled skipped
granted -> accepted downloading installed succeeded failed rolled-back timed-out cancelled
accepted -> downloading installed succeeded failed rolled-back timed-out cancelled
downloading -> installed succeeded failed rolled-back timed-out cancelled
installed -> succeeded failed rolled-back timed-out cancelled
succeeded -> rolled-back
failed -> succeeded
rolled-back .
timed-out -> succeeded
cancelled -> succeeded
skipped .
`
	if got := table(JobStates(), JobState.Next); got != want {
		t.Errorf("got %s", got)
	}
}

// A job changes state a bounded number of times: no path returns to where it was.
func TestJobsHaveNoCycle(t *testing.T) {
	var walk func(s JobState, seen []JobState)
	walk = func(s JobState, seen []JobState) {
		if slices.Contains(seen, s) {
			t.Fatalf("cycle: %v %s", seen, s)
		}
		for _, n := range s.Next() {
			walk(n, append(slices.Clone(seen), s))
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
	for i, s := range jobStates {
		*c.at(s) += i + 1 // a counter of its own for each
	}
	for i, s := range jobStates {
		if c.Of(s) != i+1 {
			t.Errorf("%s shares its counter", s)
		}
		kinds := 0
		for _, is := range []bool{s == Pending, s.InFlight(), s.Finished()} {
			if is {
				kinds++
			}
		}
		if kinds != 1 || s.Failure() && !s.Finished() {
			t.Errorf("%s: pending, in flight or finished, and one of them", s)
		}
	}
	if c.Sum() != 66 || c.InFlight() != 2+3+4+5 || c.Failures() != 7+8+9 {
		t.Errorf("sum %d, in flight %d, failures %d", c.Sum(), c.InFlight(), c.Failures())
	}
	if State("").Known() || JobState("").Known() || JobState("").Finished() || (Counts{}).Of("nonsense") != 0 {
		t.Error("the zero state is known")
	}
}

// What operators may ask for in each state, as approved text: ok, or the kind of the refusal.
func TestOperatorEvents(t *testing.T) {
	const want = `
          add       start     pause     resume    abort
draft     ok        ok        conflict  conflict  ok
running   conflict  conflict  ok        conflict  ok
paused    conflict  conflict  conflict  ok        ok
halting   conflict  conflict  conflict  conflict  ok
halted    conflict  conflict  conflict  ok        ok
completed conflict  conflict  conflict  conflict  conflict
aborted   conflict  conflict  conflict  conflict  conflict
`
	var b strings.Builder
	b.WriteString("\n          add       start     pause     resume    abort\n")
	for _, s := range States() {
		fmt.Fprintf(&b, "%-9s", s)
		for i := range 5 {
			w := inState(t, s)
			ev := []Event{
				Added{At: w.at, Targets: targets("new")}, Started{At: w.at, Who: "bob"},
				PausedBy{At: w.at, Who: "bob"}, ResumedBy{At: w.at, Who: "bob"}, AbortedBy{At: w.at, Who: "bob"},
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
	w := draft(t, 3, percent(100).with(tolerate(0)))
	if s == Draft {
		return w
	}
	w.must(Started{At: w.at, Who: "ada"})
	switch s {
	case Paused:
		w.must(PausedBy{At: w.at, Who: "ada"})
	case Halting:
		w.fail(w.offer(2)[0])
	case Halted:
		w.fail(w.offer(1)[0])
	case Completed:
		w.succeed(w.offer(3)...)
	case Aborted:
		w.must(AbortedBy{At: w.at, Who: "ada"})
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
