package cli

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"muster/api"
)

var update = flag.Bool("update", false, "rewrite testdata: only if you understand what caused the change")

var now = time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)

// golden compares what f prints with testdata/<name>.txt.
func golden(t *testing.T, name string, tty bool, f func(*ui)) {
	t.Helper()
	var out bytes.Buffer
	f(&ui{out: &out, err: &out, tty: tty, errTTY: tty, colour: tty, width: 80, now: func() time.Time { return now }})
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("%s is now\n%s\nand was\n%s", name, out.Bytes(), want)
	}
}

func fleetOfThree() []api.Device {
	return []api.Device{
		{ID: "sensor-0001", Product: "sensor", Current: "5f", Labels: api.Labels{"site": "berlin", "floor": "2"}, Status: api.DeviceStatus{Online: true, Vhost: "devices", Version: "1.1.0", LastSeen: now.Add(-30 * time.Second)}},
		{ID: "sensor-2", Product: "sensor", Current: "6a", Status: api.DeviceStatus{Online: true, Vhost: "fallback", Version: "1.0.0", LastSeen: now.Add(-3 * time.Hour)}},
		{ID: "x", Product: "lamp", Disabled: true, Status: api.DeviceStatus{Version: "über-β\x1b[31m", LastSeen: now.Add(-100 * 24 * time.Hour)}},
	}
}

func rolloutUnderWay() api.Rollout {
	return api.Rollout{
		ID: "sensor-1-1-0", Product: "sensor", Version: "1.1.0", State: "running", Targets: 100, Stage: 2, InFlight: 10, Failures: 1,
		Counts: api.Counts{"succeeded": 11, "downloading": 10, "failed": 1, "pending": 78},
		Stages: []api.RolloutStage{
			{Number: 1, Name: "canary", Count: 1, Quota: 1, Started: 1, Counts: api.Counts{"succeeded": 1}, OpenedAt: now, DoneAt: now, ClosedAt: now},
			{Number: 2, Percent: 25, Quota: 25, Started: 21, InFlight: 10, Failures: 1, Counts: api.Counts{"succeeded": 10, "downloading": 10, "failed": 1}, OpenedAt: now},
			{Number: 3, Percent: 100, Quota: 100, Counts: api.Counts{}},
		},
	}
}

func TestDeviceTable(t *testing.T) {
	for name, tty := range map[string]bool{"devices-pipe": false, "devices-terminal": true} {
		golden(t, name, tty, func(u *ui) { (&app{ui: u}).printDevices(fleetOfThree()) })
	}
}

func TestDeviceFacts(t *testing.T) {
	golden(t, "device-show", false, func(u *ui) { (&app{ui: u}).printDevice(fleetOfThree()[0]) })
}

func TestStageTable(t *testing.T) {
	golden(t, "stages", false, func(u *ui) { (&app{ui: u}).printStages(rolloutUnderWay()) })
}

func TestWatchIsRedrawn(t *testing.T) {
	halting := rolloutUnderWay()
	halting.State, halting.Reason, halting.Failures = "halting", "3 failures, 2 are tolerated", 3
	halting.Stages[1].Failures, halting.Counts["failed"] = 3, 3
	golden(t, "watch-terminal", true, func(u *ui) {
		v := &watchView{u: u}
		v.show(rolloutUnderWay())
		v.lost(errors.New("https://h cannot be reached"))
		v.show(halting)
	})
	golden(t, "watch-pipe", false, func(u *ui) {
		v := &watchView{u: u}
		v.show(rolloutUnderWay())
		v.show(rolloutUnderWay()) // nothing new, no line
		v.lost(errors.New("https://h cannot be reached"))
		v.show(halting)
	})
}

func TestRevocationReport(t *testing.T) {
	golden(t, "revoked", false, func(u *ui) {
		(&app{ui: u}).printRevocation(api.RevocationReport{
			Certificate: api.Certificate{Serial: "5f2c", Device: "sensor-0001"}, Connections: 1, StoredAfter: "1.2ms", ClosedAfter: "14ms", VerifiedAfter: "5.1s", Clean: true,
		})
	})
}

func TestMeter(t *testing.T) {
	for name, tty := range map[string]bool{"meter-pipe": false, "meter-terminal": true} {
		golden(t, name, tty, func(u *ui) {
			m := u.meter("uploading", 1<<20, size)
			for n := int64(0); n <= 1<<20; n += 1 << 17 {
				m.set(n)
				m.set(n) // nothing new
			}
			m.end()
		})
	}
}

func TestErrors(t *testing.T) {
	golden(t, "error-terminal", true, func(u *ui) { u.fail(errors.New("no\x1b[2J"), []string{"look", "again"}) })
}

func TestCleanKeepsWhatIsHarmless(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "plain": "plain", "grüße 温度 🙂": "grüße 温度 🙂", "a\nb\tc": `a\u000ab\u0009c`, "\x1b[31m": `\u001b[31m`, "\u202e": `\u202e`, "\xff": `\xff`,
		"\U000e0041": `\U000e0041`, "\u200b": `\u200b`,
	} {
		if got := clean(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := cleanJSON("{\n\"a\":\"\u009b\U000e0041\"}"); got != "{\n\"a\":\"\\u009b\\udb40\\udc41\"}" {
		t.Errorf("%q", got)
	}
}
