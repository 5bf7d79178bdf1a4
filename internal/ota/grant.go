package ota

import (
	"cmp"
	"context"
	"encoding/hex"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// Grant is what a device may download now.
type Grant struct {
	firmware.Release
	Rollout        fleet.RolloutID
	BytesPerSecond int64 // for all downloads of the rollout together; 0: no limit
	Begun          bool  // the device has some of it already
}

// Granted returns the release whose image device may download under name, the first 16 or all 64 digits of the file's
// SHA-256. A device may have what the job it is at offers, on the fallback what repairs it, and nothing else: without one,
// with one for another image, or while it is disabled, the answer is the same NotFound, so that guessing tells nothing.
func (c *Catalog) Granted(ctx context.Context, device fleet.DeviceID, name string) (Grant, error) {
	var found Grant
	err := c.c.View(ctx, func(tx Tx) error {
		d, err := tx.Device(device)
		if err != nil && !fleet.Is(err, fleet.NotFound) {
			return err
		}
		ok := err == nil && !d.Disabled
		if ok {
			if found, ok, err = granted(tx, d, name); err != nil {
				return err
			}
		}
		if !ok {
			return fleet.Errorf(fleet.NotFound, "there is no such image for this device")
		}
		return nil
	})
	return found, err
}

func granted(tx Tx, d fleet.Device, name string) (Grant, bool, error) {
	c, ok, err := cureOf(tx, d)
	if err != nil {
		return Grant{}, false, err
	}
	if ok && c.release.Names(name) {
		misfit, _, err := bootable(tx, c.release)
		return Grant{Release: c.release, Rollout: c.job}, err == nil && misfit == firmware.Fits, err
	}
	rel, job, ok, err := current(tx, d.ID)
	if err != nil || !ok || !rel.Names(name) {
		return Grant{}, false, err
	}
	if misfit, _, err := bootable(tx, rel); err != nil || misfit != firmware.Fits {
		return Grant{}, false, err
	}
	r, err := tx.Rollout(job.Rollout)
	if err != nil {
		return Grant{}, false, err
	}
	return Grant{Release: rel, Rollout: r.ID, BytesPerSecond: r.Plan.BytesPerSecond, Begun: job.Percent > 0 || job.State == rollout.Downloading}, true, nil
}

// current returns the release of the job that device is at, and the job; false if it is at none. A record that the job
// names and that is missing is a fault of the store, not of the device.
func current(tx Tx, device fleet.DeviceID) (firmware.Release, rollout.Job, bool, error) {
	job, ok, err := tx.ActiveJob(device)
	if err != nil || !ok || !job.State.InFlight() {
		return firmware.Release{}, rollout.Job{}, false, err
	}
	r, err := tx.Rollout(job.Rollout)
	if err != nil {
		return firmware.Release{}, rollout.Job{}, false, fleet.Wrap(fleet.Internal, err, "device %s has a job of rollout %s, which cannot be read", device, job.Rollout)
	}
	if r.Mode != rollout.Download {
		return firmware.Release{}, rollout.Job{}, false, nil // there is nothing to fetch
	}
	want := r.Wanted(job)
	rel, err := tx.Release(want.Product, firmware.Version(want.Version))
	if err != nil {
		return firmware.Release{}, rollout.Job{}, false, fleet.Wrap(fleet.Internal, err, "rollout %s rolls out %s %s, which cannot be read", job.Rollout, want.Product, want.Version)
	}
	return rel, job, true, nil
}

// Offer composes the doorbell of the update that device is at, from the state of the moment; false if there is nothing
// to offer: no job, or the image is installed and only the proof is missing. On the fallback what repairs it goes first.
// Errors say what an operator should know (muster device why): Unprocessable if the message does not fit the device's
// receive buffer, or the release does not fit the device. It does not look at the order of versions: whether to go back is the rollout's to decide.
func (c *Catalog) Offer(tx Tx, device fleet.DeviceID, status fleet.Status) (payload []byte, ok bool, err error) {
	d, err := tx.Device(device)
	if err != nil {
		return nil, false, err
	}
	switch c, ok, err := cureOf(tx, d); {
	case err != nil:
		return nil, false, err
	case ok:
		return ring(tx, d, status, c.release, c.job, 0)
	}
	rel, job, ok, err := current(tx, device)
	if err != nil || !ok {
		return nil, false, err
	}
	switch job.State {
	case rollout.Installed, rollout.Rebooting, rollout.Verifying:
		return nil, false, nil
	}
	spread, err := c.spread(tx, job, rel.Size)
	if err != nil {
		return nil, false, err
	}
	return ring(tx, d, status, rel, job.Rollout, spread)
}

// ring composes the message that offers a release to a device. spread is in seconds.
func ring(tx Tx, d fleet.Device, status fleet.Status, rel firmware.Release, job fleet.RolloutID, spread int) (payload []byte, ok bool, err error) {
	if misfit, why, err := bootable(tx, rel); err != nil || misfit != firmware.Fits {
		return nil, false, cmp.Or(err, fleet.Coded(fleet.Unprocessable, string(misfit), "%s", why))
	}
	if misfit, why := rel.Fit(asTarget(d, status), true); misfit != firmware.Fits {
		return nil, false, fleet.Coded(fleet.Unprocessable, string(misfit), "%s", why)
	}
	sum, err := hex.DecodeString(string(rel.SHA256))
	if err != nil {
		return nil, false, fleet.Wrap(fleet.Internal, err, "release %s %s has no SHA-256", rel.Product, rel.Version)
	}
	offer := wire.OTAOffer{Job: job, Version: string(rel.Version), Size: rel.Size, SHA256: sum, Path: rel.Path(), Spread: spread}
	room := wire.Budget(wire.DownTopic(d.ID, wire.DownOTA), status.Buffer)
	payload = offer.Within(room)
	if len(payload) > room {
		return nil, false, fleet.Coded(fleet.Unprocessable, "buffer_too_small",
			"the offer has %d bytes and the device can take %d; use a shorter rollout id or version, or a larger receive buffer (buf in its hello)", len(payload), room)
	}
	return payload, true, nil
}

// bootable is Release.Bootable with the keys of the release's product as they are now: one may have been registered or
// revoked since the release was published.
func bootable(tx Tx, rel firmware.Release) (firmware.Misfit, string, error) {
	keys, err := tx.SecureBootKeys(rel.Product)
	if err != nil {
		return "", "", err
	}
	misfit, why := rel.Bootable(keys)
	return misfit, why, nil
}

// asTarget is the device as a release sees it.
func asTarget(d fleet.Device, s fleet.Status) firmware.Device {
	return firmware.Device{Product: d.Product, Chip: s.Chip, ChipRevision: s.ChipRevision, Version: s.Version, SecureVersion: s.SecureVersion}
}

// spread returns how long a device is to wait at most before it fetches, in seconds: as long as those that are in flight
// with it keep the byte budget busy, so that they do not all come at once and are sent away.
func (c *Catalog) spread(tx Tx, job rollout.Job, size int64) (int, error) {
	r, err := tx.Rollout(job.Rollout)
	if err != nil {
		return 0, err
	}
	budget := r.Plan.BytesPerSecond
	if c.c.BytesPerSecond > 0 && (budget == 0 || c.c.BytesPerSecond < budget) {
		budget = c.c.BytesPerSecond
	}
	if budget == 0 {
		return 0, nil
	}
	return int(min(int64(max(r.Total.InFlight()-1, 0))*size/budget, wire.MaxSpread)), nil
}
