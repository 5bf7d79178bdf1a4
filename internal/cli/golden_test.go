package cli

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
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
	f(&ui{out: &out, err: &out, tty: tty, errTTY: tty, colour: tty, width: 80, size: func() (int, int) { return 80, 24 }, now: func() time.Time { return now }})
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
		ID: "sensor-1-1-0", Product: "sensor", Version: "1.1.0", State: "running", Targets: 100, Stage: 2, InFlight: 10, Failures: 1, Plan: api.Plan{MaxFailures: new(2), MaxInFlight: 20},
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
	tell := func(u *ui) {
		clock := now
		u.now = func() time.Time { return clock }
		v := newView(u, time.Second)
		r := rolloutUnderWay()
		v.take(news{rollout: &r, date: clock})
		v.take(news{decision: &api.Decision{At: clock, Code: "stage-opened", To: "running", Text: "stage 2 of 3 is open: 25 devices"}})
		clock = clock.Add(30 * time.Second)
		v.take(news{rollout: &r}) // nothing new, no line
		v.take(news{lost: errors.New("https://h cannot be reached")})
		clock = clock.Add(30 * time.Second)
		v.take(news{rollout: &halting})
		v.take(news{decision: &api.Decision{At: clock, Code: "failure-limit", To: "halting", Text: "3 failures, 2 are tolerated"}})
		v.close()
	}
	golden(t, "watch-terminal", true, tell)
	golden(t, "watch-pipe", false, tell)
	golden(t, "watch-small", true, func(u *ui) {
		u.size = func() (int, int) { return 40, 8 }
		tell(u)
	})
}

func TestAFrameFitsAnyTerminal(t *testing.T) {
	r := rolloutUnderWay()
	r.Stages[1].Name = "a name that is far too long for a bar"
	for _, size := range [][2]int{{20, 3}, {40, 10}, {80, 24}, {300, 100}} {
		var out bytes.Buffer
		u := &ui{out: &out, tty: true, colour: true, now: func() time.Time { return now }, size: func() (int, int) { return size[0], size[1] }}
		v := newView(u, time.Second)
		for range 9 {
			v.take(news{decision: &api.Decision{At: now, Code: "joined", Text: strings.Repeat("x", 300)}})
		}
		v.take(news{rollout: &r})
		lines := v.frame(size[0], size[1])
		if len(lines) >= size[1] {
			t.Errorf("%v: %d lines", size, len(lines))
		}
		for _, l := range lines {
			if columns(l) > size[0] {
				t.Errorf("%v: %d columns: %q", size, columns(l), l)
			}
		}
	}
}

// A terminal that becomes narrower breaks the lines of the last frame; they are overwritten all the same.
func TestTheViewFollowsTheSizeOfTheTerminal(t *testing.T) {
	var out bytes.Buffer
	width := 100
	u := &ui{out: &out, tty: true, now: func() time.Time { return now }, size: func() (int, int) { return width, 24 }}
	v := newView(u, time.Second)
	r := rolloutUnderWay()
	v.take(news{rollout: &r})
	rows := rowsOf(v.drawn, 50)
	if rows <= len(v.drawn) {
		t.Fatalf("no line of %v is wider than 50", v.drawn)
	}
	out.Reset()
	width = 50
	v.redraw()
	if want := fmt.Sprintf("\x1b[%dA\r", rows); !strings.Contains(out.String(), want) {
		t.Errorf("%q, want %q", out.String(), want)
	}
	if n := strings.Count(out.String(), beginFrame); n != 1 || !strings.HasSuffix(out.String(), endFrame) {
		t.Errorf("%d frames in %q", n, out.String())
	}
}

func TestRates(t *testing.T) {
	at := func(s int) time.Time { return now.Add(time.Duration(s) * time.Second) }
	counts := func(started, succeeded int) api.Rollout {
		return api.Rollout{State: "running", Targets: 100, StartedAt: now.Add(-10 * time.Minute), Counts: api.Counts{"succeeded": succeeded, "pending": 100 - started},
			Stages: []api.RolloutStage{{Started: started}}}
	}
	var p pace
	p.take(at(0), counts(20, 10))
	if o, s, ok := p.rates(counts(20, 10), at(1), at(1)); !ok || o < 1.9 || o > 2.1 || s < 0.9 || s > 1.1 { // since the start
		t.Errorf("%v %v %v", o, s, ok)
	}
	p.take(at(60), counts(50, 40))
	if o, s, ok := p.rates(counts(50, 40), at(60), at(60)); !ok || o != 30 || s != 30 {
		t.Errorf("%v %v %v", o, s, ok)
	}
	if got := p.text(counts(50, 40), at(60), at(60)); got != "30/min offered, 30/min succeeded, about 1m40s left" {
		t.Errorf("%q", got)
	}
	if _, s, _ := p.rates(counts(50, 40), at(240), at(240)); s != 0 { // nothing for two minutes
		t.Errorf("%v a minute, long after the last", s)
	}
}

