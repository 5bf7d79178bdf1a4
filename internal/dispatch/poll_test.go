package dispatch_test

import (
	"testing"
	"time"

	"muster/internal/dispatch"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/store/storetest"
)

// poll asks as a device that is never on MQTT, after a while.
func (w *world) poll(id fleet.DeviceID, image fleet.Hash, after time.Duration) bool {
	w.t.Helper()
	w.now = w.now.Add(after)
	asked, err := w.d.Poll(w.t.Context(), w.now, id, dispatch.Running{Image: image, Version: "1.0.0"})
	if err != nil {
		w.t.Fatal(err)
	}
	return asked
}

// pollers are n devices that no broker ever sees.
func pollers(t *testing.T, n int, p rollout.Plan) *world {
	w := open(t, storetest.Open(t), nil)
	w.fleet(n, 0)
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	return w
}

func TestAPollTakesAPlaceUnderTheSameGates(t *testing.T) {
	p := atOnce()
	p.Stages, p.MaxInFlight = []rollout.Stage{{Percent: 100}}, 1
	w := pollers(t, 3, p)
	var first fleet.DeviceID
	served := 0
	for _, id := range []fleet.DeviceID{"d0", "d1", "d2"} {
		if w.poll(id, oldImage, time.Second) {
			first = id
			served++
		}
	}
	if served != 1 || len(w.flying("r")) != 1 {
		t.Fatalf("%d were served under a cap of one", served)
	}
	if !w.poll(first, oldImage, time.Second) {
		t.Error("what was granted is not offered again")
	}
	if got := w.outbox(); len(got) != 0 {
		t.Errorf("a device that polls was rung: %v", got)
	}
	if w.poll(first, newImage, time.Minute) {
		t.Error("served although it runs the image")
	}
	if r := w.get("r"); r.Total.Succeeded != 1 {
		t.Errorf("%+v", r.Total)
	}
	served = 0
	for _, id := range []fleet.DeviceID{"d0", "d1", "d2"} {
		if id != first && w.poll(id, oldImage, time.Second) {
			served++
		}
	}
	if served != 1 {
		t.Errorf("the place that became free was given %d times", served)
	}
}

// It is there when it asks: a poll after the time in which it had to stay healthy proves that it did.
func TestADeviceThatPollsIsVerifiedByItsPolls(t *testing.T) {
	p := atOnce()
	p.VerifyFor, p.DarkAfter = 10*time.Minute, 30*time.Minute
	w := pollers(t, 2, p)
	for _, id := range []fleet.DeviceID{"d0", "d1"} {
		if !w.poll(id, oldImage, time.Second) || w.poll(id, newImage, time.Minute) {
			t.Fatalf("%s: not served, or served again", id)
		}
	}
	w.poll("d0", newImage, 5*time.Minute)
	w.pass(6 * time.Minute)
	if j := w.job("r", "d0"); j.State != rollout.Verifying {
		t.Errorf("before its next poll it is %s", j.State)
	}
	w.poll("d0", newImage, time.Minute)
	w.pass(20 * time.Minute)
	if j := w.job("r", "d0"); j.State != rollout.Succeeded {
		t.Errorf("after it, it is %s", j.State)
	}
	w.pass(20 * time.Minute)
	if j := w.job("r", "d1"); j.State != rollout.WentDark {
		t.Errorf("the one that never came again is %s", j.State)
	}
}

func TestAPollOfABarredDeviceBringsNothing(t *testing.T) {
	w := pollers(t, 1, atOnce())
	w.change("d0", func(d *fleet.Device, _ *fleet.Status) { d.Disabled = true })
	if w.poll("d0", oldImage, time.Second) || w.get("r").Total.InFlight() != 0 {
		t.Error("a disabled device was served")
	}
	if w.poll("ghost", oldImage, time.Second) {
		t.Error("an unknown device was served")
	}
}
