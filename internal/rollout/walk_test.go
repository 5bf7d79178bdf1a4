package rollout

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

// anyPlan draws a plan that fits n targets.
func anyPlan(t *rapid.T, n int) Plan {
	p := Plan{
		MaxFailures:   rapid.SampledFrom([]int{0, 0, 1, 2, 5, n}).Draw(t, "max failures"),
		MaxInFlight:   rapid.SampledFrom([]int{1, 2, 3, 10, 100}).Draw(t, "max in flight"),
		DeviceTimeout: time.Duration(rapid.IntRange(1, 120).Draw(t, "timeout")) * time.Minute,
		Soak:          time.Duration(rapid.SampledFrom([]int{0, 0, 1, 30, 90}).Draw(t, "soak")) * time.Minute,
		OfflineGrace:  time.Duration(rapid.IntRange(1, 200).Draw(t, "grace")) * time.Minute,
	}
	for range rapid.IntRange(0, 4).Draw(t, "stages") {
		s := Stage{Percent: rapid.IntRange(1, 99).Draw(t, "percent")}
		if rapid.Bool().Draw(t, "by count") {
			s = Stage{Count: rapid.IntRange(1, n).Draw(t, "count")}
		}
		q := p
		q.Stages = append(slices.Clone(p.Stages), s, Stage{Percent: 100})
		if q.Validate(n) == nil {
			p.Stages = append(p.Stages, s)
		}
	}
	p.Stages = append(p.Stages, Stage{Percent: 100})
	return p
}

// anyPolicy adds some of every policy to a plan that fits n targets.
func anyPolicy(t *rapid.T, p Plan, n int) Plan {
	minutes := func(name string, of ...int) time.Duration {
		return time.Duration(rapid.SampledFrom(of).Draw(t, name)) * time.Minute
	}
	maybe := func(name string) bool { return rapid.IntRange(0, 2).Draw(t, name) == 0 }
	p.VerifyFor = minutes("verify", 0, 0, 5, 40)
	p.DarkAfter = minutes("dark", 1, 10, 60)
	p.Retries, p.RetryBackoff = rapid.IntRange(0, 3).Draw(t, "retries"), minutes("backoff", 1, 10)
	for i := range p.Stages {
		p.Stages[i].MinSuccess = rapid.SampledFrom([]int{0, 0, 30, 100}).Draw(t, "min success")
		p.Stages[i].Hold = maybe("hold")
	}
	if maybe("steps") {
		p.AcceptTimeout, p.DownloadTimeout, p.InstallTimeout = p.DeviceTimeout/2, p.DeviceTimeout/2, p.DeviceTimeout
	}
	if maybe("pace") {
		p.Pace = Pace{PerMinute: rapid.SampledFrom([]int{1, 3, 600}).Draw(t, "per minute")}
		if maybe("growth") {
			p.Pace.Base, p.Pace.Factor, p.Pace.Every = 1, 2, 2
		}
	}
	if maybe("window") {
		p.Window = Window{Cron: "0 */3 * * *", Length: time.Hour}
	}
	if maybe("sites") {
		p.Sites = SiteBudget{Label: "site", Percent: rapid.SampledFrom([]int{1, 50}).Draw(t, "site percent")}
	}
	if maybe("limits") {
		p.Limits = []Limit{
			{Kinds: []JobState{RolledBack}, Count: n, Then: rapid.SampledFrom([]Reaction{"", ThenPause, ThenAbort}).Draw(t, "then")},
			{Percent: 20, MinSample: 3, Confidence: rapid.SampledFrom([]int{0, 90}).Draw(t, "confidence"), Then: ThenPause},
		}
	}
	if p.VerifyFor > 0 && maybe("health") {
		p.Health = Health{BadBoots: []string{"panic"}, Compare: maybe("compare")}
	}
	if maybe("rollback") {
		p.Rollback = RollbackPlan{Version: "1.0.0"}
		p.FailThen = rapid.SampledFrom([]Reaction{"", ThenPause, ThenRollback}).Draw(t, "fail then")
	}
	return p
}

