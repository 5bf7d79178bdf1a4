package dispatch

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Bounds of a preview.
const (
	sampleSize = 10              // devices shown for a stage
	planPage   = 1024            // devices read at once
	typicalBps = 50_000          // bytes per second that a device downloads with, for the estimate
	typicalFix = 2 * time.Minute // from the end of the download to a session with the new image, for the estimate
)

// Preview is what a rollout would do if it were started now. Nothing is stored.
type Preview struct {
	Rollout rollout.Rollout // the draft, with its defaults filled in
	Scanned int             // devices looked at
	Targets int
	Online  int // targets that are connected now
	Stages  []PreviewStage
	// Skips are the targets that would not be offered the release as they are now, by reason.
	Skips map[string]int
	// Floors are the targets that must take each floor first, by version.
	Floors map[string]int
	// Bytes is what all downloads come to, floors included; Duration the estimated time from start to end with all devices
	// online, soak included and waiting for devices that are offline not.
	Bytes    int64
	Duration time.Duration
	// Stops says what would stop the rollout; Warnings what is probably not meant.
	Stops    []string
	Warnings []string

	invalid error
}

// PreviewStage is one stage of a preview.
type PreviewStage struct {
	Number   int
	Quota    int // devices by the end of the stage, counted from the first stage on
	Devices  int // devices that it adds
	Duration time.Duration
	Sample   []fleet.DeviceID // the first of them, in the order in which they are offered the release
}

// problem returns why the rollout could not be started as it is.
func (p Preview) problem() error { return p.invalid }

// Plan says what a rollout would do. It reads the whole fleet once, in pages, and keeps counts and samples only.
func (d *Dispatcher) Plan(ctx context.Context, at time.Time, s Spec, by string) (Preview, error) {
	var p Preview
	if s.ID == "" {
		s.ID = "preview"
	}
	err := d.c.View(ctx, func(tx Tx) (err error) {
		if p.Rollout, err = d.draft(tx, at, s, by); err != nil {
			return err
		}
		c := counter{p: &p, d: d, at: at, tx: tx, rings: make([]int, len(p.Rollout.Plan.Stages)+1), first: make([][]rollout.Job, len(p.Rollout.Plan.Stages)+1)}
		p.Skips, p.Floors = map[string]int{}, map[string]int{}
		if len(s.Devices) > 0 {
			err = c.named(s.Devices)
		} else {
			err = c.all(ctx)
		}
		if err == nil {
			c.finish()
		}
		return err
	})
	return p, err
}

// counter looks at each device once.
type counter struct {
	p     *Preview
	d     *Dispatcher
	at    time.Time
	tx    Tx
	rings []int           // targets by ring
	first [][]rollout.Job // of each ring, the first in rank order: a heap would be faster, and is not needed
}

func (c *counter) all(ctx context.Context) error {
	var after fleet.DeviceID
	for ctx.Err() == nil {
		devs, err := c.tx.Devices(after, planPage)
		if err != nil || len(devs) == 0 {
			return err
		}
		after = devs[len(devs)-1].ID
		for i := range devs {
			if err := c.look(devs[i]); err != nil {
				return err
			}
		}
	}
	return fleet.Wrap(fleet.Unavailable, ctx.Err(), "the request was given up")
}

func (c *counter) named(ids []fleet.DeviceID) error {
	for _, id := range slices.Compact(slices.Sorted(slices.Values(ids))) {
		dev, err := c.tx.Device(id)
		if err != nil {
			return fleet.Wrap(fleet.KindOf(err), err, "device %s: no such device", id)
		}
		if err := c.look(dev); err != nil {
			return err
		}
	}
	return nil
}

func (c *counter) look(dev fleet.Device) error {
	c.p.Scanned++
	r := c.p.Rollout
	if dev.Product != r.Release.Product {
		return nil
	}
	s, err := c.tx.Status(dev.ID)
	if err != nil {
		return err
	}
	t, in, err := c.d.member(r, dev, s, c.at)
	if err != nil || !in {
		return err
	}
	c.p.Targets++
	c.rings[t.Ring]++
	if s.Online {
		c.p.Online++
	}
	j := rollout.Job{Rollout: r.ID, Device: dev.ID, Rank: rollout.Rank(r.ID, dev.ID), Ring: t.Ring}
	c.sample(j)
	return c.judge(j, dev, s)
}

