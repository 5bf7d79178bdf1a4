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
	NotTarget  Refusal = "not-in-target" // the device has no row
	NotRunning Refusal = "not-running"   // the rollout grants nothing in its state
	Soaking    Refusal = "soaking"       // the stage is done and watched; the next one is not open
	StageFull  Refusal = "stage-full"    // the stage's quota is used
	CapFull    Refusal = "cap-full"      // as many devices as allowed are in flight
	JobDone    Refusal = "done"          // the device has had its turn in this rollout
)

type (
	// Grant: tell the device. The same grant may be returned many times.
	Grant struct {
		Device   fleet.DeviceID
		Deadline time.Time
	}

	// Refuse answers an Asked that was not granted. After StageFull, CapFull, Soaking and NotRunning, no other pending
	// device would be granted either.
	Refuse struct {
		Device fleet.DeviceID
		Why    Refusal
	}

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
func (WakeAt) isEffect()   {}
func (Alert) isEffect()    {}
func (Decision) isEffect() {}

// Code is the kind of a decision, a stable word for programs.
type Code string

// The decisions.
const (
	OperatorStarted Code = "started"
	OperatorPaused  Code = "paused"
	OperatorResumed Code = "resumed"
	OperatorAborted Code = "aborted"
	FailureLimit    Code = "failure-limit"   // more failures than the plan tolerates
	NoSuccess       Code = "no-success"      // a stage used its quota and not one device succeeded
	Drained         Code = "drained"         // halting, and nothing is in flight any more
	StageOpened     Code = "stage-opened"    // devices of the stage may be granted
	StagePassed     Code = "stage-passed"    // passed over: an earlier stage used its quota
	StageDone       Code = "stage-done"      // it soaks, or waits for devices that are offline
	StageReopened   Code = "stage-reopened"  // not done any more
	AllFinished     Code = "all-finished"    // completed: every target is finished
	OfflineSkipped  Code = "offline-skipped" // completed: the targets left stayed offline
)
