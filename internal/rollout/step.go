package rollout

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"muster/internal/fleet"
)

// Step returns the rollout after ev, the rows that ev changed, and what to do about it. The package comment says which
// rows to pass for which event. Neither r nor jobs is changed; on an error r is returned as it was. What is late, unknown,
// repeated or out of order is not an error. Errors: Conflict if an operator asks for what the state of the rollout does
// not allow; Invalid if a rollout is started with a plan that does not fit its targets, or a device id is not one; Internal
// for a mistake of the caller.
func Step(r Rollout, jobs []Job, ev Event) (Rollout, []Job, []Effect, error) {
	if ev == nil || ev.when().IsZero() {
		return r, nil, nil, fleet.Errorf(fleet.Internal, "rollout %s: an event without a time", r.ID)
	}
	s := step{r: r, at: utc(ev.when()), online: OnlineUnknown}
	if err := s.apply(jobs, ev); err != nil {
		return r, nil, nil, err
	}
	_, tick := ev.(Ticked)
	if s.dirty || tick {
		s.settle()
		s.closeSweep()
	}
	if s.err != nil {
		return r, nil, nil, s.err
	}
	if s.dirty {
		s.r.Rev++
	}
	if !s.wake.IsZero() {
		s.fx = append(s.fx, WakeAt{s.wake})
	}
	return s.r, s.rows, s.fx, nil
}

// step is one call of Step: the records as they become.
type step struct {
	r      Rollout
	owned  bool // r.Stages is ours to change
	dirty  bool // r was changed
	at     time.Time
	online int       // pending targets that are online, or OnlineUnknown
	blame  string    // the last failure that this step brought, for people
	rows   []Job     // changed rows
	fx     []Effect  // so far
	wake   time.Time // the earliest time at which to look again
	err    error     // the first mistake found on the way
}

func (s *step) apply(jobs []Job, ev Event) error {
	for i := range jobs {
		if jobs[i].Rollout != s.r.ID {
			return fleet.Errorf(fleet.Internal, "rollout %s: was passed a row of rollout %s", s.r.ID, jobs[i].Rollout)
		}
	}
	switch ev := ev.(type) {
	case Added:
		return s.add(jobs, ev.Devices)
	case Started:
		return s.start(ev.Who)
	case PausedBy:
		return s.pause(ev.Who)
	case ResumedBy:
		return s.resume(ev.Who)
	case AbortedBy:
		return s.abort(jobs, ev.Who)
	case Swept:
		return s.sweep(jobs)
	case Ticked:
		s.online = ev.OnlinePending
		return s.expire(jobs)
	case Asked:
		s.ask(jobs, ev.Device)
	case Reported:
		s.report(jobs, ev)
	case Confirmed:
		s.confirm(jobs, ev)
	case Reverted:
		s.revert(jobs, ev)
	case Excluded:
		s.exclude(jobs, ev)
	default:
		return fleet.Errorf(fleet.Internal, "rollout %s: %T is not an event", s.r.ID, ev)
	}
	return nil
}

// find returns a copy of the row of d.
func find(jobs []Job, d fleet.DeviceID) (Job, bool) {
	for i := range jobs {
		if jobs[i].Device == d {
			return jobs[i], true
		}
	}
	return Job{}, false
}

// inOrder returns jobs by device id; a device that is in it twice would be counted twice, so that is an error.
func inOrder(jobs []Job) ([]Job, error) {
	jobs = slices.Clone(jobs)
	slices.SortFunc(jobs, func(a, b Job) int { return cmp.Compare(a.Device, b.Device) })
	for i := 1; i < len(jobs); i++ {
		if jobs[i].Device == jobs[i-1].Device {
			return nil, fleet.Errorf(fleet.Internal, "rollout %s: was passed the row of %s twice", jobs[i].Rollout, jobs[i].Device)
		}
	}
	return jobs, nil
}

