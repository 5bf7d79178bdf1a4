package dispatch_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/dispatch"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

const midImage = fleet.Hash("2222222222222222222222222222222222222222222222222222222222222222")

// at once is a plan without stages, soak or failures.
func atOnce() rollout.Plan {
	return rollout.Plan{Stages: []rollout.Stage{{Percent: 100}}, MaxInFlight: 100, DeviceTimeout: time.Hour, OfflineGrace: time.Hour}
}

func (w *world) change(id fleet.DeviceID, f func(*fleet.Device, *fleet.Status)) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		d, err := tx.Device(id)
		if err != nil {
			return err
		}
		s, err := tx.Status(id)
		if err != nil {
			return err
		}
		f(&d, &s)
		if err := tx.PutDevice(d); err != nil {
			return err
		}
		return tx.PutStatus(s)
	})
}

// add registers one more device that runs the old image and is online.
func (w *world) add(id fleet.DeviceID, labels map[string]string) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: id, Product: "lamp", Labels: labels}); err != nil {
			return err
		}
		return tx.PutStatus(fleet.Status{Device: id, Vhost: wire.VhostDevices, Online: true, ConnectedAt: w.now, HelloAt: w.now, Version: "1.0.0", Image: oldImage})
	})
}

func (w *world) label(key string, values ...string) {
	w.t.Helper()
	for i, v := range values {
		w.change(fleet.DeviceID(fmt.Sprint("d", i)), func(d *fleet.Device, _ *fleet.Status) {
			if v != "" {
				d.Labels = map[string]string{key: v}
			}
		})
	}
}

func (w *world) make(s dispatch.Spec) rollout.Rollout {
	w.t.Helper()
	if s.Product == "" {
		s.Product, s.Version = "lamp", "1.1.0"
	}
	if _, err := w.d.Create(context.Background(), w.now, s, "op"); err != nil {
		w.t.Fatal(err)
	}
	r, err := w.d.Start(context.Background(), w.now, s.ID, "op")
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) job(id fleet.RolloutID, d fleet.DeviceID) (j rollout.Job) {
	w.t.Helper()
	err := w.db.View(context.Background(), func(tx *bolt.Tx) (err error) { j, _, err = tx.Job(id, d); return err })
	if err != nil {
		w.t.Fatal(err)
	}
	return j
}

func (w *world) flying(id fleet.RolloutID) (ids []fleet.DeviceID) {
	w.t.Helper()
	js, _, err := w.d.Jobs(context.Background(), id, "", fleet.Page{Limit: 10_000})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, j := range js {
		if j.State.InFlight() {
			ids = append(ids, j.Device)
		}
	}
	return ids
}

func (w *world) reportTo(id fleet.RolloutID, d fleet.DeviceID, step wire.OTAStep) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		return w.d.Report(tx, w.now, d, wire.OTAReport{Job: id, Step: step, Error: "x"})
	})
}

// says is a hello with what matters for compatibility.
func (w *world) says(id fleet.DeviceID, h wire.Hello) {
	w.t.Helper()
	w.now = w.now.Add(time.Second)
	w.change(id, func(_ *fleet.Device, s *fleet.Status) {
		s.Image, s.Version, s.HelloAt, s.SecureVersion = h.Image, h.Version, w.now, h.SecureVersion
		s.Previous, s.PreviousSecureVersion = h.Previous, h.PreviousSecureVersion
		if h.Boot != "" {
			s.Booted(w.now, h.Boot)
		}
	})
	w.update(func(tx *bolt.Tx) error { return w.d.Hello(tx, w.now, wire.VhostDevices, id, h) })
}

func (w *world) release(v firmware.Version, image fleet.Hash, f func(*firmware.Release)) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		rel := firmware.Release{Manifest: firmware.Manifest{Product: "lamp", Version: v, Size: 10, SHA256: image, ImageHash: image}}
		if f != nil {
			f(&rel)
		}
		return tx.PutRelease(rel)
	})
}

