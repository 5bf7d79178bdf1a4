package dispatch

import (
	"context"
	"time"

	"muster/internal/access"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Spec describes a rollout to be created.
type Spec struct {
	ID      fleet.RolloutID
	Product fleet.ProductID
	Version firmware.Version
	Plan    rollout.Plan
	// Labels a device must have, all of them; empty: every device of the product.
	Labels map[string]string
	// Devices, if not empty, are the only ones.
	Devices []fleet.DeviceID
}

// Create stores a draft whose target is every device of the product that the spec chooses now. Repeating it with the same
// id is a Conflict; an unknown release is NotFound; an empty target is Unprocessable.
func (d *Dispatcher) Create(ctx context.Context, at time.Time, s Spec, by string) (rollout.Rollout, error) {
	var out rollout.Rollout
	err := d.c.Update(ctx, func(tx Tx) error {
		if _, err := tx.Rollout(s.ID); err == nil {
			return fleet.Coded(fleet.Conflict, "rollout_exists", "rollout %s exists already: choose another id", s.ID)
		} else if !fleet.Is(err, fleet.NotFound) {
			return err
		}
		rel, err := tx.Release(s.Product, s.Version)
		if err != nil {
			return err
		}
		r, err := rollout.New(rollout.Spec{ID: s.ID, Release: rollout.Release{Product: s.Product, Version: string(s.Version), Image: rel.ImageHash, Size: rel.Size}, Plan: s.Plan, By: by}, at)
		if err != nil {
			return err
		}
		targets, err := choose(tx, s)
		if err != nil {
			return err
		}
		if len(targets) == 0 {
			return fleet.Coded(fleet.Unprocessable, "empty_target", "no device of product %s matches: look with muster device list", s.Product)
		}
		if err := r.Plan.Validate(len(targets)); err != nil {
			return err
		}
		if err := tx.PutRollout(r); err != nil {
			return err
		}
		if out, _, err = d.apply(tx, r, nil, rollout.Added{At: at, Targets: toTargets(targets)}); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "rollout.create", On: string(s.ID)})
	})
	return out, err
}

// choose returns the devices that a spec names, in id order.
func choose(tx Tx, s Spec) ([]fleet.DeviceID, error) {
	named := map[fleet.DeviceID]bool{}
	for _, id := range s.Devices {
		if _, err := tx.Device(id); err != nil {
			return nil, fleet.Wrap(fleet.KindOf(err), err, "device %s: no such device", id)
		}
		named[id] = true
	}
	var out []fleet.DeviceID
	var after fleet.DeviceID
	for {
		ds, err := tx.Devices(after, 1024)
		if err != nil || len(ds) == 0 {
			return out, err
		}
		after = ds[len(ds)-1].ID
		for _, dev := range ds {
			if dev.Product == s.Product && (len(named) == 0 || named[dev.ID]) && hasLabels(dev, s.Labels) {
				out = append(out, dev.ID)
			}
		}
	}
}

func hasLabels(d fleet.Device, want map[string]string) bool {
	for k, v := range want {
		if have, ok := d.Labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

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

func toTargets(ids []fleet.DeviceID) (out []rollout.Target) {
	for _, id := range ids {
		out = append(out, rollout.Target{Device: id})
	}
	return out
}
