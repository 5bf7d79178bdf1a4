package rollout

import (
	"time"

	"muster/internal/fleet"
)

// Rollout is the header of a rollout. Its size does not depend on the number of targets. Times are UTC; a zero time
// means that it has not happened. Step never changes the slices of the Rollout it is given.
type Rollout struct {
	ID        fleet.RolloutID `json:"id"`
	Rev       uint64          `json:"rev"` // grows by one with every change; for compare-and-set
	State     State           `json:"state"`
	StateAt   time.Time       `json:"state_at,omitzero"` // when State was entered
	Code      Code            `json:"code,omitzero"`     // why State was entered, for programs
	Reason    string          `json:"reason,omitzero"`   // the same for people; code never reads it
	Release   Release         `json:"release"`
	Plan      Plan            `json:"plan"`
	Targets   int             `json:"targets"`        // rows, whatever their state
	Stage     int             `json:"stage,omitzero"` // number, from 1, of the open stage; 0 before the start
	Total     Counts          `json:"total"`          // all rows
	Stages    []StageStatus   `json:"stages"`         // one for each stage of the plan
	Round     int             `json:"round,omitzero"` // 1 from the start; one more with each resume from halted
	Failures  int             `json:"failures"`       // failures of this round: what Plan.MaxFailures limits
	Sweep     JobState        `json:"sweep,omitzero"` // what rows left open must become (Skipped, Cancelled); see Swept
	SweepWhy  Cause           `json:"sweep_why,omitzero"`
	CreatedBy string          `json:"created_by,omitzero"`
	CreatedAt time.Time       `json:"created_at,omitzero"`
	StartedAt time.Time       `json:"started_at,omitzero"`
	EndedAt   time.Time       `json:"ended_at,omitzero"` // when a final state was entered
}

// Release names what is rolled out.
type Release struct {
	Product fleet.ProductID `json:"product"`
	Version string          `json:"version"`
	Image   fleet.Hash      `json:"image"` // the hash by which a running image names itself in hello
}

// StageStatus is what has become of one stage of the plan.
type StageStatus struct {
	Counts   Counts    `json:"counts"`         // of the devices that were granted in it: no pending, no skipped
	Extra    int       `json:"extra,omitzero"` // devices beyond the plan's quota, by resuming after a halt without success
	OpenedAt time.Time `json:"opened_at,omitzero"`
	DoneAt   time.Time `json:"done_at,omitzero"`   // since when it soaks or waits for offline devices; zero while it is not done
	ClosedAt time.Time `json:"closed_at,omitzero"` // when the next stage was opened or the rollout was completed
}

// Counts is the number of devices in each state.
type Counts struct {
	Pending     int `json:"pending,omitzero"`
	Granted     int `json:"granted,omitzero"`
	Accepted    int `json:"accepted,omitzero"`
	Downloading int `json:"downloading,omitzero"`
	Installed   int `json:"installed,omitzero"`
	Succeeded   int `json:"succeeded,omitzero"`
	Failed      int `json:"failed,omitzero"`
	RolledBack  int `json:"rolled_back,omitzero"`
	TimedOut    int `json:"timed_out,omitzero"`
	Cancelled   int `json:"cancelled,omitzero"`
	Skipped     int `json:"skipped,omitzero"`
}

// InFlight returns how many devices hold a grant.
func (c Counts) InFlight() int { return c.Granted + c.Accepted + c.Downloading + c.Installed }

// Failures returns how many devices failed, in whatever way.
func (c Counts) Failures() int { return c.Failed + c.RolledBack + c.TimedOut }

// Sum returns the number of devices in all states.
func (c Counts) Sum() int {
	return c.Pending + c.InFlight() + c.Succeeded + c.Failures() + c.Cancelled + c.Skipped
}

// Of returns the number of devices in state s, 0 if there is no such state.
func (c Counts) Of(s JobState) int {
	if p := c.at(s); p != nil {
		return *p
	}
	return 0
}

// at returns the counter of s, nil if there is no such state.
func (c *Counts) at(s JobState) *int {
	switch s {
	case Pending:
		return &c.Pending
	case Granted:
		return &c.Granted
	case Accepted:
		return &c.Accepted
	case Downloading:
		return &c.Downloading
	case Installed:
		return &c.Installed
	case Succeeded:
		return &c.Succeeded
	case Failed:
		return &c.Failed
	case RolledBack:
		return &c.RolledBack
	case TimedOut:
		return &c.TimedOut
	case Cancelled:
		return &c.Cancelled
	case Skipped:
		return &c.Skipped
	}
	return nil
}

// New returns a draft without targets. Zero fields of p get their defaults; what does not depend on the number of targets
// is validated (Invalid), the rest when the rollout is started.
func New(id fleet.RolloutID, rel Release, p Plan, by string, at time.Time) (Rollout, error) {
	if _, err := fleet.ParseRolloutID(string(id)); err != nil {
		return Rollout{}, err
	}
	p = p.WithDefaults()
	if err := p.validateFields(); err != nil {
		return Rollout{}, err
	}
	if at.IsZero() {
		return Rollout{}, fleet.Errorf(fleet.Internal, "rollout %s: created without a time", id)
	}
	at = utc(at)
	return Rollout{
		ID: id, Rev: 1, State: Draft, StateAt: at, Release: rel, Plan: p,
		Stages: make([]StageStatus, len(p.Stages)), CreatedBy: by, CreatedAt: at,
	}, nil
}

// Quota returns how many devices may have been granted by the open stage's end, counted from the first stage on.
func (r Rollout) Quota() int {
	if r.Stage < 1 || r.Stage > len(r.Stages) {
		return 0
	}
	return min(r.Plan.Quota(r.Stage, r.Targets)+r.Stages[r.Stage-1].Extra, r.Targets)
}

// Started returns how many devices were granted the release so far.
func (r Rollout) Started() int {
	n := 0
	for i := range r.Stages {
		n += r.Stages[i].Counts.Sum()
	}
	return n
}

// Last reports whether the open stage is open to all targets.
func (r Rollout) Last() bool { return r.Stage > 0 && r.Quota() == r.Targets }

// Room returns how many devices Asked would grant now: what a caller may offer next. It does not exceed the number of
// pending targets.
func (r Rollout) Room() int {
	if r.refusal() != "" {
		return 0
	}
	return min(r.Quota()-r.Started(), r.Plan.MaxInFlight-r.Total.InFlight(), r.Total.Pending)
}

// refusal returns why no pending device would be granted now, empty if one would be.
func (r Rollout) refusal() Refusal {
	switch {
	case r.State != Running:
		return NotRunning
	case !r.Last() && !r.Stages[r.Stage-1].DoneAt.IsZero():
		return Soaking
	case r.Started() >= r.Quota():
		return StageFull
	case r.Total.InFlight() >= r.Plan.MaxInFlight:
		return CapFull
	}
	return ""
}

// utc returns at as it is stored: UTC, without a monotonic reading, so that a record survives JSON unchanged.
func utc(at time.Time) time.Time { return at.Round(0).UTC() }
