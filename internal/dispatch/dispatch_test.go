package dispatch_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
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

var start = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

const (
	oldImage = fleet.Hash("0000000000000000000000000000000000000000000000000000000000000000")
	newImage = fleet.Hash("1111111111111111111111111111111111111111111111111111111111111111")
)

// world is a dispatcher over a real store, with its own time.
type world struct {
	t    testing.TB
	db   *bolt.DB
	d    *dispatch.Dispatcher
	now  time.Time
	deaf bool // presence is not known
}

func open(t testing.TB, db *bolt.DB, crash func(string)) *world {
	w := &world{t: t, db: db, now: start}
	w.d = dispatch.New(w.config(dispatch.Config{Crash: crash}))
	return w
}

// config completes c for this world.
func (w *world) config(c dispatch.Config) dispatch.Config {
	c.Update = func(ctx context.Context, f func(dispatch.Tx) error) error {
		return w.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
	}
	c.View = func(ctx context.Context, f func(dispatch.Tx) error) error {
		return w.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
	}
	c.PresenceKnown, c.Committed, c.Log = func() bool { return !w.deaf }, func() {}, slog.New(slog.DiscardHandler)
	return c
}

func (w *world) clock() time.Time { return w.now }

func (w *world) update(f func(*bolt.Tx) error) {
	w.t.Helper()
	if err := w.db.Update(context.Background(), f); err != nil {
		w.t.Fatal(err)
	}
}

// fleet makes n devices that run the old image; those from offline on are not connected.
func (w *world) fleet(n, offline int) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		for i := range n {
			id := fleet.DeviceID(fmt.Sprint("d", i))
			if err := tx.PutDevice(fleet.Device{ID: id, Product: "lamp"}); err != nil {
				return err
			}
			s := fleet.Status{Device: id, Vhost: wire.VhostDevices, Online: i < offline, ConnectedAt: start, HelloAt: start, Version: "1.0.0", Image: oldImage}
			if err := tx.PutStatus(s); err != nil {
				return err
			}
		}
		return tx.PutRelease(firmware.Release{Manifest: firmware.Manifest{Product: "lamp", Version: "1.1.0", Size: 10, SHA256: newImage, ImageHash: newImage}})
	})
}

func (w *world) create(id fleet.RolloutID, p rollout.Plan) {
	w.t.Helper()
	if _, err := w.d.Create(context.Background(), w.now, dispatch.Spec{ID: id, Product: "lamp", Version: "1.1.0", Plan: p}, "op"); err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.d.Start(context.Background(), w.now, id, "op"); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) pass(after time.Duration) rollout.Rollout {
	w.t.Helper()
	w.now = w.now.Add(after)
	if _, err := w.d.Pass(context.Background(), w.clock); err != nil {
		w.t.Fatal(err)
	}
	return w.get("r")
}

