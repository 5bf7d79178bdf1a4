// Package dispatch drives rollouts: it loads what an event concerns, lets internal/rollout decide, and stores the
// decision, the changed rows and what is to be said to devices in one transaction (DESIGN §8, §10). Timers are never the
// truth: everything is derived from the records, so a restart needs no recovery.
package dispatch

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/target"
	"muster/internal/wire"
)

// Tx is what dispatch needs of the store.
type Tx interface {
	Device(fleet.DeviceID) (fleet.Device, error)
	Devices(after fleet.DeviceID, limit int) ([]fleet.Device, error)
	Status(fleet.DeviceID) (fleet.Status, error)
	PutStatus(fleet.Status) error
	Online(fleet.DeviceID) bool
	Release(fleet.ProductID, firmware.Version) (firmware.Release, error)
	Releases(fleet.ProductID) ([]firmware.Release, error)
	SecureBootKeys(fleet.ProductID) ([]firmware.SecureBootKey, error)

	Certificate(fleet.Serial) (pki.Certificate, error)
	CertificatePolicy() (p pki.Policy, ok bool, err error)
	PutCertificatePolicy(pki.Policy) error
	PutDevice(fleet.Device) error

	Rollout(fleet.RolloutID) (rollout.Rollout, error)
	PutRollout(rollout.Rollout) error
	Rollouts() ([]rollout.Rollout, error)
	LiveRollouts() ([]fleet.RolloutID, error)
	DynamicRollouts() ([]fleet.RolloutID, error)
	Joins(limit int) ([]fleet.DeviceID, error)
	DropJoin(fleet.DeviceID) error

	Job(fleet.RolloutID, fleet.DeviceID) (rollout.Job, bool, error)
	PutJob(rollout.Job) error
	Jobs(id fleet.RolloutID, after fleet.DeviceID, limit int) ([]rollout.Job, error)
	PendingJobs(id fleet.RolloutID, limit int) ([]rollout.Job, error)
	Ready(id fleet.RolloutID, ring int, f func(rollout.Job) (bool, error)) error
	DueJobs(id fleet.RolloutID, at time.Time, limit int) ([]rollout.Job, error)
	RewoundJobs(id fleet.RolloutID, at time.Time, limit int) ([]rollout.Job, error)
	JobsInFlight(id fleet.RolloutID, limit int) ([]rollout.Job, error)
	NextDeadline(fleet.RolloutID) (time.Time, bool, error)
	OpenJobs(fleet.DeviceID) ([]rollout.Job, error)
	ActiveJob(fleet.DeviceID) (rollout.Job, bool, error)
	LatestJob(fleet.DeviceID) (rollout.Job, bool, error)
	Site(id fleet.RolloutID, site string) (targets, disrupted int, err error)
	Penalty(fleet.DeviceID) (rollout.Penalty, error)
	PutPenalty(fleet.DeviceID, rollout.Penalty) error
	AddDecision(fleet.RolloutID, rollout.Decision) error
	Decisions(fleet.RolloutID) ([]rollout.Decision, error)
	DecisionsAfter(id fleet.RolloutID, seq uint64, f func(seq uint64, d rollout.Decision) bool) error

	Enqueue(downlink.Entry) error
	Audit(access.Entry) error
}

// Config of a Dispatcher. All fields but Penalty, Approval, Refusal and Crash are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
	// PresenceKnown reports whether who is online is sound: the link to the broker is up and its list was read. While
	// it is not, no stage is judged by who was seen.
	PresenceKnown func() bool
	// Committed is called after a transaction that may have put something into the outbox. It must not block.
	Committed func()
	Log       *slog.Logger
	// Penalty keeps devices out that fail again and again; zero: none.
	Penalty rollout.PenaltyRule
	// Approval asks for it in every plan.
	Approval bool
	// Refusal tells why the broker last refused a device, if it did; may be nil.
	Refusal func(fleet.DeviceID) (why string, at time.Time, ok bool)
	// Crash is called at named points, for tests that end the process there; nil in production.
	Crash func(point string)
}

