package rollout

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"muster/internal/fleet"
)

// approve notes that a second person agrees.
func (s *step) approve(who string) error {
	switch {
	case s.r.State != Draft:
		return s.conflict("it can be approved", Draft)
	case !s.r.Plan.Approval:
		return fleet.Errorf(fleet.Conflict, "rollout %s is %s and asks for no approval: start it", s.r.ID, s.r.State)
	case who == "" || who == s.r.CreatedBy:
		return fleet.Coded(fleet.Forbidden, "own_rollout", "rollout %s was created by %s: somebody else must approve it", s.r.ID, s.r.CreatedBy)
	case s.r.Approved.By != "":
		return nil
	}
	s.r.Approved = Approval{By: who, At: s.at}
	s.dirty = true
	s.noteBy(who, OperatorApproved, "approved%s", by(who))
	return nil
}

// start opens the first stage of a draft, or waits for its time.
func (s *step) start(who string) error {
	switch {
	case s.r.State != Draft:
		return s.conflict("it can be started", Draft)
	case s.r.Filling:
		return fleet.Coded(fleet.Conflict, "still_filling", "rollout %s is draft and its target is still being filled: try again in a moment", s.r.ID)
	case s.r.Plan.Approval && s.r.Approved.By == "":
		return fleet.Coded(fleet.Conflict, "approval_missing", "rollout %s is draft and waits for the approval of somebody other than %s", s.r.ID, s.r.CreatedBy)
	}
	if err := s.r.Plan.Validate(s.r.Targets); err != nil {
		return err
	}
	if s.r.Plan.StartAt.After(s.at) {
		s.become(Scheduled, OperatorStarted, who, "started"+by(who)+"; it begins at "+s.r.Plan.StartAt.Format("2006-01-02 15:04:05 MST"))
		s.wakeAt(s.r.Plan.StartAt)
		return nil
	}
	s.begin(OperatorStarted, who, "started"+by(who))
	return nil
}

func (s *step) begin(code Code, who, text string) {
	s.become(Running, code, who, text)
	s.r.StartedAt, s.r.Round = s.at, 1
	s.open(1)
}

func (s *step) pause(who string) error {
	if s.r.State != Running {
		return s.conflict("it can be paused", Running)
	}
	s.become(Paused, OperatorPaused, who, "paused"+by(who))
	return nil
}

// resume goes on after a pause or a halt. After a stop by the engine the operator takes the failures on himself.
func (s *step) resume(who string) error {
	switch {
	case s.r.State == Paused && s.r.Code == OperatorPaused:
		s.become(Running, OperatorResumed, who, "resumed"+by(who))
		s.wakeAt(s.at)
		return nil
	case s.r.State == Paused || s.r.State == Halted:
	case s.r.State == Halting:
		return fleet.Errorf(fleet.Conflict, "rollout %s is halting: wait for %s in flight, or abort it", s.r.ID, devices(s.r.Total.InFlight()))
	default:
		return s.conflict("it can be resumed", Paused, Halted)
	}
	text := fmt.Sprintf("resumed%s after %s", by(who), failures(s.r.Failures))
	if st := s.stage(); !s.r.Last() && s.r.Total.Open()+s.r.Total.InFlight() > 0 && st.Counts.Succeeded < s.r.Plan.gate(s.r.Stage, st.Counts) && s.r.Started() >= s.r.Quota() {
		st.Extra = st.Counts.Sum()
		text += fmt.Sprintf("; stage %d may try %s", s.r.Stage, devices(s.r.Quota()-s.r.Started()))
	}
	s.stage().DoneAt = zero
	s.r.Round++
	s.r.Failures, s.r.Verdicts = 0, Verdicts{}
	s.become(Running, OperatorResumed, who, text)
	s.wakeAt(s.at)
	return nil
}

// advanceBy opens the next stage by hand. It shortens a soak and ends a hold; it does not pass a gate.
func (s *step) advanceBy(who string) error {
	if s.r.State != Running {
		return s.conflict("it can be advanced", Running)
	}
	st := s.r.Stages[s.r.Stage-1]
	switch {
	case s.r.Last():
		return fleet.Coded(fleet.Conflict, "last_stage", "rollout %s is running in stage %d, the last one: there is nothing to advance to", s.r.ID, s.r.Stage)
	case st.DoneAt.IsZero():
		return fleet.Coded(fleet.Conflict, "stage_not_done", "rollout %s is running and stage %d is not done: %s, %d in flight; only a stage that is done can be left", s.r.ID, s.r.Stage, outcome(st.Counts), s.r.Total.InFlight())
	}
	s.noteBy(who, OperatorAdvanced, "advanced%s after %v of soak", by(who), s.at.Sub(st.DoneAt).Round(time.Second))
	s.next()
	return nil
}