func (w *world) get(id fleet.RolloutID) rollout.Rollout {
	w.t.Helper()
	r, err := w.d.Get(context.Background(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// inFlight returns the devices that hold a grant.
func (w *world) inFlight() (ids []fleet.DeviceID) {
	w.t.Helper()
	_ = w.db.View(context.Background(), func(tx *bolt.Tx) error {
		js, err := tx.JobsInFlight("r", 0)
		for _, j := range js {
			ids = append(ids, j.Device)
		}
		return err
	})
	return ids
}

func (w *world) hello(id fleet.DeviceID, image fleet.Hash, after time.Duration) {
	w.t.Helper()
	w.now = w.now.Add(after)
	w.update(func(tx *bolt.Tx) error {
		s, err := tx.Status(id)
		if err != nil {
			return err
		}
		s.Image, s.HelloAt = image, w.now
		if err := tx.PutStatus(s); err != nil {
			return err
		}
		return w.d.Hello(tx, w.now, wire.VhostDevices, id, wire.Hello{Version: "1", Image: image})
	})
}

func (w *world) report(id fleet.DeviceID, step wire.OTAStep) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error { return w.d.Report(tx, w.now, id, wire.OTAReport{Job: "r", Step: step}) })
}

// outbox returns what is to be said, as "device kind ref".
func (w *world) outbox() (out []string) {
	w.t.Helper()
	_ = w.db.View(context.Background(), func(tx *bolt.Tx) error {
		es, err := tx.Outbox(0)
		for _, e := range es {
			out = append(out, fmt.Sprintf("%s %s %s", e.Device, e.Kind, e.Ref))
		}
		return err
	})
	return out
}

var threeStages = rollout.Plan{Stages: []rollout.Stage{{Count: 1}, {Percent: 25}, {Percent: 100}}, MaxInFlight: 10, DeviceTimeout: time.Minute, Soak: 10 * time.Second, OfflineGrace: time.Hour}

func TestAGoodReleaseGoesOutStageByStage(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(20, 20)
	w.create("r", threeStages)
	var sizes []int
	for range 40 {
		r := w.pass(5 * time.Second)
		ids := w.inFlight()
		if len(ids) > 0 {
			sizes = append(sizes, len(ids))
		}
		for _, id := range ids {
			w.hello(id, newImage, time.Second)
		}
		if r.State == rollout.Completed {
			break
		}
	}
	r := w.get("r")
	if r.State != rollout.Completed || r.Total.Succeeded != 20 || fmt.Sprint(sizes) != "[1 4 10 5]" {
		t.Errorf("%s, %+v, batches %v", r.State, r.Total, sizes)
	}
	h, err := w.d.History(t.Context(), "r")
	if err != nil || len(h) < 7 || h[0].Code != rollout.OperatorStarted || h[len(h)-1].To != rollout.Completed {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestABadCanaryHaltsAndNobodyElseIsTouched(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(20, 20)
	w.create("r", threeStages)
	w.pass(time.Second)
	canary := w.inFlight()[0]
	w.report(canary, wire.StepInstalled)
	w.hello(canary, oldImage, 5*time.Second)
	r := w.pass(time.Second)
	if r.State != rollout.Halted || r.Total.RolledBack != 1 || r.Total.Pending != 19 {
		t.Fatalf("%s, %+v", r.State, r.Total)
	}
	for range 10 {
		w.pass(time.Hour)
	}
	if out := w.outbox(); len(out) != 1 {
		t.Errorf("said %q", out)
	}
}

// Silence is failure, and it is judged before anybody else gets the release.
func TestSilenceIsJudgedBeforeNewGrants(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(20, 20)
	p := threeStages
	p.Stages, p.MaxInFlight = []rollout.Stage{{Percent: 100}}, 2
	w.create("r", p)
	w.pass(time.Second)
	r := w.pass(time.Minute)
	if r.State != rollout.Halted || r.Total.TimedOut != 2 || r.Total.Pending != 18 {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
}

func TestOfflineDevicesNeitherHoldUpNorPassAStage(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(20, 0)
	w.create("r", threeStages)
	for range 5 {
		if r := w.pass(time.Hour); r.Stage != 1 || r.Started() != 0 {
			t.Fatalf("stage %d with %d started though nobody is online", r.Stage, r.Started())
		}
	}
	w.update(func(tx *bolt.Tx) error {
		for _, id := range []fleet.DeviceID{"d3", "d4"} {
			s, err := tx.Status(id)
			if err != nil {
				return err
			}
			s.Online = true
			if err := tx.PutStatus(s); err != nil {
				return err
			}
		}
		return nil
	})
	for range 10 {
		w.pass(20 * time.Second)
		for _, id := range w.inFlight() {
			w.hello(id, newImage, time.Second)
		}
	}
	r := w.get("r")
	if r.State != rollout.Running || r.Stage != 3 || r.Total.Succeeded != 2 {
		t.Errorf("%s in stage %d, %+v", r.State, r.Stage, r.Total)
	}
	w.deaf = true
	if r := w.pass(48 * time.Hour); r.State != rollout.Running {
		t.Errorf("%s: judged while nobody could be seen", r.State)
	}
	w.deaf = false
	w.pass(time.Second)
	r = w.pass(2 * time.Hour)
	if r = w.pass(time.Second); r.State != rollout.Completed || r.Total.Skipped != 18 {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
}

// A device that may not or need not take part is left out with its reason, and never told.
func TestDevicesThatCannotTakePartAreSkippedWithTheReason(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(6, 6)
	change := func(id fleet.DeviceID, f func(*fleet.Device, *fleet.Status)) {
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
	p := threeStages
	p.Stages = []rollout.Stage{{Percent: 100}}
	w.create("r", p)
	change("d0", func(d *fleet.Device, _ *fleet.Status) { d.Disabled = true })
	change("d1", func(d *fleet.Device, _ *fleet.Status) { d.RecoveryOff = "revoked" })
	change("d2", func(_ *fleet.Device, s *fleet.Status) { s.Image = newImage })
	change("d3", func(_ *fleet.Device, s *fleet.Status) { s.Version = "2.0.0" })
	change("d4", func(d *fleet.Device, _ *fleet.Status) { d.Product = "heater" })
	w.pass(time.Second)
	want := map[fleet.DeviceID]string{"d0": "disabled", "d1": "revoked", "d2": "already", "d3": "newer 2.0.0", "d4": "product"}
	js, _, err := w.d.Jobs(t.Context(), "r", rollout.Skipped, fleet.Page{Limit: 10})
	if err != nil || len(js) != len(want) {
		t.Errorf("%d skipped, %v", len(js), err)
	}
	for _, j := range js {
		if !strings.Contains(j.Cause.Text, want[j.Device]) || want[j.Device] == "" {
			t.Errorf("%s: %q", j.Device, j.Cause.Text)
		}
	}
	if out := w.outbox(); fmt.Sprint(out) != "[d5 ota r]" {
		t.Errorf("said %q", out)
	}
}

// A key that is registered or revoked after a release was published counts for every device that was not offered it yet.
func TestNobodyIsOfferedWhatNoLiveKeySigned(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(2, 2)
	w.update(func(tx *bolt.Tx) error {
		return tx.PutSecureBootKey(firmware.SecureBootKey{Product: "lamp", Digest: fleet.HashOf([32]byte{7})})
	})
	p := threeStages
	p.Stages = []rollout.Stage{{Percent: 100}}
	w.create("r", p)
	w.pass(time.Second)
	js, _, err := w.d.Jobs(t.Context(), "r", rollout.Skipped, fleet.Page{Limit: 10})
	if err != nil || len(js) != 2 || !strings.Contains(js[0].Cause.Text, "has no signature that is on record") || len(w.outbox()) != 0 {
		t.Errorf("%+v, %v, said %q", js, err, w.outbox())
	}
}

func TestADeviceIsNeverInTwoRollouts(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(4, 4)
	p := threeStages
	p.Stages = []rollout.Stage{{Percent: 100}}
	w.create("r", p)
	w.create("s", p)
	w.pass(time.Second)
	if n := w.get("r").Total.InFlight() + w.get("s").Total.InFlight(); n != 4 {
		t.Errorf("%d grants for 4 devices", n)
	}
	if r := w.get("s"); r.State != rollout.Running || r.Total.Pending != 4 {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
}

func TestAbortEndsEveryGrantAtOnce(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(20, 20)
	p := threeStages
	p.Stages = []rollout.Stage{{Percent: 100}}
	w.create("r", p)
	w.pass(time.Second)
	if n := len(w.inFlight()); n != 10 {
		t.Fatalf("%d in flight", n)
	}
	if _, err := w.d.Abort(t.Context(), w.now, "r", "op"); err != nil {
		t.Fatal(err)
	}
	if n := len(w.inFlight()); n != 0 {
		t.Errorf("%d still hold a grant", n)
	}
	if r := w.pass(time.Second); r.State != rollout.Aborted || r.Total.Cancelled != 20 || r.Sweep != "" {
		t.Errorf("%s, %+v", r.State, r.Total)
	}
	if _, err := w.d.Start(t.Context(), w.now, "r", "op"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("starting an aborted rollout: %v", err)
	}
}

// An image on the fallback proves nothing: the device came there because it could not do mutual TLS.
func TestAHelloOnTheFallbackIsNoSuccess(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(1, 1)
	p := threeStages
	p.Stages = []rollout.Stage{{Percent: 100}}
	w.create("r", p)
	w.pass(time.Second)
	w.update(func(tx *bolt.Tx) error {
		return w.d.Hello(tx, w.now.Add(time.Second), wire.VhostFallback, "d0", wire.Hello{Version: "1", Image: newImage})
	})
	if r := w.get("r"); r.Total.Succeeded != 0 {
		t.Errorf("%+v", r.Total)
	}
}

func TestCreateRefusesWhatCannotBeMeant(t *testing.T) {
	w := open(t, storetest.Open(t), nil)
	w.fleet(4, 4)
	create := func(s dispatch.Spec) error { _, err := w.d.Create(t.Context(), w.now, s, "op"); return err }
	for name, row := range map[string]struct {
		spec dispatch.Spec
		kind fleet.Kind
	}{
		"no such release":        {dispatch.Spec{ID: "a", Product: "lamp", Version: "9.9.9"}, fleet.NotFound},
		"no such device":         {dispatch.Spec{ID: "a", Product: "lamp", Version: "1.1.0", Devices: []fleet.DeviceID{"ghost"}}, fleet.NotFound},
		"nobody has the label":   {dispatch.Spec{ID: "a", Product: "lamp", Version: "1.1.0", Labels: map[string]string{"x": "y"}}, fleet.Unprocessable},
		"stage larger than all":  {dispatch.Spec{ID: "a", Product: "lamp", Version: "1.1.0", Plan: rollout.Plan{Stages: []rollout.Stage{{Count: 5}}}}, fleet.Invalid},
		"last stage not all":     {dispatch.Spec{ID: "a", Product: "lamp", Version: "1.1.0", Plan: rollout.Plan{Stages: []rollout.Stage{{Count: 3}}}}, fleet.Invalid},
		"id that is no topic":    {dispatch.Spec{ID: "a/b", Product: "lamp", Version: "1.1.0"}, fleet.Invalid},
		"id too long for a bell": {dispatch.Spec{ID: fleet.RolloutID(strings.Repeat("a", 25)), Product: "lamp", Version: "1.1.0"}, fleet.Invalid},
	} {
		if err := create(row.spec); !fleet.Is(err, row.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := create(dispatch.Spec{ID: "a", Product: "lamp", Version: "1.1.0"}); err != nil {
		t.Fatal(err)
	}
	if err := create(dispatch.Spec{ID: "a", Product: "lamp", Version: "1.1.0"}); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("the same id again: %v", err)
	}
}

type crash struct{ point string }

// One seed is one life of a fleet: devices act only on what they were told, tell it late, twice or wrongly, operators
// resume, and the process dies at random points and comes back from its file. Whatever happens: no cap is exceeded, no
// device has two jobs or is told of a second one, and the rollout ends.
func TestKillAtAnyPoint(t *testing.T) {
	seeds := 60
	if testing.Short() {
		seeds = 10
	}
	crashes := 0
	for seed := range seeds {
		crashes += live(t, uint64(seed))
	}
	t.Logf("%d lives, %d crashes", seeds, crashes)
	if crashes == 0 {
		t.Error("no life had a crash: this test tested nothing")
	}
}

func live(t *testing.T, seed uint64) (crashes int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 7))
	path := filepath.Join(t.TempDir(), "m.db")
	told := map[fleet.DeviceID]bool{} // by the outbox: all that a device knows
	now := start
	born := false
	for alive := true; alive; {
		func() {
			db := storetest.Reopen(t, path)
			defer func() {
				if p := recover(); p != nil {
					if _, ok := p.(crash); !ok {
						panic(p)
					}
					crashes++
				}
				if found, err := db.Check(context.Background()); err != nil || len(found) > 0 {
					t.Fatalf("seed %d: after a crash: %q, %v", seed, found, err)
				}
				db.Close()
			}()
			w := open(t, db, func(p string) {
				if born && rng.IntN(80) == 0 {
					panic(crash{p})
				}
			})
			w.now = now
			defer func() { now = w.now }()
			if !born {
				w.fleet(12, 10)
				w.create("r", rollout.Plan{Stages: []rollout.Stage{{Count: 1}, {Percent: 50}, {Percent: 100}}, MaxFailures: 2, MaxInFlight: 3, DeviceTimeout: 30 * time.Minute, Soak: time.Minute, OfflineGrace: time.Hour})
				born = true
			}
			for {
				if w.now.Sub(start) > 60*24*time.Hour {
					t.Fatalf("seed %d: not over after 60 days: %+v", seed, w.get("r"))
				}
				r := w.pass(time.Duration(1+rng.IntN(15)) * time.Minute)
				if n := len(w.inFlight()); n > 3 {
					t.Fatalf("seed %d: %d in flight", seed, n)
				}
				for _, line := range w.outbox() {
					told[fleet.DeviceID(strings.Fields(line)[0])] = true
				}
				w.update(func(tx *bolt.Tx) error {
					es, err := tx.Outbox(0)
					var seqs []uint64
					for _, e := range es {
						seqs = append(seqs, e.Seq)
					}
					if err != nil {
						return err
					}
					return tx.DropOutbox(seqs)
				})
				if r.State.Final() && r.Sweep == "" {
					alive = false
					return
				}
				if r.State == rollout.Halted {
					if _, err := w.d.Resume(context.Background(), w.now, "r", "op"); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
				}
				act(w, rng, told)
			}
		}()
	}
	return crashes
}

// act lets one device do something.
func act(w *world, rng *rand.Rand, told map[fleet.DeviceID]bool) {
	id := fleet.DeviceID(fmt.Sprint("d", rng.IntN(12)))
	if !told[id] {
		return
	}
	steps := []wire.OTAStep{wire.StepAccepted, wire.StepDownloading, wire.StepInstalled, wire.StepFailed, wire.StepRolledBack}
	switch rng.IntN(4) {
	case 0:
		w.report(id, steps[rng.IntN(len(steps))])
	case 1:
		w.hello(id, oldImage, time.Second)
	default:
		for range 1 + rng.IntN(2) {
			w.hello(id, newImage, time.Second)
		}
	}
}
