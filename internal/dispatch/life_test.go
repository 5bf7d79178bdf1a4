package dispatch_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
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

// lives is how many fleets live; make soak asks for more.
var lives = flag.Int("lives", 5, "random fleets in TestLivesUnderAnyPolicy")

// life is one fleet under one random plan: its devices lie, come late and go dark, its operators pause, retry and roll
// back, its clock jumps, and its process dies anywhere. What it does is derived from the seed alone.
type life struct {
	t    *testing.T
	rng  *rand.Rand
	w    *world
	plan rollout.Plan
	seed uint64

	told     map[fleet.DeviceID]fleet.RolloutID // the newest offer, by the outbox: all that a device knows
	runs     map[fleet.DeviceID]fleet.Hash
	grants   map[string]bool // attempts seen, by rollout, device and number
	devices  int
	crashes  int
	born     bool
	jumpable bool // the clock may jump: then times are not compared with the plan's
}

// Whatever happens: no cap, site budget or stage's quota is exceeded, nothing is granted outside the window, no device has
// two grants at once, every invariant of the records holds after every crash, and each rollout comes to its end.
func TestLivesUnderAnyPolicy(t *testing.T) {
	crashes := 0
	for seed := range *lives {
		l := &life{t: t, seed: uint64(seed), rng: rand.New(rand.NewPCG(uint64(seed), 11)), told: map[fleet.DeviceID]fleet.RolloutID{},
			runs: map[fleet.DeviceID]fleet.Hash{}, grants: map[string]bool{}, devices: 14}
		l.live()
		crashes += l.crashes
	}
	t.Logf("seeds 0 to %d, %d crashes", *lives-1, crashes)
	if crashes == 0 {
		t.Error("no life had a crash: this test tested nothing")
	}
}

func (l *life) chance(n int) bool { return l.rng.IntN(n) == 0 }

// any returns a plan with some of every policy.
func (l *life) any() rollout.Plan {
	p := rollout.Plan{
		Stages:      []rollout.Stage{{Count: 1 + l.rng.IntN(2)}, {Percent: 50, MinSuccess: l.rng.IntN(60)}, {Percent: 100}},
		MaxFailures: l.rng.IntN(4), MaxInFlight: 1 + l.rng.IntN(5),
		DeviceTimeout: 40 * time.Minute, Soak: time.Duration(l.rng.IntN(3)) * time.Minute, OfflineGrace: 3 * time.Hour,
		VerifyFor: time.Duration(l.rng.IntN(3)) * 10 * time.Minute, DarkAfter: 15 * time.Minute,
		Retries: l.rng.IntN(3), RetryBackoff: time.Minute,
	}
	if l.chance(2) {
		p.Stages[0] = rollout.Stage{Percent: 20, Where: `labels.site == "b"`}
	}
	if l.chance(3) {
		p.Stages[1].Hold = true
	}
	if l.chance(2) {
		p.Sites = rollout.SiteBudget{Label: "site", Count: 1 + l.rng.IntN(2)}
	}
	if l.chance(2) {
		p.Pace = rollout.Pace{PerMinute: 1 + l.rng.IntN(3)}
	}
	if l.chance(3) {
		p.Window = rollout.Window{Cron: "0 */2 * * *", Length: time.Hour}
	}
	if l.chance(2) {
		p.Limits = []rollout.Limit{{Kinds: []rollout.JobState{rollout.Failed, rollout.TimedOut}, Percent: 30, MinSample: 3, Confidence: 80, Then: rollout.ThenPause}}
	}
	if p.VerifyFor > 0 && l.chance(2) {
		p.Health = rollout.Health{BadBoots: []string{"panic"}}
	}
	if l.chance(2) {
		p.Rollback = rollout.RollbackPlan{Version: "1.0.0", MaxFailures: l.rng.IntN(3)}
		if l.chance(2) {
			p.FailThen = rollout.ThenRollback
		}
	}
	if l.chance(4) {
		p.AcceptTimeout, p.DownloadTimeout, p.InstallTimeout = 10*time.Minute, 20*time.Minute, 5*time.Minute
	}
	return p
}

func (l *life) fail(format string, a ...any) {
	l.t.Helper()
	plan, _ := json.Marshal(l.plan)
	l.t.Fatalf("seed %d, plan %s: %s", l.seed, plan, fmt.Sprintf(format, a...))
}