// anyEvent draws an event, sensible or not, of a device or the operator.
func anyEvent(t *rapid.T, w *world, n int) Event {
	d := deviceID(rapid.IntRange(0, n).Draw(t, "device")) // one more than there are: a stranger
	session := w.at.Add(-time.Duration(rapid.SampledFrom([]int{0, 0, 1, 5, 60, 600}).Draw(t, "session")) * time.Minute)
	switch k := rapid.IntRange(0, 99).Draw(t, "event"); {
	case k < 30:
		return w.asked(d)
	case k < 48:
		all := []Report{ReportAccepted, ReportDownloading, ReportDownloaded, ReportInstalled, ReportInstalled, ReportRebooting, ReportFailed, ReportRejected, ReportRolledBack, "lies"}
		return Reported{At: w.at, Device: d, Report: rapid.SampledFrom(all).Draw(t, "report"), Percent: rapid.IntRange(-10, 110).Draw(t, "pct"), Text: "x"}
	case k < 66:
		return Confirmed{At: w.at, Device: d, Session: session}
	case k < 72:
		return Reverted{At: w.at, Device: d, Session: session}
	case k < 74:
		return Excluded{At: w.at, Device: d, Why: "removed"}
	case k < 76:
		return Unhealthy{At: w.at, Device: d, Why: "panic"}
	case k < 77:
		return Compared{At: w.at, Control: rapid.IntRange(0, 50).Draw(t, "control"), Bad: rapid.IntRange(0, 3).Draw(t, "bad")}
	case k < 88:
		ev := Ticked{At: w.at, OnlinePending: rapid.IntRange(-1, 2).Draw(t, "online"), OnlineWaiting: rapid.IntRange(-1, 1).Draw(t, "again"), Offline: map[fleet.DeviceID]time.Time{}}
		for i := range n {
			if rapid.IntRange(0, 3).Draw(t, "gone") == 0 {
				ev.Offline[deviceID(i)] = session
			}
		}
		ev.Blind = rapid.IntRange(0, 4).Draw(t, "blind") == 0
		return ev
	case k < 89:
		return AdvancedBy{At: w.at, Who: "op"}
	case k < 90:
		return RetriedBy{At: w.at, Who: "op"}
	case k < 91:
		return PausedBy{At: w.at, Who: "op"}
	case k < 96:
		return ResumedBy{At: w.at, Who: "op"}
	case k < 97:
		return Swept{At: w.at}
	case k < 98 && rapid.IntRange(0, 3).Draw(t, "really") == 0:
		return AbortedBy{At: w.at, Who: "op"}
	case k < 99:
		if rapid.IntRange(0, 3).Draw(t, "back") == 0 {
			return RollbackBy{At: w.at, Who: "op"}
		}
		return Added{At: w.at, Targets: targets("late-comer")}
	default:
		return Started{At: w.at, Who: "op"}
	}
}

// Whatever happens in whatever order: the records agree with each other after every step (world.step), no gate and no cap
// is passed, what is delivered twice changes nothing, the same events give the same decisions, and from wherever it got to
// a rollout can be brought to its end with no device left behind.
func TestWalks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 40).Draw(t, "targets")
		p := anyPlan(t, n)
		if rapid.Bool().Draw(t, "policies") {
			p = anyPolicy(t, p, n)
		}
		w := begun(t, n, p)
		w.jumps = rapid.IntRange(0, 3).Draw(t, "clock jumps") == 0
		var log []Event
		for range rapid.IntRange(1, 150).Draw(t, "events") {
			w.pass(time.Duration(rapid.SampledFrom([]int{0, 0, 1, 5, 30}).Draw(t, "minutes")) * time.Minute)
			if w.jumps && rapid.IntRange(0, 20).Draw(t, "jump") == 0 {
				w.pass(time.Duration(rapid.IntRange(-72, 72).Draw(t, "hours")) * time.Hour)
			}
			ev := anyEvent(t, w, n)
			log = append(log, ev)
			before, rows := w.r, maps.Clone(w.jobs)
			fx, err := w.step(ev)
			if err != nil {
				if !fleet.Is(err, fleet.Conflict) {
					t.Fatalf("%T%+v: %v", ev, ev, err)
				}
				continue
			}
			w.restart()
			holdGates(t, w, before, rows, ev, fx)
			holdTwice(t, w, ev, fx)
		}
		holdReplay(t, w, n, p, log)
		finish(t, w)
	})
}

