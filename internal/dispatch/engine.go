package dispatch

import (
	"context"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Bounds of one transaction of the engine, in rows.
const (
	grantBatch = 256
	sweepBatch = 512
)

const (
	// idle is the longest time between two looks at a rollout that is not over.
	idle = 5 * time.Second
	// rest is the shortest: a fleet that reports without pause must not keep the writer busy with looking.
	rest = 50 * time.Millisecond
)

// Run drives every rollout until ctx ends.
func (d *Dispatcher) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.kick:
			// Let what came together be one look.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(rest):
			}
		case <-timer.C:
		}
		next, err := d.Pass(ctx, time.Now())
		if err != nil && ctx.Err() == nil {
			d.c.Log.Error("rollouts could not be driven; trying again", "error", err)
		}
		timer.Reset(max(rest, time.Until(next)))
	}
}

// Pass does all that is due at time at, for every rollout, and returns when to look again. One rollout's failure does
// not stop the others; the first error is returned.
func (d *Dispatcher) Pass(ctx context.Context, at time.Time) (next time.Time, err error) {
	next = at.Add(idle)
	var ids []fleet.RolloutID
	err = d.c.View(ctx, func(tx Tx) error {
		all, err := tx.Rollouts()
		for _, r := range all {
			if r.State != rollout.Draft && (!r.State.Final() || r.Sweep != "") {
				ids = append(ids, r.ID)
			}
		}
		return err
	})
	if err != nil {
		return next, err
	}
	for _, id := range ids {
		d.mu.Lock()
		delete(d.wake, id)
		d.mu.Unlock()
		if e := d.drive(ctx, at, id); e != nil && err == nil {
			err = e
		}
		d.mu.Lock()
		if w, ok := d.wake[id]; ok && w.Before(next) {
			next = w
		}
		d.mu.Unlock()
	}
	if len(ids) > 0 {
		d.c.Committed()
	}
	return next, err
}

// drive brings one rollout as far as it can go at time at, in transactions of bounded size.
func (d *Dispatcher) drive(ctx context.Context, at time.Time, id fleet.RolloutID) error {
	// A stage that opens makes room for grants, and those may fill it, so look again until nothing changes. Each round
	// that changes something is bounded by the number of rows.
	for ctx.Err() == nil {
		d.c.Crash("before-tx")
		var changed bool
		err := d.c.Update(ctx, func(tx Tx) error {
			r, err := tx.Rollout(id)
			if err != nil {
				return err
			}
			before := r.Rev
			if r.Sweep != "" {
				r, err = d.sweep(tx, at, r)
			} else if !r.State.Final() {
				r, err = d.judgeAndGrant(tx, at, r)
			}
			changed = r.Rev != before
			return err
		})
		if err != nil {
			return err
		}
		d.c.Crash("after-commit")
		if !changed {
			return nil
		}
	}
	return nil
}

// sweep closes rows that were left open when the rollout ended.
func (d *Dispatcher) sweep(tx Tx, at time.Time, r rollout.Rollout) (rollout.Rollout, error) {
	rows, err := tx.JobsInFlight(r.ID, sweepBatch)
	if err != nil {
		return r, err
	}
	pending, err := tx.PendingJobs(r.ID, 0, "", sweepBatch)
	if err != nil {
		return r, err
	}
	r, _, err = d.apply(tx, r, append(rows, pending...), rollout.Swept{At: at})
	return r, err
}

// judgeAndGrant lets time pass for a rollout and offers the release to those whose turn it is.
func (d *Dispatcher) judgeAndGrant(tx Tx, at time.Time, r rollout.Rollout) (rollout.Rollout, error) {
	due, err := tx.DueJobs(r.ID, at, sweepBatch)
	if err != nil {
		return r, err
	}
	r, due, err = d.excuse(tx, at, r, due)
	if err != nil {
		return r, err
	}
	// Failures that are due come before grants: they may be what halts the rollout.
	if len(due) > 0 {
		if r, _, err = d.apply(tx, r, due, rollout.Ticked{At: at, OnlinePending: rollout.OnlineUnknown}); err != nil {
			return r, err
		}
	}
	r, online, err := d.grant(tx, at, r)
	if err != nil {
		return r, err
	}
	if r, _, err = d.apply(tx, r, nil, rollout.Ticked{At: at, OnlinePending: online}); err != nil {
		return r, err
	}
	deadline, ok, err := tx.NextDeadline(r.ID)
	if ok {
		d.hint(r.ID, deadline)
	}
	return r, err
}

