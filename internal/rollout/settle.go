package rollout

import (
	"fmt"
	"slices"
	"time"
)

// zero is the time of what has not happened.
var zero time.Time

// settle applies the rules that hold after any change and at any time.
func (s *step) settle() {
	s.judge()
	switch s.r.State {
	case Scheduled:
		if start := s.r.Plan.StartAt; s.at.Before(start) {
			s.wakeAt(start)
		} else {
			s.begin(StartTime, "", "the time to start has come")
		}
	case Halting:
		if s.r.Total.InFlight() == 0 {
			s.drained()
		}
	case Running:
		s.look()
		s.advance()
	}
}

// judging reports whether the stop rules hold now: not after they have stopped the rollout.
func (s *step) judging() bool {
	return s.r.State == Running || s.r.State == Paused && s.r.Code == OperatorPaused
}

// judge applies the stop rules. The hardest reaction of those that are passed is taken.
func (s *step) judge() {
	if !s.judging() {
		return
	}
	var worst Reaction
	var text string
	for _, l := range append([]Limit{{Count: s.r.Plan.MaxFailures, Then: s.r.Plan.FailThen}}, s.r.Plan.Limits...) {
		why, passed := l.passed(s.r.Verdicts)
		if !passed {
			continue
		}
		if text == "" || l.Then.harder(worst) {
			worst, text = l.Then, why
		}
	}
	if text == "" {
		return
	}
	if s.blame != "" {
		text += "; the last: " + s.blame
	}
	s.react(worst, FailureLimit, text)
}

// harder reports whether r is a harder reaction than o.
func (r Reaction) harder(o Reaction) bool {
	order := []Reaction{ThenPause, "", ThenAbort, ThenRollback}
	place := func(r Reaction) int {
		if r == ThenHalt {
			r = ""
		}
		return slices.Index(order, r)
	}
	return place(r) > place(o)
}

// react does what the plan says about what was found.
func (s *step) react(then Reaction, code Code, text string) {
	verb := "halts"
	switch then {
	case ThenPause:
		verb = "pauses"
		if s.r.State == Paused { // by an operator: from now on it is the engine's, and to resume is to take the failures on oneself
			s.r.Code, s.r.Reason, s.dirty = code, text, true
			s.note(code, "%s", text)
		} else {
			s.become(Paused, code, "", text)
		}
	case ThenAbort:
		verb = "is aborted"
		s.become(Aborted, code, "", text)
		s.end(Cancelled, Cause{ByAbort, text})
	case ThenRollback:
		verb = "is rolled back"
		s.undo(code, "", text)
	default:
		s.become(Halting, code, "", text)
	}
	s.fx = append(s.fx, Alert{fmt.Sprintf("rollout %s %s in stage %d of %d: %s", s.r.ID, verb, s.r.Stage, len(s.r.Stages), text)})
}

// look notes when the window opens and closes, and takes times back that a clock ahead of itself has set.
func (s *step) look() {
	// A pace that has grown, or a clock that was set back: nobody waits longer than the pace of now demands.
	if n, most := s.r.NextGrant, s.at.Add(max(s.r.Interval(), burst)); n.After(most) {
		s.r.NextGrant, s.dirty = most, true
		s.wakeAt(most)
	} else if n.After(s.at) && s.r.Total.Open() > 0 {
		s.wakeAt(n)
	}
	if st := s.r.Stages[s.r.Stage-1]; st.DoneAt.After(s.at.Add(time.Minute)) {
		s.stage().DoneAt = s.at
	}
	w := s.r.Plan.Window
	if !s.tick || !w.Set() || w.PerDevice() || s.r.Total.Open() == 0 {
		return
	}
	open, change := w.Open(s.at, s.zone)
	if !change.IsZero() {
		s.wakeAt(change)
	}
	if open == !s.r.Shut {
		return
	}
	s.r.Shut, s.dirty = !open, true
	if open {
		s.note(WindowOpened, "the window is open until %s", change.Format(time.RFC3339))
	} else {
		s.note(WindowShut, "the window is closed until %s", change.Format(time.RFC3339))
	}
}

// drained ends a halt. The header keeps the code and the reason of the halt, which is what an operator must judge.
func (s *step) drained() {
	code := s.r.Code
	s.become(Halted, Drained, "", s.r.Reason)
	s.r.Code = code
}

// gate returns how many devices of stage n must have succeeded, of those that were granted in it.
func (p Plan) gate(n int, c Counts) int { return max(share(p.Stages[n-1].MinSuccess, c.Sum()), 1) }