// naiveQuota finds the smallest number of devices that is at least the stage's share, by counting.
func naiveQuota(s Stage, n int) int {
	if s.Count > 0 {
		return s.Count
	}
	q := 1
	for q*100 < s.Percent*n {
		q++
	}
	return q
}

// holdGates checks grants and the opening of stages against the rows alone.
func holdGates(t *rapid.T, w *world, before Rollout, rows map[fleet.DeviceID]Job, ev Event, fx []Effect) {
	t.Helper()
	for d, j := range w.jobs {
		old := rows[d]
		if j.Attempts == old.Attempts {
			_, ticked := ev.(Ticked) // may begin an attempt again that lies in the future
			if j.GrantedAt != old.GrantedAt && !ticked || j.Stage != old.Stage {
				t.Fatalf("the grant of %s changed: %+v, then %+v", d, old, j)
			}
			continue
		}
		granted, flying, site := 0, 0, 0
		for _, k := range w.jobs {
			if !k.GrantedAt.IsZero() {
				granted++
			}
			if k.State.InFlight() {
				flying++
				if k.Site == j.Site && k.Site != "" {
					site++
				}
			}
		}
		quota := naiveQuota(w.r.Plan.Stages[j.Stage-1], w.r.Targets) + w.r.Stages[j.Stage-1].Extra
		room := before.Room(w.at, nil) > 0 || old.State == Waiting && before.Refusal(w.at, nil) == ""
		asked, ok := ev.(Asked)
		if !ok || before.State != Running || !room || old.Attempts == 0 && granted > quota || flying > w.r.Plan.MaxInFlight || j.Attempts != old.Attempts+1 {
			t.Fatalf("%T granted %s in %s: %d of %d granted, %d in flight", ev, d, before.State, granted, quota, flying)
		}
		if w.r.Plan.Sites.Label != "" && j.Site != "" && site > max((asked.SiteSize*w.r.Plan.Sites.Percent+99)/100, 1) {
			t.Fatalf("%d of %d devices of site %s in flight", site, asked.SiteSize, j.Site)
		}
		if hour := w.at.Hour() % 3; w.r.Plan.Window.Set() && hour != 0 {
			t.Fatalf("%s was granted at %v, outside of the window", d, w.at)
		}
		if old.State == Waiting && w.at.Before(old.RetryAt) {
			t.Fatalf("%s was granted %v before its time", d, old.RetryAt.Sub(w.at))
		}
		holdPace(t, w)
	}
	if before.Stage == 0 || w.r.Stage == before.Stage {
		return
	}
	// A stage was opened: its predecessor was proven, quiet, and soaked.
	proven := false
	_, byHand := ev.(AdvancedBy)
	for d, j := range w.jobs {
		if j.Stage == before.Stage && j.State == Succeeded {
			proven = true
		}
		if j.State.InFlight() {
			t.Fatalf("stage %d was opened with %s in flight", w.r.Stage, d)
		}
		if old := rows[d]; old.Stage == before.Stage && !old.Late && !old.FinishedAt.IsZero() && j == old && w.at.Sub(j.FinishedAt) < w.r.Plan.Soak && !byHand && !w.jumps {
			t.Fatalf("stage %d was opened %v after %s finished, soak %v", w.r.Stage, w.at.Sub(j.FinishedAt), d, w.r.Plan.Soak)
		}
	}
	if !proven {
		t.Fatalf("stage %d was opened without a success in stage %d", w.r.Stage, before.Stage)
	}
	if w.r.Stage < before.Stage || before.State == Draft {
		t.Fatalf("stage %d after stage %d", w.r.Stage, before.Stage)
	}
}