func TestRolloutTexts(t *testing.T) {
	golden(t, "rollout-show", false, func(u *ui) {
		r := rolloutUnderWay()
		r.Where, r.Dynamic, r.CreatedAt, r.CreatedBy, r.StartedAt = `labels["site"] == "berlin"`, true, now.Add(-time.Hour), "alice", now.Add(-30*time.Minute)
		r.Floors = []api.Floor{{Version: "0.9.0"}}
		r.Approved = api.RolloutApproval{By: "bob", At: now.Add(-40 * time.Minute)}
		r.Stages[1].DoneAt, r.NextGrant = now.Add(-10*time.Minute), now.Add(time.Minute)
		r.Plan = api.Plan{
			MaxFailures: new(2), MaxInFlight: 10, DeviceTimeout: "1h0m0s", VerifyFor: "5m0s", Soak: "30m0s", OfflineGrace: "168h0m0s", Retries: 2, RetryBackoff: "5m0s",
			Limits: []api.Limit{{Percent: 5, MinSample: 20, Confidence: 95, Then: "pause"}, {Kinds: []api.FailureKind{"went-dark"}, Count: 1}},
			Window: api.Window{Cron: "0 2 * * *", Length: "4h0m0s", Zone: "Europe/Berlin"}, Pace: api.Pace{Base: 5, Factor: 2, Every: 50, PerMinute: 100},
			Sites: api.SiteBudget{Label: "site", Percent: 10}, Rollback: api.RollbackPlan{Version: "1.0.0"}, BytesPerSecond: 4 << 20,
		}
		(&app{ui: u}).printRollout(r)
	})
	golden(t, "rollout-plan", false, func(u *ui) {
		(&app{ui: u}).printPreview(api.RolloutPreview{
			Product: "sensor", Version: "1.1.0", Dynamic: true, Targets: 1000, Online: 900, Bytes: 1 << 30, Duration: "26h30m12s",
			Stages: []api.PreviewStage{
				{Number: 1, Name: "canary", Count: 1, Quota: 1, Devices: 1, Duration: "37m0s", Sample: []string{"sensor-0007"}},
				{Number: 2, Percent: 100, Quota: 1000, Devices: 999, Duration: "25h53m12s", Sample: []string{"a", "b", "c", "d"}},
			},
			Floors: map[string]int{"0.9.0": 12}, Skips: map[string]int{"never-seen": 3, "has-image": 40},
			Stops: []string{"3 failures: halt", "no success in stage 1: halt"}, Warnings: []string{"no target is connected now"}, Problem: "plan: stage 2 …",
		}, true)
	})
	golden(t, "why", false, func(u *ui) {
		(&app{ui: u}).printWhy(api.Why{Blocked: true, Reasons: []api.Reason{
			{Code: "offline", Text: "it is offline since 2030-01-02 11:00:00 UTC (1h0m0s ago)", Blocking: true}, {Code: "next", Text: "rollout spring (1.1.0): it is among the next\x1b[2J"},
		}})
	})
}

// The plans that docs/rollouts.md shows are good for --plan.
func TestThePlansOfTheDocumentsAreRead(t *testing.T) {
	page, err := os.ReadFile("../../docs/rollouts.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for part := range strings.SplitSeq(string(page), "```json\n") {
		text, _, whole := strings.Cut(part, "```")
		if !whole || !strings.HasPrefix(text, "{") {
			continue
		}
		n++
		if p, err := (&app{env: Env{Stdin: strings.NewReader(text)}}).readPlan("-"); err != nil || len(p.Stages) == 0 {
			t.Errorf("%v in\n%s", err, text)
		}
	}
	if n < 3 {
		t.Errorf("%d plans were found", n)
	}
}