// add makes rows for the devices that have none.
func (s *step) add(jobs []Job, ids []fleet.DeviceID) error {
	if s.r.State != Draft {
		return s.conflict("devices can be added", Draft)
	}
	ids = slices.Clone(ids)
	slices.Sort(ids)
	have := make(map[fleet.DeviceID]bool, len(jobs))
	for i := range jobs {
		have[jobs[i].Device] = true
	}
	for _, d := range slices.Compact(ids) {
		if !d.Valid() {
			return fleet.Errorf(fleet.Invalid, "rollout %s: a target is not a device id", s.r.ID)
		}
		if have[d] {
			continue
		}
		s.rows = append(s.rows, Job{Rollout: s.r.ID, Device: d, Rank: Rank(s.r.ID, d), Rev: 1, State: Pending, StateAt: s.at})
		s.r.Targets++
		s.r.Total.Pending++
		s.dirty = true
	}
	if s.r.Targets > MaxTargets {
		return fleet.Errorf(fleet.TooLarge, "rollout %s: more than %d targets", s.r.ID, MaxTargets)
	}
	return nil
}

// ask answers a device that is online.
func (s *step) ask(jobs []Job, d fleet.DeviceID) {
	j, ok := find(jobs, d)
	switch {
	case !ok:
		s.refuse(d, NotTarget)
	case s.r.State.Final() && !j.State.Finished():
		s.refuse(d, NotRunning)
	case j.State.InFlight() && !s.at.Before(j.Deadline): // the tick that says so is still to come
		s.timeOut(&j)
		s.refuse(d, JobDone)
	case j.State.InFlight(): // asked again: same grant, same deadline
		s.fx = append(s.fx, Grant{d, j.Deadline})
	case j.State != Pending:
		s.refuse(d, JobDone)
	default:
		if why := s.r.refusal(); why != "" {
			s.refuse(d, why)
			return
		}
		s.grant(&j)
	}
}

func (s *step) refuse(d fleet.DeviceID, why Refusal) { s.fx = append(s.fx, Refuse{d, why}) }

func (s *step) grant(j *Job) {
	j.Stage = s.r.Stage
	j.Attempts++
	j.GrantedAt = s.at
	j.Deadline = s.at.Add(s.r.Plan.DeviceTimeout)
	s.move(j, Granted)
	s.changed(*j)
	s.stage().DoneAt = zero // the last stage is open to devices that come back
	s.fx = append(s.fx, Grant{j.Device, j.Deadline})
	s.wakeAt(j.Deadline)
}

// report takes the word of a device in flight: progress, or a failure.
func (s *step) report(jobs []Job, ev Reported) {
	to, known := reports[ev.Report]
	j, ok := find(jobs, ev.Device)
	if !known || !ok || !j.State.InFlight() {
		return
	}
	place, percent := reports[j.Report].place, min(max(ev.Percent, j.Percent), 100)
	switch {
	case to.cause != "":
		j.Report = ev.Report
		s.fail(&j, to.to, Cause{to.cause, clean(ev.Text)})
	case to.place < place || to.place == place && percent == j.Percent:
		return // out of order, or again
	default:
		j.Report, j.Percent = ev.Report, percent
		if j.State != to.to {
			s.move(&j, to.to)
		} else {
			j.Rev++
		}
	}
	s.changed(j)
}

// confirm takes the evidence of a session with the new image.
func (s *step) confirm(jobs []Job, ev Confirmed) {
	j, ok := find(jobs, ev.Device)
	if !ok {
		return
	}
	if j.State == Pending { // it came by the image without us: no success of ours
		j.Cause = Cause{Kind: HasImage, Text: "runs the image of the release already"}
		s.move(&j, Skipped)
		s.changed(j)
		return
	}
	at := utc(ev.Session)
	if !j.State.CanGo(Succeeded) || j.GrantedAt.IsZero() || !at.After(j.GrantedAt) || !at.After(j.Session) {
		return
	}
	j.Late = j.State.Finished() || !s.at.Before(j.Deadline) || s.r.State.Final()
	j.Session = at
	s.move(&j, Succeeded)
	s.changed(j)
}

// revert takes the evidence of a session with another image.
func (s *step) revert(jobs []Job, ev Reverted) {
	j, ok := find(jobs, ev.Device)
	if !ok {
		return
	}
	at := utc(ev.Session)
	switch {
	case j.State == Installed && at.After(j.StateAt):
	case j.State == Succeeded && at.After(j.Session) && !s.r.State.Final():
	default:
		return
	}
	j.Session = at
	s.fail(&j, RolledBack, Cause{ByRollback, "a later session runs another image"})
	s.changed(j)
}

