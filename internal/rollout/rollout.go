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
	Floors    []Release       `json:"floors,omitempty"` // releases that a device below them must take first, in their order
	Mode      Mode            `json:"mode,omitzero"`
	Lifetime  time.Duration   `json:"lifetime,omitzero"` // with Renewal: of the certificates that it brings; 0: as the policy says
	Plan      Plan            `json:"plan"`
	Where     string          `json:"where,omitzero"`    // the target expression; the caller's to judge
	Dynamic   bool            `json:"dynamic,omitzero"`  // devices that come to match Where while it runs are added
	Filling   bool            `json:"filling,omitzero"`  // targets are still being added; it cannot be started
	Targets   int             `json:"targets"`           // rows, whatever their state
	Stage     int             `json:"stage,omitzero"`    // number, from 1, of the open stage; 0 before the start
	Total     Counts          `json:"total"`             // all rows
	Stages    []StageStatus   `json:"stages"`            // one for each stage of the plan
	Round     int             `json:"round,omitzero"`    // 1 from the start; one more with each resume from halted
	Failures  int             `json:"failures"`          // failures of this round: what Plan.MaxFailures limits
	Verdicts  Verdicts        `json:"verdicts,omitzero"` // of this round, by kind: what Plan.Limits judges
	Health    HealthCounts    `json:"health,omitzero"`
	NextGrant time.Time       `json:"next_grant,omitzero"` // by the pace, no device is granted before
	Shut      bool            `json:"shut,omitzero"`       // the window was closed when it was last looked at
	Sweep     JobState        `json:"sweep,omitzero"`      // what rows left open must become (Skipped, Cancelled); see Swept
	SweepWhy  Cause           `json:"sweep_why,omitzero"`
	CreatedBy string          `json:"created_by,omitzero"`
	CreatedAt time.Time       `json:"created_at,omitzero"`
	Approved  Approval        `json:"approved,omitzero"`
	StartedAt time.Time       `json:"started_at,omitzero"`
	EndedAt   time.Time       `json:"ended_at,omitzero"`  // when a final state was entered
	Undoes    fleet.RolloutID `json:"undoes,omitzero"`    // this rollout is the rollback of that one
	UndoneBy  fleet.RolloutID `json:"undone_by,omitzero"` // that rollout is the rollback of this one
}

// Mode is how a device gets the release.
type Mode string

// The modes.
const (
	Download     Mode = ""              // over HTTPS
	PreviousSlot Mode = "previous-slot" // by booting the image that is still in its other slot, without a download
	Renewal      Mode = "renewal"       // no release at all: the device renews its certificate
)

// Approval says who approved a rollout.
type Approval struct {
	By string    `json:"by,omitzero"`
	At time.Time `json:"at,omitzero"`
}

// HealthCounts are the devices that ran the new image under the plan's Health, and those of them that behaved badly.
type HealthCounts struct {
	Watched int `json:"watched,omitzero"`
	Bad     int `json:"bad,omitzero"`
}

// Release names what is rolled out.
type Release struct {
	Product fleet.ProductID `json:"product"`
	Version string          `json:"version"`
	Image   fleet.Hash      `json:"image,omitzero"` // the hash by which a running image names itself in hello; empty with PreviousSlot and Renewal
	Size    int64           `json:"size,omitzero"`  // bytes to download; 0: unknown
	Chip    string          `json:"chip,omitzero"`  // of a floor: the only one that has to take it; empty: every one
}

// StageStatus is what has become of one stage of the plan.
type StageStatus struct {
	Counts   Counts    `json:"counts"`         // of the devices that were first granted in it: no pending, no skipped
	Extra    int       `json:"extra,omitzero"` // devices beyond the plan's quota, by resuming after a halt without success
	OpenedAt time.Time `json:"opened_at,omitzero"`
	DoneAt   time.Time `json:"done_at,omitzero"`   // since when it soaks or waits for offline devices; zero while it is not done
	HeldAt   time.Time `json:"held_at,omitzero"`   // since when it waits for an operator to advance
	ClosedAt time.Time `json:"closed_at,omitzero"` // when the next stage was opened or the rollout was completed
}

// Counts is the number of devices in each state.
type Counts struct {
	Pending     int `json:"pending,omitzero"`
	Waiting     int `json:"waiting,omitzero"`
	Offered     int `json:"offered,omitzero"`
	Accepted    int `json:"accepted,omitzero"`
	Downloading int `json:"downloading,omitzero"`
	Downloaded  int `json:"downloaded,omitzero"`
	Installed   int `json:"installed,omitzero"`
	Rebooting   int `json:"rebooting,omitzero"`
	Verifying   int `json:"verifying,omitzero"`
	Succeeded   int `json:"succeeded,omitzero"`
	Failed      int `json:"failed,omitzero"`
	Rejected    int `json:"rejected,omitzero"`
	RolledBack  int `json:"rolled_back,omitzero"`
	TimedOut    int `json:"timed_out,omitzero"`
	WentDark    int `json:"went_dark,omitzero"`
	Cancelled   int `json:"cancelled,omitzero"`
	Skipped     int `json:"skipped,omitzero"`
}

// Open returns how many devices wait for their turn, or for another one.
func (c Counts) Open() int { return c.Pending + c.Waiting }

// InFlight returns how many devices hold a grant.
func (c Counts) InFlight() int {
	return c.Offered + c.Accepted + c.Downloading + c.Downloaded + c.Installed + c.Rebooting + c.Verifying
}

// Failures returns how many devices failed, in whatever way.
func (c Counts) Failures() int { return c.Failed + c.Rejected + c.RolledBack + c.TimedOut + c.WentDark }