// excuse takes devices out that an operator barred while they were in flight: their silence is no failure of the release.
func (d *Dispatcher) excuse(tx Tx, at time.Time, r rollout.Rollout, due []rollout.Job) (rollout.Rollout, []rollout.Job, error) {
	var left []rollout.Job
	for _, j := range due {
		why, err := barred(tx, j.Device)
		if err != nil {
			return r, nil, err
		}
		if why == "" {
			left = append(left, j)
			continue
		}
		if r, _, err = d.apply(tx, r, []rollout.Job{j}, rollout.Excluded{At: at, Device: j.Device, Why: why}); err != nil {
			return r, nil, err
		}
	}
	return r, left, nil
}

// barred says why a device cannot take part at all; empty if it can.
func barred(tx Tx, id fleet.DeviceID) (string, error) {
	dev, err := tx.Device(id)
	switch {
	case fleet.Is(err, fleet.NotFound):
		return "the device was removed", nil
	case err != nil:
		return "", err
	case dev.Disabled:
		return "the device is disabled", nil
	case dev.RecoveryOff != "":
		return "the device's certificate is revoked", nil
	}
	return "", nil
}

// grant offers the release in rank order to devices that are online, while there is room. online is how many pending
// devices are known to be online, as rollout.Ticked wants it: what was offered a place and got none counts, one is enough.
func (d *Dispatcher) grant(tx Tx, at time.Time, r rollout.Rollout) (_ rollout.Rollout, online int, err error) {
	rel, err := tx.Release(r.Release.Product, firmware.Version(r.Release.Version))
	if err != nil {
		return r, 0, err
	}
	var rank uint64
	var last fleet.DeviceID
	for grants := 0; r.State == rollout.Running && grants < grantBatch; {
		rows, err := tx.PendingJobs(r.ID, rank, last, grantBatch)
		if err != nil || len(rows) == 0 {
			return r, d.known(online), err
		}
		for _, j := range rows {
			rank, last = j.Rank, j.Device
			if !tx.Online(j.Device) {
				continue
			}
			var v verdict
			if r, v, err = d.consider(tx, at, r, rel, j); err != nil {
				return r, 0, err
			}
			switch v {
			case granted:
				grants++
			case soon:
				online++
			case noRoom: // nor is there any for those behind it
				return r, d.known(online + 1), nil
			}
		}
	}
	if r.State == rollout.Running {
		online++ // the batch is full; who comes next is not known yet
	}
	return r, d.known(online), nil
}

// known hides what was seen while presence is not sound.
func (d *Dispatcher) known(online int) int {
	if !d.c.PresenceKnown() {
		return rollout.OnlineUnknown
	}
	return online
}

// verdict says what became of a pending device that is online.
type verdict int

const (
	passed  verdict = iota // it has no part in this rollout now, or none any more
	granted                // it was granted the release
	noRoom                 // it is a candidate, and there is no room
	soon                   // it is a candidate as soon as it has said what it runs
)

// helloTime is how long a session without a hello is waited for.
const helloTime = time.Minute

// consider offers the release to one pending device that is online.
func (d *Dispatcher) consider(tx Tx, at time.Time, r rollout.Rollout, rel firmware.Release, j rollout.Job) (rollout.Rollout, verdict, error) {
	rows := []rollout.Job{j}
	exclude := func(why string) (rollout.Rollout, verdict, error) {
		r, _, err := d.apply(tx, r, rows, rollout.Excluded{At: at, Device: j.Device, Why: why})
		return r, passed, err
	}
	why, err := barred(tx, j.Device)
	if err != nil {
		return r, passed, err
	}
	if why != "" {
		return exclude(why)
	}
	dev, err := tx.Device(j.Device)
	if err != nil {
		return r, passed, err
	}
	s, err := tx.Status(j.Device)
	if err != nil {
		return r, passed, err
	}
	if s.HelloAt.IsZero() {
		if at.Sub(s.ConnectedAt) < helloTime {
			return r, soon, nil
		}
		return r, passed, nil
	}
	if s.Image == r.Release.Image {
		r, _, err = d.apply(tx, r, rows, rollout.Confirmed{At: at, Device: j.Device, Session: s.HelloAt})
		return r, passed, err
	}
	if _, why := rel.Fit(fitOf(dev, s), false); why != "" {
		return exclude(why)
	}
	if other, busy, err := tx.ActiveJob(j.Device); err != nil || busy && other.Rollout != r.ID {
		return r, passed, err // another rollout's turn: it comes back to this one later
	}
	r, effects, err := d.apply(tx, r, rows, rollout.Asked{At: at, Device: j.Device})
	if err != nil {
		return r, passed, err
	}
	for _, fx := range effects {
		switch fx.(type) {
		case rollout.Grant:
			return r, granted, nil
		case rollout.Refuse:
			return r, noRoom, nil
		}
	}
	return r, passed, nil
}

func fitOf(d fleet.Device, s fleet.Status) firmware.Device {
	return firmware.Device{Product: d.Product, Chip: s.Chip, Version: s.Version, SecureVersion: s.SecureVersion}
}