// retry gives failed devices another attempt.
func (s *step) retry(jobs []Job, who string) error {
	switch s.r.State {
	case Running, Paused, Halted:
	default:
		return s.conflict("failed devices can be tried again", Running, Paused, Halted)
	}
	jobs, err := inOrder(jobs)
	if err != nil {
		return err
	}
	n := 0
	for _, j := range jobs {
		if !j.State.Failure() {
			continue
		}
		j.Last, j.RetryAt = j.State, s.at
		s.move(&j, Waiting)
		j.Deadline = s.at.Add(s.r.Plan.DeviceTimeout)
		s.changed(j)
		n++
	}
	if n == 0 {
		return nil
	}
	s.stage().DoneAt = zero
	s.noteBy(who, OperatorRetried, "%s that failed: tried again%s", devices(n), by(who))
	s.wakeAt(s.at)
	return nil
}

// abort ends the rollout; the rows that were passed are closed now, the others by Swept.
func (s *step) abort(jobs []Job, who, why string) error {
	if s.r.State.Final() || s.r.State == RollingBack {
		return s.conflict("it can be aborted", Draft, Scheduled, Running, Paused, Halting, Halted)
	}
	text := "aborted" + by(who)
	if why != "" {
		text += ": " + clean(why)
	}
	s.become(Aborted, OperatorAborted, who, text)
	s.end(Cancelled, Cause{ByAbort, text})
	return s.sweep(jobs)
}

// rollback ends the rollout and takes its devices back.
func (s *step) rollback(who string) error {
	if !s.r.State.CanGo(RollingBack) {
		return s.conflict("it can be rolled back", Running, Paused, Halting, Halted, Completed, Aborted)
	}
	if !s.r.Plan.Rollback.Set() {
		return fleet.Coded(fleet.Conflict, "no_way_back", "rollout %s is %s and its plan names no way back: create a rollout of the older release with allow_downgrade", s.r.ID, s.r.State)
	}
	if s.r.Started() == 0 {
		return fleet.Coded(fleet.Conflict, "nothing_to_roll_back", "rollout %s is %s and no device was granted the release: abort it", s.r.ID, s.r.State)
	}
	s.undo(OperatorUndid, who, "rolled back"+by(who))
	return nil
}

// undo goes to RollingBack. What is open or in flight is closed by Swept, as after an abort.
func (s *step) undo(code Code, who, text string) {
	s.r.UndoneBy = rollbackID(s.r.ID, s.r.UndoneBy)
	s.become(RollingBack, code, who, text+"; rollout "+string(s.r.UndoneBy)+" takes the devices back")
	s.r.EndedAt = zero
	s.r.Sweep, s.r.SweepWhy = Cancelled, Cause{ByUndoing, text}
	s.fx = append(s.fx, RollBack{})
}

// rollbackID names the rollout that takes the devices of id back: id-rb, then id-rb2, ... A name that would be too long is
// cut, with 6 digits of its SHA-256 in place of the rest.
func rollbackID(id, last fleet.RolloutID) fleet.RolloutID {
	for n := 1; ; n++ {
		suffix := "-rb"
		if n > 1 {
			suffix += strconv.Itoa(n)
		}
		base := string(id)
		if len(base)+len(suffix) > fleet.MaxRolloutIDLen {
			sum := sha256.Sum256([]byte(id))
			base = strings.TrimRight(base[:fleet.MaxRolloutIDLen-len(suffix)-7], "-") + "-" + hex.EncodeToString(sum[:3])
		}
		if got := fleet.RolloutID(base + suffix); last == "" || n > 100 {
			return got
		} else if got == last {
			last = ""
		}
	}
}

// rollbackEnded ends the rollout with its rollback.
func (s *step) rollbackEnded(completed bool) error {
	if s.r.State != RollingBack {
		return nil
	}
	if completed {
		s.become(RolledBackAll, RollbackDone, "", "rollout "+string(s.r.UndoneBy)+" has taken the devices back")
	} else {
		s.become(Aborted, RollbackGivenUp, "", "rollout "+string(s.r.UndoneBy)+", which was to take the devices back, was aborted")
	}
	s.end(Cancelled, s.r.SweepWhy)
	if s.r.SweepWhy.Kind == "" {
		s.r.SweepWhy = Cause{ByUndoing, s.r.Reason}
	}
	return nil
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

// note records a decision of the engine that leaves the state as it is.
func (s *step) note(code Code, format string, a ...any) { s.noteBy("", code, format, a...) }

// noteBy is note for an operator's decision.
func (s *step) noteBy(who string, code Code, format string, a ...any) {
	s.fx = append(s.fx, Decision{At: s.at, Code: code, From: s.r.State, To: s.r.State, Stage: s.r.Stage, Who: who, Text: fmt.Sprintf(format, a...)})
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
	}{{c.Failed, "failed"}, {c.Rejected, "rejected"}, {c.RolledBack, "rolled back"}, {c.TimedOut, "timed out"}, {c.WentDark, "gone dark"}, {c.Cancelled, "cancelled"}, {c.Skipped, "skipped"}} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.word))
		}
	}
	return strings.Join(parts, ", ")
}