// judge counts what a target would get.
func (c *counter) judge(j rollout.Job, dev fleet.Device, s fleet.Status) error {
	r := c.p.Rollout
	switch {
	case dev.Disabled:
		c.p.Skips["disabled"]++
		return nil
	case dev.RecoveryOff != "":
		c.p.Skips["revoked"]++
		return nil
	case s.HelloAt.IsZero():
		c.p.Skips["never-seen"]++
		return nil
	case s.Image == r.Release.Image && s.Image != "":
		c.p.Skips["has-image"]++
		return nil
	}
	f, err := c.d.fits(c.tx, r, j, dev, s, c.at)
	if err != nil {
		return err
	}
	if f.why != "" {
		c.p.Skips[f.code]++
		return nil
	}
	if f.floor == 0 {
		c.p.Bytes += f.size
		return nil
	}
	// It goes through every floor from the first one on, and then takes the release.
	for _, floor := range r.Floors[f.floor-1:] {
		if !concerns(floor, fitOf(dev, s)) {
			continue
		}
		c.p.Floors[floor.Version]++
		c.p.Bytes += floor.Size
	}
	c.p.Bytes += r.Release.Size
	return nil
}

// sample keeps the first of each ring. Stages further on begin later in the order; what they add is found by finish.
func (c *counter) sample(j rollout.Job) {
	first := c.first[j.Ring]
	if keep := c.keep(); len(first) >= keep && rollout.Compare(first[len(first)-1], j) < 0 {
		return
	}
	i, _ := slices.BinarySearchFunc(first, j, rollout.Compare)
	first = slices.Insert(first, i, j)
	c.first[j.Ring] = first[:min(len(first), c.keep())]
}

// keep is how many devices of a ring are remembered: enough for the samples of the first stages of a small fleet.
func (c *counter) keep() int { return 1000 }

func (c *counter) finish() {
	p, r := c.p, c.p.Rollout
	r.Targets = p.Targets
	if p.Targets == 0 {
		p.Warnings = append(p.Warnings, "the target holds no device")
		return
	}
	p.invalid = r.Plan.Validate(p.Targets)
	if p.invalid != nil {
		p.Warnings = append(p.Warnings, p.invalid.Error())
		return
	}
	before, candidates := 0, 0
	for i := range r.Plan.Stages {
		n := i + 1
		candidates += c.rings[n]
		st := PreviewStage{Number: n, Quota: r.Plan.Quota(n, p.Targets)}
		reach := max(min(st.Quota, candidates), before)
		st.Devices = reach - before
		if c.rings[n] == 0 && r.Plan.Stages[i].Where != "" && !r.Dynamic {
			p.invalid = fleet.Coded(fleet.Unprocessable, "empty_stage", "stage %d selects no device of the target, so it could never be passed: change its where", n)
		}
		if st.Devices == 0 {
			p.Warnings = append(p.Warnings, fmt.Sprintf("stage %d adds no device", n))
		}
		for _, j := range c.order(n)[min(before, len(c.order(n))):min(before+min(st.Devices, sampleSize), len(c.order(n)))] {
			st.Sample = append(st.Sample, j.Device)
		}
		st.Duration = c.duration(before, st.Devices)
		if n < len(r.Plan.Stages) {
			st.Duration += r.Plan.Soak
		}
		p.Duration += st.Duration
		before = reach
		p.Stages = append(p.Stages, st)
	}
	if w := r.Plan.Window; w.Set() {
		p.Duration = throughWindow(w, c.d.zone(w.Zone), c.at, p.Duration)
	}
	p.Stops = stops(r.Plan)
	c.warn()
}

// order returns the remembered devices that stage n may grant, in the order in which they are offered the release.
func (c *counter) order(n int) []rollout.Job {
	var out []rollout.Job
	for ring := 1; ring <= n; ring++ {
		out = append(out, c.first[ring]...)
		if len(c.first[ring]) < c.rings[ring] {
			break // what comes next is not remembered
		}
	}
	return out
}