// holdPace counts the grants of the last minute. With a clock that jumps there is no such minute.
func holdPace(t *rapid.T, w *world) {
	t.Helper()
	w.times = append(w.times, w.at)
	p := w.r.Plan.Pace
	if w.jumps || p.PerMinute == 0 {
		return
	}
	n := 0
	for _, at := range w.times {
		if w.at.Sub(at) < time.Minute {
			n++
		}
	}
	if most := p.PerMinute + p.PerMinute/60 + 1; n > most {
		t.Fatalf("%d grants in a minute, at most %d", n, most)
	}
}

// holdTwice delivers a device's event again, a little later.
func holdTwice(t *rapid.T, w *world, ev Event, fx []Effect) {
	t.Helper()
	switch ev.(type) {
	case Asked, Reported, Confirmed, Reverted, Excluded:
	default:
		return
	}
	n, changed, again, err := Step(w.r, w.rows(ev), ev)
	if err != nil || n.Rev != w.r.Rev || len(changed) > 0 {
		t.Fatalf("%T%+v again: %v, rev %d then %d, %+v", ev, ev, err, w.r.Rev, n.Rev, changed)
	}
	if first, second := has[Grant](fx), has[Grant](again); !slices.Equal(first, second) {
		t.Fatalf("%T again: %v, then %v", ev, first, second)
	}
}

// holdReplay does the same again from the start.
func holdReplay(t *rapid.T, w *world, n int, p Plan, log []Event) {
	t.Helper()
	again := begun(t, n, p)
	for _, ev := range log {
		again.at = ev.when()
		if _, err := again.step(ev); err != nil && !fleet.Is(err, fleet.Conflict) {
			t.Fatal(err)
		}
	}
	same := reflect.DeepEqual(w.history, again.history)
	if w.r.Sweep == "" && w.r.State != Aborted && w.r.State != RollingBack { // how a sweep is batched is the caller's choice
		same = same && reflect.DeepEqual(w.r, again.r) && reflect.DeepEqual(w.jobs, again.jobs)
	}
	if !same {
		t.Fatalf("the same events gave\n%+v\nand then\n%+v", w.history, again.history)
	}
}

// finish brings a rollout to its end with a patient operator, devices of which some fail or stay silent, and some that
// stay offline for as long as that can be.
func finish(t *rapid.T, w *world) {
	t.Helper()
	offline := map[fleet.DeviceID]time.Time{}
	for _, d := range slices.Sorted(maps.Keys(w.jobs)) {
		if rapid.IntRange(0, 3).Draw(t, "offline") == 0 {
			offline[d] = w.at
		}
	}
	for steps := 0; !w.r.State.Final(); steps++ {
		if steps > 60*len(w.jobs)+400 {
			t.Fatalf("%s in stage %d (%s) for ever: %+v", w.r.State, w.r.Stage, w.r.Reason, w.r.Total)
		}
		w.operate()
		online, again := 0, 0
		for _, d := range append(w.order(Waiting), w.order(Pending)...) {
			if _, gone := offline[d]; gone {
				continue
			}
			if w.ask(d) == "" {
				continue
			}
			if w.jobs[d].State == Waiting {
				again++
			} else if w.jobs[d].Ring <= w.r.Stage {
				online++
			}
		}
		w.pass(time.Second)
		for _, d := range slices.Sorted(maps.Keys(w.jobs)) {
			if w.jobs[d].State.InFlight() && rapid.IntRange(0, 9).Draw(t, "good") > 0 {
				w.must(Confirmed{At: w.at, Device: d, Session: w.at})
			}
		}
		rev := w.r.Rev
		for _, after := range []time.Duration{0, 61 * time.Minute, 140 * time.Minute} {
			w.pass(after)
			w.must(Ticked{At: w.at, OnlinePending: online, OnlineWaiting: again, Offline: offline})
		}
		if w.r.Rev == rev && w.r.State == Running && online+again == 0 && w.r.Total.InFlight() == 0 {
			clear(offline) // an unproven stage waits for somebody to come
		}
	}
	w.sweep()
	for d, j := range w.jobs {
		if !j.State.Finished() {
			t.Fatalf("%s, and %s is %s", w.r.State, d, j.State)
		}
	}
}

