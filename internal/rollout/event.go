package rollout

import (
	"time"

	"muster/internal/fleet"
)

// Event is something that happened; At is when, by the caller's clock, and must not be zero. The events are the types
// of this file.
type Event interface{ when() time.Time }

// OnlineUnknown is the value of Ticked.OnlinePending while the caller cannot know who is online.
const OnlineUnknown = -1

// Target is one device that is to be in a rollout.
type Target struct {
	Device fleet.DeviceID
	Ring   int        // see Plan.Ring; 0 is the first stage without an expression
	Site   string     // the value of the label that Plan.Sites names; empty if it has none
	Image  fleet.Hash // with PreviousSlot: where the device is to go back to
}

type (
	// Added brings devices into the target: of a draft, or of a dynamic rollout while it is not over. Those that have a
	// row already, or are named twice, are not added again.
	Added struct {
		At      time.Time
		Targets []Target
	}

	// Filled says that a draft has all of its targets (Rollout.Filling).
	Filled struct{ At time.Time }

	// ApprovedBy approves a draft whose plan asks for it. Forbidden for whoever created it.
	ApprovedBy struct {
		At  time.Time
		Who string
	}

	// Started starts a draft: the first stage opens, or waits for Plan.StartAt.
	Started struct {
		At  time.Time
		Who string
	}

	// Asked offers the release to a device that is online. Step answers with Grant or Refuse.
	Asked struct {
		At        time.Time
		Device    fleet.DeviceID
		Floor     int            // number of the floor that the device must take next; 0: the release itself
		From      fleet.Hash     // the image that it runs
		Zone      *time.Location // of the window: that of the plan, or the device's own where the plan says so; nil: UTC
		Disrupted int            // devices of its site that are in flight
		SiteSize  int            // targets of its site
	}

	// Reported is what a device says about its job.
	Reported struct {
		At      time.Time
		Device  fleet.DeviceID
		Report  Report
		Percent int    // of the download; taken as 0 to 100
		Text    string // the device's words about a failure; may be anything
	}

	// Confirmed says that a session which began at Session named the image of the release, or of the floor that the
	// device is to take. Only a session that began after the grant is evidence.
	Confirmed struct {
		At      time.Time
		Device  fleet.DeviceID
		Session time.Time
		Floor   int // as in Job.Floor; 0: the image of the release
		// Stayed: it is being verified, was found healthy, and is there at this moment; for one that is never connected.
		Stayed bool
	}

	// Unhealthy says that a device that runs the new image did what Plan.Health forbids.
	Unhealthy struct {
		At     time.Time
		Device fleet.DeviceID
		Why    string
	}

	// Compared brings the control group: how many devices wait for their turn and are online, and how many of them did
	// lately what Plan.Health forbids. It does nothing unless the plan compares.
	Compared struct {
		At           time.Time
		Control, Bad int
	}

	// Reverted says that a session which began at Session named another image than the one that the job wants. It
	// matters only if it began after the device reported the image installed, or after the session that confirmed it.
	Reverted struct {
		At      time.Time
		Device  fleet.DeviceID
		Session time.Time
	}

	// Excluded takes a device out: removed from the fleet, disabled, not compatible. A pending device is skipped, one in
	// flight cancelled.
	Excluded struct {
		At     time.Time
		Device fleet.DeviceID
		Why    string
	}

	// Ticked says what time it is. OnlinePending is the number of pending targets that are online now and may be granted
	// in the open stage, OnlineWaiting that of waiting ones; any positive number means the same. A caller whose view of
	// presence is not sound (its link to the broker is down, or it has just started) must say OnlineUnknown, or a stage
	// would be judged by the few that were seen.
	Ticked struct {
		At            time.Time
		OnlinePending int
		OnlineWaiting int
		Zone          *time.Location // of the plan's window; nil: UTC
		// Offline holds those of the rows that are passed whose device is not connected, and since when.
		Offline map[fleet.DeviceID]time.Time
		// Blind: presence is not known, and Offline means nothing.
		Blind bool
	}

	// Swept closes the rows it is given, as Rollout.Sweep says. It does nothing while Sweep is empty.
	Swept struct{ At time.Time }

	// PausedBy pauses a running rollout.
	PausedBy struct {
		At  time.Time
		Who string
	}

	// ResumedBy resumes a rollout that is paused or halted.
	ResumedBy struct {
		At  time.Time
		Who string
	}

	// AdvancedBy opens the next stage: the open one must be done, and is not soaked or held any longer.
	AdvancedBy struct {
		At  time.Time
		Who string
	}

	// RetriedBy gives the failed devices among the rows another attempt.
	RetriedBy struct {
		At  time.Time
		Who string
	}

	// AbortedBy ends a rollout for good.
	AbortedBy struct {
		At  time.Time
		Who string
		Why string // empty: the operator did
	}

	// RollbackBy ends a rollout and takes its devices back by another one, whose id Step chooses (Rollout.UndoneBy).
	RollbackBy struct {
		At  time.Time
		Who string
	}

	// RollbackEnded says that the rollback is over: completed, or aborted.
	RollbackEnded struct {
		At        time.Time
		Completed bool
	}
)

func (e Added) when() time.Time         { return e.At }
func (e Started) when() time.Time       { return e.At }
func (e Asked) when() time.Time         { return e.At }
func (e Reported) when() time.Time      { return e.At }
func (e Confirmed) when() time.Time     { return e.At }
func (e Reverted) when() time.Time      { return e.At }
func (e Excluded) when() time.Time      { return e.At }
func (e Ticked) when() time.Time        { return e.At }
func (e Swept) when() time.Time         { return e.At }
func (e PausedBy) when() time.Time      { return e.At }
func (e ResumedBy) when() time.Time     { return e.At }
func (e AbortedBy) when() time.Time     { return e.At }
func (e Filled) when() time.Time        { return e.At }
func (e ApprovedBy) when() time.Time    { return e.At }
func (e Unhealthy) when() time.Time     { return e.At }
func (e Compared) when() time.Time      { return e.At }
func (e AdvancedBy) when() time.Time    { return e.At }
func (e RetriedBy) when() time.Time     { return e.At }
func (e RollbackBy) when() time.Time    { return e.At }
func (e RollbackEnded) when() time.Time { return e.At }
