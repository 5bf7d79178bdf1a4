package simdev

import (
	"context"
	"net"
	"time"

	"muster/internal/fleet"
)

// Timing of a device. A zero field takes the value of DefaultTiming.
type Timing struct {
	Spread         time.Duration // the first connection is made at random within it
	Connect        time.Duration // limit of dial, handshake and login together
	KeepAlive      time.Duration // MQTT; whole seconds
	Ack            time.Duration // how long to wait for an acknowledgement before the session counts as lost
	Answer         time.Duration // a hello that is not answered is said again after it, then after twice as long, and so on
	TelemetryEvery time.Duration // below zero: never
	BackoffBase    time.Duration // reconnects wait at random between 0 and base·2ⁿ, at most cap (full jitter)
	BackoffCap     time.Duration
	Reboot         time.Duration // from reset to running
	BootTries      int           // boots of a new image before the bootloader goes back
	Watchdog       time.Duration // a new image that muster has not answered within it is rolled back; below zero: never
	ProgressEvery  int           // percent of a download between two reports
	OTATries       int           // attempts of a download without progress, and of whole downloads with a wrong hash
	BusyTries      int           // answers of 429 or 503 in a row before a download fails: the server is busy, not broken
	FallbackStay   time.Duration // on the fallback without a certificate, before the front is tried again
	NewCertPause   time.Duration // a certificate that did not work is not tried again within it
	Fallback       Policy
}

// DefaultTiming is what a device in the field should use.
func DefaultTiming() Timing {
	return Timing{
		Connect: 20 * time.Second, KeepAlive: time.Minute, Ack: 15 * time.Second, Answer: 2 * time.Minute, TelemetryEvery: time.Minute,
		BackoffBase: 2 * time.Second, BackoffCap: 5 * time.Minute, Reboot: 2 * time.Second, BootTries: 3, Watchdog: 10 * time.Minute,
		ProgressEvery: 10, OTATries: 5, BusyTries: 100, FallbackStay: 10 * time.Minute, NewCertPause: time.Hour,
		Fallback: Policy{Refusals: 10, After: time.Hour, NewTries: 3},
	}
}

// QuickTiming is DefaultTiming in fast motion, for a demonstration or a test on one machine.
func QuickTiming() Timing {
	return Timing{
		Connect: 10 * time.Second, KeepAlive: 10 * time.Second, Ack: 10 * time.Second, Answer: 10 * time.Second, TelemetryEvery: 5 * time.Second,
		BackoffBase: 200 * time.Millisecond, BackoffCap: 5 * time.Second, Reboot: 300 * time.Millisecond, BootTries: 3, Watchdog: 15 * time.Second,
		ProgressEvery: 25, OTATries: 3, BusyTries: 100, FallbackStay: 20 * time.Second, NewCertPause: 30 * time.Second,
		Fallback: Policy{Refusals: 3, After: 5 * time.Second, NewTries: 2},
	}
}

// withDefaults returns t with its zero fields filled.
func (t Timing) withDefaults() Timing {
	d := DefaultTiming()
	for _, f := range []struct{ v, def *time.Duration }{
		{&t.Connect, &d.Connect}, {&t.KeepAlive, &d.KeepAlive}, {&t.Ack, &d.Ack}, {&t.Answer, &d.Answer}, {&t.TelemetryEvery, &d.TelemetryEvery}, {&t.BackoffBase, &d.BackoffBase},
		{&t.BackoffCap, &d.BackoffCap}, {&t.Reboot, &d.Reboot}, {&t.Watchdog, &d.Watchdog}, {&t.FallbackStay, &d.FallbackStay},
		{&t.NewCertPause, &d.NewCertPause}, {&t.Fallback.After, &d.Fallback.After},
	} {
		if *f.v == 0 {
			*f.v = *f.def
		}
	}
	for _, f := range []struct{ v, def *int }{
		{&t.BootTries, &d.BootTries}, {&t.ProgressEvery, &d.ProgressEvery}, {&t.OTATries, &d.OTATries}, {&t.BusyTries, &d.BusyTries},
		{&t.Fallback.Refusals, &d.Fallback.Refusals}, {&t.Fallback.NewTries, &d.Fallback.NewTries},
	} {
		if *f.v == 0 {
			*f.v = *f.def
		}
	}
	return t
}

// Config of a device.
type Config struct {
	Credentials Credentials // needed until the flash holds what came of them
	Flash       Flash       // nil: in memory
	Firmware    []byte      // what it is made with; nil: a good image of version 1.0.0
	Hardware    string      // for hello; may be empty
	Chip        string      // for hello; may be empty
	Revision    int         // silicon revision × 100, for hello; 0 = it does not know

	// SecureVersion is what the eFuses count to when the device is made. An image with a higher one raises the count when it
	// is confirmed; one with a lower one does not start.
	SecureVersion uint32

	Timing Timing
	Faults Faults
	Seed   uint64 // of everything that the device does at random, keys excepted

	// OnEvent, if set, is called for each event, by the goroutines of many devices at once. It must not block.
	OnEvent func(Event)
	// Dial opens network connections; nil: net.Dialer. Tests put pipes here.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// factoryImage is what devices without Config.Firmware are made with; they all share it.
var factoryImage = MakeImage("1.0.0", Good, 1024, 1)

func (c Config) withDefaults() (Config, error) {
	if err := c.Credentials.check(); err != nil {
		return c, err
	}
	if c.Flash == nil {
		c.Flash = &MemFlash{}
	}
	if c.Firmware == nil {
		c.Firmware = factoryImage
	}
	if _, err := ParseImage(c.Firmware); err != nil {
		return c, err
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	if c.OnEvent == nil {
		c.OnEvent = func(Event) {}
	}
	if c.Faults.Buffer > 0 && c.Faults.Buffer < 64 {
		return c, fleet.Errorf(fleet.Invalid, "a receive buffer of %d bytes holds no message at all: use 64 or more", c.Faults.Buffer)
	}
	c.Timing = c.Timing.withDefaults()
	return c, nil
}
