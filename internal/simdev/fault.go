package simdev

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Faults are what a device does wrong on request. The zero value is a device without faults.
type Faults struct {
	PowerCut         Cut            // once, at a write of the flash
	CorruptDownloads int            // flips a bit in so many downloads; below zero, in all
	LieInstalled     bool           // reports installed, and installs nothing
	ClaimID          fleet.DeviceID // names this device in its payloads
	FloodPerSecond   int            // telemetry messages per second, QoS 0, over and above the usual
	Clock1970        bool           // no clock: every boot begins in 1970
	BootLoop         bool           // the next image it installs does not start here, good as it may be
	Silent           bool           // says no hello and reports no update; telemetry goes on
	DropEvery        time.Duration  // cuts its own connection at random, on average so often
	Duplicates       bool           // says everything twice
	Buffer           int            // receive buffer of so many bytes: larger packets are dropped without a word
	LoseKeys         bool           // its keys and certificates are gone at the next boot, once
	NoReports        bool           // reports nothing on up/ota; hello, state and telemetry go on
	Reject           string         // rejects every offer and every way back, with this reason
	SlowDownload     int            // bytes per second
	CutDownloads     int            // the line breaks in the middle of so many requests; below zero, of all
	Dark             Darkness       // the next image that it installs never connects, good as it may be
}

// Darkness is how a device goes dark after an update. The zero value is not at all.
type Darkness struct {
	On    bool
	After time.Duration // a technician comes after it and puts the old image back; 0: nobody comes
}

// faultNames explain what Set understands. A test sets each of them.
var faultNames = []struct{ name, value, what string }{
	{"power-cut", "N[:before|middle|after]", "the power goes in the Nth write of the flash"},
	{"corrupt-download", "N|all", "a bit flips in the first N downloads"},
	{"lie", "installed", "reports an update as installed without installing it"},
	{"claim", "DEVICE", "names another device in its payloads"},
	{"flood", "RATE", "sends RATE more telemetry messages per second"},
	{"clock", "1970", "has no clock"},
	{"boot-loop", "on", "the next image that it installs does not start"},
	{"silent", "on", "says no hello and reports no update"},
	{"drop", "DURATION", "cuts its connection at random, on average so often"},
	{"duplicates", "on", "says everything twice"},
	{"buffer", "BYTES", "drops packets larger than its receive buffer"},
	{"lose-keys", "on", "its keys are gone at the next boot"},
	{"no-reports", "on", "never says how far an update is; hello goes on"},
	{"reject", "REASON", "rejects every update"},
	{"slow-download", "BYTES", "downloads so many bytes per second"},
	{"cut-download", "N|all", "the line breaks in the middle of N requests"},
	{"dark", "on|DURATION", "never connects after its next update; after DURATION a technician comes"},
}

// FaultHelp returns a line for each fault that Set understands.
func FaultHelp() string {
	var b strings.Builder
	for _, f := range faultNames {
		fmt.Fprintf(&b, "  %-36s %s\n", f.name+"="+f.value, f.what)
	}
	return b.String()
}

// Set takes one fault as text, name=value. The error is of kind Invalid.
func (f *Faults) Set(text string) error {
	name, value, _ := strings.Cut(text, "=")
	var err error
	switch name {
	case "power-cut":
		f.PowerCut, err = parseCut(value)
	case "corrupt-download":
		f.CorruptDownloads, err = countOrAll(value)
	case "lie":
		f.LieInstalled, err = value == "installed", is(value, "installed")
	case "claim":
		f.ClaimID, err = fleet.ParseDeviceID(value)
	case "flood":
		f.FloodPerSecond, err = positive(value)
	case "clock":
		f.Clock1970, err = true, is(value, "1970")
	case "boot-loop":
		f.BootLoop, err = true, is(value, "on")
	case "silent":
		f.Silent, err = true, is(value, "on")
	case "drop":
		f.DropEvery, err = positiveDuration(value)
	case "duplicates":
		f.Duplicates, err = true, is(value, "on")
	case "buffer":
		f.Buffer, err = positive(value)
	case "lose-keys":
		f.LoseKeys, err = true, is(value, "on")
	case "no-reports":
		f.NoReports, err = true, is(value, "on")
	case "reject":
		if f.Reject = value; value == "" || value != cut(value) {
			err = fmt.Errorf("a reason is 1 to %d bytes of text", wire.MaxText)
		}
	case "slow-download":
		f.SlowDownload, err = positive(value)
	case "cut-download":
		f.CutDownloads, err = countOrAll(value)
	case "dark":
		f.Dark.On = true
		if value != "on" {
			f.Dark.After, err = positiveDuration(value)
		}
	default:
		return fleet.Errorf(fleet.Invalid, "no fault is called %q; there are\n%s", name, FaultHelp())
	}
	if err != nil {
		return fleet.Wrap(fleet.Invalid, err, "fault %s", name)
	}
	return nil
}

func positive(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err == nil && n < 1 {
		err = fmt.Errorf("not above zero")
	}
	return n, err
}

// countOrAll reads a number above zero, or all as -1.
func countOrAll(s string) (int, error) {
	if s == "all" {
		return -1, nil
	}
	return positive(s)
}

func positiveDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d <= 0 {
		err = fmt.Errorf("not above zero")
	}
	return d, err
}

func is(got, want string) error {
	if got != want {
		return fmt.Errorf("use %q", want)
	}
	return nil
}

func parseCut(s string) (Cut, error) {
	number, point, has := strings.Cut(s, ":")
	if !has {
		point = string(CutMiddle)
	}
	n, err := positive(number)
	if err == nil && !slices.Contains([]CutPoint{CutBefore, CutMiddle, CutAfter}, CutPoint(point)) {
		err = fmt.Errorf("the point is before, middle or after")
	}
	return Cut{uint64(n), CutPoint(point)}, err
}