// Dispatcher drives all rollouts. Run is called once; the other methods at any time.
type Dispatcher struct {
	c    Config
	kick chan struct{} // capacity 1: a rollout may be able to go on

	mu       sync.Mutex
	wake     map[fleet.RolloutID]time.Time // hints from the last step
	scanned  map[fleet.RolloutID]time.Time // when it makes sense to look again for devices that may be granted
	compared map[fleet.RolloutID]time.Time // when the control group was last counted
	exprs    map[string]*target.Expr       // compiled, by text
	zones    map[string]*time.Location     // looked up, by name; nil for an unknown one
}

// New returns a Dispatcher.
func New(c Config) *Dispatcher {
	if c.Crash == nil {
		c.Crash = func(string) {}
	}
	return &Dispatcher{
		c: c, kick: make(chan struct{}, 1), wake: map[fleet.RolloutID]time.Time{}, scanned: map[fleet.RolloutID]time.Time{},
		compared: map[fleet.RolloutID]time.Time{}, exprs: map[string]*target.Expr{}, zones: map[string]*time.Location{},
	}
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
	if err := d.punish(tx, jobs, rows); err != nil {
		return r, nil, err
	}
	d.c.Crash("in-tx")
	for _, fx := range effects {
		if err := d.carry(tx, next, ev, fx); err != nil {
			return r, nil, err
		}
	}
	if next.Mode == rollout.Renewal && next.State == rollout.Completed && r.State != rollout.Completed {
		return next, effects, d.adoptTerms(tx, next)
	}
	if next.Undoes != "" && next.State.Final() && !r.State.Final() {
		return next, effects, d.tellParent(tx, next.StateAt, next)
	}
	return next, effects, nil
}

// carry stores one effect: history, outbox, hints, and the rollout that undoes this one.
func (d *Dispatcher) carry(tx Tx, r rollout.Rollout, ev rollout.Event, fx rollout.Effect) error {
	switch fx := fx.(type) {
	case rollout.Decision:
		d.c.Log.Info("rollout", "rollout", r.ID, "decision", fx.Code, "state", fx.To, "why", fx.Text)
		return tx.AddDecision(r.ID, fx)
	case rollout.Alert:
		d.c.Log.Warn("rollout needs attention", "rollout", r.ID, "why", fx.Text)
	case rollout.Grant:
		if r.Mode == rollout.Renewal {
			return d.askToRenew(tx, at(ev), fx.Device)
		}
		return d.offer(tx, at(ev), fx.Device, r.ID)
	case rollout.Withdraw: // a download ends by itself: it is no longer served
		if r.Mode == rollout.Renewal {
			return d.askNoMore(tx, fx.Device)
		}
	case rollout.WakeAt:
		d.hint(r.ID, fx.At)
	case rollout.RollBack:
		return d.takeBack(tx, r)
	}
	return nil // Refuse is for who asked
}

// punish notes failed attempts, so that a device that keeps failing is left alone for a while.
func (d *Dispatcher) punish(tx Tx, before, after []rollout.Job) error {
	if d.c.Penalty.Failures == 0 {
		return nil
	}
	for _, j := range after {
		i := slices.IndexFunc(before, func(b rollout.Job) bool { return b.Device == j.Device })
		if i < 0 || !before[i].State.InFlight() || !j.State.Failure() && j.Last == "" {
			continue
		}
		p, err := tx.Penalty(j.Device)
		if err != nil {
			return err
		}
		if err := tx.PutPenalty(j.Device, d.c.Penalty.Failed(p, j.StateAt)); err != nil {
			return err
		}
	}
	return nil
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
	if !s.Online && s.PolledAt.After(s.LostAt) {
		return nil // it polls: nobody is there to be rung
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
