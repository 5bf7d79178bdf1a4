package dispatch

import (
	"time"

	"muster/internal/rollout"
)

// Bounds of counting the control group.
const (
	compareEvery = time.Minute
	controlMost  = 5000 // devices looked at
)

// compare holds the devices that run the new image against those that wait for their turn, if the plan asks for it: a
// device of the control group behaved badly if it did, within the last verify_for, what the plan's health forbids.
func (d *Dispatcher) compare(tx Tx, at time.Time, r rollout.Rollout) (rollout.Rollout, error) {
	h := r.Plan.Health
	if !h.Compare || r.Health.Bad == 0 || r.Health.Watched < h.MinSample || r.State != rollout.Running && r.State != rollout.Paused {
		return r, nil
	}
	d.mu.Lock()
	last, ok := d.compared[r.ID]
	due := !ok || !at.Before(last.Add(compareEvery)) || at.Before(last)
	if due {
		d.compared[r.ID] = at
	}
	d.mu.Unlock()
	if !due {
		return r, nil
	}
	control, bad := 0, 0
	// Every ring: who is to be granted last is as good a control as who is next.
	err := tx.Ready(r.ID, len(r.Plan.Stages), func(j rollout.Job) (bool, error) {
		if j.State != rollout.Pending {
			return true, nil
		}
		dev, err := tx.Device(j.Device)
		if err != nil {
			return true, ignoreNotFound(err)
		}
		s, err := tx.Status(j.Device)
		if err != nil {
			return false, err
		}
		control++
		if d.unhealthy(h, dev, s, at.Add(-r.Plan.VerifyFor), at) != "" {
			bad++
		}
		return control < controlMost, nil
	})
	if err != nil {
		return r, err
	}
	r, _, err = d.apply(tx, r, nil, rollout.Compared{At: at, Control: control, Bad: bad})
	return r, err
}