func (l *life) live() {
	l.t.Helper()
	path := filepath.Join(l.t.TempDir(), "m.db")
	l.plan, l.jumpable = l.any(), l.chance(3)
	now := start
	for over := false; !over; {
		over = l.process(path, &now)
	}
}

// process is the time from one start of the program to its end; true if everything is over.
func (l *life) process(path string, now *time.Time) (over bool) {
	db := storetest.Reopen(l.t, path)
	defer func() {
		if p := recover(); p != nil {
			if _, ok := p.(crash); !ok {
				panic(p)
			}
			l.crashes++
		}
		if found, err := db.Check(context.Background()); err != nil || len(found) > 0 {
			l.fail("after a crash: %q, %v", found, err)
		}
		db.Close()
	}()
	l.w = open(l.t, db, func(p string) {
		if l.born && l.chance(150) {
			panic(crash{p})
		}
	})
	l.w.now = *now
	defer func() { *now = l.w.now }()
	if !l.born {
		l.birth()
	}
	for {
		if l.w.now.Sub(start) > 120*24*time.Hour {
			l.fail("not over after 120 days: %s", l.describe())
		}
		l.pass()
		l.listen()
		if l.watch() {
			return true
		}
		for range 3 {
			l.act()
		}
		l.operate()
	}
}

func (l *life) birth() {
	l.w.fleet(l.devices, l.devices-2)
	l.w.release("1.0.0", oldImage, nil)
	if l.chance(2) {
		l.w.release("1.0.5", midImage, func(r *firmware.Release) { r.Floor = true })
	}
	for i := range l.devices {
		d := fleet.DeviceID(fmt.Sprint("d", i))
		l.runs[d] = oldImage
		l.w.change(d, func(d *fleet.Device, _ *fleet.Status) {
			d.Labels = map[string]string{"site": []string{"a", "b", "c"}[i%3]}
		})
	}
	l.w.make(dispatch.Spec{ID: "r", Plan: l.plan})
	l.born = true
}

func (l *life) pass() {
	step := time.Duration(1+l.rng.IntN(12)) * time.Minute
	if l.jumpable && l.chance(40) {
		step = time.Duration(l.rng.IntN(96)-48) * time.Hour
	}
	l.w.now = l.w.now.Add(step)
	if _, err := l.w.d.Pass(context.Background(), l.w.clock); err != nil {
		l.fail("%v", err)
	}
}

// listen takes what is in the outbox to the devices.
func (l *life) listen() {
	l.w.update(func(tx *bolt.Tx) error {
		es, err := tx.Outbox(0)
		var seqs []uint64
		for _, e := range es {
			l.told[e.Device] = fleet.RolloutID(e.Ref)
			seqs = append(seqs, e.Seq)
		}
		if err != nil {
			return err
		}
		return tx.DropOutbox(seqs)
	})
}

func (l *life) rollouts() []rollout.Rollout {
	rs, err := l.w.d.List(context.Background())
	if err != nil {
		l.fail("%v", err)
	}
	return rs
}

func (l *life) describe() (text string) {
	for _, r := range l.rollouts() {
		text += fmt.Sprintf("%s %s (%s) %+v; ", r.ID, r.State, r.Reason, r.Total)
	}
	return text
}

// watch holds what is to the plan; true if every rollout is over.
func (l *life) watch() bool {
	over := true
	holders := map[fleet.DeviceID]fleet.RolloutID{}
	for _, r := range l.rollouts() {
		if !r.State.Final() || r.Sweep != "" {
			over = false
		}
		jobs, _, err := l.w.d.Jobs(context.Background(), r.ID, "", fleet.Page{Limit: 1000})
		if err != nil {
			l.fail("%v", err)
		}
		flying, sites, started := 0, map[string]int{}, 0
		for _, j := range jobs {
			if j.Stage > 0 {
				started++
			}
			if !j.State.InFlight() {
				continue
			}
			flying++
			sites[j.Site]++
			if other, busy := holders[j.Device]; busy {
				l.fail("%s holds grants of %s and %s", j.Device, other, r.ID)
			}
			holders[j.Device] = r.ID
			l.granted(r, j)
		}
		if flying > r.Plan.MaxInFlight || started > r.Quota() && r.State != rollout.Draft {
			l.fail("%s: %d in flight, %d started of %d", r.ID, flying, started, r.Quota())
		}
		for s, n := range sites {
			if r.Plan.Sites.Label != "" && n > r.Plan.Sites.Count {
				l.fail("%s: %d devices of site %s at once", r.ID, n, s)
			}
		}
	}
	return over
}

