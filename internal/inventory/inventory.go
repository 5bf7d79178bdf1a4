// Package inventory is the device registry: who belongs to the fleet, what each device last said of itself, and who is
// connected. Credentials are kept in the same record but changed by enroll.
package inventory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/target"
)

// Tx is what inventory needs of the store.
type Tx interface {
	Device(fleet.DeviceID) (fleet.Device, error)
	PutDevice(fleet.Device) error
	Devices(after fleet.DeviceID, limit int) ([]fleet.Device, error)
	Status(fleet.DeviceID) (fleet.Status, error)
	PutStatus(fleet.Status) error
	Audit(access.Entry) error
}

// Config of an Inventory. All fields are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
}

// Inventory is the registry.
type Inventory struct{ c Config }

// New returns an Inventory.
func New(c Config) *Inventory { return &Inventory{c: c} }

// Limits of what operators may write on a device.
const (
	MaxLabels     = 32
	MaxLabelKey   = 63  // bytes: a-z, 0-9 and ._/-
	MaxLabelValue = 128 // bytes of printable text
	MaxHardware   = 64  // bytes of printable text
	MaxGroups     = 32  // a group's name has the form of a label's key
	MaxBulk       = 1000
)

// Spec describes a device to be added.
type Spec struct {
	ID       fleet.DeviceID
	Product  fleet.ProductID
	Hardware string
	Labels   map[string]string
	Groups   []string
}

// check returns an Invalid error that says which device and field is wrong.
func (s Spec) check() error {
	if _, err := fleet.ParseDeviceID(string(s.ID)); err != nil {
		return err
	}
	if _, err := fleet.ParseProductID(string(s.Product)); err != nil {
		return fleet.Wrap(fleet.Invalid, err, "device %s: %s", s.ID, err.Error())
	}
	if !printable(s.Hardware, MaxHardware) {
		return fleet.Errorf(fleet.Invalid, "device %s: hardware must be at most %d bytes of printable text", s.ID, MaxHardware)
	}
	if err := checkGroups(s.Groups); err != nil {
		return err
	}
	return checkLabels(s.Labels)
}

func checkGroups(groups []string) error {
	if len(groups) > MaxGroups {
		return fleet.Errorf(fleet.Invalid, "groups: a device is in at most %d", MaxGroups)
	}
	for _, g := range groups {
		if !isKey(g) {
			return fleet.Errorf(fleet.Invalid, "groups: a name is 1 to %d of a-z, 0-9 and ._/-", MaxLabelKey)
		}
	}
	return nil
}

func isKey(k string) bool {
	return k != "" && len(k) <= MaxLabelKey && strings.Trim(k, "abcdefghijklmnopqrstuvwxyz0123456789._/-") == ""
}

// tidy returns groups sorted, each once; nil if there are none.
func tidy(groups []string) []string {
	out := slices.Compact(slices.Sorted(slices.Values(groups)))
	if len(out) == 0 {
		return nil
	}
	return out
}

func checkLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return fleet.Errorf(fleet.Invalid, "labels: at most %d on a device", MaxLabels)
	}
	for k, v := range labels {
		if !isKey(k) {
			return fleet.Errorf(fleet.Invalid, "labels: a key is 1 to %d of a-z, 0-9 and ._/-", MaxLabelKey)
		}
		if !printable(v, MaxLabelValue) {
			return fleet.Errorf(fleet.Invalid, "label %s: the value must be at most %d bytes of printable text", k, MaxLabelValue)
		}
	}
	return nil
}

