package ota

import (
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
// SHA-256. A device may have what the job it is at offers, and nothing else: without one, with one for another image, or
// while it is disabled, the answer is the same NotFound, so that guessing tells nothing.
func (c *Catalog) Granted(ctx context.Context, device fleet.DeviceID, name string) (Grant, error) {
	var found Grant
	err := c.c.View(ctx, func(tx Tx) error {
		rel, job, ok, err := current(tx, device)
		if err != nil {
			return err
		}
		d, err := tx.Device(device)
		if err != nil && !fleet.Is(err, fleet.NotFound) {
			return err
		}
		if !ok || err != nil || d.Disabled || !rel.Names(name) {
			return fleet.Errorf(fleet.NotFound, "there is no such image for this device")
		}
		r, err := tx.Rollout(job.Rollout)
		if err != nil {
			return err
		}
		found = Grant{Release: rel, Rollout: r.ID, BytesPerSecond: r.Plan.BytesPerSecond, Begun: job.Percent > 0 || job.State == rollout.Downloading}
		return nil
	})
	return found, err
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
// to offer: no job, or the image is installed and only the proof is missing. Errors say what an operator should know
// (muster device why): Unprocessable if the message does not fit the device's receive buffer, or the release does not fit
// the device. It does not look at the order of versions: whether to go back is the rollout's to decide.
func (c *Catalog) Offer(tx Tx, device fleet.DeviceID, status fleet.Status) (payload []byte, ok bool, err error) {
	rel, job, ok, err := current(tx, device)
	if err != nil || !ok {
		return nil, false, err
	}
	switch job.State {
	case rollout.Installed, rollout.Rebooting, rollout.Verifying:
		return nil, false, nil
	}
	d, err := tx.Device(device)
	if err != nil {
		return nil, false, err
	}
	target := firmware.Device{Product: d.Product, Chip: status.Chip, ChipRevision: status.ChipRevision, Version: status.Version, SecureVersion: status.SecureVersion}
	if misfit, why := rel.Fit(target, true); misfit != firmware.Fits {
		return nil, false, fleet.Coded(fleet.Unprocessable, string(misfit), "%s", why)
	}
	sum, err := hex.DecodeString(string(rel.SHA256))
	if err != nil {
		return nil, false, fleet.Wrap(fleet.Internal, err, "release %s %s has no SHA-256", rel.Product, rel.Version)
	}
	offer := wire.OTAOffer{Job: job.Rollout, Version: string(rel.Version), Size: rel.Size, SHA256: sum, Path: rel.Path()}
	if offer.Spread, err = c.spread(tx, job, rel.Size); err != nil {
		return nil, false, err
	}
	room := wire.Budget(wire.DownTopic(device, wire.DownOTA), status.Buffer)
	payload = offer.Within(room)
	if len(payload) > room {
		return nil, false, fleet.Coded(fleet.Unprocessable, "buffer_too_small",
			"the offer has %d bytes and the device can take %d; use a shorter rollout id or version, or a larger receive buffer (buf in its hello)", len(payload), room)
	}
	return payload, true, nil
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