// duration estimates how long it takes to bring n devices to success, after done others.
func (c *counter) duration(done, n int) time.Duration {
	if n == 0 {
		return 0
	}
	r := c.p.Rollout
	bps := int64(typicalBps)
	each := time.Duration(r.Release.Size)*time.Second/time.Duration(bps) + typicalFix + r.Plan.VerifyFor
	waves := (n + r.Plan.MaxInFlight - 1) / r.Plan.MaxInFlight
	total := time.Duration(waves) * each
	// The pace: how long until the last of them is granted, with each success counted at once.
	var paced time.Duration
	for left, succeeded := n, done; left > 0; {
		step := left
		rr := r
		rr.Total.Succeeded = succeeded
		if e := r.Plan.Pace.Every; r.Plan.Pace.Base > 0 {
			step = min(left, e-succeeded%e)
		}
		paced += rr.Interval() * time.Duration(step)
		left, succeeded = left-step, succeeded+step
	}
	return max(total, paced+each)
}

// throughWindow stretches a duration over the openings of a window.
func throughWindow(w rollout.Window, zone *time.Location, at time.Time, left time.Duration) time.Duration {
	t := at
	for n := 0; left > 0 && n < 10_000; n++ {
		open, change := w.Open(t, zone)
		if change.IsZero() || !change.After(t) {
			break
		}
		if open {
			if change.Sub(t) >= left {
				return t.Add(left).Sub(at)
			}
			left -= change.Sub(t)
		}
		t = change
	}
	return t.Add(left).Sub(at)
}

// stops says in words what would stop a rollout.
func stops(p rollout.Plan) (out []string) {
	then := func(r rollout.Reaction) string { return string(cmp.Or(r, rollout.ThenHalt)) }
	if p.MaxFailures < rollout.MaxTargets {
		out = append(out, fmt.Sprintf("%d failures: %s", p.MaxFailures+1, then(p.FailThen)))
	}
	for _, l := range p.Limits {
		kinds := "failures"
		if len(l.Kinds) > 0 {
			kinds = ""
			for i, k := range l.Kinds {
				if i > 0 {
					kinds += " or "
				}
				kinds += string(k)
			}
		}
		switch {
		case l.Percent == 0:
			out = append(out, fmt.Sprintf("%d %s: %s", l.Count+1, kinds, then(l.Then)))
		case l.Confidence == 0:
			out = append(out, fmt.Sprintf("more than %d %% %s of at least %d devices: %s", l.Percent, kinds, l.MinSample, then(l.Then)))
		default:
			out = append(out, fmt.Sprintf("more than %d %% %s at %d %% confidence, of at least %d devices: %s", l.Percent, kinds, l.Confidence, l.MinSample, then(l.Then)))
		}
	}
	if p.Health.Compare {
		out = append(out, fmt.Sprintf("devices with the new image less healthy than those without, at %d %% confidence and %d of each: %s", p.Health.Confidence, p.Health.MinSample, then(p.Health.Then)))
	}
	for i, s := range p.Stages[:len(p.Stages)-1] {
		if s.MinSuccess > 0 {
			out = append(out, fmt.Sprintf("less than %d %% success in stage %d: %s", s.MinSuccess, i+1, then(p.FailThen)))
		} else {
			out = append(out, fmt.Sprintf("no success in stage %d: %s", i+1, then(p.FailThen)))
		}
		if s.Hold {
			out = append(out, fmt.Sprintf("the end of stage %d: holds until an operator advances", i+1))
		}
	}
	return out
}

func (c *counter) warn() {
	p := c.p
	skipped := 0
	for _, n := range p.Skips {
		skipped += n
	}
	if skipped == p.Targets {
		p.Warnings = append(p.Warnings, "no target would be offered the release as the devices are now")
	}
	if p.Online == 0 {
		p.Warnings = append(p.Warnings, "no target is connected now")
	}
	if p.Rollout.Plan.MaxFailures >= p.Targets && len(p.Rollout.Plan.Limits) == 0 {
		p.Warnings = append(p.Warnings, "max_failures is not below the number of targets: no number of failures would stop it")
	}
	if p.Rollout.Plan.VerifyFor == 0 && p.Rollout.Plan.Soak == 0 {
		p.Warnings = append(p.Warnings, "neither verify_for nor soak is set: a device counts as a success in the moment in which it is back")
	}
}