// exclude takes a device out that has not finished.
func (s *step) exclude(jobs []Job, ev Excluded) {
	j, ok := find(jobs, ev.Device)
	if !ok || j.State.Finished() {
		return
	}
	s.drop(&j, Skipped, Cause{ByCaller, clean(ev.Why)})
}

// drop ends a job that has not finished without judging it: a pending one goes to the given state, one in flight is
// cancelled.
func (s *step) drop(j *Job, pending JobState, why Cause) {
	j.Cause = why
	if j.State.InFlight() {
		s.move(j, Cancelled)
		s.fx = append(s.fx, Withdraw{j.Device})
	} else {
		s.move(j, pending)
	}
	s.changed(*j)
}

// expire times out the rows that are due.
func (s *step) expire(jobs []Job) error {
	jobs, err := inOrder(jobs)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		if j.State.InFlight() && !s.at.Before(j.Deadline) {
			s.timeOut(&j)
		}
	}
	return nil
}

func (s *step) timeOut(j *Job) {
	s.fail(j, TimedOut, Cause{ByDeadline, fmt.Sprintf("no success within %v; last known: %s", s.r.Plan.DeviceTimeout, j.State)})
	s.changed(*j)
	s.fx = append(s.fx, Withdraw{j.Device})
}

func (s *step) fail(j *Job, to JobState, why Cause) {
	j.Cause = why
	s.move(j, to)
	s.blame = fmt.Sprintf("%s: %s", j.Device, why.Kind)
}

// sweep closes the given rows after the rollout has ended.
func (s *step) sweep(jobs []Job) error {
	if s.r.Sweep == "" {
		return nil
	}
	jobs, err := inOrder(jobs)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		if j.State.Finished() {
			continue
		}
		s.drop(&j, s.r.Sweep, s.r.SweepWhy)
	}
	return nil
}

// closeSweep ends the sweep when no row is left open, whatever closed the last one.
func (s *step) closeSweep() {
	if s.r.Sweep != "" && s.r.Total.Pending+s.r.Total.InFlight() == 0 {
		s.r.Sweep, s.r.SweepWhy = "", Cause{}
	}
}

// move brings j to another state and keeps the counts in step.
func (s *step) move(j *Job, to JobState) {
	from := j.State
	if !from.CanGo(to) {
		s.fault("%s has no way from %s to %s", j.Device, from, to)
		return
	}
	*s.r.Total.at(from)--
	*s.r.Total.at(to)++
	if j.Stage > len(s.r.Stages) {
		s.fault("%s was granted in stage %d of %d", j.Device, j.Stage, len(s.r.Stages))
		return
	}
	if j.Stage > 0 {
		c := &s.stages()[j.Stage-1].Counts
		if from != Pending {
			*c.at(from)--
		}
		*c.at(to)++
	}
	if from.Failure() && j.Round == s.r.Round {
		s.r.Failures--
	}
	j.Round = 0
	if to.Failure() {
		j.Round = s.r.Round
		s.r.Failures++
	}
	j.State, j.StateAt = to, s.at
	if to.Finished() {
		j.FinishedAt = s.at
	}
	j.Rev++
	s.dirty = true
}

func (s *step) changed(j Job) { s.rows = append(s.rows, j) }

func (s *step) fault(format string, a ...any) {
	if s.err == nil {
		s.err = fleet.Errorf(fleet.Internal, "rollout "+string(s.r.ID)+": "+format, a...)
	}
}

// stages returns the stages of the copy, for change.
func (s *step) stages() []StageStatus {
	if !s.owned {
		s.r.Stages, s.owned = slices.Clone(s.r.Stages), true
	}
	s.dirty = true
	return s.r.Stages
}

// stage returns the open stage, for change.
func (s *step) stage() *StageStatus { return &s.stages()[s.r.Stage-1] }

func (s *step) wakeAt(at time.Time) {
	if s.wake.IsZero() || at.Before(s.wake) {
		s.wake = at
	}
}
