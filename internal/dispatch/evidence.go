package dispatch

import (
	"fmt"
	"slices"
	"time"

	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/target"
	"muster/internal/wire"
)

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
// the offer again to a device whose job is open. The device's status must be stored before.
func (d *Dispatcher) Hello(tx Tx, at time.Time, vhost string, dev fleet.DeviceID, h wire.Hello) error {
	j, ok, err := tx.LatestJob(dev)
	if err != nil || !ok {
		return err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil {
		return err
	}
	if r.Mode == rollout.Renewal { // proven by the connection, and enroll brings the wish to renew again
		return d.Health(tx, at, dev)
	}
	ev := evidence(r, j, at, h.Image)
	// A session on the fallback may show what runs, but not that the image can do mutual TLS: it proves no success.
	if _, good := ev.(rollout.Confirmed); good && vhost != wire.VhostDevices {
		return nil
	}
	if _, _, err := d.apply(tx, r, []rollout.Job{j}, ev); err != nil {
		return err
	}
	if err := d.Health(tx, at, dev); err != nil {
		return err
	}
	j, ok, err = tx.ActiveJob(dev)
	if err != nil || !ok || j.State == rollout.Verifying {
		return err
	}
	return tx.Enqueue(downlink.Entry{Device: dev, Vhost: vhost, Kind: downlink.OTA, Ref: string(j.Rollout), At: at})
}

// evidence says what a session that named an image means for a job; nil if nothing.
func evidence(r rollout.Rollout, j rollout.Job, at time.Time, image fleet.Hash) rollout.Event {
	if r.Mode == rollout.Renewal {
		return nil
	}
	final := r.Release.Image
	if r.Mode == rollout.PreviousSlot {
		final = j.Image
	}
	switch {
	case image == final:
		return rollout.Confirmed{At: at, Device: j.Device, Session: at}
	case j.Floor > 0 && image == r.Wanted(j).Image:
		return rollout.Confirmed{At: at, Device: j.Device, Session: at, Floor: j.Floor}
	}
	return rollout.Reverted{At: at, Device: j.Device, Session: at}
}

// Health judges a device that is being verified by its stored status: after a hello, a state document or a new session.
func (d *Dispatcher) Health(tx Tx, at time.Time, dev fleet.DeviceID) error {
	j, ok, err := tx.ActiveJob(dev)
	if err != nil || !ok || j.State != rollout.Verifying {
		return err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil {
		return err
	}
	_, err = d.judgeHealth(tx, at, r, j)
	return err
}

func (d *Dispatcher) judgeHealth(tx Tx, at time.Time, r rollout.Rollout, j rollout.Job) (rollout.Rollout, error) {
	if !r.Plan.Health.Set() {
		return r, nil
	}
	dev, err := tx.Device(j.Device)
	if err != nil {
		return r, ignoreNotFound(err)
	}
	s, err := tx.Status(j.Device)
	if err != nil {
		return r, err
	}
	why := d.unhealthy(r.Plan.Health, dev, s, j.Session, at)
	if why == "" {
		return r, nil
	}
	r, _, err = d.apply(tx, r, []rollout.Job{j}, rollout.Unhealthy{At: at, Device: j.Device, Why: why})
	return r, err
}

// unhealthy says what a device did since a time that h forbids; empty if nothing.
func (d *Dispatcher) unhealthy(h rollout.Health, dev fleet.Device, s fleet.Status, since, at time.Time) string {
	for _, b := range s.Boots {
		if b.At.After(since) && slices.Contains(h.BadBoots, b.Reason) {
			return fmt.Sprintf("restarted: %s", b.Reason)
		}
	}
	if h.Reconnects > 0 {
		n := 0
		for _, c := range s.Sessions {
			if c.After(since) {
				n++
			}
		}
		if n > h.Reconnects {
			return fmt.Sprintf("connected %d times, %d tolerated", n, h.Reconnects)
		}
	}
	if h.Expression == "" {
		return ""
	}
	e, err := d.expression(h.Expression)
	if err != nil {
		return "" // it was compiled when the rollout was created
	}
	if bad, err := e.Match(target.Facts(dev, s, at)); err == nil && bad {
		return "is as unhealthy_if says"
	}
	return ""
}

func ignoreNotFound(err error) error {
	if fleet.Is(err, fleet.NotFound) {
		return nil
	}
	return err
}
