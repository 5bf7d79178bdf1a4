package ota

import (
	"context"
	"fmt"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// slotAlign is what an OTA slot's size is a multiple of (esp32.md §5).
const slotAlign = 0x1000

// SetOTASlot says how large the OTA slots of a product's devices are, in bytes. From then on no larger image of it is
// published. The same again changes nothing. Errors: Invalid; Conflict (ota_slot_smaller) if a release is larger, unless
// force says that the releases are known to be for other devices.
func (c *Catalog) SetOTASlot(ctx context.Context, at time.Time, p fleet.ProductID, bytes int64, force bool, by string) (firmware.OTASlot, error) {
	if _, err := fleet.ParseProductID(string(p)); err != nil {
		return firmware.OTASlot{}, err
	}
	if bytes < slotAlign || bytes > firmware.MaxImageSize || bytes%slotAlign != 0 {
		return firmware.OTASlot{}, fleet.Errorf(fleet.Invalid, "an OTA slot has a multiple of %d bytes, at most %d", slotAlign, firmware.MaxImageSize)
	}
	var out firmware.OTASlot
	err := c.c.Update(ctx, func(tx Tx) error {
		old, ok, err := tx.OTASlot(p)
		if err != nil || ok && old.Bytes == bytes {
			out = old
			return err
		}
		all, err := tx.Releases(p)
		if err != nil {
			return err
		}
		for _, r := range all {
			if r.Size > bytes && !force {
				return fleet.Coded(fleet.Conflict, "ota_slot_smaller", "%s %s has %d bytes, more than a slot of %d: is that the table of the devices in the field? Say force if it is", p, r.Version, r.Size, bytes)
			}
		}
		out = firmware.OTASlot{Product: p, Bytes: bytes, SetAt: at.UTC(), SetBy: by}
		if err := tx.PutOTASlot(out); err != nil {
			return err
		}
		return audit(tx, at, by, "firmware.ota-slot", string(p), fmt.Sprint(bytes, " bytes"))
	})
	return out, err
}

// ClearOTASlot forgets it: images of the product may be of any size again. NotFound if there is none.
func (c *Catalog) ClearOTASlot(ctx context.Context, at time.Time, p fleet.ProductID, by string) error {
	return c.c.Update(ctx, func(tx Tx) error {
		_, ok, err := tx.OTASlot(p)
		if err != nil {
			return err
		}
		if !ok {
			return fleet.Errorf(fleet.NotFound, "nobody said how large the OTA slots of %s are", p)
		}
		if err := tx.DropOTASlot(p); err != nil {
			return err
		}
		return audit(tx, at, by, "firmware.ota-slot-cleared", string(p), "")
	})
}

// OTASlots returns those of all products.
func (c *Catalog) OTASlots(ctx context.Context) (out []firmware.OTASlot, err error) {
	err = c.c.View(ctx, func(tx Tx) error {
		out, err = tx.OTASlots()
		return err
	})
	return out, err
}

// fitsSlot refuses an image that is larger than the OTA slots of its product.
func fitsSlot(tx Tx, m firmware.Manifest) error {
	s, ok, err := tx.OTASlot(m.Product)
	if err != nil || !ok || m.Size <= s.Bytes {
		return err
	}
	return fleet.Coded(fleet.Unprocessable, "esp_slot_too_small",
		"the image has %d bytes, the OTA slots of %s have %d: make it %d bytes smaller", m.Size, m.Product, s.Bytes, m.Size-s.Bytes)
}
