package rollout

import "slices"

// State is where a rollout stands. The zero State is invalid.
type State string

// The states of a rollout. Completed and Aborted are final.
const (
	Draft     State = "draft"     // targets may be added; nothing is granted
	Running   State = "running"   // devices are granted the release as the plan allows
	Paused    State = "paused"    // by an operator: no new grants, devices in flight may finish
	Halting   State = "halting"   // by the engine: no new grants, waiting for devices in flight
	Halted    State = "halted"    // by the engine, nothing in flight; an operator may resume
	Completed State = "completed" // every target is finished or was skipped
	Aborted   State = "aborted"   // by an operator, for good
)

// states are all states, in the order in which they are shown.
var states = []State{Draft, Running, Paused, Halting, Halted, Completed, Aborted}

// next is the whole life of a rollout.
var next = map[State][]State{
	Draft:     {Running, Aborted},
	Running:   {Paused, Halting, Completed, Aborted},
	Paused:    {Running, Halting, Aborted},
	Halting:   {Halted, Aborted},
	Halted:    {Running, Aborted}, // only by an operator
	Completed: {},
	Aborted:   {},
}

// States returns all states of a rollout, in the order in which they are shown.
func States() []State { return slices.Clone(states) }

// Next returns the states that can follow s.
func (s State) Next() []State { return slices.Clone(next[s]) }

// CanGo reports whether to can follow s.
func (s State) CanGo(to State) bool { return slices.Contains(next[s], to) }

// Known reports whether s is a state of a rollout.
func (s State) Known() bool { _, ok := next[s]; return ok }

// Final reports whether no state can follow s.
func (s State) Final() bool { return s == Completed || s == Aborted }

// JobState is where one device stands in a rollout. The zero JobState is invalid.
type JobState string

// The states of a job.
const (
	Pending     JobState = "pending"     // its turn has not come
	Granted     JobState = "granted"     // offered to the device; it has not answered
	Accepted    JobState = "accepted"    // the device said that it will
	Downloading JobState = "downloading" // the device said so
	Installed   JobState = "installed"   // written, rebooting or verifying: until a session names the new image
	Succeeded   JobState = "succeeded"   // a session named the new image
	Failed      JobState = "failed"      // the device said so, or rejected the job
	RolledBack  JobState = "rolled-back" // the device runs another image again
	TimedOut    JobState = "timed-out"   // not succeeded by its deadline
	Cancelled   JobState = "cancelled"   // the rollout was aborted, or the device taken out while in flight
	Skipped     JobState = "skipped"     // never granted; the cause says why
)

// jobStates are all job states, in the order in which they are shown.
var jobStates = []JobState{Pending, Granted, Accepted, Downloading, Installed, Succeeded, Failed, RolledBack, TimedOut, Cancelled, Skipped}

// jobNext is the whole life of a job. It has no cycle, so a job changes state a bounded number of times whatever
// arrives. What leads out of a finished state is a correction by evidence.
var jobNext = map[JobState][]JobState{
	Pending:     {Granted, Cancelled, Skipped},
	Granted:     {Accepted, Downloading, Installed, Succeeded, Failed, RolledBack, TimedOut, Cancelled},
	Accepted:    {Downloading, Installed, Succeeded, Failed, RolledBack, TimedOut, Cancelled},
	Downloading: {Installed, Succeeded, Failed, RolledBack, TimedOut, Cancelled},
	Installed:   {Succeeded, Failed, RolledBack, TimedOut, Cancelled},
	Succeeded:   {RolledBack},
	Failed:      {Succeeded},
	TimedOut:    {Succeeded},
	Cancelled:   {Succeeded},
	RolledBack:  {},
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

// InFlight reports whether a device in state s holds a grant.
func (s JobState) InFlight() bool {
	return s == Granted || s == Accepted || s == Downloading || s == Installed
}

// Failure reports whether s counts against Plan.MaxFailures.
func (s JobState) Failure() bool { return s == Failed || s == RolledBack || s == TimedOut }

// Finished reports whether the device is neither pending nor in flight.
func (s JobState) Finished() bool { return s.Known() && s != Pending && !s.InFlight() }