// granted holds a new attempt to the window.
func (l *life) granted(r rollout.Rollout, j rollout.Job) {
	key := fmt.Sprint(r.ID, "/", j.Device, "/", j.Attempts)
	if l.grants[key] {
		return
	}
	l.grants[key] = true
	if open, _ := r.Plan.Window.Open(j.GrantedAt, nil); !open && !l.jumpable {
		l.fail("%s was granted at %v, outside of the window", key, j.GrantedAt)
	}
}

// act lets one device do something, sensible or not.
func (l *life) act() {
	d := fleet.DeviceID(fmt.Sprint("d", l.rng.IntN(l.devices)))
	id, told := l.told[d]
	steps := []wire.OTAStep{wire.StepAccepted, wire.StepDownloading, wire.StepDownloaded, wire.StepInstalled, wire.StepRebooting, wire.StepVerifying, wire.StepFailed, wire.StepRejected, wire.StepRolledBack}
	switch n := l.rng.IntN(12); {
	case n == 0: // it comes or goes
		l.w.change(d, func(_ *fleet.Device, s *fleet.Status) {
			if s.Online = !s.Online; s.Online {
				s.ConnectedAt = l.w.now
			} else {
				s.LostAt = l.w.now
			}
		})
	case n == 1: // a word out of nowhere
		l.w.reportTo("r", d, steps[l.rng.IntN(len(steps))])
	case !told:
	case n < 4:
		l.w.reportTo(id, d, steps[l.rng.IntN(6)])
	case n == 4:
		l.w.reportTo(id, d, steps[l.rng.IntN(len(steps))])
	case n == 5: // it goes back to what it ran
		l.runs[d] = oldImage
		l.hello(d)
	default: // it takes what it was offered
		if image := l.offered(id, d); image != "" {
			l.runs[d] = image
		}
		for range 1 + l.rng.IntN(2) {
			l.hello(d)
		}
	}
}

// offered returns the image that a device's job is to bring, as an honest device would learn it from its offer.
func (l *life) offered(id fleet.RolloutID, d fleet.DeviceID) (image fleet.Hash) {
	_ = l.w.db.View(context.Background(), func(tx *bolt.Tx) error {
		r, err := tx.Rollout(id)
		if err != nil {
			return err
		}
		if j, ok, err := tx.Job(id, d); ok && err == nil && j.State.InFlight() {
			image = r.Wanted(j).Image
		}
		return nil
	})
	return image
}

var versions = map[fleet.Hash]string{oldImage: "1.0.0", midImage: "1.0.5", newImage: "1.1.0"}

func (l *life) hello(d fleet.DeviceID) {
	boot := "sw"
	if l.chance(10) {
		boot = "panic"
	}
	l.w.says(d, wire.Hello{Version: versions[l.runs[d]], Image: l.runs[d], Boot: boot})
}

// operate lets an operator do something; in the end he sees every rollout through.
func (l *life) operate() {
	ctx := context.Background()
	for _, r := range l.rollouts() {
		var err error
		switch {
		case (r.State == rollout.Paused || r.State == rollout.Halted) && l.chance(3):
			_, err = l.w.d.Resume(ctx, l.w.now, r.ID, "op")
		case r.State == rollout.Halted && l.chance(3):
			_, _, err = l.w.d.Retry(ctx, l.w.now, r.ID, "", "op")
		case r.State == rollout.Running && r.Stage > 0 && !r.Stages[r.Stage-1].HeldAt.IsZero() && !r.Stages[r.Stage-1].DoneAt.IsZero() && !r.Last():
			_, err = l.w.d.Advance(ctx, l.w.now, r.ID, "op")
		case r.State == rollout.Running && l.chance(60):
			_, err = l.w.d.Pause(ctx, l.w.now, r.ID, "op")
		case l.w.now.Sub(start) > 10*24*time.Hour && (r.State == rollout.Paused || r.State == rollout.Halted || r.State == rollout.Running):
			_, err = l.w.d.Abort(ctx, l.w.now, r.ID, "op")
		}
		if err != nil && !fleet.Is(err, fleet.Conflict) {
			l.fail("%s: %v", r.ID, err)
		}
	}
}
