package simdev_test

import (
	"testing"
	"time"

	"muster/internal/simdev"
	"muster/internal/wire"
)

// An answer that never came is asked for again, less and less often.
func TestUnansweredHelloIsRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.silent = true })
		d, _ := w.device(func(c *simdev.Config) { c.Timing.Answer = time.Minute })
		time.Sleep(16 * time.Minute) // after 1, 3, 7 and 15 minutes
		if n := get(w, func() int { return len(w.hellos) }); n != 5 {
			t.Errorf("%d hellos", n)
		}
		w.set(func() { w.silent = false })
		time.Sleep(time.Hour)
		if c := d.Counts(); c.Hellos != 6 || c.Answers != 1 || c.Connects != 1 {
			t.Errorf("%+v", c)
		}
	})
}

// A connection that ends while a message waits for its acknowledgement is missed at once, not when the wait is over.
func TestLossIsNoticedWhileSaying(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.hangUp = true })
		d, _ := w.device(func(c *simdev.Config) { c.Timing.Ack = 20 * time.Second })
		time.Sleep(time.Minute + 5*time.Second)
		if c := d.Counts(); c.Connects != 2 || c.Answers != 2 || c.Telemetry != 0 {
			t.Errorf("%+v", c)
		}
	})
}

func TestSession(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d, stop := w.device(func(c *simdev.Config) { c.Hardware, c.Chip = "rev-c", "esp32s3" })
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		h := get(w, func() wire.Hello { return w.hellos[0] })
		snap := d.Snapshot()
		if h.Version != "1.0.0" || h.Hardware != "rev-c" || h.Chip != "esp32s3" || h.Boot != "power-on" || h.Serial != snap.Serial || h.Image != snap.Image || !snap.Connected {
			t.Errorf("hello %+v, snapshot %+v", h, snap)
		}
		time.Sleep(10*time.Minute + time.Second)
		if got := d.Acked(); len(got) != 1 || got[0] != (simdev.Range{From: 1, To: 10}) {
			t.Errorf("acknowledged %v", got)
		}
		if c := d.Counts(); c.Connects != 1 || c.Telemetry != 10 || c.Refusals+c.Unreachable+c.Dropped != 0 {
			t.Errorf("%+v", c)
		}
		if n := get(w, func() int { return w.bad }); n != 0 {
			t.Errorf("%d messages that the codec refuses", n)
		}
		w.tell(wire.DownCmd, wire.Encode(wire.Cmd{Op: wire.CmdReport}))
		w.tell(wire.DownCmd, wire.Encode(wire.Cmd{Op: "blink"}))
		w.tell(wire.DownCmd, []byte(`{"op":`))
		w.tell("other", []byte(`{}`))
		w.eventually(time.Second, "a second hello", func() bool { return w.saw(simdev.Answered, "") == 2 && w.saw(simdev.Dropped, "") == 2 })
		stop()
		if d.Snapshot().Connected {
			t.Error("still connected after the end")
		}
	})
}
