package ota

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"muster/internal/downlink"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// cure is the release that a device on the fallback is offered, and the job that the offer names.
type cure struct {
	release firmware.Release
	job     fleet.RolloutID
}

// cureOf returns what repairs a device whose image cannot do mutual TLS; false if nothing is meant for it. Two things are:
// what an operator ordered for this very device, and, for a device that runs the image of a rollout that was taken back, the
// release that the rollout goes back to. Both only while the device is on the fallback, the door of those that cannot use
// the other; whoever can is updated by rollouts, with their gates.
func cureOf(tx Tx, d fleet.Device) (cure, bool, error) {
	s, err := tx.Status(d.ID)
	if err != nil || s.Vhost != wire.VhostFallback || d.Disabled || d.RecoveryOff != "" {
		return cure{}, false, err
	}
	c, ok, err := ordered(tx, d)
	if err == nil && !ok {
		c, ok, err = takenBack(tx, d, s)
	}
	if err != nil || !ok || c.release.ImageHash == s.Image { // it runs that already: only the front is missing
		return cure{}, false, err
	}
	return c, true, nil
}

func ordered(tx Tx, d fleet.Device) (cure, bool, error) {
	r, ok, err := tx.Repair(d.ID)
	if err != nil || !ok || r.Product != d.Product {
		return cure{}, false, err
	}
	rel, err := tx.Release(r.Product, r.Version)
	if err != nil {
		return cure{}, false, fleet.Wrap(fleet.Internal, err, "device %s is to get %s %s over the fallback, which cannot be read", d.ID, r.Product, r.Version)
	}
	return cure{rel, r.Job}, true, nil
}

