package dispatch

import (
	"context"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// operate applies what an operator asks for.
func (d *Dispatcher) operate(ctx context.Context, at time.Time, id fleet.RolloutID, ev rollout.Event, what, by string) (rollout.Rollout, error) {
	var out rollout.Rollout
	d.c.Crash("before-tx")
	err := d.c.Update(ctx, func(tx Tx) error {
		r, err := tx.Rollout(id)
		if err != nil {
			return err
		}
		if out, _, err = d.apply(tx, r, nil, ev); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: what, On: string(id)})
	})
	if err != nil {
		return rollout.Rollout{}, err
	}
	d.c.Crash("after-commit")
	d.Kick()
	return out, nil
}

// Start starts a draft. Like Pause, Resume and Abort it returns a Conflict error that says why the rollout's state does
// not allow it.
func (d *Dispatcher) Start(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	return d.operate(ctx, at, id, rollout.Started{At: at, Who: by}, "rollout.start", by)
}

// Pause stops new grants; devices in flight may finish.
func (d *Dispatcher) Pause(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	return d.operate(ctx, at, id, rollout.PausedBy{At: at, Who: by}, "rollout.pause", by)
}

// Resume goes on after a pause, or after a halt, whose failures the operator takes on himself.
func (d *Dispatcher) Resume(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	return d.operate(ctx, at, id, rollout.ResumedBy{At: at, Who: by}, "rollout.resume", by)
}

// Abort ends a rollout for good; grants end at once.
func (d *Dispatcher) Abort(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	var inFlight []rollout.Job
	var out rollout.Rollout
	err := d.c.Update(ctx, func(tx Tx) error {
		r, err := tx.Rollout(id)
		if err != nil {
			return err
		}
		if inFlight, err = tx.JobsInFlight(id, 0); err != nil {
			return err
		}
		if out, _, err = d.apply(tx, r, inFlight, rollout.AbortedBy{At: at, Who: by}); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "rollout.abort", On: string(id)})
	})
	if err == nil {
		d.Kick()
	}
	return out, err
}

// Approve agrees to a draft that somebody else has created; Forbidden for whoever did.
func (d *Dispatcher) Approve(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	return d.operate(ctx, at, id, rollout.ApprovedBy{At: at, Who: by}, "rollout.approve", by)
}

// Advance opens the next stage of a rollout whose stage is done and soaks or is held.
func (d *Dispatcher) Advance(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	return d.operate(ctx, at, id, rollout.AdvancedBy{At: at, Who: by}, "rollout.advance", by)
}

// Rollback ends a rollout and takes its devices back as its plan says, by another rollout: UndoneBy of the answer.
func (d *Dispatcher) Rollback(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error) {
	return d.operate(ctx, at, id, rollout.RollbackBy{At: at, Who: by}, "rollout.rollback", by)
}

// retryBatch is how many failed rows are put back in line in one transaction.
const retryBatch = 1000

// Retry gives the failed devices of a rollout another attempt, those of one kind of failure if kind is not empty, and
// returns how many there are. Conflict if the rollout is over: create another one for them.
func (d *Dispatcher) Retry(ctx context.Context, at time.Time, id fleet.RolloutID, kind rollout.JobState, by string) (rollout.Rollout, int, error) {
	var out rollout.Rollout
	var after fleet.DeviceID
	n := 0
	for more := true; more; {
		err := d.c.Update(ctx, func(tx Tx) error {
			r, err := tx.Rollout(id)
			if err != nil {
				return err
			}
			rows, err := failed(tx, id, kind, &after, retryBatch)
			if err != nil {
				return err
			}
			more = len(rows) == retryBatch
			if out, _, err = d.apply(tx, r, rows, rollout.RetriedBy{At: at, Who: by}); err != nil || len(rows) == 0 {
				return err
			}
			for _, j := range rows { // an operator's word opens the penalty box
				if err := tx.PutPenalty(j.Device, rollout.Penalty{}); err != nil {
					return err
				}
			}
			n += len(rows)
			return tx.Audit(access.Entry{At: at, Who: by, What: "rollout.retry", On: string(id)})
		})
		if err != nil {
			return rollout.Rollout{}, n, err
		}
	}
	d.Kick()
	return out, n, nil
}

