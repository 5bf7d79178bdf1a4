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

type (
	// Added brings devices into the target of a draft. Those that have a row already, or are named twice, are not
	// added again.
	Added struct {
		At      time.Time
		Devices []fleet.DeviceID
	}

	// Started starts a draft: the first stage opens.
	Started struct {
		At  time.Time
		Who string
	}

	// Asked offers the release to a device that is online. Step answers with Grant or Refuse.
	Asked struct {
		At     time.Time
		Device fleet.DeviceID
	}

	// Reported is what a device says about its job.
	Reported struct {
		At      time.Time
		Device  fleet.DeviceID
		Report  Report
		Percent int    // of the download; taken as 0 to 100
		Text    string // the device's words about a failure; may be anything
	}

	// Confirmed says that a session which began at Session named the image of the release. Only a session that began
	// after the grant is a success.
	Confirmed struct {
		At      time.Time
		Device  fleet.DeviceID
		Session time.Time
	}

	// Reverted says that a session which began at Session named another image than that of the release. It matters
	// only if it began after the device reported the image installed, or after the session that confirmed it.
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

	// Ticked says what time it is. OnlinePending is the number of pending targets that are online now; any positive
	// number means the same. A caller whose view of presence is not sound (its link to the broker is down, or it has
	// just started) must say OnlineUnknown, or a stage would be judged by the few that were seen.
	Ticked struct {
		At            time.Time
		OnlinePending int
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

	// AbortedBy ends a rollout for good.
	AbortedBy struct {
		At  time.Time
		Who string
	}
)

func (e Added) when() time.Time     { return e.At }
func (e Started) when() time.Time   { return e.At }
func (e Asked) when() time.Time     { return e.At }
func (e Reported) when() time.Time  { return e.At }
func (e Confirmed) when() time.Time { return e.At }
func (e Reverted) when() time.Time  { return e.At }
func (e Excluded) when() time.Time  { return e.At }
func (e Ticked) when() time.Time    { return e.At }
func (e Swept) when() time.Time     { return e.At }
func (e PausedBy) when() time.Time  { return e.At }
func (e ResumedBy) when() time.Time { return e.At }
func (e AbortedBy) when() time.Time { return e.At }
