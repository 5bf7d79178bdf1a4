package ota

import (
	"context"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// AddKey registers the public key in the PEM text for releases of product, of every product if it is empty. The same
// again changes nothing. Errors: those of firmware.ParseKey; Conflict if the key is registered for another product or
// was revoked, which is for good.
func (c *Catalog) AddKey(ctx context.Context, at time.Time, text []byte, product fleet.ProductID, by string) (firmware.Key, error) {
	k, err := firmware.ParseKey(text, product)
	if err != nil {
		return firmware.Key{}, err
	}
	k.AddedAt, k.AddedBy = at, by
	err = c.c.Update(ctx, func(tx Tx) error {
		old, err := tx.Key(k.ID)
		if fleet.Is(err, fleet.NotFound) {
			if err := tx.PutKey(k); err != nil {
				return err
			}
			return audit(tx, at, by, "key.add", k.ID, "product "+string(product))
		}
		switch {
		case err != nil:
			return err
		case old.Revoked:
			return fleet.Coded(fleet.Conflict, "key_revoked", "key %s was revoked, which is for good; make another with: muster firmware keygen", k.ID)
		case old.Product != product:
			return fleet.Coded(fleet.Conflict, "key_exists", "key %s is registered for another product; use a key of its own for each", k.ID)
		}
		k = old
		return nil
	})
	if err != nil {
		return firmware.Key{}, err
	}
	return k, nil
}

// RevokeKey makes a key unfit to sign from now on; NotFound if there is none. What it signed before stays published:
// the operator who knows why the key went decides on each release. Revoking again changes nothing.
func (c *Catalog) RevokeKey(ctx context.Context, at time.Time, id, by string) (firmware.Key, error) {
	var k firmware.Key
	err := c.c.Update(ctx, func(tx Tx) error {
		var err error
		if k, err = tx.Key(id); err != nil || k.Revoked {
			return err
		}
		k.Revoked, k.RevokedAt, k.RevokedBy = true, at, by
		if err := tx.PutKey(k); err != nil {
			return err
		}
		return audit(tx, at, by, "key.revoke", k.ID, "")
	})
	return k, err
}

// Keys returns all signing keys, revoked ones included, in id order.
func (c *Catalog) Keys(ctx context.Context) ([]firmware.Key, error) {
	var all []firmware.Key
	err := c.c.View(ctx, func(tx Tx) error {
		var err error
		all, err = tx.Keys()
		return err
	})
	return all, err
}