func TestATargetIsWhatItsExpressionChooses(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(6, 6)
	w.label("site", "berlin", "berlin", "rome", "")
	w.make(dispatch.Spec{ID: "r", Where: `labels.site == "berlin" && version != "9"`, Plan: atOnce()})
	w.pass(time.Second)
	if got := w.flying("r"); fmt.Sprint(got) != "[d0 d1]" {
		t.Errorf("got %v", got)
	}
	if _, err := w.d.Create(t.Context(), w.now, dispatch.Spec{ID: "s", Product: "lamp", Version: "1.1.0", Where: `labels.site ==`}, "op"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("half an expression: %v", err)
	}
	p := atOnce()
	p.Stages = []rollout.Stage{{Percent: 10, Where: `labels.site == "paris"`}, {Percent: 100}}
	if _, err := w.d.Create(t.Context(), w.now, dispatch.Spec{ID: "s", Product: "lamp", Version: "1.1.0", Plan: p, Static: true}, "op"); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("a stage that selects nobody: %v", err)
	}
}

// A stage's expression keeps the others out until its turn is over, and does not hold them up when it has none left.
func TestAStageMayBeForSomeDevicesOnly(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(6, 6)
	w.label("ring", "canary", "", "canary")
	p := atOnce()
	p.Stages = []rollout.Stage{{Percent: 100, Where: `labels.ring == "canary"`}, {Percent: 100}}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	if got := w.flying("r"); fmt.Sprint(got) != "[d0 d2]" {
		t.Fatalf("the canary stage has %v", got)
	}
	for _, d := range w.flying("r") {
		w.hello(d, newImage, time.Second)
	}
	w.pass(time.Second)
	if got := w.flying("r"); len(got) != 4 {
		t.Errorf("afterwards %v", got)
	}
}

func TestDevicesJoinARunningRolloutByItsOwnRules(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(4, 4)
	p := atOnce()
	p.Stages = []rollout.Stage{{Percent: 25}, {Percent: 100}}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.make(dispatch.Spec{ID: "fixed", Plan: p, Static: true})
	w.add("late", nil)
	r := w.pass(time.Second)
	if r.Targets != 5 || r.Stage != 1 || len(w.flying("r")) != 2 { // 25 % of 5 is 2
		t.Errorf("%d targets, stage %d, %v in flight", r.Targets, r.Stage, w.flying("r"))
	}
	if s := w.get("fixed"); s.Targets != 4 {
		t.Errorf("a static target has %d", s.Targets)
	}
	// By a label that it gets later.
	w.label("site", "lab")
	w.make(dispatch.Spec{ID: "lab", Where: `labels.site == "lab"`, Plan: atOnce()})
	w.change("d3", func(d *fleet.Device, _ *fleet.Status) { d.Labels = map[string]string{"site": "lab"} })
	w.pass(time.Second)
	if s := w.get("lab"); s.Targets != 2 {
		t.Errorf("%d targets after a device was labelled", s.Targets)
	}
}

func TestADeviceThatLeavesTheTargetIsNotOffered(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(2, 2)
	w.label("site", "a", "a")
	p := atOnce()
	p.MaxInFlight = 1
	w.make(dispatch.Spec{ID: "r", Where: `labels.site == "a"`, Plan: p})
	w.pass(time.Second)
	first := w.flying("r")[0]
	other := fleet.DeviceID("d0")
	if first == "d0" {
		other = "d1"
	}
	w.change(other, func(d *fleet.Device, _ *fleet.Status) { d.Labels = nil })
	w.hello(first, newImage, time.Second)
	w.pass(time.Second)
	if j := w.job("r", other); j.State != rollout.Skipped || !strings.Contains(j.Cause.Text, "target") {
		t.Errorf("%s: %+v", j.State, j.Cause)
	}
}

