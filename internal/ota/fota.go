package ota

import (
	"context"
	"encoding/base64"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// FOTAOrder is a signature for esp32FOTA that is to go out before a release's image.
type FOTAOrder struct {
	Signature []byte
	PublicKey []byte // PEM: what the sketches of the product hold
	NewKey    bool   // it is meant to be another key than that of the product's other releases
	By        string
}

// SignForFOTA keeps the signature that esp32FOTA clients get before the image of a release. It is checked as the device will
// check it. Repeating it changes nothing. Errors: NotFound; Unprocessable (esp32fota_key, esp32fota_signature); Conflict
// (esp32fota_other_key) if the product's other releases have another key, which sketches in the field would refuse, unless
// that is meant.
func (c *Catalog) SignForFOTA(ctx context.Context, at time.Time, p fleet.ProductID, v firmware.Version, o FOTAOrder) (firmware.Release, error) {
	key, err := firmware.ParseFOTAKey(o.PublicKey)
	if err != nil {
		return firmware.Release{}, err
	}
	var out firmware.Release
	err = c.c.Update(ctx, func(tx Tx) (err error) {
		if out, err = tx.Release(p, v); err != nil {
			return err
		}
		if err := key.Verify(out.SHA256, o.Signature); err != nil {
			return err
		}
		text := base64.StdEncoding.EncodeToString(o.Signature)
		if out.FOTA.Base64 == text && out.FOTA.Key == key.Digest {
			return nil
		}
		if err := sameFOTAKey(tx, out, key.Digest); err != nil && !o.NewKey {
			return err
		}
		out.FOTA = firmware.FOTASignature{Base64: text, Key: key.Digest, By: o.By, At: at.UTC()}
		if err := tx.PutRelease(out); err != nil {
			return err
		}
		return audit(tx, at, o.By, "firmware.esp32fota", string(p)+" "+string(v), "key "+string(key.Digest))
	})
	return out, err
}

// UnsignForFOTA takes the signature away: esp32FOTA clients get the image alone. Repeating it changes nothing.
func (c *Catalog) UnsignForFOTA(ctx context.Context, at time.Time, p fleet.ProductID, v firmware.Version, by string) (firmware.Release, error) {
	var out firmware.Release
	err := c.c.Update(ctx, func(tx Tx) (err error) {
		if out, err = tx.Release(p, v); err != nil || out.FOTA == (firmware.FOTASignature{}) {
			return err
		}
		out.FOTA = firmware.FOTASignature{}
		if err := tx.PutRelease(out); err != nil {
			return err
		}
		return audit(tx, at, by, "firmware.unesp32fota", string(p)+" "+string(v), "")
	})
	return out, err
}

// sameFOTAKey refuses a key that is not the one of another release of the product.
func sameFOTAKey(tx Tx, rel firmware.Release, key fleet.Hash) error {
	all, err := tx.Releases(rel.Product)
	if err != nil {
		return err
	}
	newestFirst(all)
	for _, r := range all {
		if r.Version != rel.Version && r.FOTA.Key != "" && r.FOTA.Key != key {
			return fleet.Coded(fleet.Conflict, "esp32fota_other_key",
				"%s %s is signed for esp32FOTA by key %s, this by %s: sketches that hold the other key would refuse it; if that is meant, give it with new_key (muster firmware esp32fota --new-key)", r.Product, r.Version, r.FOTA.Key, key)
		}
		if r.Version != rel.Version && r.FOTA.Key == key {
			return nil
		}
	}
	return nil
}
