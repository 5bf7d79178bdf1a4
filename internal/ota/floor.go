package ota

import (
	"context"
	"time"
	"unicode"
	"unicode/utf8"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// MaxFloorWhy is the longest reason for a floor, in bytes.
const MaxFloorWhy = 200

// SetFloor marks a release as a floor, which no device below it may skip on its way to a newer one, or takes the mark off.
// It is for rollouts that are created afterwards. Repeating it changes nothing but the reason; an unknown release is
// NotFound.
func (c *Catalog) SetFloor(ctx context.Context, at time.Time, p fleet.ProductID, v firmware.Version, on bool, why, by string) (firmware.Release, error) {
	if len(why) > MaxFloorWhy || !utf8.ValidString(why) || !printable(why) {
		return firmware.Release{}, fleet.Errorf(fleet.Invalid, "why: use at most %d bytes of printable text", MaxFloorWhy)
	}
	var out firmware.Release
	err := c.c.Update(ctx, func(tx Tx) (err error) {
		if out, err = tx.Release(p, v); err != nil || out.Floor == on && (out.FloorWhy == why || !on) {
			return err
		}
		out.Floor, out.FloorWhy, out.FloorBy, out.FloorAt = on, why, by, at.UTC()
		what := "firmware.floor"
		if !on {
			out.FloorWhy, out.FloorBy, out.FloorAt = "", "", time.Time{}
			what = "firmware.unfloor"
		}
		if err := tx.PutRelease(out); err != nil {
			return err
		}
		return audit(tx, at, by, what, string(p)+" "+string(v), why)
	})
	return out, err
}

func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
