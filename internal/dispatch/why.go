package dispatch

import (
	"context"
	"fmt"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// Reason is one sentence about why a device is not updating or not connecting.
type Reason struct {
	Code     string // a stable word for programs
	Text     string
	Rollout  fleet.RolloutID // that it is about; empty if it is about the device
	Blocking bool            // it keeps the device from updating, or from connecting
}

// Why says in ordered sentences why a device is not updating, or not connecting: first what concerns the device, then
// what each rollout has for it. A device that is well has one sentence that says so. Unknown devices are NotFound.
func (d *Dispatcher) Why(ctx context.Context, at time.Time, id fleet.DeviceID) (out []Reason, err error) {
	err = d.c.View(ctx, func(tx Tx) error {
		dev, err := tx.Device(id)
		if err != nil {
			return err
		}
		s, err := tx.Status(id)
		if err != nil {
			return err
		}
		out = d.whyDevice(dev, s, at)
		p, err := tx.Penalty(id)
		if err != nil {
			return err
		}
		if at.Before(p.Until) {
			out = append(out, Reason{Code: "penalty", Blocking: true,
				Text: fmt.Sprintf("it failed %d times within %v: no rollout offers it anything until %s; muster device pardon %s ends that", d.c.Penalty.Failures, d.c.Penalty.Within, when(p.Until), id)})
		}
		about, err := d.whyRollouts(tx, dev, s, at)
		out = append(out, about...)
		return err
	})
	if err == nil && len(out) == 0 {
		out = []Reason{{Code: "ok", Text: "it is connected and no rollout has anything for it"}}
	}
	return out, err
}

func when(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 MST") }

// whyDevice says what keeps a device out, whatever the rollouts are.
func (d *Dispatcher) whyDevice(dev fleet.Device, s fleet.Status, at time.Time) (out []Reason) {
	if dev.RecoveryOff != "" {
		out = append(out, Reason{Code: "revoked", Blocking: true, Text: fmt.Sprintf("its certificate is revoked (%s), and the fallback is closed to it: issue it a new certificate", dev.RecoveryOff)})
	}
	if dev.Disabled {
		out = append(out, Reason{Code: "disabled", Blocking: true, Text: fmt.Sprintf("it was disabled on %s: muster device enable %s", when(dev.DisabledAt), dev.ID)})
	}
	switch {
	case dev.Current == "" && dev.Next == "" && len(dev.Passwords) == 0:
		out = append(out, Reason{Code: "no-credentials", Blocking: true, Text: "it has neither a certificate nor a fallback password: muster device credentials"})
	case s.ConnectedAt.IsZero():
		out = append(out, Reason{Code: "never-connected", Blocking: true, Text: "it has never connected"})
	case !s.Online:
		out = append(out, Reason{Code: "offline", Blocking: true, Text: fmt.Sprintf("it is offline since %s (%s)", when(s.LostAt), ago(at, s.LostAt))})
	case s.Vhost == wire.VhostFallback:
		out = append(out, Reason{Code: "fallback", Blocking: true, Text: fmt.Sprintf("it is connected through the fallback, without a certificate: it is updated when it is back on the devices' vhost; if it is its image that keeps it away, muster recovery firmware %s VERSION", dev.ID)})
	case s.HelloAt.IsZero() || s.HelloAt.Before(s.ConnectedAt.Add(-time.Minute)):
		out = append(out, Reason{Code: "no-hello", Blocking: true, Text: fmt.Sprintf("it is connected since %s and has not said hello, so what it runs is not known", when(s.ConnectedAt))})
	}
	if d.c.Refusal != nil {
		if why, last, ok := d.c.Refusal(dev.ID); ok && (!s.Online || last.After(s.ConnectedAt)) {
			out = append(out, Reason{Code: "refused", Blocking: !s.Online, Text: fmt.Sprintf("the broker last refused it on %s: %s", when(last), why)})
		}
	}
	return out
}

func ago(at, t time.Time) string {
	d := at.Sub(t)
	if d < time.Minute {
		return "less than a minute ago"
	}
	return d.Round(time.Minute).String() + " ago"
}

// whyRollouts says what each rollout that is not over has for a device, and what its newest job came to.
func (d *Dispatcher) whyRollouts(tx Tx, dev fleet.Device, s fleet.Status, at time.Time) (out []Reason, err error) {
	active, busy, err := tx.ActiveJob(dev.ID)
	if err != nil {
		return nil, err
	}
	ids, err := tx.LiveRollouts()
	if err != nil {
		return nil, err
	}
	live := false
	for _, id := range ids {
		r, err := tx.Rollout(id)
		if err != nil {
			return nil, err
		}
		if r.Release.Product != dev.Product {
			continue
		}
		live = true
		j, in, err := tx.Job(id, dev.ID)
		if err != nil {
			return nil, err
		}
		say := func(code string, blocking bool, format string, a ...any) {
			out = append(out, Reason{Code: code, Rollout: id, Blocking: blocking, Text: fmt.Sprintf("rollout %s (%s): ", id, r.Release.Version) + fmt.Sprintf(format, a...)})
		}
		switch {
		case !in:
			d.whyNotIn(say, r, dev, s, at)
		case j.State.InFlight():
			say("in-flight", false, "%s", inFlight(j, at))
			why, err := unsayable(tx, r, j, s)
			if err != nil {
				return nil, err
			}
			if why != "" {
				say("buffer-too-small", true, "%s", why)
			}
		case j.State.Open():
			if busy && active.Rollout != id {
				say("busy", true, "rollout %s updates it now; its turn comes afterwards", active.Rollout)
				continue
			}
			if err := d.whyOpen(tx, say, r, j, dev, s, at); err != nil {
				return nil, err
			}
		default:
			say(string(j.State), j.State != rollout.Succeeded, "%s", finished(j))
		}
	}
	if !live {
		if j, ok, err := tx.LatestJob(dev.ID); err != nil {
			return nil, err
		} else if ok {
			out = append(out, Reason{Code: "last-" + string(j.State), Rollout: j.Rollout, Text: fmt.Sprintf("no rollout of %s is under way; its last one was %s: %s", dev.Product, j.Rollout, finished(j))})
		} else {
			out = append(out, Reason{Code: "no-rollout", Text: fmt.Sprintf("no rollout of %s is under way", dev.Product)})
		}
	}
	return out, nil
}

// unsayable says why the offer of a job cannot reach a device: what does not fit its receive buffer is never sent, since many
// clients drop it without a word (esp32.md §7). Empty if it can.
func unsayable(tx Tx, r rollout.Rollout, j rollout.Job, s fleet.Status) (string, error) {
	if r.Mode != rollout.Download || j.State != rollout.Offered {
		return "", nil
	}
	want := r.Wanted(j)
	rel, err := tx.Release(want.Product, firmware.Version(want.Version))
	if err != nil {
		return "", err
	}
	offer := wire.OTAOffer{Job: r.ID, Version: want.Version, Size: rel.Size, SHA256: make([]byte, 32), Path: rel.Path()}
	room := wire.Budget(wire.DownTopic(j.Device, wire.DownOTA), s.Buffer)
	if n := len(offer.Within(room)); n > room {
		return fmt.Sprintf("the offer has %d bytes and the device can take %d, so it is not sent: use a shorter rollout id or version, or a larger receive buffer (buf in its hello)", n, room), nil
	}
	return "", nil
}

type sayer func(code string, blocking bool, format string, a ...any)

// whyNotIn says why a device is not a target.
func (d *Dispatcher) whyNotIn(say sayer, r rollout.Rollout, dev fleet.Device, s fleet.Status, at time.Time) {
	switch _, in, err := d.member(r, dev, s, at); {
	case s.Image == r.Release.Image && s.Image != "":
		say("has-image", false, "it runs the image already")
	case err != nil || !in:
		say("not-in-target", true, "it is not in the target: %s", orAll(r.Where))
	case !r.Dynamic:
		say("not-in-target", true, "it matches the target, which was fixed when the rollout was created")
	default:
		say("joining", false, "it has just come to match the target")
	}
}

func orAll(where string) string {
	if where == "" {
		return "the target was given as a list of devices"
	}
	return where
}

func inFlight(j rollout.Job, at time.Time) string {
	text := fmt.Sprintf("it is %s since %s", j.State, when(j.StateAt))
	if j.State == rollout.Downloading && j.Percent > 0 {
		text += fmt.Sprintf(", %d %%", j.Percent)
	}
	if j.Attempts > 1 {
		text += fmt.Sprintf(", attempt %d", j.Attempts)
	}
	if left := j.Deadline.Sub(at); left > 0 {
		text += fmt.Sprintf("; looked at again in %v", left.Round(time.Second))
	}
	return text
}

func finished(j rollout.Job) string {
	text := fmt.Sprintf("it is %s since %s", j.State, when(j.StateAt))
	if j.Cause.Text != "" && j.State != rollout.Succeeded {
		text += ": " + j.Cause.Text
	}
	return text
}

// whyOpen says why a target that waits for its turn has not got it.
func (d *Dispatcher) whyOpen(tx Tx, say sayer, r rollout.Rollout, j rollout.Job, dev fleet.Device, s fleet.Status, at time.Time) error {
	fit, err := d.fits(tx, r, j, dev, s, at)
	if err != nil {
		return err
	}
	switch {
	case s.HelloAt.IsZero():
		say("no-hello", true, "it has never said hello, so what it runs is not known")
		return nil
	case fit.why != "":
		say(fit.code, true, "it will be skipped: %s", fit.why)
		return nil
	case fit.floor > 0:
		say("floor", false, "it runs %s and takes %s first, which may not be skipped", s.Version, r.Floors[fit.floor-1].Version)
	}
	if j.State == rollout.Waiting && at.Before(j.RetryAt) {
		say("back-off", true, "attempt %d failed (%s); it is tried again from %s", j.Attempts, j.Cause.Text, when(j.RetryAt))
	}
	switch r.State {
	case rollout.Running:
	case rollout.Draft:
		say("not-started", true, "it has not been started")
		return nil
	case rollout.Scheduled:
		say("scheduled", true, "it begins at %s", when(r.Plan.StartAt))
		return nil
	default:
		say(string(r.State), true, "it is %s: %s", r.State, r.Reason)
		return nil
	}
	d.whyTurn(say, r, j)
	zone := d.zone(r.Plan.Window.Zone)
	if r.Plan.Window.PerDevice() {
		zone = d.zoneFor(r.Plan.Window, dev)
	}
	if open, until := r.Plan.Window.Open(at, zone); !open {
		say("window-closed", true, "its window is closed until %s", when(until))
	}
	switch r.Refusal(at, zone) {
	case rollout.CapFull:
		say("cap-full", true, "%d devices are in flight, as many as may be at once", r.Total.InFlight())
	case rollout.RateFull:
		say("rate-full", true, "the pace allows the next device at %s", when(r.NextGrant))
	}
	if j.Site != "" {
		size, disrupted, err := tx.Site(r.ID, j.Site)
		if err != nil {
			return err
		}
		if most := r.Plan.SiteLimit(size); r.Plan.Sites.Label != "" && disrupted >= most {
			say("site-full", true, "%d of the %d devices with %s=%s are disrupted, and %d may be at once", disrupted, size, r.Plan.Sites.Label, j.Site, most)
		}
	}
	return nil
}

// whyTurn says where a target stands in the line.
func (d *Dispatcher) whyTurn(say sayer, r rollout.Rollout, j rollout.Job) {
	if j.State == rollout.Waiting {
		return
	}
	st := r.Stages[r.Stage-1]
	switch {
	case j.Ring > r.Stage:
		say("turn", true, "stage %d of %d is open, and it belongs to stage %d", r.Stage, len(r.Stages), j.Ring)
	case r.StageRefusal() == rollout.StageFull:
		say("turn", true, "its turn has not come: stage %d of %d is full (%d of %d devices), and the next one opens when it is done", r.Stage, len(r.Stages), r.Started(), r.Targets)
	case r.StageRefusal() == rollout.Soaking && !st.HeldAt.IsZero():
		say("turn", true, "its turn has not come: stage %d of %d is done and held until an operator advances (muster rollout advance %s)", r.Stage, len(r.Stages), r.ID)
	case r.StageRefusal() == rollout.Soaking:
		say("turn", true, "its turn has not come: stage %d of %d is done since %s and soaks for %v", r.Stage, len(r.Stages), when(st.DoneAt), r.Plan.Soak)
	default:
		say("next", false, "it is among the next in stage %d of %d", r.Stage, len(r.Stages))
	}
}
