package dispatch

import (
	"context"
	"slices"
	"time"

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
		next, err := d.Pass(ctx, time.Now)
		if err != nil && ctx.Err() == nil {
			d.c.Log.Error("rollouts could not be driven; trying again", "error", err)
		}
		timer.Reset(max(rest, time.Until(next)))
	}
}

// Pass does all that is due, for every rollout, and returns when to look again. clock is read in each transaction. One
// rollout's failure does not stop the others; the first error is returned.
func (d *Dispatcher) Pass(ctx context.Context, clock func() time.Time) (next time.Time, err error) {
	next = clock().Add(idle)
	if err := d.join(ctx, clock); err != nil {
		return next, err
	}
	var ids []fleet.RolloutID
	err = d.c.View(ctx, func(tx Tx) (err error) {
		ids, err = tx.LiveRollouts()
		return err
	})
	if err != nil {
		return next, err
	}
	d.forget(ids)
	for _, id := range ids {
		d.mu.Lock()
		delete(d.wake, id)
		d.mu.Unlock()
		if e := d.drive(ctx, clock, id); e != nil && err == nil {
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

// forget drops what is remembered of rollouts that are over.
func (d *Dispatcher) forget(live []fleet.RolloutID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range []map[fleet.RolloutID]time.Time{d.wake, d.scanned, d.compared} {
		for id := range m {
			if !slices.Contains(live, id) {
				delete(m, id)
			}
		}
	}
}

// drive brings one rollout as far as it can go now, in transactions of bounded size. Each has its own time: what others
// stored meanwhile must not lie in its future.
func (d *Dispatcher) drive(ctx context.Context, clock func() time.Time, id fleet.RolloutID) error {
	// A stage that opens makes room for grants, and those may fill it, so look again until nothing changes. Each round
	// that changes something is bounded by the number of rows.
	for ctx.Err() == nil {
		d.c.Crash("before-tx")
		var changed, filling bool
		err := d.c.Update(ctx, func(tx Tx) error {
			at := clock()
			r, err := tx.Rollout(id)
			if err != nil {
				return err
			}
			before := r.Rev
			switch {
			case r.Filling:
				filling = true
				return nil
			case r.Sweep != "":
				r, err = d.sweep(tx, at, r)
			case !r.State.Final() && r.State != rollout.Draft:
				r, err = d.judgeAndGrant(tx, at, r)
			}
			changed = r.Rev != before
			return err
		})
		if err != nil {
			return err
		}
		d.c.Crash("after-commit")
		if filling {
			return d.goOnFilling(ctx, clock, id)
		}
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
	pending, err := tx.PendingJobs(r.ID, sweepBatch)
	if err != nil {
		return r, err
	}
	r, _, err = d.apply(tx, r, append(rows, pending...), rollout.Swept{At: at})
	return r, err
}

// judgeAndGrant lets time pass for a rollout and offers the release to those whose turn it is.
func (d *Dispatcher) judgeAndGrant(tx Tx, at time.Time, r rollout.Rollout) (rollout.Rollout, error) {
	r, err := d.lookAtDue(tx, at, r)
	if err != nil {
		return r, err
	}
	if r, err = d.compare(tx, at, r); err != nil {
		return r, err
	}
	seen, err := crowd{again: rollout.OnlineUnknown, fresh: rollout.OnlineUnknown}, error(nil)
	if r.State == rollout.Running && d.worthScanning(r.ID, at) {
		if r, seen, err = d.grant(tx, at, r); err != nil {
			return r, err
		}
	}
	if !d.c.PresenceKnown() {
		seen = crowd{again: rollout.OnlineUnknown, fresh: rollout.OnlineUnknown}
	}
	tick := rollout.Ticked{At: at, OnlinePending: seen.fresh, OnlineWaiting: seen.again, Zone: d.zone(r.Plan.Window.Zone), Blind: !d.c.PresenceKnown()}
	if r, _, err = d.apply(tx, r, nil, tick); err != nil {
		return r, err
	}
	if deadline, ok, err := tx.NextDeadline(r.ID); err != nil {
		return r, err
	} else if ok {
		d.hint(r.ID, deadline)
	}
	return r, nil
}

// lookAtDue judges the rows whose time has come, and those that a clock ahead of itself has put into the future.
func (d *Dispatcher) lookAtDue(tx Tx, at time.Time, r rollout.Rollout) (rollout.Rollout, error) {
	due, err := tx.DueJobs(r.ID, at, sweepBatch)
	if err != nil {
		return r, err
	}
	rewound, err := tx.RewoundJobs(r.ID, at.Add(horizon(r.Plan)), sweepBatch)
	if err != nil {
		return r, err
	}
	if r, due, err = d.excuse(tx, at, r, due); err != nil {
		return r, err
	}
	tick := rollout.Ticked{At: at, OnlinePending: rollout.OnlineUnknown, OnlineWaiting: rollout.OnlineUnknown, Zone: d.zone(r.Plan.Window.Zone),
		Offline: map[fleet.DeviceID]time.Time{}, Blind: !d.c.PresenceKnown()}
	var rows []rollout.Job
	for _, j := range append(due, rewound...) {
		if j.State == rollout.Verifying { // the last chance to see that it is not healthy
			if r, err = d.judgeHealth(tx, at, r, j); err != nil {
				return r, err
			}
			if j, _, err = tx.Job(r.ID, j.Device); err != nil {
				return r, err
			}
		}
		if !tx.Online(j.Device) {
			s, err := tx.Status(j.Device)
			if err != nil {
				return r, err
			}
			tick.Offline[j.Device] = later(s.LostAt, s.PolledAt) // one that polls is there when it asks
		}
		rows = append(rows, j)
	}
	if len(rows) == 0 {
		return r, nil
	}
	// Failures that are due come before grants: they may be what stops the rollout.
	r, _, err = d.apply(tx, r, rows, tick)
	return r, err
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// horizon is longer than any deadline that p sets.
func horizon(p rollout.Plan) time.Duration {
	return p.DeviceTimeout*2 + p.VerifyFor + p.DarkAfter + 2*(p.RetryBackoff<<p.Retries) + time.Hour
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

// crowd is how many devices are online that could be offered the release: those whose turn may come in the open stage, and
// those that wait for another attempt. One is enough to know.
type crowd struct{ fresh, again int }

// grant offers the release to devices that are online, while there is room: first to those that wait for another attempt,
// then in the order of rings and ranks.
func (d *Dispatcher) grant(tx Tx, at time.Time, r rollout.Rollout) (_ rollout.Rollout, seen crowd, err error) {
	began := time.Now()
	grants, looked := 0, 0
	count := func(j rollout.Job) *int {
		if j.State == rollout.Waiting {
			return &seen.again
		}
		return &seen.fresh
	}
	err = tx.Ready(r.ID, r.Stage, func(j rollout.Job) (bool, error) {
		if r.State != rollout.Running {
			return false, nil
		}
		if grants >= grantBatch {
			*count(j)++ // the batch is full; who comes next is looked at in the next one
			return false, nil
		}
		looked++
		var v verdict
		var err error
		if r, v, err = d.consider(tx, at, r, j); err != nil {
			return false, err
		}
		switch v {
		case granted:
			grants++
		case soon:
			*count(j)++
		case noRoom: // nor is there any for those behind it, unless it is another kind of room
			*count(j)++
			return j.State == rollout.Waiting && r.Refusal(at, d.zone(r.Plan.Window.Zone)) == "", nil
		}
		return true, nil
	})
	if grants == 0 && looked > 1000 {
		// Many are online and none may be granted: a second look at once would find the same.
		d.mu.Lock()
		d.scanned[r.ID] = at.Add(20 * time.Since(began))
		d.mu.Unlock()
	}
	return r, seen, err
}

// worthScanning reports whether the last scan that found nothing is long enough ago.
func (d *Dispatcher) worthScanning(id fleet.RolloutID, at time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	until, ok := d.scanned[id]
	if ok && at.Before(until) && until.Sub(at) < time.Minute {
		if w, ok := d.wake[id]; !ok || until.Before(w) {
			d.wake[id] = until
		}
		return false
	}
	delete(d.scanned, id)
	return true
}

// verdict says what became of an open row whose device is online.
type verdict int

const (
	passed  verdict = iota // it has no part in this rollout now, or none any more
	granted                // it was granted the release
	noRoom                 // it is a candidate, and there is no room for anybody
	soon                   // it is a candidate, but not at this moment
)

// helloTime is how long a session without a hello is waited for.
const helloTime = time.Minute

// consider offers the release to one device that is online.
func (d *Dispatcher) consider(tx Tx, at time.Time, r rollout.Rollout, j rollout.Job) (rollout.Rollout, verdict, error) {
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
	if ev, ok := evidence(r, j, s.HelloAt, s.Image).(rollout.Confirmed); ok && ev.Floor == 0 {
		ev.At = at
		r, _, err = d.apply(tx, r, rows, ev)
		return r, passed, err
	}
	fit, err := d.fits(tx, r, j, dev, s, at)
	if err != nil {
		return r, passed, err
	}
	if fit.why != "" {
		return exclude(fit.why)
	}
	if p, err := tx.Penalty(j.Device); err != nil || at.Before(p.Until) {
		return r, passed, err
	}
	if other, busy, err := tx.ActiveJob(j.Device); err != nil || busy && other.Rollout != r.ID {
		return r, passed, err // another rollout's turn: it comes back to this one later
	}
	ask := rollout.Asked{At: at, Device: j.Device, Floor: fit.floor, From: s.Image, Zone: d.zoneFor(r.Plan.Window, dev)}
	if j.Site != "" {
		if ask.SiteSize, ask.Disrupted, err = tx.Site(r.ID, j.Site); err != nil {
			return r, passed, err
		}
	}
	r, effects, err := d.apply(tx, r, rows, ask)
	if err != nil {
		return r, passed, err
	}
	for _, fx := range effects {
		switch fx := fx.(type) {
		case rollout.Grant:
			return r, granted, nil
		case rollout.Refuse:
			if fx.Why.Everyone() || fx.Why == rollout.WindowClosed && !r.Plan.Window.PerDevice() {
				return r, noRoom, nil
			}
			return r, soon, nil
		}
	}
	return r, passed, nil
}
