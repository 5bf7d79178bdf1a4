package dispatch

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"muster/internal/access"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/target"
)

// Spec describes a rollout to be created.
type Spec struct {
	ID      fleet.RolloutID
	Product fleet.ProductID
	Version firmware.Version // empty with Renewal
	Plan    rollout.Plan
	// Renewal, if set, makes it a rollout of certificates instead of firmware.
	Renewal *Renewal
	// Where is a target expression; empty: every device of the product.
	Where string
	// Labels a device must have, all of them: a short form of Where.
	Labels map[string]string
	// Devices, if not empty, are the only ones, and no other can join.
	Devices []fleet.DeviceID
	// Static: devices that come to match while it runs do not join.
	Static bool
}

// Renewal says what a rollout of certificates changes.
type Renewal struct {
	Lifetime time.Duration // of the new certificates, and of all others once it is completed; 0: as the policy says
}

// where returns the whole target expression of s.
func (s Spec) where() string {
	var terms []string
	if s.Where != "" {
		terms = append(terms, "("+s.Where+")")
	}
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		terms = append(terms, "labels["+strconv.Quote(k)+"] == "+strconv.Quote(s.Labels[k]))
	}
	if len(terms) == 1 && s.Where != "" {
		return s.Where
	}
	return strings.Join(terms, " && ")
}

// draft returns the header of the rollout that s describes, and the release, from the store.
func (d *Dispatcher) draft(tx Tx, at time.Time, s Spec, by string) (rollout.Rollout, error) {
	where := s.where()
	if err := d.compiles(s.Plan, where); err != nil {
		return rollout.Rollout{}, err
	}
	plan := s.Plan
	plan.Approval = plan.Approval || d.c.Approval
	spec := rollout.Spec{ID: s.ID, Plan: plan, By: by, Where: where, Dynamic: !s.Static && len(s.Devices) == 0, Filling: true}
	if s.Renewal != nil {
		spec.Mode, spec.Lifetime = rollout.Renewal, s.Renewal.Lifetime
		spec.Release = rollout.Release{Product: s.Product, Version: "certificates"}
		return rollout.New(spec, at)
	}
	rel, err := tx.Release(s.Product, s.Version)
	if err != nil {
		return rollout.Rollout{}, err
	}
	floors, err := floorsBelow(tx, rel)
	if err != nil {
		return rollout.Rollout{}, err
	}
	if v := s.Plan.Rollback.Version; v != "" {
		back, err := tx.Release(s.Product, firmware.Version(v))
		if err != nil {
			return rollout.Rollout{}, fleet.Wrap(fleet.KindOf(err), err, "rollback: there is no release %s of %s", v, s.Product)
		}
		if back.ImageHash == rel.ImageHash {
			return rollout.Rollout{}, fleet.Coded(fleet.Unprocessable, "rollback_to_itself", "rollback: %s is the release that is rolled out", v)
		}
	}
	spec.Floors = floors
	spec.Release = rollout.Release{Product: s.Product, Version: string(s.Version), Image: rel.ImageHash, Size: rel.Size}
	return rollout.New(spec, at)
}

// compiles checks what of a plan the core cannot: expressions and time zones.
func (d *Dispatcher) compiles(p rollout.Plan, where string) error {
	exprs := []struct{ what, text string }{{"target", where}, {"health: unhealthy_if", p.Health.Expression}}
	for i, s := range p.Stages {
		exprs = append(exprs, struct{ what, text string }{"stage " + strconv.Itoa(i+1) + ": where", s.Where})
	}
	for _, e := range exprs {
		if e.text == "" {
			continue
		}
		if _, err := target.Compile(e.text); err != nil {
			return fleet.Coded(fleet.Invalid, "target_invalid", "%s: %s", e.what, err.Error())
		}
	}
	if z := p.Window.Zone; z != "" && d.zone(z) == nil {
		return fleet.Errorf(fleet.Invalid, "plan: window: %q is not a time zone that this server knows; use an IANA name like Europe/Berlin", z)
	}
	return nil
}

// floorsBelow returns the releases that no device below them may skip on its way to rel, in their order.
func floorsBelow(tx Tx, rel firmware.Release) ([]rollout.Release, error) {
	all, err := tx.Releases(rel.Product)
	if err != nil {
		return nil, err
	}
	var floors []firmware.Release
	for _, f := range all {
		if f.Floor && f.Version.Compare(rel.Version) < 0 && (f.Chip == "" || rel.Chip == "" || f.Chip == rel.Chip) {
			floors = append(floors, f)
		}
	}
	slices.SortFunc(floors, func(a, b firmware.Release) int { return a.Version.Compare(b.Version) })
	var out []rollout.Release
	for _, f := range floors {
		out = append(out, rollout.Release{Product: f.Product, Version: string(f.Version), Image: f.ImageHash, Size: f.Size, Chip: f.Chip})
	}
	return out, nil
}