// failed returns up to limit failed rows of a rollout after device *after, which it moves on.
func failed(tx Tx, id fleet.RolloutID, kind rollout.JobState, after *fleet.DeviceID, limit int) (out []rollout.Job, err error) {
	for {
		rows, err := tx.Jobs(id, *after, 256)
		if err != nil || len(rows) == 0 {
			return out, err
		}
		for _, j := range rows {
			*after = j.Device
			if j.State.Failure() && (kind == "" || j.State == kind) {
				out = append(out, j)
			}
			if len(out) == limit {
				return out, nil
			}
		}
	}
}

// Pardon lets a device out of the penalty box.
func (d *Dispatcher) Pardon(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error {
	err := d.c.Update(ctx, func(tx Tx) error {
		if _, err := tx.Device(id); err != nil {
			return err
		}
		if err := tx.PutPenalty(id, rollout.Penalty{}); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "device.pardon", On: string(id)})
	})
	d.Kick()
	return err
}

// Get returns a rollout, or a NotFound error.
func (d *Dispatcher) Get(ctx context.Context, id fleet.RolloutID) (r rollout.Rollout, err error) {
	err = d.c.View(ctx, func(tx Tx) error { r, err = tx.Rollout(id); return err })
	return r, err
}

// List returns all rollouts, in id order.
func (d *Dispatcher) List(ctx context.Context) (rs []rollout.Rollout, err error) {
	err = d.c.View(ctx, func(tx Tx) error { rs, err = tx.Rollouts(); return err })
	return rs, err
}

// Jobs returns up to page.Limit rows of a rollout in device order, of the given state if it is not empty. more says
// whether there are others.
func (d *Dispatcher) Jobs(ctx context.Context, id fleet.RolloutID, state rollout.JobState, page fleet.Page) (out []rollout.Job, more bool, err error) {
	err = d.c.View(ctx, func(tx Tx) error {
		if _, err := tx.Rollout(id); err != nil {
			return err
		}
		after := fleet.DeviceID(page.After)
		for {
			rows, err := tx.Jobs(id, after, 256)
			if err != nil || len(rows) == 0 {
				return err
			}
			after = rows[len(rows)-1].Device
			for _, j := range rows {
				if state != "" && j.State != state {
					continue
				}
				if len(out) == page.Limit {
					more = true
					return nil
				}
				out = append(out, j)
			}
		}
	})
	return out, more, err
}

// History returns every decision of a rollout with its reason, oldest first.
func (d *Dispatcher) History(ctx context.Context, id fleet.RolloutID) (ds []rollout.Decision, err error) {
	err = d.c.View(ctx, func(tx Tx) error {
		if _, err := tx.Rollout(id); err != nil {
			return err
		}
		ds, err = tx.Decisions(id)
		return err
	})
	return ds, err
}

// Line is a decision with its number.
type Line struct {
	Seq      uint64
	Decision rollout.Decision
}

// Since returns a rollout as it is now, and its decisions after number seq, at most limit of them: what a follower needs.
func (d *Dispatcher) Since(ctx context.Context, id fleet.RolloutID, seq uint64, limit int) (r rollout.Rollout, lines []Line, err error) {
	err = d.c.View(ctx, func(tx Tx) error {
		if r, err = tx.Rollout(id); err != nil {
			return err
		}
		return tx.DecisionsAfter(id, seq, func(n uint64, dec rollout.Decision) bool {
			lines = append(lines, Line{n, dec})
			return len(lines) < limit
		})
	})
	return r, lines, err
}