func printable(s string, max int) bool {
	return len(s) <= max && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// Added is what became of one device of an Add.
type Added struct {
	Device  fleet.Device
	Created bool
	Changed bool // it existed, and was brought to its description
}

// Add registers devices, all of them or none. A device that exists makes it a Conflict, unless it was added with the same
// description: then nothing changes, so that a request may be repeated. With update, one that exists gets what its description
// names instead: the hardware and the groups if they are not empty, and each of the labels. What it does not name stays, and
// the product never changes.
func (inv *Inventory) Add(ctx context.Context, at time.Time, specs []Spec, update bool, by string) ([]Added, error) {
	if len(specs) == 0 || len(specs) > MaxBulk {
		return nil, fleet.Errorf(fleet.Invalid, "add 1 to %d devices at a time", MaxBulk)
	}
	for i, s := range specs {
		if err := s.check(); err != nil {
			return nil, numbered(specs, i, err)
		}
	}
	var out []Added
	err := inv.c.Update(ctx, func(tx Tx) error {
		out = nil
		for i, s := range specs {
			d, err := addOne(tx, at, s, update, by)
			if err != nil {
				return numbered(specs, i, err)
			}
			out = append(out, d)
		}
		return nil
	})
	return out, err
}

// numbered says which of several devices an error is about.
func numbered(specs []Spec, i int, err error) error {
	e, ok := errors.AsType[*fleet.Error](err)
	if !ok || len(specs) == 1 {
		return err
	}
	return &fleet.Error{Kind: e.Kind, Code: e.Code, Msg: fmt.Sprintf("device %d of %d: %s", i+1, len(specs), e.Msg), Err: e.Err}
}

func addOne(tx Tx, at time.Time, s Spec, update bool, by string) (Added, error) {
	s.Groups = tidy(s.Groups)
	have, err := tx.Device(s.ID)
	switch {
	case err == nil && have.Product == s.Product && have.Hardware == s.Hardware && sameLabels(have.Labels, s.Labels) && slices.Equal(have.Groups, s.Groups):
		return Added{Device: have}, nil
	case err == nil && update && have.Product == s.Product:
		return bring(tx, at, have, s, by)
	case err == nil:
		return Added{}, fleet.Coded(fleet.Conflict, "device_exists", "device %s exists already with another description: change it with an update", s.ID)
	case !fleet.Is(err, fleet.NotFound):
		return Added{}, err
	}
	d := fleet.Device{ID: s.ID, Product: s.Product, Hardware: s.Hardware, Labels: s.Labels, Groups: s.Groups, CreatedAt: at.UTC()}
	return store(tx, at, d, "device.add", by, Added{Created: true})
}

// bring gives a device what s names of its description.
func bring(tx Tx, at time.Time, have fleet.Device, s Spec, by string) (Added, error) {
	c := Change{Labels: map[string]*string{}}
	if s.Hardware != "" {
		c.Hardware = &s.Hardware
	}
	for k, v := range s.Labels {
		c.Labels[k] = &v
	}
	if len(s.Groups) > 0 {
		c.Join, c.Leave = s.Groups, slices.DeleteFunc(slices.Clone(have.Groups), func(g string) bool { return slices.Contains(s.Groups, g) })
	}
	d, changed, err := c.apply(have)
	if err != nil || !changed {
		return Added{Device: have}, err
	}
	return store(tx, at, d, "device.update", by, Added{Changed: true})
}

// store writes a device and its audit line, and completes a with it as it is stored.
func store(tx Tx, at time.Time, d fleet.Device, what, by string, a Added) (Added, error) {
	err := tx.PutDevice(d)
	if err == nil {
		err = tx.Audit(access.Entry{At: at, Who: by, What: what, On: string(d.ID)})
	}
	if err == nil {
		a.Device, err = tx.Device(d.ID)
	}
	return a, err
}

func sameLabels(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || w != v {
			return false
		}
	}
	return true
}

// Change is an update of a device's description. Nil fields stay; a nil label value removes the label.
type Change struct {
	Rev      *uint64 // if set, the device must still have this revision
	Product  *fleet.ProductID
	Hardware *string
	Labels   map[string]*string
	Join     []string // groups that it is put into
	Leave    []string // groups that it is taken out of
}

