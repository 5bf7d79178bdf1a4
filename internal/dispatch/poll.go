package dispatch

import (
	"context"
	"time"

	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// Running is what a device that asks for an update over HTTPS says of itself (esp32.md §6). Empty fields are not known.
type Running struct {
	Image   fleet.Hash // appended SHA-256 of the image that runs
	Version string
}

// Poll takes the question of a device that fetches updates by itself, over mutual TLS, instead of being rung by MQTT. It is
// under the same gates, caps and order as everybody else: what it says is evidence as in a hello, and if a rollout has a
// place for it now, it gets it. asked says that the device is at a job, old or new: what it may fetch is ota's to say.
func (d *Dispatcher) Poll(ctx context.Context, at time.Time, dev fleet.DeviceID, run Running) (asked bool, err error) {
	err = d.c.Update(ctx, func(tx Tx) error {
		asked = false
		if why, err := barred(tx, dev); err != nil || why != "" {
			return err
		}
		if err := d.heardOf(tx, at, dev, run); err != nil {
			return err
		}
		if run.Image != "" {
			if err := d.sawRunning(tx, at, dev, run.Image); err != nil {
				return err
			}
		}
		if j, ok, err := tx.ActiveJob(dev); err != nil || ok {
			asked = ok && j.State != rollout.Verifying
			return err
		}
		asked, err = d.takePlace(tx, at, dev)
		return err
	})
	if err == nil {
		d.Kick() // what was waited for may have been this
	}
	return asked, err
}

// heardOf keeps what a poll says of a device.
func (d *Dispatcher) heardOf(tx Tx, at time.Time, dev fleet.DeviceID, run Running) error {
	s, err := tx.Status(dev)
	if err != nil {
		return err
	}
	s.LastSeen, s.PolledAt = at, at
	if run.Image != "" {
		s.Image, s.HelloAt = run.Image, at
	}
	if run.Version != "" {
		s.Version = run.Version
	}
	return tx.PutStatus(s)
}

// sawRunning takes the image that a device named as evidence for its newest job.
func (d *Dispatcher) sawRunning(tx Tx, at time.Time, dev fleet.DeviceID, image fleet.Hash) error {
	j, ok, err := tx.LatestJob(dev)
	if err != nil || !ok {
		return err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil {
		return err
	}
	ev := evidence(r, j, at, image)
	if ev == nil {
		return nil
	}
	if good, ok := ev.(rollout.Confirmed); ok && j.State == rollout.Verifying {
		// It is there only when it asks, so its health is judged now, before its presence counts.
		if r, err = d.judgeHealth(tx, at, r, j); err != nil {
			return err
		}
		if j, _, err = tx.Job(r.ID, dev); err != nil {
			return err
		}
		good.Stayed = true
		ev = good
	}
	_, _, err = d.apply(tx, r, []rollout.Job{j}, ev)
	return err
}

// takePlace offers the places of the running rollouts to one device.
func (d *Dispatcher) takePlace(tx Tx, at time.Time, dev fleet.DeviceID) (bool, error) {
	open, err := tx.OpenJobs(dev)
	if err != nil {
		return false, err
	}
	for _, j := range open {
		r, err := tx.Rollout(j.Rollout)
		if err != nil {
			return false, err
		}
		if r.State != rollout.Running || r.Mode != rollout.Download {
			continue // only MQTT can tell it of the rest
		}
		if j.State == rollout.Waiting && at.Before(j.RetryAt) || j.State == rollout.Pending && j.Ring > r.Stage {
			continue
		}
		_, v, err := d.consider(tx, at, r, j)
		if err != nil || v == granted {
			return v == granted, err
		}
	}
	return false, nil
}

// Fetching notes how far a device that polls is with its download, in a transaction of its own: a client of that kind
// reports nothing. A job that it is not at changes nothing.
func (d *Dispatcher) Fetching(ctx context.Context, at time.Time, dev fleet.DeviceID, job fleet.RolloutID, step rollout.Report, text string) error {
	return d.c.Update(ctx, func(tx Tx) error {
		return d.Report(tx, at, dev, wire.OTAReport{Job: job, Step: wire.OTAStep(step), Error: text})
	})
}