// takenBack returns the release that a rollout takes its devices back to, if d runs its image. The rollout that brings it
// grants only to devices at the front, where this one cannot come.
func takenBack(tx Tx, d fleet.Device, s fleet.Status) (cure, bool, error) {
	j, ok, err := tx.LatestJob(d.ID)
	if err != nil || !ok {
		return cure{}, false, err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil {
		return cure{}, false, err
	}
	back := r.Plan.Rollback.Version
	if r.State != rollout.RollingBack && r.State != rollout.RolledBackAll || back == "" || r.Wanted(j).Image != s.Image || r.Release.Product != d.Product {
		return cure{}, false, nil
	}
	rel, err := tx.Release(d.Product, firmware.Version(back))
	if err != nil {
		return cure{}, false, fleet.Wrap(fleet.Internal, err, "rollout %s goes back to %s, which cannot be read", r.ID, back)
	}
	return cure{rel, r.UndoneBy}, true, nil
}

// Hello notes in the caller's transaction that a device said hello in a vhost: on the fallback it is offered what repairs it,
// and at the front an order is over. The device's status must be stored before.
func (c *Catalog) Hello(tx Tx, at time.Time, vhost string, id fleet.DeviceID) error {
	d, err := tx.Device(id)
	if fleet.Is(err, fleet.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if vhost != wire.VhostFallback {
		return closeRepair(tx, at, d)
	}
	cure, ok, err := cureOf(tx, d)
	if err != nil || !ok {
		return err
	}
	if r, ok, err := tx.Repair(id); err != nil {
		return err
	} else if ok {
		r.Offered, r.Offers = at, r.Offers+1
		if err := tx.PutRepair(r); err != nil {
			return err
		}
	}
	return tx.Enqueue(downlink.Entry{Device: id, Vhost: vhost, Kind: downlink.OTA, Ref: string(cure.job), At: at})
}

// closeRepair ends the order for a device that is at the front.
func closeRepair(tx Tx, at time.Time, d fleet.Device) error {
	r, ok, err := tx.Repair(d.ID)
	if err != nil || !ok {
		return err
	}
	s, err := tx.Status(d.ID)
	if err != nil {
		return err
	}
	if err := tx.DropRepair(d.ID); err != nil {
		return err
	}
	return audit(tx, at, "device:"+string(d.ID), "recovery.firmware-over", string(d.ID), fmt.Sprintf("is at the front with %.32q; ordered was %s", s.Version, r.Version))
}

// Repair orders that a device gets a release over the fallback. The device must have been there last: one that comes to the
// front is updated by a rollout. The same order again changes nothing. Errors: NotFound; Conflict if the device is not on the
// fallback, is barred from it, or runs that image; Unprocessable if the release does not fit it.
func (c *Catalog) Repair(ctx context.Context, at time.Time, id fleet.DeviceID, v firmware.Version, by string) (firmware.Repair, error) {
	var out firmware.Repair
	err := c.c.Update(ctx, func(tx Tx) error {
		d, err := tx.Device(id)
		if err != nil {
			return err
		}
		s, err := tx.Status(id)
		if err != nil {
			return err
		}
		rel, err := tx.Release(d.Product, v)
		if err != nil {
			return err
		}
		if err := mayRepair(d, s, rel); err != nil {
			return err
		}
		if misfit, why, err := bootable(tx, rel); err != nil || misfit != firmware.Fits {
			return cmp.Or(err, fleet.Coded(fleet.Unprocessable, string(misfit), "%s", why))
		}
		have, ok, err := tx.Repair(id)
		if err != nil || ok && have.Version == v && have.Product == d.Product {
			out = have
			return err
		}
		out = firmware.Repair{Device: id, Product: d.Product, Version: v, At: at, By: by}
		if out.Job, err = repairJob(); err != nil {
			return err
		}
		if err := tx.PutRepair(out); err != nil {
			return err
		}
		if s.Online {
			if err := tx.Enqueue(downlink.Entry{Device: id, Vhost: s.Vhost, Kind: downlink.OTA, Ref: string(out.Job), At: at}); err != nil {
				return err
			}
		}
		return audit(tx, at, by, "recovery.firmware", string(id), "version "+string(v)+" over the fallback")
	})
	if err != nil {
		return firmware.Repair{}, err
	}
	c.c.Committed()
	return out, nil
}

func mayRepair(d fleet.Device, s fleet.Status, rel firmware.Release) error {
	switch {
	case d.Disabled || d.RecoveryOff != "":
		return fleet.Coded(fleet.Conflict, "barred", "device %s is disabled or revoked: it gets nothing over the fallback", d.ID)
	case s.Vhost != wire.VhostFallback:
		return fleet.Coded(fleet.Conflict, "not_on_fallback", "device %s was not on the fallback when it was last heard of: update it by a rollout", d.ID)
	case s.Image == rel.ImageHash:
		return fleet.Coded(fleet.Conflict, "runs_already", "device %s runs %s already: its image is not what keeps it from the front", d.ID, rel.Version)
	}
	if misfit, why := rel.Fit(asTarget(d, s), true); misfit != firmware.Fits {
		return fleet.Coded(fleet.Unprocessable, string(misfit), "%s", why)
	}
	return nil
}

// repairJob returns a name for the offer that no rollout will have.
func repairJob() (fleet.RolloutID, error) {
	var b [6]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "no random numbers")
	}
	return fleet.RolloutID("repair-" + hex.EncodeToString(b[:])), nil
}

// CancelRepair takes an order back. A download under way ends. It returns a NotFound error if there is no order.
func (c *Catalog) CancelRepair(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error {
	return c.c.Update(ctx, func(tx Tx) error {
		r, ok, err := tx.Repair(id)
		if err != nil {
			return err
		}
		if !ok {
			return fleet.Errorf(fleet.NotFound, "nothing is ordered for device %s over the fallback", id)
		}
		if err := tx.DropRepair(id); err != nil {
			return err
		}
		return audit(tx, at, by, "recovery.firmware-cancel", string(id), "version "+string(r.Version))
	})
}

// Repairs returns the orders that are not over, in the order of the devices' ids.
func (c *Catalog) Repairs(ctx context.Context) (out []firmware.Repair, err error) {
	err = c.c.View(ctx, func(tx Tx) error {
		out, err = tx.Repairs()
		return err
	})
	return out, err
}
