package enroll

import (
	"context"
	"fmt"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// reasonCessation is cessationOfOperation (RFC 5280 §5.3.1).
const reasonCessation = 5

// Remove takes a device out of the fleet: every certificate of it that still holds is revoked, its connections are closed
// as Revoke does, and it is forgotten but for the records of its certificates, which revocation lists and the check for
// keys that were used before need. What is stored is stored in one transaction, so a crash leaves the device as it was or
// gone, with Run closing what is open.
//
// Removing it again says how far the first time got. A device that was added again under its name is another one, and needs
// a new key. It returns a NotFound error for one that never had a certificate and does not exist.
func (e *Enroller) Remove(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (Evidence, error) {
	x := exclusion{device: id, at: at, start: time.Now()}
	seen, stop := e.c.Refusals(id)
	defer stop()
	x.refused = seen
	var before time.Time
	err := e.c.Update(ctx, func(tx Tx) (err error) {
		dev, err := tx.Device(id)
		if fleet.Is(err, fleet.NotFound) {
			before, err = removedAt(tx, id, err)
			return err
		}
		if err != nil {
			return err
		}
		if x.live, err = live(tx, id); err != nil {
			return err
		}
		return e.remove(tx, at, dev, by)
	})
	if err != nil {
		return Evidence{}, err
	}
	x.stored = time.Since(x.start)
	if before.IsZero() {
		e.c.Committed()
		e.c.Revoked()
	}
	out, err := e.shutOut(ctx, x)
	if !before.IsZero() {
		out.StoredAt = before
	}
	return out, err
}

// removedAt returns when a device that does not exist was removed, or absent if it never was there: its last certificate
// tells.
func removedAt(tx Tx, id fleet.DeviceID, absent error) (time.Time, error) {
	own, err := tx.CertificatesOf(id)
	if err != nil {
		return time.Time{}, err
	}
	if len(own) == 0 {
		return time.Time{}, absent
	}
	var last time.Time
	for _, c := range own {
		if c.RevokedAt.After(last) {
			last = c.RevokedAt
		}
	}
	if last.IsZero() { // all of them had expired
		last = own[len(own)-1].NotAfter
	}
	return last, nil
}

func (e *Enroller) remove(tx Tx, at time.Time, dev fleet.Device, by string) error {
	own, err := tx.CertificatesOf(dev.ID)
	if err != nil {
		return err
	}
	revoked := 0
	for _, c := range own {
		if c.State == pki.Revoked || c.State == pki.Expired {
			continue
		}
		if err := revokeOne(tx, at, c, reasonCessation, by); err != nil {
			return err
		}
		revoked++
	}
	if err := tx.PutClosing(pki.Closing{User: string(dev.ID), Device: dev.ID, Why: "device removed", Since: at}); err != nil {
		return err
	}
	if err := tx.DropDevice(dev.ID); err != nil {
		return err
	}
	return audit(tx, at, by, "device.remove", dev.ID, fmt.Sprintf("product %s, %d certificates revoked", dev.Product, revoked))
}