// advance judges the open stage of a running rollout. It opens at most one stage.
func (s *step) advance() {
	if s.r.Total.InFlight() > 0 {
		return
	}
	var (
		st      = s.r.Stages[s.r.Stage-1]
		full    = s.r.Started() >= s.r.Quota()
		rest    = s.r.Total.Open()
		last    = s.r.Last() || rest == 0 // nothing comes after it
		waiting = s.r.Total.Waiting > 0
	)
	if !last && st.Counts.Succeeded < s.r.Plan.gate(s.r.Stage, st.Counts) {
		s.unproven(st, full && !waiting)
		return
	}
	// Somebody can still be offered the release in this stage, as far as is known.
	next := s.r.Total.Pending > 0 && !full && s.online != 0 || waiting && s.again != 0
	if next && (last || st.DoneAt.IsZero()) {
		seen := !full && s.online > 0 || waiting && s.again > 0
		if last && seen && !st.DoneAt.IsZero() { // they are offered the release again, and are waited for
			s.stage().DoneAt = zero
		}
		return
	}
	if st.DoneAt.IsZero() {
		s.done(last, rest)
		st.DoneAt = s.at
	}
	wait := s.r.Plan.Soak
	if rest > 0 && last {
		wait = max(wait, s.r.Plan.OfflineGrace)
	}
	switch due := st.DoneAt.Add(wait); {
	case s.at.Before(due):
		s.wakeAt(due)
	case last:
		s.complete(rest)
	case s.r.Plan.Stages[s.r.Stage-1].Hold:
		if st.HeldAt.IsZero() {
			s.stage().HeldAt = s.at
			s.note(StageHeld, "stage %d has soaked and holds until an operator advances", s.r.Stage)
			s.fx = append(s.fx, Alert{fmt.Sprintf("rollout %s waits in stage %d of %d for an operator to advance", s.r.ID, s.r.Stage, len(s.r.Stages))})
		}
	default:
		s.next()
	}
}

// unproven is a stage with too few successes, nothing in flight: it waits for more devices, or halts if it may not have
// more.
func (s *step) unproven(st StageStatus, full bool) {
	if full {
		need := "no device"
		if st.Counts.Succeeded > 0 {
			need = fmt.Sprintf("fewer than %d %% of the devices", s.r.Plan.Stages[s.r.Stage-1].MinSuccess)
		}
		text := fmt.Sprintf("%s of stage %d succeeded: %s", need, s.r.Stage, outcome(st.Counts))
		s.react(s.r.Plan.FailThen, NoSuccess, text)
		if s.r.State == Halting {
			s.drained()
		}
		return
	}
	if !st.DoneAt.IsZero() {
		s.stage().DoneAt = zero
		s.note(StageReopened, "stage %d is not done any more: too few successes are left (%s)", s.r.Stage, outcome(st.Counts))
		s.wakeAt(s.at)
	}
}

// done marks the open stage. Waiting for devices that are offline is no decision: it comes and goes with each of them.
func (s *step) done(last bool, rest int) {
	s.stage().DoneAt = s.at
	if last && rest > 0 {
		return
	}
	s.note(StageDone, "stage %d is done: %s; it soaks for %v", s.r.Stage, outcome(s.r.Stages[s.r.Stage-1].Counts), s.r.Plan.Soak)
}

// next opens the next stage that has devices of its own.
func (s *step) next() {
	s.stage().ClosedAt = s.at
	n := s.r.Stage + 1
	for s.r.Started() >= s.r.Plan.Quota(n, s.r.Targets) && n < len(s.r.Stages) {
		s.note(StagePassed, "stage %d is passed over: its %s have had their turn", n, devices(s.r.Plan.Quota(n, s.r.Targets)))
		n++
	}
	s.open(n)
}

func (s *step) open(n int) {
	s.r.Stage = n
	s.stage().OpenedAt = s.at
	s.note(StageOpened, "stage %d of %d is open: up to %d of %s", n, len(s.r.Stages), s.r.Quota(), devices(s.r.Targets))
	s.wakeAt(s.at)
}

// complete ends the rollout; rest targets are still pending, and offline.
func (s *step) complete(rest int) {
	s.stage().ClosedAt = s.at
	if rest == 0 {
		s.become(Completed, AllFinished, "", "every target is finished: "+outcome(s.r.Total))
		s.end("", Cause{})
		return
	}
	text := fmt.Sprintf("offline for %v while the last stage was open", s.r.Plan.OfflineGrace)
	s.become(Completed, OfflineSkipped, "", fmt.Sprintf("%s; %s left, %s", outcome(s.r.Total), devices(rest), text))
	s.end(Skipped, Cause{WasOffline, text})
}