// apply returns d as c wants it, and whether that is another description than before.
func (c Change) apply(d fleet.Device) (fleet.Device, bool, error) {
	s := Spec{ID: d.ID, Product: d.Product, Hardware: d.Hardware, Labels: map[string]string{}, Groups: slices.Clone(d.Groups)}
	for k, v := range d.Labels {
		s.Labels[k] = v
	}
	if c.Product != nil {
		s.Product = *c.Product
	}
	if c.Hardware != nil {
		s.Hardware = *c.Hardware
	}
	for k, v := range c.Labels {
		if v == nil {
			delete(s.Labels, k)
		} else {
			s.Labels[k] = *v
		}
	}
	s.Groups = slices.DeleteFunc(append(s.Groups, c.Join...), func(g string) bool { return slices.Contains(c.Leave, g) })
	s.Groups = tidy(s.Groups)
	if err := s.check(); err != nil {
		return d, false, err
	}
	same := d.Product == s.Product && d.Hardware == s.Hardware && sameLabels(d.Labels, s.Labels) && slices.Equal(d.Groups, s.Groups)
	d.Product, d.Hardware, d.Labels, d.Groups = s.Product, s.Hardware, s.Labels, s.Groups
	return d, !same, nil
}

// Update changes the description of a device. A revision that is not the present one is a Conflict with code stale.
func (inv *Inventory) Update(ctx context.Context, at time.Time, id fleet.DeviceID, c Change, by string) (fleet.Device, error) {
	var out fleet.Device
	err := inv.c.Update(ctx, func(tx Tx) error {
		d, err := tx.Device(id)
		if err != nil {
			return err
		}
		if c.Rev != nil && *c.Rev != d.Rev {
			return fleet.Coded(fleet.Conflict, "stale", "device %s has revision %d, the request supposes %d: read it again", id, d.Rev, *c.Rev)
		}
		if d, _, err = c.apply(d); err != nil {
			return err
		}
		a, err := store(tx, at, d, "device.update", by, Added{})
		out = a.Device
		return err
	})
	return out, err
}

// Row is a device with its last known state.
type Row struct {
	Device fleet.Device
	Status fleet.Status
}

// Get returns a device, or a NotFound error.
func (inv *Inventory) Get(ctx context.Context, id fleet.DeviceID) (Row, error) {
	var r Row
	err := inv.c.View(ctx, func(tx Tx) (err error) {
		if r.Device, err = tx.Device(id); err != nil {
			return err
		}
		r.Status, err = tx.Status(id)
		return err
	})
	return r, err
}

// Filter chooses devices; empty fields choose all.
type Filter struct {
	Product fleet.ProductID
	Labels  map[string]string
	Online  *bool
	Text    string // part of the id
	Group   string
	Where   *target.Expr
	At      time.Time // what now means in Where
}

// Match reports whether the filter chooses r.
func (f Filter) Match(r Row) bool {
	if f.Product != "" && r.Device.Product != f.Product || f.Online != nil && r.Status.Online != *f.Online {
		return false
	}
	if f.Text != "" && !strings.Contains(string(r.Device.ID), f.Text) {
		return false
	}
	for k, v := range f.Labels {
		if have, ok := r.Device.Labels[k]; !ok || have != v {
			return false
		}
	}
	if f.Group != "" && !slices.Contains(r.Device.Groups, f.Group) {
		return false
	}
	if f.Where == nil {
		return true
	}
	in, _ := f.Where.Match(target.Facts(r.Device, r.Status, f.At)) // without a value it is not chosen
	return in
}

// List returns up to page.Limit devices that f chooses, in id order, after page.After. more says whether there are others.
func (inv *Inventory) List(ctx context.Context, f Filter, page fleet.Page) (rows []Row, more bool, err error) {
	err = inv.pages(ctx, inv.c.View, fleet.DeviceID(page.After), func(_ Tx, r Row) (bool, error) {
		if !f.Match(r) {
			return true, nil
		}
		if more = len(rows) == page.Limit; !more {
			rows = append(rows, r)
		}
		return !more, nil
	})
	return rows, more, err
}
