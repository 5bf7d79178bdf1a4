package dispatch

import (
	"context"
	"time"

	"muster/internal/access"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Problem returns why a rollout like this would be refused, nil if it would not: it is what Create returns.
func (p Preview) Problem() error { return p.invalid }

// AbortFor is Abort with a reason for the history.
func (d *Dispatcher) AbortFor(ctx context.Context, at time.Time, id fleet.RolloutID, why, by string) (rollout.Rollout, error) {
	var out rollout.Rollout
	err := d.c.Update(ctx, func(tx Tx) error {
		r, err := tx.Rollout(id)
		if err != nil {
			return err
		}
		inFlight, err := tx.JobsInFlight(id, 0)
		if err != nil {
			return err
		}
		if out, _, err = d.apply(tx, r, inFlight, rollout.AbortedBy{At: at, Who: by, Why: why}); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "rollout.abort", On: string(id), Details: why})
	})
	if err == nil {
		d.Kick()
	}
	return out, err
}

// MaxAgain is how many devices RetryAs takes into a new rollout.
const MaxAgain = 10_000

// RetryAs creates a rollout for the devices that failed in one that is over, those of one kind of failure if kind is not
// empty, and returns it and how many devices it has. Its plan is the old one's, with two stages (one device, then all) and
// without a start time. Conflict if the old one is not over; Unprocessable if nothing failed in it, or too much did.
func (d *Dispatcher) RetryAs(ctx context.Context, at time.Time, id fleet.RolloutID, kind rollout.JobState, as fleet.RolloutID, by string) (rollout.Rollout, int, error) {
	var old rollout.Rollout
	var rows []rollout.Job
	err := d.c.View(ctx, func(tx Tx) (err error) {
		if old, err = tx.Rollout(id); err != nil {
			return err
		}
		if !old.State.Final() {
			return fleet.Coded(fleet.Conflict, "not_over", "rollout %s is %s: only one that is over is tried again as another", id, old.State)
		}
		if old.Mode == rollout.PreviousSlot {
			return fleet.Coded(fleet.Conflict, "no_release", "rollout %s took devices back to their previous image, and has no release to try again", id)
		}
		var after fleet.DeviceID
		rows, err = failed(tx, id, kind, &after, MaxAgain+1)
		return err
	})
	if err != nil {
		return rollout.Rollout{}, 0, err
	}
	switch {
	case len(rows) == 0:
		return rollout.Rollout{}, 0, fleet.Coded(fleet.Unprocessable, "nothing_failed", "no device failed like this in rollout %s", id)
	case len(rows) > MaxAgain:
		return rollout.Rollout{}, 0, fleet.Coded(fleet.Unprocessable, "too_many_devices", "more than %d devices failed in rollout %s: retry one kind of failure, or create a rollout for the whole target", MaxAgain, id)
	}
	s := Spec{ID: as, Product: old.Release.Product, Version: firmware.Version(old.Release.Version), Plan: again(old.Plan, len(rows))}
	if old.Mode == rollout.Renewal {
		s.Version, s.Renewal = "", &Renewal{Lifetime: old.Lifetime}
	}
	for _, j := range rows {
		s.Devices = append(s.Devices, j.Device)
	}
	r, err := d.Create(ctx, at, s, by)
	if err != nil {
		return rollout.Rollout{}, 0, err
	}
	err = d.c.Update(ctx, func(tx Tx) error { // an operator's word opens the penalty box
		for _, id := range s.Devices {
			if p, err := tx.Penalty(id); err != nil {
				return err
			} else if p.Until.IsZero() && len(p.Failures) == 0 {
				continue
			}
			if err := tx.PutPenalty(id, rollout.Penalty{}); err != nil {
				return err
			}
		}
		return nil
	})
	return r, r.Targets, err
}

// again returns the plan for another go at devices that failed under p.
func again(p rollout.Plan, devices int) rollout.Plan {
	p.Stages = []rollout.Stage{{Percent: 100}}
	if devices > 1 {
		p.Stages = []rollout.Stage{{Name: "canary", Count: 1}, {Percent: 100}}
	}
	p.StartAt = time.Time{}
	return p
}
