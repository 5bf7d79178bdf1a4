package rollout

import (
	"fmt"
	"iter"

	"muster/internal/fleet"
)

// Check returns the first broken invariant of a header. The store calls it before it commits; what it finds is a fault of
// muster (Internal), never of a user.
func Check(r Rollout) error {
	if msg := r.check(); msg != "" {
		return fleet.Errorf(fleet.Internal, "rollout %s: %s", r.ID, msg)
	}
	return nil
}

func (r Rollout) check() string {
	if !r.State.Known() {
		return fmt.Sprintf("unknown state %q", r.State)
	}
	if len(r.Stages) != len(r.Plan.Stages) {
		return fmt.Sprintf("%d stages, %d planned", len(r.Stages), len(r.Plan.Stages))
	}
	if r.Stage < 0 || r.Stage > len(r.Stages) {
		return fmt.Sprintf("stage %d of %d", r.Stage, len(r.Stages))
	}
	if msg := r.checkCounts(); msg != "" {
		return msg
	}
	if msg := r.checkCaps(); msg != "" {
		return msg
	}
	return r.checkState()
}

// checkCounts holds the counts against each other.
func (r Rollout) checkCounts() string {
	if r.Total.Sum() != r.Targets {
		return fmt.Sprintf("counts of %d jobs, %d targets", r.Total.Sum(), r.Targets)
	}
	var sum Counts
	for i := range r.Stages {
		c := &r.Stages[i].Counts
		if i+1 > r.Stage && c.Sum() != 0 {
			return fmt.Sprintf("stage %d is not open and has %d jobs", i+1, c.Sum())
		}
		for _, s := range jobStates {
			if c.Of(s) < 0 {
				return fmt.Sprintf("stage %d: %d jobs %s", i+1, c.Of(s), s)
			}
			*sum.at(s) += c.Of(s)
		}
	}
	for _, s := range jobStates {
		n, staged := r.Total.Of(s), sum.Of(s)
		switch {
		case n < 0:
			return fmt.Sprintf("%d jobs %s", n, s)
		case (s == Pending || s == Skipped) && staged != 0:
			return fmt.Sprintf("%d jobs %s in stages", staged, s)
		case s == Cancelled && staged > n, s != Pending && s != Skipped && s != Cancelled && staged != n:
			return fmt.Sprintf("%d jobs %s, %d in stages", n, s, staged)
		}
	}
	return ""
}

// checkCaps holds the counts against the plan.
func (r Rollout) checkCaps() string {
	switch n := r.Total.InFlight(); {
	case n > r.Plan.MaxInFlight:
		return fmt.Sprintf("%d in flight, %d allowed", n, r.Plan.MaxInFlight)
	case r.Started() > r.Quota():
		return fmt.Sprintf("%d granted, stage %d allows %d", r.Started(), r.Stage, r.Quota())
	case r.Failures != r.Verdicts.Failures() || r.Failures > r.Total.Failures() || r.Verdicts.Succeeded > r.Total.Succeeded:
		return fmt.Sprintf("%d failures in this round, verdicts %+v, all %+v", r.Failures, r.Verdicts, r.Total)
	case r.State == Running && r.Failures > r.Plan.MaxFailures:
		return fmt.Sprintf("%s with %d failures, %d tolerated", r.State, r.Failures, r.Plan.MaxFailures)
	case r.Health.Bad < 0 || r.Health.Bad > r.Health.Watched || r.Health.Watched > r.Targets:
		return fmt.Sprintf("%d of %d watched devices are bad, of %d", r.Health.Bad, r.Health.Watched, r.Targets)
	}
	for _, s := range failureStates {
		if n := *r.Verdicts.of(s); n < 0 || n > r.Total.Of(s) {
			return fmt.Sprintf("%d %s in this round, %d in all", n, s, r.Total.Of(s))
		}
	}
	return ""
}

// checkState holds the state against the rest.
func (r Rollout) checkState() string {
	inFlight, open := r.Total.InFlight(), r.Total.Open()+r.Total.InFlight()
	begun := r.Stage != 0 || r.Started() != 0 || r.Round != 0
	switch {
	case (r.State == Draft || r.State == Scheduled) && begun:
		return fmt.Sprintf("%s, and has begun", r.State)
	case r.State != Draft && r.State != Scheduled && r.State != Aborted && (r.Stage < 1 || r.Round < 1 || r.StartedAt.IsZero()):
		return fmt.Sprintf("%s without a start", r.State)
	case r.Plan.Approval && begun && r.Approved.By == "":
		return "begun without the approval that its plan asks for"
	case r.Approved.By != "" && r.Approved.By == r.CreatedBy:
		return "approved by whoever created it"
	case r.Filling && begun:
		return "begun before its target was filled"
	case (r.State == Halted || r.State == Completed) && inFlight > 0:
		return fmt.Sprintf("%s with %d in flight", r.State, inFlight)
	case r.State == Halting && inFlight == 0:
		return "halting with nothing in flight"
	case r.State.Final() != !r.EndedAt.IsZero():
		return fmt.Sprintf("%s, ended at %v", r.State, r.EndedAt)
	case (r.State == RollingBack || r.State == RolledBackAll) != (r.UndoneBy != "") && r.State != Aborted:
		return fmt.Sprintf("%s, undone by %q", r.State, r.UndoneBy)
	case !r.State.Final() && r.State != RollingBack && r.Sweep != "":
		return fmt.Sprintf("%s and sweeping", r.State)
	case (r.State.Final() || r.State == RollingBack) && (r.Sweep != "") != (open > 0):
		return fmt.Sprintf("%s with %d jobs open, sweep %q", r.State, open, r.Sweep)
	case r.Sweep != "" && r.Sweep != Cancelled && (r.Sweep != Skipped || r.State != Completed):
		return fmt.Sprintf("%s and sweeping to %s", r.State, r.Sweep)
	case r.Stage > 0 && inFlight > 0 && !r.Stages[r.Stage-1].DoneAt.IsZero() && !r.State.Final() && r.State != RollingBack:
		return fmt.Sprintf("stage %d is done with %d in flight", r.Stage, inFlight)
	}
	return ""
}