// Sum returns the number of devices in all states.
func (c Counts) Sum() int {
	return c.Open() + c.InFlight() + c.Succeeded + c.Failures() + c.Cancelled + c.Skipped
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
	case Waiting:
		return &c.Waiting
	case Offered:
		return &c.Offered
	case Accepted:
		return &c.Accepted
	case Downloading:
		return &c.Downloading
	case Downloaded:
		return &c.Downloaded
	case Installed:
		return &c.Installed
	case Rebooting:
		return &c.Rebooting
	case Verifying:
		return &c.Verifying
	case Succeeded:
		return &c.Succeeded
	case Failed:
		return &c.Failed
	case Rejected:
		return &c.Rejected
	case RolledBack:
		return &c.RolledBack
	case TimedOut:
		return &c.TimedOut
	case WentDark:
		return &c.WentDark
	case Cancelled:
		return &c.Cancelled
	case Skipped:
		return &c.Skipped
	}
	return nil
}

// Spec is what a rollout is made of.
type Spec struct {
	ID      fleet.RolloutID
	Release Release
	Floors  []Release // in the order in which they are to be taken
	Mode    Mode
	// Lifetime goes with Renewal.
	Lifetime time.Duration
	Plan     Plan
	Where    string
	Dynamic  bool
	Filling  bool // its targets come in several Added, the last one followed by Filled
	By       string
	Undoes   fleet.RolloutID
}

// New returns a draft without targets. Zero fields of the plan get their defaults; what does not depend on the number of
// targets is validated (Invalid), the rest when the rollout is started.
func New(spec Spec, at time.Time) (Rollout, error) {
	if _, err := fleet.ParseRolloutID(string(spec.ID)); err != nil {
		return Rollout{}, err
	}
	p := spec.Plan.WithDefaults()
	if err := p.validateFields(); err != nil {
		return Rollout{}, err
	}
	if at.IsZero() {
		return Rollout{}, fleet.Errorf(fleet.Internal, "rollout %s: created without a time", spec.ID)
	}
	if spec.Mode == Renewal && (p.Rollback.Set() || p.AllowDowngrade || p.BytesPerSecond > 0) {
		return Rollout{}, invalid("a rollout of certificates has no download and no way back: a certificate that was used has retired the one before")
	}
	if spec.Lifetime != 0 && (spec.Mode != Renewal || spec.Lifetime < time.Second) {
		return Rollout{}, invalid("a lifetime of at least one second goes with a rollout of certificates")
	}
	if spec.Dynamic && p.Stages[len(p.Stages)-1].Percent != 100 {
		return Rollout{}, invalid("devices may join this target while it runs: let the last stage be percent 100")
	}
	if !p.StartAt.IsZero() {
		p.StartAt = utc(p.StartAt)
	}
	at = utc(at)
	return Rollout{
		ID: spec.ID, Rev: 1, State: Draft, StateAt: at, Release: spec.Release, Floors: spec.Floors, Mode: spec.Mode, Lifetime: spec.Lifetime, Plan: p,
		Where: spec.Where, Dynamic: spec.Dynamic, Filling: spec.Filling, Undoes: spec.Undoes,
		Stages: make([]StageStatus, len(p.Stages)), CreatedBy: spec.By, CreatedAt: at,
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
func (r Rollout) Last() bool {
	if r.Stage == 0 || r.Quota() != r.Targets {
		return false
	}
	for _, s := range r.Plan.Stages[:r.Stage] {
		if s.Where == "" {
			return true
		}
	}
	return false
}

// Refusal returns why no device would be granted at time at, empty if one could be; zone is that of the plan's window (nil:
// UTC). What depends on the single device (its own zone, its site, its ring) is not in it.
func (r Rollout) Refusal(at time.Time, zone *time.Location) Refusal {
	switch {
	case r.State != Running:
		return NotRunning
	case r.Total.InFlight() >= r.Plan.MaxInFlight:
		return CapFull
	case utc(at).Before(r.NextGrant):
		return RateFull
	}
	if !r.Plan.Window.PerDevice() {
		if open, _ := r.Plan.Window.Open(at, zone); !open {
			return WindowClosed
		}
	}
	return ""
}

// StageRefusal returns why no pending device would be granted by the stage that is open, empty if one could be. Devices
// that wait for another attempt have their place already.
func (r Rollout) StageRefusal() Refusal {
	switch {
	case r.State != Running:
		return NotRunning
	case !r.Last() && !r.Stages[r.Stage-1].DoneAt.IsZero():
		return Soaking
	case r.Started() >= r.Quota():
		return StageFull
	}
	return ""
}

// Room returns how many pending devices Asked would grant at time at, unless their own site, zone or the pace refuses
// them: what a caller may offer next. It does not exceed the number of pending targets.
func (r Rollout) Room(at time.Time, zone *time.Location) int {
	if r.Refusal(at, zone) != "" || r.StageRefusal() != "" {
		return 0
	}
	return min(r.Quota()-r.Started(), r.Plan.MaxInFlight-r.Total.InFlight(), r.Total.Pending)
}

// Wanted returns the image that a device with this row is to run next: that of a floor, or of the release.
func (r Rollout) Wanted(j Job) Release {
	if j.Floor > 0 && j.Floor <= len(r.Floors) {
		return r.Floors[j.Floor-1]
	}
	rel := r.Release
	if r.Mode == PreviousSlot {
		rel.Image = j.Image
	}
	return rel
}

// utc returns at as it is stored: UTC, without a monotonic reading, so that a record survives JSON unchanged.
func utc(at time.Time) time.Time { return at.Round(0).UTC() }