// Create stores a draft whose target is every device of the product that the spec chooses. It is filled in transactions of
// bounded size; with a large fleet that may go on after Create has returned (Filling). Repeating it with the same id is a
// Conflict; an unknown release is NotFound; an empty target is Unprocessable.
func (d *Dispatcher) Create(ctx context.Context, at time.Time, s Spec, by string) (rollout.Rollout, error) {
	preview, err := d.Plan(ctx, at, s, by)
	if err != nil {
		return rollout.Rollout{}, err
	}
	if preview.Targets == 0 {
		return rollout.Rollout{}, fleet.Coded(fleet.Unprocessable, "empty_target", "no device of product %s matches: look with muster target or muster device list", s.Product)
	}
	if err := preview.problem(); err != nil {
		return rollout.Rollout{}, err
	}
	began := time.Now()
	var out rollout.Rollout
	err = d.c.Update(ctx, func(tx Tx) error {
		if _, err := tx.Rollout(s.ID); err == nil {
			return fleet.Coded(fleet.Conflict, "rollout_exists", "rollout %s exists already: choose another id", s.ID)
		} else if !fleet.Is(err, fleet.NotFound) {
			return err
		}
		r, err := d.draft(tx, at, s, by)
		if err != nil {
			return err
		}
		if err := tx.PutRollout(r); err != nil {
			return err
		}
		if err := tx.Audit(access.Entry{At: at, Who: by, What: "rollout.create", On: string(s.ID)}); err != nil {
			return err
		}
		if len(s.Devices) == 0 {
			// A fleet that fits one transaction is there or not there as a whole.
			out, _, _, err = d.fillSome(tx, at, r, "")
			return err
		}
		ts, err := d.named(tx, at, r, s)
		if err != nil {
			return err
		}
		if r, _, err = d.apply(tx, r, nil, rollout.Added{At: at, Targets: ts}); err != nil {
			return err
		}
		out, _, err = d.apply(tx, r, nil, rollout.Filled{At: at})
		return err
	})
	if err != nil || !out.Filling {
		return out, err
	}
	out, err = d.fill(ctx, func() time.Time { return at.Add(time.Since(began)) }, s.ID, fillFor)
	if err == nil {
		d.Kick()
	}
	return out, err
}

// named returns the targets of a spec that names its devices.
func (d *Dispatcher) named(tx Tx, at time.Time, r rollout.Rollout, s Spec) (out []rollout.Target, err error) {
	ids := slices.Compact(slices.Sorted(slices.Values(s.Devices)))
	for _, id := range ids {
		dev, err := tx.Device(id)
		if err != nil {
			return nil, fleet.Wrap(fleet.KindOf(err), err, "device %s: no such device", id)
		}
		st, err := tx.Status(id)
		if err != nil {
			return nil, err
		}
		t, in, err := d.member(r, dev, st, at)
		if err != nil {
			return nil, err
		}
		if in {
			out = append(out, t)
		}
	}
	return out, nil
}

// member reports whether a device is a target of r, and as what.
func (d *Dispatcher) member(r rollout.Rollout, dev fleet.Device, s fleet.Status, at time.Time) (rollout.Target, bool, error) {
	if dev.Product != r.Release.Product {
		return rollout.Target{}, false, nil
	}
	matches := func(text string) (bool, error) {
		e, err := d.expression(text)
		if err != nil {
			return false, err
		}
		in, err := e.Match(target.Facts(dev, s, at))
		return in && err == nil, nil // a device for which the expression has no value is not in it
	}
	if r.Where != "" {
		if in, err := matches(r.Where); err != nil || !in {
			return rollout.Target{}, false, err
		}
	}
	var failed error
	t := rollout.Target{Device: dev.ID, Site: dev.Labels[r.Plan.Sites.Label]}
	t.Ring = r.Plan.Ring(func(stage int) bool {
		in, err := matches(r.Plan.Stages[stage-1].Where)
		if err != nil {
			failed = err
		}
		return in
	})
	return t, true, failed
}

// Bounds of filling a target.
const (
	fillBatch = 5000             // devices looked at in one transaction
	fillFor   = 10 * time.Second // how long Create fills before it leaves the rest to Run
)