// A device below a floor goes through it first, in the same job, and is then offered the release.
func TestAFloorIsTakenFirst(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(2, 2)
	w.release("1.0.5", midImage, func(r *firmware.Release) { r.Floor = true })
	w.change("d1", func(_ *fleet.Device, s *fleet.Status) { s.Version, s.Image = "1.0.5", midImage })
	w.make(dispatch.Spec{ID: "r", Plan: atOnce()})
	w.pass(time.Second)
	if a, b := w.job("r", "d0"), w.job("r", "d1"); a.Floor != 1 || b.Floor != 0 || a.State != rollout.Offered || b.State != rollout.Offered {
		t.Fatalf("%s floor %d, %s floor %d", a.State, a.Floor, b.State, b.Floor)
	}
	w.says("d1", wire.Hello{Version: "1.1.0", Image: newImage})
	w.says("d0", wire.Hello{Version: "1.0.5", Image: midImage})
	if j := w.job("r", "d0"); j.State != rollout.Waiting || j.Cause.Kind != rollout.ByFloor {
		t.Fatalf("after the floor: %s, %+v", j.State, j.Cause)
	}
	w.pass(time.Second)
	if j := w.job("r", "d0"); j.State != rollout.Offered || j.Floor != 0 || j.Attempts != 2 {
		t.Fatalf("%s, floor %d", j.State, j.Floor)
	}
	w.says("d0", wire.Hello{Version: "1.1.0", Image: newImage})
	if r := w.pass(time.Second); r.State != rollout.Completed || r.Total.Succeeded != 2 {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
}

// A floor of another chip is no floor.
func TestAFloorOfAnotherChipIsNone(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(1, 1)
	w.change("d0", func(_ *fleet.Device, s *fleet.Status) { s.Chip = "ESP32-S3" })
	w.release("1.0.4", midImage, func(r *firmware.Release) { r.Floor, r.Chip = true, "esp32" })
	w.make(dispatch.Spec{ID: "r", Plan: atOnce()})
	w.pass(time.Second)
	if j := w.job("r", "d0"); j.State != rollout.Offered || j.Floor != 0 {
		t.Errorf("%s, floor %d: %s", j.State, j.Floor, j.Cause.Text)
	}
}

func TestOlderReleasesNeedAWord(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(1, 1)
	w.change("d0", func(_ *fleet.Device, s *fleet.Status) { s.Version = "2.0.0" })
	w.make(dispatch.Spec{ID: "r", Plan: atOnce()})
	p := atOnce()
	p.AllowDowngrade = true
	w.make(dispatch.Spec{ID: "s", Plan: p})
	w.pass(time.Second)
	if a, b := w.job("r", "d0"), w.job("s", "d0"); a.State != rollout.Skipped || b.State != rollout.Offered {
		t.Errorf("without the word %s, with it %s", a.State, b.State)
	}
}

func TestASiteKeepsMostOfItsDevices(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(8, 8)
	w.label("site", "a", "a", "a", "a", "b", "b")
	p := atOnce()
	p.Sites = rollout.SiteBudget{Label: "site", Percent: 25}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	for range 8 {
		w.pass(time.Second)
		at := map[string]int{}
		for _, d := range w.flying("r") {
			at[w.job("r", d).Site]++
		}
		if at["a"] > 1 || at["b"] > 1 {
			t.Fatalf("at once: %v", at)
		}
		for _, d := range w.flying("r") {
			w.hello(d, newImage, time.Second)
		}
	}
	if r := w.get("r"); r.State != rollout.Completed {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
}

func TestADevicesOwnZoneHasItsOwnWindow(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(2, 2)
	w.label("tz", "Asia/Tokyo", "Europe/Berlin")
	p := atOnce()
	p.Window = rollout.Window{Cron: "0 2 * * *", Length: 2 * time.Hour, ZoneLabel: "tz"}
	w.now = time.Date(2030, 1, 1, 17, 30, 0, 0, time.UTC) // 2:30 in Tokyo
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	if got := w.flying("r"); fmt.Sprint(got) != "[d0]" {
		t.Errorf("got %v", got)
	}
	w.hello("d0", newImage, time.Second)
	w.now = time.Date(2030, 1, 2, 1, 30, 0, 0, time.UTC) // 2:30 in Berlin
	w.pass(0)
	if got := w.flying("r"); fmt.Sprint(got) != "[d1]" {
		t.Errorf("got %v", got)
	}
}

func TestADeviceThatIsNotHealthyHasFailed(t *testing.T) {
	for name, bad := range map[string]func(*world){
		"panics": func(w *world) { w.says("d0", wire.Hello{Version: "1.1.0", Image: newImage, Boot: "panic"}) },
		"expression": func(w *world) {
			w.change("d0", func(_ *fleet.Device, s *fleet.Status) { s.State = []byte(`{"heap": 10}`) })
		},
		"reconnects": func(w *world) {
			w.change("d0", func(_ *fleet.Device, s *fleet.Status) {
				for i := range 4 {
					s.Began(w.now.Add(time.Duration(i+1) * time.Second))
				}
			})
			w.now = w.now.Add(time.Minute)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := open(t, storetest.Open(t), nil)
			w.fleet(2, 2)
			p := atOnce()
			p.VerifyFor, p.MaxFailures = 10*time.Minute, 5
			p.Health = rollout.Health{BadBoots: []string{"panic"}, Reconnects: 3, Expression: `state.heap < 1000.0`}
			w.make(dispatch.Spec{ID: "r", Plan: p})
			w.pass(time.Second)
			w.says("d0", wire.Hello{Version: "1.1.0", Image: newImage, Boot: "sw"})
			w.says("d1", wire.Hello{Version: "1.1.0", Image: newImage, Boot: "sw"})
			bad(w)
			w.pass(20 * time.Minute)
			if a, b := w.job("r", "d0"), w.job("r", "d1"); a.State != rollout.Failed || a.Cause.Kind != rollout.ByHealth || b.State != rollout.Succeeded {
				t.Errorf("d0 %s (%s), d1 %s", a.State, a.Cause.Text, b.State)
			}
		})
	}
}

func TestSilenceAfterTheUpdateIsAFailureAndAbsenceIsNot(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(3, 2) // d2 is offline all along
	p := atOnce()
	p.VerifyFor, p.DarkAfter, p.MaxFailures, p.OfflineGrace = 10*time.Minute, 5*time.Minute, 5, time.Minute
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	for _, d := range []fleet.DeviceID{"d0", "d1"} {
		w.says(d, wire.Hello{Version: "1.1.0", Image: newImage})
	}
	w.change("d1", func(_ *fleet.Device, s *fleet.Status) { s.Online, s.LostAt = false, w.now })
	for range 10 {
		w.pass(3 * time.Minute)
	}
	r := w.pass(2 * time.Hour)
	if a, b, c := w.job("r", "d0"), w.job("r", "d1"), w.job("r", "d2"); a.State != rollout.Succeeded || b.State != rollout.WentDark || c.State != rollout.Skipped {
		t.Errorf("%s: d0 %s, d1 %s, d2 %s", r.State, a.State, b.State, c.State)
	}
}

// With a control group the rollout stops although no device failed by its own word, and does not stop where everybody is
// equally bad.
func TestDevicesWithTheUpdateAreComparedWithThoseWithout(t *testing.T) {
	for name, row := range map[string]struct {
		control bool // the others panic as well
		want    rollout.State
	}{"only with it": {false, rollout.Halted}, "everywhere": {true, rollout.Running}} {
		t.Run(name, func(t *testing.T) {
			w := open(t, storetest.Open(t), nil)
			w.fleet(60, 60)
			p := atOnce()
			p.Stages = []rollout.Stage{{Percent: 50}, {Percent: 100}}
			p.VerifyFor, p.MaxFailures = 10*time.Minute, 5
			p.Health = rollout.Health{BadBoots: []string{"panic"}, Compare: true}
			w.make(dispatch.Spec{ID: "r", Plan: p})
			w.pass(time.Second)
			updated := w.flying("r")
			if len(updated) != 30 {
				t.Fatalf("%d in flight", len(updated))
			}
			for _, d := range updated {
				w.says(d, wire.Hello{Version: "1.1.0", Image: newImage})
			}
			for i := range 60 {
				d := fleet.DeviceID(fmt.Sprint("d", i))
				switch {
				case slices.Contains(updated, d):
					w.says(d, wire.Hello{Version: "1.1.0", Image: newImage, Boot: "panic"})
				case row.control:
					w.says(d, wire.Hello{Version: "1.0.0", Image: oldImage, Boot: "panic"})
				}
			}
			w.pass(time.Second)
			for range 3 {
				w.pass(2 * time.Minute)
			}
			r := w.pass(9 * time.Minute)
			if r.State != row.want && !(row.want == rollout.Running && r.Stage == 2) {
				t.Errorf("%s in stage %d: %s (%+v)", r.State, r.Stage, r.Reason, r.Health)
			}
		})
	}
}

func TestADeviceThatKeepsFailingIsLeftAlone(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(1, 1)
	w.d = dispatch.New(w.config(dispatch.Config{Penalty: rollout.PenaltyRule{Failures: 2, Within: 24 * time.Hour, For: 48 * time.Hour}}))
	p := atOnce()
	p.MaxFailures = 10
	for _, id := range []fleet.RolloutID{"a", "b"} {
		w.make(dispatch.Spec{ID: id, Plan: p})
		w.tick(time.Second)
		w.reportTo(id, "d0", wire.StepFailed)
		w.tick(time.Second)
	}
	w.make(dispatch.Spec{ID: "c", Plan: p})
	w.tick(time.Second)
	if j := w.job("c", "d0"); j.State != rollout.Pending {
		t.Fatalf("offered though it is in the penalty box: %s", j.State)
	}
	if why := w.why("d0"); !strings.Contains(why, "penalty") {
		t.Errorf("why: %s", why)
	}
	if err := w.d.Pardon(t.Context(), w.now, "d0", "op"); err != nil {
		t.Fatal(err)
	}
	w.tick(time.Second)
	if j := w.job("c", "d0"); j.State != rollout.Offered {
		t.Errorf("after the pardon: %s", j.State)
	}
}

func (w *world) tick(d time.Duration) {
	w.t.Helper()
	w.now = w.now.Add(d)
	if _, err := w.d.Pass(context.Background(), w.clock); err != nil {
		w.t.Fatal(err)
	}
}

// why returns the codes of what keeps a device from updating.
func (w *world) why(d fleet.DeviceID) string {
	w.t.Helper()
	rs, err := w.d.Why(context.Background(), w.now, d)
	if err != nil {
		w.t.Fatal(err)
	}
	var codes []string
	for _, r := range rs {
		codes = append(codes, r.Code)
	}
	return strings.Join(codes, " ")
}

func TestFailedDevicesAreTriedAgainByHand(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(5, 5)
	w.make(dispatch.Spec{ID: "r", Plan: atOnce()})
	w.pass(time.Second)
	w.report("d0", wire.StepFailed)
	for _, d := range w.flying("r") {
		w.hello(d, newImage, time.Second)
	}
	if r := w.pass(time.Second); r.State != rollout.Halted {
		t.Fatal(r.State)
	}
	if _, n, err := w.d.Retry(t.Context(), w.now, "r", rollout.Rejected, "op"); err != nil || n != 0 {
		t.Errorf("rejected ones: %d, %v", n, err)
	}
	if _, n, err := w.d.Retry(t.Context(), w.now, "r", "", "op"); err != nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := w.d.Resume(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	w.hello("d0", newImage, time.Second)
	if r := w.pass(time.Second); r.State != rollout.Completed || r.Total.Succeeded != 5 {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
	if _, _, err := w.d.Retry(t.Context(), w.now, "r", "", "op"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("after the end: %v", err)
	}
}

func TestApprovalIsASecondPersons(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(1, 1)
	w.d = dispatch.New(w.config(dispatch.Config{Approval: true}))
	if _, err := w.d.Create(t.Context(), w.now, dispatch.Spec{ID: "r", Product: "lamp", Version: "1.1.0", Plan: atOnce()}, "ann"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.d.Start(t.Context(), w.now, "r", "ann"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("start: %v", err)
	}
	if _, err := w.d.Approve(t.Context(), w.now, "r", "ann"); !fleet.Is(err, fleet.Forbidden) {
		t.Errorf("by herself: %v", err)
	}
	if _, err := w.d.Approve(t.Context(), w.now, "r", "bob"); err != nil {
		t.Fatal(err)
	}
	if r, err := w.d.Start(t.Context(), w.now, "r", "ann"); err != nil || r.State != rollout.Running {
		t.Errorf("%s, %v", r.State, err)
	}
}

// The whole way: a release goes bad, the limit takes the fleet back to the older release, and that way back is itself taken
// back by hand.
func TestAFleetIsTakenBackAndForth(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(4, 4)
	w.release("1.0.0", oldImage, nil)
	p := atOnce()
	p.Limits = []rollout.Limit{{Count: 0, Then: rollout.ThenRollback}}
	p.MaxFailures = rollout.MaxTargets
	p.Rollback = rollout.RollbackPlan{Version: "1.0.0"}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	for _, d := range []fleet.DeviceID{"d0", "d1"} {
		w.says(d, wire.Hello{Version: "1.1.0", Image: newImage})
	}
	w.reportTo("r", "d2", wire.StepFailed)
	r := w.get("r")
	if r.State != rollout.RollingBack || r.UndoneBy != "r-rb" {
		t.Fatalf("%s, undone by %q", r.State, r.UndoneBy)
	}
	w.pass(time.Second)
	back := w.get("r-rb")
	if back.State != rollout.Running || back.Targets != 2 || fmt.Sprint(w.flying("r-rb")) != "[d0 d1]" {
		t.Fatalf("%s with %d targets, %v in flight", back.State, back.Targets, w.flying("r-rb"))
	}
	for _, d := range w.flying("r-rb") {
		w.says(d, wire.Hello{Version: "1.0.0", Image: oldImage})
	}
	w.pass(time.Second)
	if a, b := w.get("r"), w.get("r-rb"); a.State != rollout.RolledBackAll || b.State != rollout.Completed {
		t.Fatalf("%s, %s", a.State, b.State)
	}
	if _, err := w.d.Rollback(t.Context(), w.now, "r-rb", "op"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	for _, d := range w.flying("r-rb-rb") {
		w.says(d, wire.Hello{Version: "1.1.0", Image: newImage})
	}
	w.pass(time.Second)
	if a, b := w.get("r-rb"), w.get("r-rb-rb"); a.State != rollout.RolledBackAll || b.State != rollout.Completed || b.Total.Succeeded != 2 {
		t.Errorf("%s, %s %+v", a.State, b.State, b.Total)
	}
}

// Without a download: each device boots what it ran before, if that is what its other slot holds and its eFuses allow.
func TestAFleetIsTakenBackToItsOtherSlot(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(3, 3)
	p := atOnce()
	p.Rollback = rollout.RollbackPlan{Previous: true}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	w.says("d0", wire.Hello{Version: "1.1.0", Image: newImage, Previous: oldImage})
	w.says("d1", wire.Hello{Version: "1.1.0", Image: newImage, Previous: midImage})
	w.says("d2", wire.Hello{Version: "1.1.0", Image: newImage, Previous: oldImage, SecureVersion: 2, PreviousSecureVersion: 1})
	w.pass(time.Second)
	if _, err := w.d.Rollback(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	for d, want := range map[fleet.DeviceID]rollout.JobState{"d0": rollout.Offered, "d1": rollout.Skipped, "d2": rollout.Skipped} {
		if j := w.job("r-rb", d); j.State != want {
			t.Errorf("%s: %s (%s)", d, j.State, j.Cause.Text)
		}
	}
	var payload []byte
	w.update(func(tx *bolt.Tx) error {
		s, err := tx.Status("d0")
		if err != nil {
			return err
		}
		payload, _, err = w.d.BootPrevious(tx, "d0", s)
		return err
	})
	if cmd, err := wire.DecodeCmd(payload); err != nil || cmd.Op != wire.CmdPrevious || cmd.Job != "r-rb" || fmt.Sprintf("%x", cmd.Image) != string(oldImage) {
		t.Errorf("%+v, %v", cmd, err)
	}
	w.says("d0", wire.Hello{Version: "1.0.0", Image: oldImage, Previous: newImage})
	w.pass(time.Second)
	if r := w.get("r"); r.State != rollout.RolledBackAll {
		t.Errorf("%s", r.State)
	}
}

// A rollback that fails pauses, and the rollout that it undoes waits for it.
func TestARollbackThatFailsPauses(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(2, 2)
	w.release("1.0.0", oldImage, nil)
	p := atOnce()
	p.Rollback = rollout.RollbackPlan{Version: "1.0.0"}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	for _, d := range []fleet.DeviceID{"d0", "d1"} {
		w.says(d, wire.Hello{Version: "1.1.0", Image: newImage})
	}
	w.pass(time.Second)
	if _, err := w.d.Rollback(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	w.reportTo("r-rb", "d0", wire.StepFailed)
	w.pass(time.Second)
	if a, b := w.get("r"), w.get("r-rb"); a.State != rollout.RollingBack || b.State != rollout.Paused {
		t.Fatalf("%s, %s", a.State, b.State)
	}
	if _, err := w.d.Abort(t.Context(), w.now, "r-rb", "op"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	if a := w.get("r"); a.State != rollout.Aborted {
		t.Errorf("%s", a.State)
	}
}

func TestPlanSaysWhatWouldHappen(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(20, 15)
	w.release("1.0.5", midImage, func(r *firmware.Release) { r.Floor, r.Size = true, 7 })
	w.change("d0", func(d *fleet.Device, _ *fleet.Status) { d.Disabled = true })
	w.change("d1", func(_ *fleet.Device, s *fleet.Status) { s.Image = newImage })
	w.change("d2", func(_ *fleet.Device, s *fleet.Status) { s.Version = "3.0.0" })
	w.change("d3", func(_ *fleet.Device, s *fleet.Status) { s.Version = "1.0.5" })
	plan := threeStages
	plan.Limits = []rollout.Limit{{Percent: 5, MinSample: 20, Confidence: 95}}
	p, err := w.d.Plan(t.Context(), w.now, dispatch.Spec{Product: "lamp", Version: "1.1.0", Plan: plan}, "op")
	if err != nil {
		t.Fatal(err)
	}
	if p.Targets != 20 || p.Online != 15 || p.Skips["disabled"] != 1 || p.Skips["has-image"] != 1 || p.Skips["downgrade"] != 1 || p.Floors["1.0.5"] != 16 {
		t.Errorf("%+v", p)
	}
	if p.Bytes != 17*10+16*7 {
		t.Errorf("%d bytes", p.Bytes)
	}
	if len(p.Stages) != 3 || p.Stages[0].Devices != 1 || p.Stages[1].Devices != 4 || p.Stages[2].Devices != 15 || p.Duration < 3*time.Minute {
		t.Errorf("%+v in %v", p.Stages, p.Duration)
	}
	if len(p.Stops) < 3 || len(p.Stages[0].Sample) != 1 {
		t.Errorf("%q, %v", p.Stops, p.Stages[0].Sample)
	}
	// What it foretells is what happens.
	w.create("preview", threeStages)
	w.tick(time.Second)
	if got := w.flying("preview"); len(got) > 0 && got[0] != p.Stages[0].Sample[0] && w.online(p.Stages[0].Sample[0]) {
		t.Errorf("foretold %v, got %v", p.Stages[0].Sample, got)
	}
	if rs, err := w.d.List(t.Context()); err != nil || len(rs) != 1 {
		t.Errorf("a dry run left %d rollouts, %v", len(rs)-1, err)
	}
}

func (w *world) online(id fleet.DeviceID) (yes bool) {
	_ = w.db.View(context.Background(), func(tx *bolt.Tx) error { yes = tx.Online(id); return nil })
	return yes
}

// The sentences that an operator asks for, by the words for programs.
func TestWhy(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(8, 7)
	w.update(func(tx *bolt.Tx) error {
		for i := range 8 {
			d, err := tx.Device(fleet.DeviceID(fmt.Sprint("d", i)))
			if err != nil {
				return err
			}
			d.Passwords = []fleet.Password{{SHA256: oldImage}}
			if err := tx.PutDevice(d); err != nil {
				return err
			}
		}
		return nil
	})
	p := atOnce()
	p.Stages, p.MaxInFlight, p.Soak = []rollout.Stage{{Count: 2}, {Percent: 100}}, 1, time.Hour
	if got := w.why("d0"); got != "no-rollout" {
		t.Errorf("before: %s", got)
	}
	w.make(dispatch.Spec{ID: "r", Plan: p, Where: `id != "d6"`})
	w.pass(time.Second)
	flying := w.flying("r")[0]
	for d, want := range map[fleet.DeviceID]string{flying: "in-flight", "d6": "not-in-target"} {
		if got := w.why(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	w.change(flying, func(_ *fleet.Device, s *fleet.Status) { s.Buffer = 100 })
	if got := w.why(flying); got != "in-flight buffer-too-small" {
		t.Errorf("with a small buffer: %s", got)
	}
	var waiting fleet.DeviceID
	for i := range 6 {
		if d := fleet.DeviceID(fmt.Sprint("d", i)); d != flying {
			waiting = d
		}
	}
	if got := w.why(waiting); got != "next cap-full" {
		t.Errorf("waiting: %s", got)
	}
	if got := w.why("d7"); got != "offline next cap-full" {
		t.Errorf("offline: %s", got)
	}
	w.change(waiting, func(d *fleet.Device, _ *fleet.Status) { d.Disabled = true })
	if got := w.why(waiting); !strings.HasPrefix(got, "disabled ") {
		t.Errorf("disabled: %s", got)
	}
	w.hello(flying, newImage, time.Second)
	w.pass(time.Second)
	w.hello(w.flying("r")[0], newImage, time.Second)
	if got := w.why("d7"); got != "offline turn" {
		t.Errorf("before its stage: %s", got)
	}
	if _, err := w.d.Pause(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	if got := w.why("d7"); got != "offline paused" {
		t.Errorf("paused: %s", got)
	}
	if _, err := w.d.Why(t.Context(), w.now, "ghost"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("a stranger: %v", err)
	}
}

func TestARollbackKeepsItsOwnCap(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(3, 3)
	w.release("1.0.0", oldImage, nil)
	p := atOnce()
	p.Rollback = rollout.RollbackPlan{Version: "1.0.0", MaxInFlight: 1}
	w.make(dispatch.Spec{ID: "r", Plan: p})
	w.pass(time.Second)
	for _, d := range w.flying("r") {
		w.says(d, wire.Hello{Version: "1.1.0", Image: newImage})
	}
	w.pass(time.Second)
	if _, err := w.d.Rollback(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	if got := w.flying("r-rb"); len(got) != 1 {
		t.Errorf("%v at once", got)
	}
}