func TestSmallLanguages(t *testing.T) {
	for in, want := range map[string]api.Stage{
		"1": {Count: 1}, "25%": {Percent: 25}, "canary=5,min=80,hold": {Name: "canary", Count: 5, MinSuccess: 80, Hold: true}, "100%,min=95%": {Percent: 100, MinSuccess: 95},
		"0": {}, "": {}, "%": {}, "101%": {}, "-1": {}, "1,min=": {}, "1,min=101": {}, "1,hold=yes": {}, "a=b=1": {}, "1 ": {},
	} {
		if got, err := parseStage(in); (err != nil) != (want == api.Stage{}) || err == nil && got != want {
			t.Errorf("stage %q: %+v %v", in, got, err)
		}
	}
	for in, want := range map[string]api.Limit{
		"3":                      {Count: 3},
		"0:abort":                {Then: "abort"},
		"5%/20@95:pause":         {Percent: 5, MinSample: 20, Confidence: 95, Then: "pause"},
		"10%/1":                  {Percent: 10, MinSample: 1},
		"went-dark=1:rollback":   {Kinds: []api.FailureKind{"went-dark"}, Count: 1, Then: "rollback"},
		"failed+timed-out=5%/20": {Kinds: []api.FailureKind{"failed", "timed-out"}, Percent: 5, MinSample: 20},
		"":                       {}, "5%": {}, "%/20": {}, "5%/": {}, "-1": {}, "=1": {}, "1:": {}, "5/20": {}, "x": {}, "5%/20@": {},
	} {
		got, err := parseLimit(in)
		if bad := reflect.DeepEqual(want, api.Limit{}); (err != nil) != bad || !bad && !reflect.DeepEqual(got, want) {
			t.Errorf("limit %q: %+v %v", in, got, err)
		}
	}
	for in, want := range map[string][]string{
		"0 2 * * */4h/Europe/Berlin": {"0 2 * * *", "4h", "Europe/Berlin"},
		"0 2 * * */2/1h30m":          {"0 2 * * */2", "1h30m", ""},
		"*/5 1-3 * * 1-5/10m":        {"*/5 1-3 * * 1-5", "10m", ""},
		"0 2 * * *":                  nil, "0 2 * */4h": nil, "0 2 * * */4": nil, "": nil, "0 2 * * */4h/": nil,
	} {
		got := windowForm.FindStringSubmatch(in)
		if len(got) > 0 {
			got = got[1:]
		}
		if !slices.Equal(got, want) {
			t.Errorf("window %q: %q", in, got)
		}
	}
}

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestRevocationReport(t *testing.T) {
	golden(t, "revoked", false, func(u *ui) {
		(&app{ui: u}).printRevocation(api.RevocationReport{
			Certificate: api.Certificate{Serial: "5f2c", Device: "sensor-0001"}, Connections: 1, StoredAfter: "1.2ms", ClosedAfter: "14ms", VerifiedAfter: "5.1s", Clean: true,
			StoredAt: noon, ClosedAt: noon.Add(13 * time.Millisecond), EndedAt: noon.Add(15 * time.Millisecond), LastLook: noon.Add(time.Minute),
			RefusedAt: noon.Add(2 * time.Second), RefusedWhy: "certificate-unknown: its certificate was replaced or revoked, or never issued",
		})
		(&app{ui: u}).printRevocation(api.RevocationReport{
			Certificate: api.Certificate{Serial: "5f2d", Device: "sensor-0002"}, StoredAfter: "1.2ms", StoredAt: noon, Detail: "the broker or the store does not answer",
		})
	})
}

func TestMassRevocationReport(t *testing.T) {
	golden(t, "mass-revocation", false, func(u *ui) {
		a := &app{ui: u}
		a.printMass(api.MassRevocation{Issuer: "00ff", State: api.MassRevocationStateDrill, Total: 100000, Connections: 81000, Took: "41s", Estimate: "1m12s"})
		a.printMass(api.MassRevocation{Issuer: "00ff", State: api.MassRevocationStateDone, Total: 100000, Revoked: 100003, Connections: 81000, Closing: 12, Since: noon, DoneAt: noon.Add(70 * time.Second), Took: "1m10s"})
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

func TestServerCertificateTable(t *testing.T) {
	day := 24 * time.Hour
	list := []api.ServerCertificate{
		{Name: "ops", File: "/var/lib/muster/tls/ops.crt", Serial: "4f2a", Issuer: "muster servers 1", Ours: true, NotAfter: now.Add(300 * day), RenewsAt: now.Add(200 * day)},
		{Name: "broker", File: "/var/lib/muster/broker/tls/server.crt", Serial: "5b", Issuer: "Example CA", NotAfter: now.Add(20 * day), Refused: "they are not a certificate and its key", Doors: []api.ServerCertificateDoor{
			{Name: "mqtt", Address: "iot.example.com:8883", Serial: "5b", NotAfter: now.Add(20 * day), Proven: true},
			{Name: "fallback", Address: "iot.example.com:8884", Serial: "5a", NotAfter: now.Add(day)},
			{Name: "amqps", Address: "localhost:5671", Error: "connection refused"},
		}},
		{Name: "elsewhere", Failed: "the key\x1b[31m is away"},
	}
	for name, tty := range map[string]bool{"server-certs-pipe": false, "server-certs-terminal": true} {
		golden(t, name, tty, func(u *ui) { (&app{ui: u}).printServerCerts(list) })
	}
}

func TestExpiryTable(t *testing.T) {
	day := 24 * time.Hour
	l := api.ExpiryList{Items: []api.Expiry{
		{Kind: "token", Name: "cron", NotAfter: now.Add(-day), Alarm: api.ExpiryAlarmEnded, Fix: "muster token create, then delete this one"},
		{Kind: "served", Name: "broker-mqtt", NotAfter: now.Add(20 * day), LeftPercent: 5, Alarm: api.ExpiryAlarmN10, Fix: "look at it"},
		{Kind: "server", Name: "ops", NotAfter: now.Add(80 * day), LeftPercent: 22, Alarm: api.ExpiryAlarmN25, RenewsAt: now.Add(day)},
		{Kind: "root", Name: "root", NotAfter: now.Add(24 * 365 * day), LeftPercent: 96, Alarm: api.ExpiryAlarmFine},
	}, Incomplete: "tokens: the store is away"}
	for name, tty := range map[string]bool{"expiries-pipe": false, "expiries-terminal": true} {
		golden(t, name, tty, func(u *ui) { (&app{ui: u}).printExpiries(l) })
	}
}
