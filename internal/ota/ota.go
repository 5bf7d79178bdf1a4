// Package ota publishes releases, keeps the keys that may sign them, and says what a device gets now: the offer that
// rings its bell, and the grant without which nothing can be downloaded (DESIGN §8).
package ota

import (
	"context"
	"io"
	"time"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Tx is what ota needs of the store.
type Tx interface {
	Device(fleet.DeviceID) (fleet.Device, error)
	Status(fleet.DeviceID) (fleet.Status, error)
	ActiveJob(fleet.DeviceID) (rollout.Job, bool, error)
	LatestJob(fleet.DeviceID) (rollout.Job, bool, error)
	Rollout(fleet.RolloutID) (rollout.Rollout, error)
	Release(fleet.ProductID, firmware.Version) (firmware.Release, error)
	PutRelease(firmware.Release) error
	Releases(fleet.ProductID) ([]firmware.Release, error)
	Key(id string) (firmware.Key, error)
	PutKey(firmware.Key) error
	Keys() ([]firmware.Key, error)
	SecureBootKey(fleet.ProductID, fleet.Hash) (firmware.SecureBootKey, error)
	PutSecureBootKey(firmware.SecureBootKey) error
	SecureBootKeys(fleet.ProductID) ([]firmware.SecureBootKey, error)
	OTASlot(fleet.ProductID) (firmware.OTASlot, bool, error)
	OTASlots() ([]firmware.OTASlot, error)
	PutOTASlot(firmware.OTASlot) error
	DropOTASlot(fleet.ProductID) error
	Repair(fleet.DeviceID) (firmware.Repair, bool, error)
	PutRepair(firmware.Repair) error
	DropRepair(fleet.DeviceID) error
	Repairs() ([]firmware.Repair, error)
	Enqueue(downlink.Entry) error
	Audit(access.Entry) error
}

// Images is where image files are kept.
type Images interface {
	// PutIf receives r, at most max bytes, and keeps it if accept returns nil for its SHA-256, its size and what it
	// holds. Errors are accept's own, or of kind TooLarge, Full, Invalid (r broke off) or the context's; then nothing is
	// kept.
	PutIf(ctx context.Context, r io.Reader, max int64, accept func(fleet.Hash, int64, io.ReaderAt) error) error
	Remove(fleet.Hash) error
	List() ([]fleet.Hash, error)
}

// Config of a Catalog. All fields but BytesPerSecond and Committed are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
	Images Images
	// MaxImage is the largest image that is taken, in bytes.
	MaxImage int64
	// BytesPerSecond is the budget of all downloads together; 0: none.
	BytesPerSecond int64
	// Committed, if set, is called after a transaction that put something into the outbox. It must not block.
	Committed func()
}

// Catalog is the releases of all products. Its methods may be called from any goroutine.
type Catalog struct{ c Config }

// New returns a Catalog.
func New(c Config) *Catalog {
	if c.Committed == nil {
		c.Committed = func() {}
	}
	return &Catalog{c: c}
}

// Release returns a release, or NotFound.
func (c *Catalog) Release(ctx context.Context, p fleet.ProductID, v firmware.Version) (firmware.Release, error) {
	var r firmware.Release
	err := c.c.View(ctx, func(tx Tx) error {
		var err error
		r, err = tx.Release(p, v)
		return err
	})
	return r, err
}

// Releases returns the releases of a product, of all if p is empty; within a product the newest version comes first.
func (c *Catalog) Releases(ctx context.Context, p fleet.ProductID) ([]firmware.Release, error) {
	var all []firmware.Release
	err := c.c.View(ctx, func(tx Tx) error {
		var err error
		all, err = tx.Releases(p)
		return err
	})
	newestFirst(all)
	return all, err
}

// Prune removes images that no release names: what is left when a publication broke off between the file and its
// record. Call it before the first Publish of a process. It returns how many went.
func (c *Catalog) Prune(ctx context.Context) (int, error) {
	files, err := c.c.Images.List()
	if err != nil {
		return 0, err
	}
	named := map[fleet.Hash]bool{}
	all, err := c.Releases(ctx, "")
	if err != nil {
		return 0, err
	}
	for _, r := range all {
		named[r.SHA256] = true
	}
	n := 0
	for _, h := range files {
		if named[h] {
			continue
		}
		if err := c.c.Images.Remove(h); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

func audit(tx Tx, at time.Time, by, what, on, details string) error {
	return tx.Audit(access.Entry{At: at, Who: by, What: what, On: on, Details: details})
}