// fillSome adds the targets among the devices after one. done says that there are no more; then the rollout is filled.
func (d *Dispatcher) fillSome(tx Tx, at time.Time, r rollout.Rollout, after fleet.DeviceID) (_ rollout.Rollout, last fleet.DeviceID, done bool, err error) {
	devs, err := tx.Devices(after, fillBatch)
	if err != nil {
		return r, after, false, err
	}
	var ts []rollout.Target
	var rows []rollout.Job
	for _, dev := range devs {
		last = dev.ID
		s, err := tx.Status(dev.ID)
		if err != nil {
			return r, last, false, err
		}
		t, in, err := d.member(r, dev, s, at)
		if err != nil {
			return r, last, false, err
		}
		if !in {
			continue
		}
		if j, had, err := tx.Job(r.ID, dev.ID); err != nil {
			return r, last, false, err
		} else if had {
			rows = append(rows, j)
		}
		ts = append(ts, t)
	}
	if len(ts) > 0 {
		if r, _, err = d.apply(tx, r, rows, rollout.Added{At: at, Targets: ts}); err != nil {
			return r, last, false, err
		}
	}
	if len(devs) == fillBatch {
		return r, last, false, nil
	}
	r, _, err = d.apply(tx, r, nil, rollout.Filled{At: at})
	return r, last, true, err
}

// fill adds targets until all are there, ctx ends or limit is over; 0: no limit. It may begin again from the start: who is
// a target already is not added twice.
func (d *Dispatcher) fill(ctx context.Context, clock func() time.Time, id fleet.RolloutID, limit time.Duration) (out rollout.Rollout, err error) {
	began := time.Now()
	var after fleet.DeviceID
	for done := false; !done && ctx.Err() == nil && (limit == 0 || time.Since(began) < limit); {
		err := d.c.Update(ctx, func(tx Tx) error {
			r, err := tx.Rollout(id)
			if err != nil {
				return err
			}
			if out, done = r, !r.Filling; done { // somebody else has filled it, or aborted it
				return nil
			}
			step := d.fillSome
			if r.Undoes != "" {
				step = d.fillUndo
			}
			out, after, done, err = step(tx, clock(), r, after)
			return err
		})
		if err != nil {
			return out, err
		}
	}
	return out, ctx.Err()
}

// goOnFilling is what Run does for a rollout whose target is not complete: filling goes on, and the way back of another
// rollout starts by itself.
func (d *Dispatcher) goOnFilling(ctx context.Context, clock func() time.Time, id fleet.RolloutID) error {
	r, err := d.fill(ctx, clock, id, 0)
	if err != nil || r.Undoes == "" || r.State != rollout.Draft {
		return err
	}
	if err := d.startUndo(ctx, clock(), id); err != nil {
		return err
	}
	return d.drive(ctx, clock, id)
}

// joinBatch is how many devices are held against the targets of running rollouts in one transaction.
const joinBatch = 256

// join brings devices into the running rollouts whose target they have come to match.
func (d *Dispatcher) join(ctx context.Context, clock func() time.Time) error {
	for more := true; more && ctx.Err() == nil; {
		more = false
		var ids []fleet.DeviceID
		if err := d.c.View(ctx, func(tx Tx) (err error) { ids, err = tx.Joins(joinBatch); return err }); err != nil || len(ids) == 0 {
			return err
		}
		more = len(ids) == joinBatch
		err := d.c.Update(ctx, func(tx Tx) error {
			at := clock()
			live, err := tx.DynamicRollouts()
			if err != nil {
				return err
			}
			for _, id := range live {
				if err := d.joinOne(tx, at, id, ids); err != nil {
					return err
				}
			}
			for _, dev := range ids {
				if err := tx.DropJoin(dev); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *Dispatcher) joinOne(tx Tx, at time.Time, id fleet.RolloutID, ids []fleet.DeviceID) error {
	r, err := tx.Rollout(id)
	if err != nil {
		return err
	}
	var ts []rollout.Target
	for _, dev := range ids {
		if _, had, err := tx.Job(id, dev); err != nil {
			return err
		} else if had {
			continue
		}
		rec, err := tx.Device(dev)
		if fleet.Is(err, fleet.NotFound) {
			continue
		}
		if err != nil {
			return err
		}
		s, err := tx.Status(dev)
		if err != nil {
			return err
		}
		t, in, err := d.member(r, rec, s, at)
		if err != nil {
			return err
		}
		if in && !(s.Image == r.Release.Image && r.Release.Image != "") { // it has what the rollout would bring
			ts = append(ts, t)
		}
	}
	if len(ts) == 0 {
		return nil
	}
	_, _, err = d.apply(tx, r, nil, rollout.Added{At: at, Targets: ts})
	return err
}
