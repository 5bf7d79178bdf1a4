package rollout

import (
	"fmt"
	"strings"

	"muster/internal/fleet"
)

// start opens the first stage of a draft.
func (s *step) start(who string) error {
	if s.r.State != Draft {
		return s.conflict("it can be started", Draft)
	}
	if err := s.r.Plan.Validate(s.r.Targets); err != nil {
		return err
	}
	s.become(Running, OperatorStarted, who, "started"+by(who))
	s.r.StartedAt, s.r.Round = s.at, 1
	s.open(1)
	return nil
}

func (s *step) pause(who string) error {
	if s.r.State != Running {
		return s.conflict("it can be paused", Running)
	}
	s.become(Paused, OperatorPaused, who, "paused"+by(who))
	return nil
}

// resume goes on after a pause or a halt. After a halt the operator takes the failures on himself.
func (s *step) resume(who string) error {
	switch s.r.State {
	case Paused:
		s.become(Running, OperatorResumed, who, "resumed"+by(who))
		s.wakeAt(s.at)
		return nil
	case Halted:
	case Halting:
		return fleet.Errorf(fleet.Conflict, "rollout %s is halting: wait for %s in flight, or abort it", s.r.ID, devices(s.r.Total.InFlight()))
	default:
		return s.conflict("it can be resumed", Paused, Halted)
	}
	text := fmt.Sprintf("resumed%s after %s", by(who), failures(s.r.Failures))
	if st := s.stage(); !s.r.Last() && st.Counts.Succeeded == 0 && s.r.Started() >= s.r.Quota() {
		st.Extra = st.Counts.Sum()
		text += fmt.Sprintf("; stage %d may try %s", s.r.Stage, devices(s.r.Quota()-s.r.Started()))
	}
	s.stage().DoneAt = zero
	s.r.Round++
	s.r.Failures = 0
	s.become(Running, OperatorResumed, who, text)
	s.wakeAt(s.at)
	return nil
}

// abort ends the rollout; the rows that were passed are closed now, the others by Swept.
func (s *step) abort(jobs []Job, who string) error {
	if s.r.State.Final() {
		return s.conflict("it can be aborted", Draft, Running, Paused, Halting, Halted)
	}
	text := "aborted" + by(who)
	s.become(Aborted, OperatorAborted, who, text)
	s.end(Cancelled, Cause{ByAbort, text})
	return s.sweep(jobs)
}

// end closes a rollout that has just become final; rows left open are to become left.
func (s *step) end(left JobState, why Cause) {
	s.r.EndedAt = s.at
	s.r.Sweep, s.r.SweepWhy = left, why
}

// become changes the state of the rollout and records why.
func (s *step) become(to State, code Code, who, text string) {
	if !s.r.State.CanGo(to) {
		s.fault("no way from %s to %s", s.r.State, to)
		return
	}
	from := s.r.State
	s.r.State, s.r.StateAt, s.r.Code, s.r.Reason = to, s.at, code, text
	s.dirty = true
	s.fx = append(s.fx, Decision{At: s.at, Code: code, From: from, To: to, Stage: s.r.Stage, Who: who, Text: text})
}

// note records a decision that leaves the state as it is.
func (s *step) note(code Code, format string, a ...any) {
	s.fx = append(s.fx, Decision{At: s.at, Code: code, From: s.r.State, To: s.r.State, Stage: s.r.Stage, Text: fmt.Sprintf(format, a...)})
}

func (s *step) conflict(what string, in ...State) error {
	words := make([]string, len(in))
	for i, st := range in {
		words[i] = string(st)
	}
	return fleet.Errorf(fleet.Conflict, "rollout %s is %s; %s only while it is %s", s.r.ID, s.r.State, what, strings.Join(words, " or "))
}

func by(who string) string {
	if who == "" {
		return ""
	}
	return " by " + who
}

func devices(n int) string { return plural(n, "device") }

func failures(n int) string { return plural(n, "failure") }

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// outcome says in words how the devices of c ended.
func outcome(c Counts) string {
	parts := []string{fmt.Sprintf("%d succeeded", c.Succeeded)}
	for _, p := range []struct {
		n    int
		word string
	}{{c.Failed, "failed"}, {c.RolledBack, "rolled back"}, {c.TimedOut, "timed out"}, {c.Cancelled, "cancelled"}, {c.Skipped, "skipped"}} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.word))
		}
	}
	return strings.Join(parts, ", ")
}
