package ota

import (
	"context"

	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Wanted returns what the job that a device is at brings it, for a client that asks without knowing a name (esp32.md §6.1,
// §6.4); false if it is at none, has the image already, or may have nothing.
func (c *Catalog) Wanted(ctx context.Context, device fleet.DeviceID) (found Grant, ok bool, err error) {
	err = c.c.View(ctx, func(tx Tx) error {
		found, ok = Grant{}, false
		d, err := tx.Device(device)
		if err != nil || d.Disabled {
			return err
		}
		rel, job, at, err := current(tx, device)
		if err != nil || !at || job.State == rollout.Verifying {
			return err
		}
		st, err := tx.Status(device)
		if err != nil || st.Image == rel.ImageHash {
			return err
		}
		found, ok, err = granted(tx, d, string(rel.SHA256))
		return err
	})
	return found, ok, err
}
