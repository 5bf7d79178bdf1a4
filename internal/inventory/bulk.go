package inventory

import (
	"context"
	"time"

	"muster/internal/fleet"
	"muster/internal/target"
	"muster/internal/wire"
)

// SampleSize is how many ids a preview or a bulk change shows.
const SampleSize = 20

// page is how many devices are looked at in one transaction.
const page = 512

// Preview is which devices an expression chooses.
type Preview struct {
	Scanned int // devices looked at
	Count   int
	Online  int // of those that are chosen, with their certificate
	Sample  []fleet.DeviceID
}

func (p *Preview) take(r Row) {
	p.Count++
	if r.Status.Online && r.Status.Vhost == wire.VhostDevices {
		p.Online++
	}
	if len(p.Sample) < SampleSize {
		p.Sample = append(p.Sample, r.Device.ID)
	}
}

// Preview counts the devices that f chooses. It reads the fleet in pages, each a view of its own.
func (inv *Inventory) Preview(ctx context.Context, f Filter) (Preview, error) {
	var p Preview
	err := inv.pages(ctx, inv.c.View, "", func(_ Tx, r Row) (bool, error) {
		p.Scanned++
		if f.Match(r) {
			p.take(r)
		}
		return true, nil
	})
	return p, err
}

// pages calls f with the devices after one until it returns false, page by page, each in a transaction of its own: a walk
// through the whole fleet must not hold the store's pages.
func (inv *Inventory) pages(ctx context.Context, in func(context.Context, func(Tx) error) error, after fleet.DeviceID, f func(Tx, Row) (bool, error)) error {
	for more := true; more; {
		err := in(ctx, func(tx Tx) error {
			ds, err := tx.Devices(after, page)
			if err != nil {
				return err
			}
			more = len(ds) == page
			for _, d := range ds {
				s, err := tx.Status(d.ID)
				if err != nil {
					return err
				}
				goOn, err := f(tx, Row{Device: d, Status: s})
				if err != nil || !goOn {
					more = false
					return err
				}
				after = d.ID
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// Bulk changes the description of many devices.
type Bulk struct {
	Where   *target.Expr     // which; nil: those of Devices
	Devices []fleet.DeviceID // at most MaxBulk
	Change  Change           // without a revision and a product
	DryRun  bool
}

// BulkReport is what became of a bulk change.
type BulkReport struct {
	Preview
	Changed int // descriptions that are others now
}

// UpdateMany changes the devices that b chooses, in transactions of bounded size, and may be repeated: who is as wanted
// stays so. With DryRun nothing changes and Changed says how many would. An error leaves what was changed before it.
func (inv *Inventory) UpdateMany(ctx context.Context, at time.Time, b Bulk, by string) (BulkReport, error) {
	var rep BulkReport
	if (b.Where == nil) == (len(b.Devices) == 0) || len(b.Devices) > MaxBulk {
		return rep, fleet.Errorf(fleet.Invalid, "name the devices, 1 to %d of them, or choose them by where: one of both", MaxBulk)
	}
	if len(b.Change.Labels)+len(b.Change.Join)+len(b.Change.Leave) == 0 && b.Change.Hardware == nil {
		return rep, fleet.Errorf(fleet.Invalid, "say what to change: labels, join or leave")
	}
	one := func(tx Tx, r Row) error {
		d, changed, err := b.Change.apply(r.Device)
		if err != nil {
			return fleet.Wrap(fleet.KindOf(err), err, "device %s: %s", r.Device.ID, err.Error())
		}
		rep.take(r)
		if !changed {
			return nil
		}
		rep.Changed++
		if b.DryRun {
			return nil
		}
		_, err = store(tx, at, d, "device.update", by, Added{})
		return err
	}
	in := inv.c.Update
	if b.DryRun {
		in = inv.c.View
	}
	if b.Where == nil {
		err := in(ctx, func(tx Tx) error {
			rep = BulkReport{}
			for _, id := range b.Devices {
				d, err := tx.Device(id)
				if err != nil {
					return fleet.Wrap(fleet.KindOf(err), err, "device %s: no such device", id)
				}
				s, err := tx.Status(id)
				if err != nil {
					return err
				}
				rep.Scanned++
				if err := one(tx, Row{Device: d, Status: s}); err != nil {
					return err
				}
			}
			return nil
		})
		return rep, err
	}
	f := Filter{Where: b.Where, At: at}
	err := inv.pages(ctx, in, "", func(tx Tx, r Row) (bool, error) {
		rep.Scanned++
		if !f.Match(r) {
			return true, nil
		}
		return true, one(tx, r)
	})
	return rep, err
}
