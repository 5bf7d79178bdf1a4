package rollout

import (
	"time"

	"muster/internal/fleet"
)

// Effect is what the caller does once the new state is stored, never before. The effects are the types of this file.
// Step returns them in a fixed order: those of devices by device id, then decisions and alerts as they were made, then
// at most one WakeAt.
type Effect interface{ isEffect() }

// Refusal says why a device was not granted the release. It is a stable word for programs.
type Refusal string

// The refusals of Asked.
const (
	NotTarget    Refusal = "not-in-target" // the device has no row
	NotRunning   Refusal = "not-running"   // the rollout grants nothing in its state
	Soaking      Refusal = "soaking"       // the stage is done and watched; the next one is not open
	StageFull    Refusal = "stage-full"    // the stage's quota is used
	RingClosed   Refusal = "ring-closed"   // no stage is open that the device may be granted in
	CapFull      Refusal = "cap-full"      // as many devices as allowed are in flight
	RateFull     Refusal = "rate-full"     // as many devices as allowed were granted in this time
	WindowClosed Refusal = "window-closed" // outside of the window
	SiteFull     Refusal = "site-full"     // as many devices of the same site as allowed are disrupted
	BackOff      Refusal = "back-off"      // it failed, and the time for another attempt has not come
	JobDone      Refusal = "done"          // the device has had its turn in this rollout
)

// Everyone reports whether no other pending device would be granted either.
func (r Refusal) Everyone() bool {
	switch r {
	case NotRunning, Soaking, StageFull, CapFull, RateFull:
		return true
	}
	return false
}

type (
	// Grant: tell the device. The same grant may be returned many times.
	Grant struct {
		Device   fleet.DeviceID
		Deadline time.Time // by which a session must have named the image
	}

	// Refuse answers an Asked that was not granted.
	Refuse struct {
		Device fleet.DeviceID
		Why    Refusal
		Until  time.Time // when asking again may help; zero if that is not known
	}

	// RollBack: create and start the rollout Rollout.UndoneBy.
	RollBack struct{}

	// Withdraw: the device's grant has ended before it finished; nothing more may be downloaded on it.
	Withdraw struct{ Device fleet.DeviceID }

	// WakeAt: send a Ticked at that time. A hint, see the package comment.
	WakeAt struct{ At time.Time }

	// Alert: tell the operators.
	Alert struct{ Text string }

	// Decision is a line of the rollout's history, to be stored with the change it tells of.
	Decision struct {
		At    time.Time `json:"at"`
		Code  Code      `json:"code"`
		From  State     `json:"from"`
		To    State     `json:"to"` // equal to From if the state did not change
		Stage int       `json:"stage,omitzero"`
		Who   string    `json:"who,omitzero"` // the operator; empty if the engine decided
		Text  string    `json:"text"`
	}
)

func (Grant) isEffect()    {}
func (Refuse) isEffect()   {}
func (Withdraw) isEffect() {}
func (RollBack) isEffect() {}
func (WakeAt) isEffect()   {}
func (Alert) isEffect()    {}
func (Decision) isEffect() {}

// Code is the kind of a decision, a stable word for programs.
type Code string

// The decisions.
const (
	OperatorStarted  Code = "started"
	OperatorPaused   Code = "paused"
	OperatorResumed  Code = "resumed"
	OperatorAborted  Code = "aborted"
	OperatorApproved Code = "approved"
	OperatorAdvanced Code = "advanced"
	OperatorRetried  Code = "retried"
	OperatorUndid    Code = "rollback"
	StartTime        Code = "start-time"   // the scheduled time has come
	Joined           Code = "joined"       // devices came into the target while it runs
	HealthWorse      Code = "health-worse" // devices with the new image do worse than the control group
	WindowOpened     Code = "window-opened"
	WindowShut       Code = "window-closed"
	StageHeld        Code = "stage-held" // soaked; an operator must advance
	RollbackDone     Code = "rollback-done"
	RollbackGivenUp  Code = "rollback-aborted"
	FailureLimit     Code = "failure-limit"   // more failures than the plan tolerates
	NoSuccess        Code = "no-success"      // a stage used its quota and too few devices succeeded
	Drained          Code = "drained"         // halting, and nothing is in flight any more
	StageOpened      Code = "stage-opened"    // devices of the stage may be granted
	StagePassed      Code = "stage-passed"    // passed over: an earlier stage used its quota
	StageDone        Code = "stage-done"      // it soaks, or waits for devices that are offline
	StageReopened    Code = "stage-reopened"  // not done any more
	AllFinished      Code = "all-finished"    // completed: every target is finished
	OfflineSkipped   Code = "offline-skipped" // completed: the targets left stayed offline
)