// operate is what a patient operator does about a rollout that waits for him.
func (w *world) operate() {
	w.t.Helper()
	switch w.r.State {
	case Paused, Halted:
		w.must(ResumedBy{At: w.at, Who: "op"})
	case RollingBack:
		w.sweep()
		w.must(RollbackEnded{At: w.at, Completed: true})
	case Running:
		if st := w.r.Stages[w.r.Stage-1]; !st.HeldAt.IsZero() && !st.DoneAt.IsZero() && !w.r.Last() {
			w.must(AdvancedBy{At: w.at, Who: "op"})
		}
	}
}

// The dumb twin: which device is granted in which stage, by sorting hashes as text and walking through the list.
func TestStagesAgainstTwin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 40).Draw(t, "targets")
		p := anyPlan(t, n)
		p.Soak, p.MaxFailures = 0, 0
		p.OfflineGrace = MaxOfflineGrace
		w := begun(t, n, p)

		names := map[string]string{}
		var list []string
		for d := range w.jobs {
			sum := sha256.Sum256([]byte("r1\x00" + string(d)))
			key := hex.EncodeToString(sum[:8]) + string(d)
			names[key] = string(d)
			list = append(list, key)
		}
		slices.Sort(list)
		twin, stage := map[string]int{}, 1

		for round := range rapid.IntRange(1, 8).Draw(t, "rounds") {
			online := map[string]bool{}
			for _, key := range list {
				online[names[key]] = rapid.Bool().Draw(t, "online")
			}
			stage = twinRound(p, n, list, names, online, twin, stage)

			for rev := uint64(0); rev != w.r.Rev && w.r.State == Running; {
				rev = w.r.Rev
				left := 0
				for _, d := range w.order(Pending) {
					if !online[string(d)] {
						continue
					}
					if w.ask(d) != "" {
						left++
					}
				}
				for _, d := range w.order(Offered) {
					w.succeed(d)
				}
				w.tick(left)
			}
			got := map[string]int{}
			for d, j := range w.jobs {
				if j.Stage > 0 {
					got[string(d)] = j.Stage
				}
			}
			if !maps.Equal(got, twin) {
				t.Fatalf("round %d, stage %d: %s, want %s", round, w.r.Stage, fmt.Sprint(got), fmt.Sprint(twin))
			}
		}
	})
}

// twinRound grants to all that are online, stage by stage, until nothing moves, and returns the stage that is open then.
func twinRound(p Plan, n int, list []string, names map[string]string, online map[string]bool, twin map[string]int, stage int) int {
	for {
		quota, own, waiting := naiveQuota(p.Stages[stage-1], n), 0, false
		for _, key := range list {
			d := names[key]
			if twin[d] == 0 && online[d] {
				if len(twin) < quota {
					twin[d] = stage
				} else {
					waiting = true
				}
			}
			if twin[d] == stage {
				own++
			}
		}
		if quota == n || own == 0 || waiting && len(twin) < quota {
			return stage
		}
		stage++
		for stage < len(p.Stages) && naiveQuota(p.Stages[stage-1], n) <= len(twin) {
			stage++
		}
	}
}
