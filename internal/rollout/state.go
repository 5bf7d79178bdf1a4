package rollout

import "slices"

// State is where a rollout stands. The zero State is invalid.
type State string

// The states of a rollout. Completed, Aborted and RolledBackAll end it; only a rollback may follow the first two.
const (
	Draft         State = "draft"        // targets may be added; nothing is granted
	Scheduled     State = "scheduled"    // started by an operator, waits for its time
	Running       State = "running"      // devices are granted the release as the plan allows
	Paused        State = "paused"       // no new grants, devices in flight may finish; an operator may resume
	Halting       State = "halting"      // by the engine: no new grants, waiting for devices in flight
	Halted        State = "halted"       // by the engine, nothing in flight; an operator may resume
	RollingBack   State = "rolling-back" // another rollout takes the devices back
	Completed     State = "completed"    // every target is finished or was skipped
	Aborted       State = "aborted"      // for good
	RolledBackAll State = "rolled-back"  // the rollout that took the devices back is completed
)

// states are all states, in the order in which they are shown.
var states = []State{Draft, Scheduled, Running, Paused, Halting, Halted, RollingBack, Completed, Aborted, RolledBackAll}

// next is the whole life of a rollout.
var next = map[State][]State{
	Draft:         {Scheduled, Running, Aborted},
	Scheduled:     {Running, Aborted},
	Running:       {Paused, Halting, RollingBack, Completed, Aborted},
	Paused:        {Running, Halting, RollingBack, Aborted},
	Halting:       {Halted, RollingBack, Aborted},
	Halted:        {Running, RollingBack, Aborted}, // only by an operator
	RollingBack:   {Aborted, RolledBackAll},        // aborted: the rollback was
	Completed:     {RollingBack},                   // only by an operator
	Aborted:       {RollingBack},                   // only by an operator
	RolledBackAll: {},
}

// States returns all states of a rollout, in the order in which they are shown.
func States() []State { return slices.Clone(states) }

// Next returns the states that can follow s.
func (s State) Next() []State { return slices.Clone(next[s]) }

// CanGo reports whether to can follow s.
func (s State) CanGo(to State) bool { return slices.Contains(next[s], to) }

// Known reports whether s is a state of a rollout.
func (s State) Known() bool { _, ok := next[s]; return ok }

// Final reports whether the rollout is over: it grants nothing any more, whatever comes.
func (s State) Final() bool { return s == Completed || s == Aborted || s == RolledBackAll }

// JobState is where one device stands in a rollout. The zero JobState is invalid.
type JobState string

// The states of a job.
const (
	Pending     JobState = "pending"     // its turn has not come
	Waiting     JobState = "waiting"     // will be offered again: after a failed attempt, or after a floor
	Offered     JobState = "offered"     // the device was told; it has not answered
	Accepted    JobState = "accepted"    // the device said that it will
	Downloading JobState = "downloading" // the device said so
	Downloaded  JobState = "downloaded"  // the device said so
	Installed   JobState = "installed"   // written to the spare slot
	Rebooting   JobState = "rebooting"   // the device said so
	Verifying   JobState = "verifying"   // a session named the new image; it must stay healthy for Plan.VerifyFor
	Succeeded   JobState = "succeeded"   // it did
	Failed      JobState = "failed"      // the device said so, or was not healthy
	Rejected    JobState = "rejected"    // the device refused the job
	RolledBack  JobState = "rolled-back" // the device runs another image again
	TimedOut    JobState = "timed-out"   // a step took too long
	WentDark    JobState = "went-dark"   // installed the image and was not heard of again
	Cancelled   JobState = "cancelled"   // ended without a verdict after it was granted, or when the rollout ended
	Skipped     JobState = "skipped"     // never granted; the cause says why
)

// jobStates are all job states, in the order in which they are shown.
var jobStates = []JobState{Pending, Waiting, Offered, Accepted, Downloading, Downloaded, Installed, Rebooting, Verifying, Succeeded,
	Failed, Rejected, RolledBack, TimedOut, WentDark, Cancelled, Skipped}

// jobNext is the whole life of a job. What leads out of a finished state is a correction by evidence, or an operator's
// retry (to Waiting). The only cycle goes through Waiting, and each turn of it is an attempt (Plan.Retries), a floor
// (Rollout.Floors) or an operator's word, so a job changes state a bounded number of times whatever devices say.
var jobNext = map[JobState][]JobState{
	Pending:     {Offered, Cancelled, Skipped},
	Waiting:     {Offered, Succeeded, Failed, Rejected, RolledBack, TimedOut, WentDark, Cancelled},
	Offered:     {Waiting, Accepted, Downloading, Downloaded, Installed, Rebooting, Verifying, Succeeded, Failed, Rejected, RolledBack, TimedOut, Cancelled},
	Accepted:    {Waiting, Downloading, Downloaded, Installed, Rebooting, Verifying, Succeeded, Failed, Rejected, RolledBack, TimedOut, Cancelled},
	Downloading: {Waiting, Downloaded, Installed, Rebooting, Verifying, Succeeded, Failed, Rejected, RolledBack, TimedOut, Cancelled},
	Downloaded:  {Waiting, Installed, Rebooting, Verifying, Succeeded, Failed, Rejected, RolledBack, TimedOut, Cancelled},
	Installed:   {Waiting, Rebooting, Verifying, Succeeded, Failed, Rejected, RolledBack, TimedOut, WentDark, Cancelled},
	Rebooting:   {Waiting, Verifying, Succeeded, Failed, Rejected, RolledBack, TimedOut, WentDark, Cancelled},
	Verifying:   {Succeeded, Failed, RolledBack, WentDark, Cancelled},
	Succeeded:   {RolledBack},
	Failed:      {Waiting, Succeeded},
	Rejected:    {Waiting, Succeeded},
	RolledBack:  {Waiting},
	TimedOut:    {Waiting, Succeeded},
	WentDark:    {Waiting, Succeeded},
	Cancelled:   {Succeeded},
	Skipped:     {},
}

// JobStates returns all states of a job, in the order in which they are shown.
func JobStates() []JobState { return slices.Clone(jobStates) }

// Next returns the states that can follow s.
func (s JobState) Next() []JobState { return slices.Clone(jobNext[s]) }

// CanGo reports whether to can follow s.
func (s JobState) CanGo(to JobState) bool { return slices.Contains(jobNext[s], to) }

// Known reports whether s is a state of a job.
func (s JobState) Known() bool { _, ok := jobNext[s]; return ok }

// Open reports whether the device waits for its turn, or for another one.
func (s JobState) Open() bool { return s == Pending || s == Waiting }

// InFlight reports whether a device in state s holds a grant.
func (s JobState) InFlight() bool {
	switch s {
	case Offered, Accepted, Downloading, Downloaded, Installed, Rebooting, Verifying:
		return true
	}
	return false
}

// Failure reports whether s counts against Plan.MaxFailures and Plan.Limits.
func (s JobState) Failure() bool { return slices.Contains(failureStates, s) }

// failureStates are the kinds of failure that a Limit may name.
var failureStates = []JobState{Failed, Rejected, RolledBack, TimedOut, WentDark}

// Finished reports whether the device is neither open nor in flight.
func (s JobState) Finished() bool { return s.Known() && !s.Open() && !s.InFlight() }
