// Package dispatch drives rollouts: it loads what an event concerns, lets internal/rollout decide, and stores the
// decision, the changed rows and what is to be said to devices in one transaction (DESIGN §8, §10). Timers are never the
// truth: everything is derived from the records, so a restart needs no recovery.
package dispatch

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// Tx is what dispatch needs of the store.
type Tx interface {
	Device(fleet.DeviceID) (fleet.Device, error)
	Devices(after fleet.DeviceID, limit int) ([]fleet.Device, error)
	Status(fleet.DeviceID) (fleet.Status, error)
	Online(fleet.DeviceID) bool
	Release(fleet.ProductID, firmware.Version) (firmware.Release, error)

	Rollout(fleet.RolloutID) (rollout.Rollout, error)
	PutRollout(rollout.Rollout) error
	Rollouts() ([]rollout.Rollout, error)
	Job(fleet.RolloutID, fleet.DeviceID) (rollout.Job, bool, error)
	PutJob(rollout.Job) error
	Jobs(id fleet.RolloutID, after fleet.DeviceID, limit int) ([]rollout.Job, error)
	PendingJobs(id fleet.RolloutID, afterRank uint64, afterDevice fleet.DeviceID, limit int) ([]rollout.Job, error)
	DueJobs(id fleet.RolloutID, at time.Time, limit int) ([]rollout.Job, error)
	JobsInFlight(id fleet.RolloutID, limit int) ([]rollout.Job, error)
	NextDeadline(fleet.RolloutID) (time.Time, bool, error)
	ActiveJob(fleet.DeviceID) (rollout.Job, bool, error)
	LatestJob(fleet.DeviceID) (rollout.Job, bool, error)
	AddDecision(fleet.RolloutID, rollout.Decision) error
	Decisions(fleet.RolloutID) ([]rollout.Decision, error)

	Enqueue(downlink.Entry) error
	Audit(access.Entry) error
}

// Config of a Dispatcher. All fields but Crash are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
	// PresenceKnown reports whether who is online is sound: the link to the broker is up and its list was read. While
	// it is not, no stage is judged by who was seen.
	PresenceKnown func() bool
	// Committed is called after a transaction that may have put something into the outbox. It must not block.
	Committed func()
	Log       *slog.Logger
	// Crash is called at named points, for tests that end the process there; nil in production.
	Crash func(point string)
}

// Dispatcher drives all rollouts. Run is called once; the other methods at any time.
type Dispatcher struct {
	c    Config
	kick chan struct{} // capacity 1: a rollout may be able to go on

	mu   sync.Mutex
	wake map[fleet.RolloutID]time.Time // hints from the last step
}

// New returns a Dispatcher.
func New(c Config) *Dispatcher {
	if c.Crash == nil {
		c.Crash = func(string) {}
	}
	return &Dispatcher{c: c, kick: make(chan struct{}, 1), wake: map[fleet.RolloutID]time.Time{}}
}

// Kick tells Run that something happened. It never blocks.
func (d *Dispatcher) Kick() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// apply is the only way a rollout changes: it steps r with the given rows and stores everything that follows, in tx.
func (d *Dispatcher) apply(tx Tx, r rollout.Rollout, jobs []rollout.Job, ev rollout.Event) (rollout.Rollout, []rollout.Effect, error) {
	next, rows, effects, err := rollout.Step(r, jobs, ev)
	if err != nil {
		return r, nil, err
	}
	if err := rollout.Check(next); err != nil {
		return r, nil, fleet.Wrap(fleet.Internal, err, "rollout %s would be broken by %T", r.ID, ev)
	}
	if next.Rev != r.Rev {
		if err := tx.PutRollout(next); err != nil {
			return r, nil, err
		}
	}
	// Rows that end come first: they free their device for a row that begins.
	for _, ended := range []bool{true, false} {
		for _, j := range rows {
			if j.State.InFlight() != ended {
				if err := tx.PutJob(j); err != nil {
					return r, nil, err
				}
			}
		}
	}
	d.c.Crash("in-tx")
	for _, fx := range effects {
		if err := d.carry(tx, r.ID, ev, fx); err != nil {
			return r, nil, err
		}
	}
	return next, effects, nil
}

// carry stores one effect: history, outbox, hints.
func (d *Dispatcher) carry(tx Tx, id fleet.RolloutID, ev rollout.Event, fx rollout.Effect) error {
	switch fx := fx.(type) {
	case rollout.Decision:
		d.c.Log.Info("rollout", "rollout", id, "decision", fx.Code, "state", fx.To, "why", fx.Text)
		return tx.AddDecision(id, fx)
	case rollout.Alert:
		d.c.Log.Warn("rollout needs attention", "rollout", id, "why", fx.Text)
	case rollout.Grant:
		return d.offer(tx, at(ev), fx.Device, id)
	case rollout.WakeAt:
		d.hint(id, fx.At)
	}
	return nil // Withdraw needs no word: what was granted is no longer served. Refuse is for who asked.
}

// at returns when an event that can grant happened.
func at(ev rollout.Event) time.Time {
	if a, ok := ev.(rollout.Asked); ok {
		return a.At
	}
	return time.Time{}
}

// offer rings a device on the vhost where it is.
func (d *Dispatcher) offer(tx Tx, at time.Time, dev fleet.DeviceID, id fleet.RolloutID) error {
	s, err := tx.Status(dev)
	if err != nil {
		return err
	}
	vhost := s.Vhost
	if vhost == "" {
		vhost = wire.VhostDevices
	}
	return tx.Enqueue(downlink.Entry{Device: dev, Vhost: vhost, Kind: downlink.OTA, Ref: string(id), At: at})
}

func (d *Dispatcher) hint(id fleet.RolloutID, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if have, ok := d.wake[id]; !ok || at.Before(have) {
		d.wake[id] = at
	}
}

// Report takes what a device says about its job. A job that it does not have changes nothing.
func (d *Dispatcher) Report(tx Tx, at time.Time, dev fleet.DeviceID, rep wire.OTAReport) error {
	j, ok, err := tx.Job(rep.Job, dev)
	if err != nil || !ok {
		return err
	}
	r, err := tx.Rollout(rep.Job)
	if err != nil {
		return err
	}
	_, _, err = d.apply(tx, r, []rollout.Job{j}, rollout.Reported{
		At: at, Device: dev, Report: rollout.Report(rep.Step), Percent: rep.Percent, Text: rep.Error,
	})
	return err
}

// Hello takes the evidence of a new session: which image the device runs. It is the only proof of success, and it brings
// the offer again to a device whose job is open.
func (d *Dispatcher) Hello(tx Tx, at time.Time, vhost string, dev fleet.DeviceID, h wire.Hello) error {
	j, ok, err := tx.LatestJob(dev)
	if err != nil || !ok {
		return err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil {
		return err
	}
	var ev rollout.Event = rollout.Reverted{At: at, Device: dev, Session: at}
	// A session on the fallback may show what runs, but not that the image can do mutual TLS: it proves no success.
	if h.Image == r.Release.Image {
		if vhost != wire.VhostDevices {
			return nil
		}
		ev = rollout.Confirmed{At: at, Device: dev, Session: at}
	}
	if _, _, err := d.apply(tx, r, []rollout.Job{j}, ev); err != nil {
		return err
	}
	j, ok, err = tx.ActiveJob(dev)
	if err != nil || !ok {
		return err
	}
	return tx.Enqueue(downlink.Entry{Device: dev, Vhost: vhost, Kind: downlink.OTA, Ref: string(j.Rollout), At: at})
}
