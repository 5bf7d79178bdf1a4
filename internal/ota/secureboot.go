package ota

import (
	"context"
	"encoding/pem"
	"strings"
	"time"

	"muster/internal/esp/secureboot"
	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/fleet"
)

// AddSecureBootKey registers a key that devices of product p trust to sign their images: text is a public key in PEM, or
// the 64 hex digits of its digest. From then on an image of p needs the signature of such a key. The same again changes
// nothing. Errors: Invalid and Unprocessable for what is no such key; Conflict for one that was revoked, which is for good.
func (c *Catalog) AddSecureBootKey(ctx context.Context, at time.Time, p fleet.ProductID, text, by string) (firmware.SecureBootKey, error) {
	if _, err := fleet.ParseProductID(string(p)); err != nil {
		return firmware.SecureBootKey{}, err
	}
	k, err := readSecureBootKey(text)
	if err != nil {
		return firmware.SecureBootKey{}, err
	}
	k.Product, k.AddedAt, k.AddedBy = p, at, by
	err = c.c.Update(ctx, func(tx Tx) error {
		old, err := tx.SecureBootKey(p, k.Digest)
		switch {
		case fleet.Is(err, fleet.NotFound):
			if err := tx.PutSecureBootKey(k); err != nil {
				return err
			}
			return audit(tx, at, by, "secure-boot-key.add", string(k.Digest), "product "+string(p))
		case err != nil:
			return err
		case old.Revoked:
			return fleet.Coded(fleet.Conflict, "key_revoked", "Secure Boot key %s of %s was revoked, which is for good; register another", k.Digest, p)
		}
		k = old
		return nil
	})
	if err != nil {
		return firmware.SecureBootKey{}, err
	}
	return k, nil
}

func readSecureBootKey(text string) (firmware.SecureBootKey, error) {
	text = strings.TrimSpace(text)
	if !strings.HasPrefix(text, "-----BEGIN ") {
		d, err := secureboot.ParseKeyDigest(text)
		return firmware.SecureBootKey{Digest: fleet.Hash(d.String())}, err
	}
	block, rest := pem.Decode([]byte(text))
	switch {
	case block != nil && strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return firmware.SecureBootKey{}, fleet.Errorf(fleet.Invalid, "this is a private key; register its public half and consider the private one exposed")
	case block == nil || block.Type != "PUBLIC KEY" || len(rest) != 0:
		return firmware.SecureBootKey{}, fleet.Errorf(fleet.Invalid, "Secure Boot key: use exactly one PEM block of type PUBLIC KEY, or the 64 hex digits of the digest")
	}
	k, err := secureboot.ParseKey(block.Bytes)
	if err != nil {
		return firmware.SecureBootKey{}, err
	}
	return firmware.SecureBootKey{Digest: fleet.Hash(k.Digest().String()), Scheme: string(k.Scheme())}, nil
}

// RevokeSecureBootKey ends the use of a key: no image that it alone signed is published or offered to a device from now on;
// NotFound if there is none. Revoking again changes nothing. What devices run stays, and eFuses are the firmware's to revoke.
func (c *Catalog) RevokeSecureBootKey(ctx context.Context, at time.Time, p fleet.ProductID, digest fleet.Hash, by string) (firmware.SecureBootKey, error) {
	var k firmware.SecureBootKey
	err := c.c.Update(ctx, func(tx Tx) error {
		var err error
		if k, err = tx.SecureBootKey(p, digest); err != nil || k.Revoked {
			return err
		}
		k.Revoked, k.RevokedAt, k.RevokedBy = true, at, by
		if err := tx.PutSecureBootKey(k); err != nil {
			return err
		}
		return audit(tx, at, by, "secure-boot-key.revoke", string(digest), "product "+string(p))
	})
	return k, err
}

// SecureBootKeys returns the Secure Boot keys of a product, of all if p is empty, revoked ones included.
func (c *Catalog) SecureBootKeys(ctx context.Context, p fleet.ProductID) ([]firmware.SecureBootKey, error) {
	var all []firmware.SecureBootKey
	err := c.c.View(ctx, func(tx Tx) error {
		var err error
		all, err = tx.SecureBootKeys(p)
		return err
	})
	return all, err
}

// trusted refuses an image that no registered key of its product signed, if the product has registered any. Its devices
// would not start it, and some burn a key when they see it (esp32.md §2).
func trusted(tx Tx, p fleet.ProductID, app *espapp.App) error {
	keys, err := tx.SecureBootKeys(p)
	if err != nil || len(keys) == 0 {
		return err
	}
	if app == nil {
		return fleet.Coded(fleet.Unprocessable, "esp_unsigned", "product %s has Secure Boot keys, and this is not an ESP32 image that one of them could have signed", p)
	}
	slots := make([]secureboot.Slot, 0, len(keys))
	for _, k := range keys {
		d, err := secureboot.ParseKeyDigest(string(k.Digest))
		if err != nil {
			return fleet.Wrap(fleet.Internal, err, "a Secure Boot key of %s cannot be read", p)
		}
		slots = append(slots, secureboot.Slot{Key: d, Revoked: k.Revoked})
	}
	return app.Accepted(slots)
}