// CheckAll returns the first broken invariant of a header and all of its rows, in any order. It is for fsck and tests:
// its cost grows with the number of rows, its memory does not. That no device has two rows is the store's to hold, by its key.
func CheckAll(r Rollout, jobs iter.Seq[Job]) error {
	if err := Check(r); err != nil {
		return err
	}
	var total Counts
	var verdicts Verdicts
	var health HealthCounts
	staged := make([]Counts, len(r.Stages))
	for j := range jobs {
		if msg := j.check(r); msg != "" {
			return fleet.Errorf(fleet.Internal, "rollout %s, device %s: %s", r.ID, j.Device, msg)
		}
		*total.at(j.State)++
		if j.Stage > 0 {
			*staged[j.Stage-1].at(j.State)++
		}
		if n := verdicts.of(j.State); n != nil && j.Round == r.Round {
			*n++
		}
		if j.Watched {
			health.Watched++
		}
		if j.Bad {
			health.Bad++
		}
	}
	if total != r.Total {
		return fleet.Errorf(fleet.Internal, "rollout %s: the header counts %+v, the rows are %+v", r.ID, r.Total, total)
	}
	for i := range staged {
		if staged[i] != r.Stages[i].Counts {
			return fleet.Errorf(fleet.Internal, "rollout %s: stage %d counts %+v, its rows are %+v", r.ID, i+1, r.Stages[i].Counts, staged[i])
		}
	}
	if verdicts != r.Verdicts || health != r.Health {
		return fleet.Errorf(fleet.Internal, "rollout %s: the header has verdicts %+v and health %+v, the rows %+v and %+v", r.ID, r.Verdicts, r.Health, verdicts, health)
	}
	return nil
}

// check holds a row against itself and its header.
func (j Job) check(r Rollout) string {
	granted := !j.GrantedAt.IsZero()
	switch {
	case j.Rollout != r.ID:
		return fmt.Sprintf("row of rollout %s", j.Rollout)
	case !j.State.Known():
		return fmt.Sprintf("unknown state %q", j.State)
	case j.Rank != Rank(j.Rollout, j.Device):
		return fmt.Sprintf("rank %d, should be %d", j.Rank, Rank(j.Rollout, j.Device))
	case j.Ring < 1 || j.Ring > len(r.Stages) || j.Stage > 0 && j.Stage < j.Ring:
		return fmt.Sprintf("granted in stage %d, and its ring is %d", j.Stage, j.Ring)
	case j.Stage < 0 || j.Stage > r.Stage:
		return fmt.Sprintf("granted in stage %d, stage %d is open", j.Stage, r.Stage)
	case granted != (j.Stage > 0) || granted != (j.Attempts > 0) || granted == j.Deadline.IsZero(): // not After: the clock may have been set back
		return fmt.Sprintf("granted at %v, deadline %v, stage %d, %d attempts", j.GrantedAt, j.Deadline, j.Stage, j.Attempts)
	case granted == (j.State == Pending || j.State == Skipped) && j.State != Cancelled:
		return fmt.Sprintf("%s, granted at %v", j.State, j.GrantedAt)
	case j.State.Finished() == j.FinishedAt.IsZero():
		return fmt.Sprintf("%s, finished at %v", j.State, j.FinishedAt)
	case (j.State == Waiting) != !j.RetryAt.IsZero() && !j.State.Finished():
		return fmt.Sprintf("%s, another attempt at %v", j.State, j.RetryAt)
	case j.Floor < 0 || j.Floor > len(r.Floors):
		return fmt.Sprintf("floor %d of %d", j.Floor, len(r.Floors))
	case j.Bad && !j.Watched:
		return "bad, and was not watched"
	case (j.State.Failure() || j.State == Succeeded) != (j.Round > 0) || j.Round > r.Round:
		return fmt.Sprintf("%s in round %d of %d", j.State, j.Round, r.Round)
	case (j.State.Failure() || j.State == Skipped || j.State == Cancelled) && j.Cause.Kind == "":
		return fmt.Sprintf("%s without a cause", j.State)
	case j.Late && j.State != Succeeded && j.State != RolledBack && j.State != Waiting && !j.State.InFlight():
		return fmt.Sprintf("%s and late", j.State)
	case j.Percent < 0 || j.Percent > 100:
		return fmt.Sprintf("%d %%", j.Percent)
	}
	return ""
}
