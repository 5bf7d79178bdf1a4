package simdev_test

import (
	"crypto/sha256"
	"slices"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/internal/wire"
)

func back(job fleet.RolloutID, image []byte) []byte {
	sum := sha256.Sum256(image)
	return wire.Encode(wire.Cmd{Op: wire.CmdPrevious, Job: job, Image: sum[:]})
}

// The way back without a download: the very image that is meant, told of in hello; told twice, it changes nothing.
func TestTheWayBackToTheOtherSlot(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		old := simdev.MakeImage("1.0.0", simdev.Good, 5000, 3)
		image := simdev.MakeImage("1.1.0", simdev.Good, 5000, 1)
		d := ready(w, func(c *simdev.Config) { c.Firmware = old })
		w.offerImage("r1", image)
		w.eventually(time.Minute, "the update", running(d, "1.1.0"))
		w.eventually(time.Minute, "a hello that names the other slot", func() bool {
			return get(w, func() bool { return w.hellos[len(w.hellos)-1].Previous == fleet.HashOf(sha256.Sum256(old)) })
		})
		w.set(func() { w.offer = nil })              // nobody wants the new image any more
		w.tell(wire.DownCmd, back("r2", image[:10])) // runs neither: not what the other slot holds
		w.eventually(time.Minute, "a refusal", func() bool { return slices.Equal(w.steps("r2"), []wire.OTAStep{wire.StepRejected}) })
		w.tell(wire.DownCmd, back("r3", old))
		w.tell(wire.DownCmd, back("r3", old))
		w.eventually(time.Minute, "the old image", running(d, "1.0.0"))
		w.tell(wire.DownCmd, back("r3", old))
		time.Sleep(time.Minute)
		if got := w.steps("r3"); !slices.Contains(got, wire.StepAccepted) || slices.Contains(got, wire.StepRejected) || !running(d, "1.0.0")() {
			t.Errorf("steps %v", got)
		}
	})
}

// What the eFuses have burnt shut stays shut, whoever asks.
func TestNoWayBackBelowTheSecureVersion(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		old := simdev.MakeImage("1.0.0", simdev.Good, 5000, 3)
		d := ready(w, func(c *simdev.Config) { c.Firmware = old })
		w.offerImage("r1", simdev.Firmware{Version: "1.1.0", Behaviour: simdev.Good, SecureVersion: 1}.Image(5000, 1))
		w.eventually(time.Minute, "the update", running(d, "1.1.0"))
		w.eventually(time.Minute, "the confirmation that burns", func() bool { return w.saw(simdev.Confirmed, "1.1.0") == 1 })
		w.tell(wire.DownCmd, back("r2", old))
		w.eventually(time.Minute, "a refusal", func() bool { return slices.Equal(w.steps("r2"), []wire.OTAStep{wire.StepRejected}) })
	})
}

func TestARejectedUpdate(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) { c.Faults.Reject = "battery low" })
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Good, 5000, 1))
		w.eventually(time.Minute, "a refusal", func() bool { return slices.Equal(w.steps("r1"), []wire.OTAStep{wire.StepRejected}) })
		if !running(d, "1.0.0")() {
			t.Error("updated all the same")
		}
	})
}

// An image that works and says nothing of it: from installed on, hello is all there is.
func TestAnImageThatNeverReports(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) { c.Faults.NoReports = true })
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.NoReports, 5000, 1))
		w.eventually(time.Minute, "the update", running(d, "1.1.0"))
		w.eventually(time.Minute, "its hello", func() bool {
			return get(w, func() bool { return w.hellos[len(w.hellos)-1].Version == "1.1.0" })
		})
		if got := w.steps("r1"); len(got) != 0 {
			t.Errorf("reported %v", got)
		}
	})
}

// A device that goes dark stays so until a technician comes.
func TestADeviceThatGoesDark(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) { c.Faults.Dark = simdev.Darkness{On: true, After: time.Hour} })
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Good, 5000, 1))
		w.eventually(time.Minute, "the update", func() bool { return d.Snapshot().Version == "1.1.0" })
		before := get(w, func() int { return len(w.hellos) })
		time.Sleep(50 * time.Minute)
		if n := get(w, func() int { return len(w.hellos) }); n != before || d.Snapshot().Connected {
			t.Errorf("%d hellos out of the dark", n-before)
		}
		w.eventually(time.Hour, "the technician", running(d, "1.0.0"))
	})
}

// A release whose floor was skipped does not start; after the floor it does.
func TestAFloorThatMatters(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		image := simdev.Firmware{Version: "2.0.0", Behaviour: simdev.Good, Needs: "1.5.0"}
		w.offerImage("r1", image.Image(5000, 1))
		w.eventually(5*time.Minute, "the way back", func() bool { return slices.Contains(w.steps("r1"), wire.StepRolledBack) })
		w.offerImage("r2", simdev.MakeImage("1.5.0", simdev.Good, 5000, 1))
		w.eventually(time.Minute, "the floor", running(d, "1.5.0"))
		w.offerImage("r3", image.Image(5000, 2))
		w.eventually(time.Minute, "the release", running(d, "2.0.0"))
	})
}

// The spread that an offer asks for is kept, and not always the same.
func TestAnOfferThatSpreads(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		image := simdev.MakeImage("1.1.0", simdev.Good, 5000, 1)
		sum := sha256.Sum256(image)
		w.offerImage("warm", image) // puts it on the server
		w.eventually(time.Minute, "the update", running(d, "1.1.0"))
		second := simdev.MakeImage("1.2.0", simdev.Good, 5000, 2)
		w.offerImage("r2", second)
		w.eventually(time.Minute, "the second update", running(d, "1.2.0"))
		began := time.Now()
		w.tell(wire.DownOTA, wire.Encode(wire.OTAOffer{Job: "r3", Version: "1.1.0", Size: int64(len(image)), SHA256: sum[:], Path: "/f/r3", Spread: 600}))
		w.eventually(time.Minute, "accepted", func() bool { return slices.Contains(w.steps("r3"), wire.StepAccepted) })
		w.eventually(20*time.Minute, "an end", func() bool { return len(w.steps("r3")) > 1 })
		if waited := time.Since(began); waited < time.Second || waited > 11*time.Minute {
			t.Errorf("waited %v", waited)
		}
	})
}
