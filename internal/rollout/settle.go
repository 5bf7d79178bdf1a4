package rollout

import (
	"fmt"
	"time"
)

// zero is the time of what has not happened.
var zero time.Time

// settle applies the rules that hold after any change and at any time.
func (s *step) settle() {
	if (s.r.State == Running || s.r.State == Paused) && s.r.Failures > s.r.Plan.MaxFailures {
		text := fmt.Sprintf("%s, %d tolerated", failures(s.r.Failures), s.r.Plan.MaxFailures)
		if s.blame != "" {
			text += "; the last: " + s.blame
		}
		s.halt(FailureLimit, text)
	}
	switch s.r.State {
	case Halting:
		if s.r.Total.InFlight() == 0 {
			s.drained()
		}
	case Running:
		s.advance()
	}
}

func (s *step) halt(code Code, text string) {
	s.become(Halting, code, "", text)
	s.fx = append(s.fx, Alert{fmt.Sprintf("rollout %s halts in stage %d of %d: %s", s.r.ID, s.r.Stage, len(s.r.Stages), text)})
}

// drained ends a halt. The header keeps the code and the reason of the halt, which is what an operator must judge.
func (s *step) drained() {
	code := s.r.Code
	s.become(Halted, Drained, "", s.r.Reason)
	s.r.Code = code
}

// advance judges the open stage of a running rollout. It opens at most one stage.
func (s *step) advance() {
	if s.r.Total.InFlight() > 0 {
		return
	}
	var (
		st   = s.r.Stages[s.r.Stage-1]
		full = s.r.Started() >= s.r.Quota()
		rest = s.r.Total.Pending
		last = s.r.Last() || rest == 0 // nothing comes after it
	)
	if !last && st.Counts.Succeeded == 0 {
		s.unproven(st, full)
		return
	}
	if rest > 0 && !full && (last || st.DoneAt.IsZero()) && s.online != 0 {
		if last && s.online > 0 && !st.DoneAt.IsZero() { // they are offered the release again, and are waited for
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
	default:
		s.next()
	}
}

// unproven is a stage without a success, nothing in flight: it waits for more devices, or halts if it may not have more.
func (s *step) unproven(st StageStatus, full bool) {
	if full {
		s.halt(NoSuccess, fmt.Sprintf("no device of stage %d succeeded: %s", s.r.Stage, outcome(st.Counts)))
		s.drained()
		return
	}
	if !st.DoneAt.IsZero() {
		s.stage().DoneAt = zero
		s.note(StageReopened, "stage %d is not done any more: no success is left (%s)", s.r.Stage, outcome(st.Counts))
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
