package dispatch

import (
	"fmt"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/target"
)

// fitness is what a device would get from a rollout now.
type fitness struct {
	floor int    // number of the floor that it must take first; 0: the release itself
	why   string // why it gets nothing, for good; empty if it may
	code  string // the same as a word
	size  int64  // of the download
}

// fits finds out whether a device may have what a rollout brings, and what it must take first.
func (d *Dispatcher) fits(tx Tx, r rollout.Rollout, j rollout.Job, dev fleet.Device, s fleet.Status, at time.Time) (fitness, error) {
	if r.Dynamic && r.Where != "" {
		e, err := d.expression(r.Where)
		if err != nil {
			return fitness{}, err
		}
		if in, _ := e.Match(target.Facts(dev, s, at)); !in { // without a value it is not in it, as when it was chosen
			return fitness{why: "it is not in the target any more", code: "not-in-target"}, nil
		}
	}
	switch r.Mode {
	case rollout.PreviousSlot:
		return previousFits(j, s), nil
	case rollout.Renewal:
		return renewalFits(tx, dev)
	}
	f := fitOf(dev, s)
	if n := nextFloor(r.Floors, f); n > 0 {
		rel, err := tx.Release(r.Floors[n-1].Product, firmware.Version(r.Floors[n-1].Version))
		if err != nil {
			return fitness{}, err
		}
		code, why := rel.Fit(f, false)
		if why == "" {
			if code, why, err = bootable(tx, rel); err != nil {
				return fitness{}, err
			}
		}
		if why != "" {
			return fitness{code: string(code), why: fmt.Sprintf("it must take %s first, and that does not fit: %s", rel.Version, why)}, nil
		}
		return fitness{floor: n, size: rel.Size}, nil
	}
	rel, err := tx.Release(r.Release.Product, firmware.Version(r.Release.Version))
	if err != nil {
		return fitness{}, err
	}
	code, why := rel.Fit(f, r.Plan.AllowDowngrade)
	if why == "" {
		if code, why, err = bootable(tx, rel); err != nil {
			return fitness{}, err
		}
	}
	return fitness{code: string(code), why: why, size: rel.Size}, nil
}

// bootable judges an image by the Secure Boot keys that its product has now.
func bootable(tx Tx, rel firmware.Release) (firmware.Misfit, string, error) {
	keys, err := tx.SecureBootKeys(rel.Product)
	if err != nil {
		return "", "", err
	}
	misfit, why := rel.Bootable(keys)
	return misfit, why, nil
}

// nextFloor returns the number, from 1, of the first floor above what f runs; 0 if there is none. A floor for another chip
// is none. A version without an order (a developer's build) passes no floor: only the release's own minimum judges it.
func nextFloor(floors []rollout.Release, f firmware.Device) int {
	runs, err := firmware.ParseVersion(f.Version)
	if err != nil {
		return 0
	}
	for i, floor := range floors {
		if concerns(floor, f) && firmware.Version(floor.Version).Compare(runs) > 0 {
			return i + 1
		}
	}
	return 0
}

// concerns reports whether a floor is for the chip of a device. One that did not name its chip has to prove that it is not.
func concerns(floor rollout.Release, f firmware.Device) bool {
	return floor.Chip == "" || f.Chip == "" || firmware.SameChip(floor.Chip, f.Chip)
}

// previousFits guards the way back to the other slot by what the device says is in it.
func previousFits(j rollout.Job, s fleet.Status) fitness {
	switch {
	case j.Image == "":
		return fitness{code: "previous-unknown", why: "what it ran before is not known"}
	case s.Previous == "":
		return fitness{code: "previous-unknown", why: "its hello does not say what is in its other slot"}
	case s.Previous != j.Image:
		return fitness{code: "previous-gone", why: "its other slot does not hold the image that it ran before"}
	case s.PreviousSecureVersion < s.SecureVersion:
		return fitness{code: string(firmware.SecureTooLow), why: fmt.Sprintf("the image in its other slot has secure version %d, its anti-rollback counter is %d", s.PreviousSecureVersion, s.SecureVersion)}
	}
	return fitness{}
}

func fitOf(d fleet.Device, s fleet.Status) firmware.Device {
	return firmware.Device{Product: d.Product, Chip: s.Chip, ChipRevision: s.ChipRevision, Version: s.Version, SecureVersion: s.SecureVersion}
}

// expression compiles a target expression once.
func (d *Dispatcher) expression(text string) (*target.Expr, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.exprs[text]; e != nil {
		return e, nil
	}
	e, err := target.Compile(text)
	if err != nil {
		return nil, err
	}
	if len(d.exprs) > 1000 {
		clear(d.exprs)
	}
	d.exprs[text] = e
	return e, nil
}

// zone returns the location of an IANA name, nil (UTC) for an empty or unknown one.
func (d *Dispatcher) zone(name string) *time.Location {
	if name == "" || name == "Local" {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if z, ok := d.zones[name]; ok {
		return z
	}
	z, err := time.LoadLocation(name)
	if err != nil {
		z = nil
	}
	if len(d.zones) > 1000 { // names come from labels
		clear(d.zones)
	}
	d.zones[name] = z
	return z
}

// zoneFor returns the zone of a device's window.
func (d *Dispatcher) zoneFor(w rollout.Window, dev fleet.Device) *time.Location {
	if w.ZoneLabel != "" {
		if z := d.zone(dev.Labels[w.ZoneLabel]); z != nil {
			return z
		}
	}
	return d.zone(w.Zone)
}
