package rollout

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"muster/internal/fleet"
)

// epoch is when every test begins.
var epoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

var release = Release{Product: "boiler", Version: "1.1.0", Image: fleet.HashOf([32]byte{1})}

// fataler is what *testing.T and *rapid.T have in common.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// world is a caller of Step: it holds the records as a store would, passes the rows that the package comment asks for,
// and holds every step to what must always be true.
type world struct {
	t       fataler
	at      time.Time
	r       Rollout
	jobs    map[fleet.DeviceID]Job
	history []Decision
	alerts  []string
	jumps   bool                 // the clock may jump
	times   []time.Time          // of the grants
	grants  map[string]time.Time // the deadline of each grant ever returned, by attempt
}

// deviceID names the nth device of a test.
func deviceID(n int) fleet.DeviceID { return fleet.DeviceID(fmt.Sprintf("d%d", n)) }

// draft returns a world with n targets and the plan p.
func draft(t fataler, n int, p Plan) *world {
	t.Helper()
	r, err := New(Spec{ID: "r1", Release: release, Plan: p, By: "ada"}, epoch)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	w := &world{t: t, at: epoch, r: r, jobs: map[fleet.DeviceID]Job{}, grants: map[string]time.Time{}}
	ids := make([]fleet.DeviceID, n)
	for i := range ids {
		ids[i] = deviceID(i)
	}
	ts := targets(ids...)
	for i := range ts {
		if p.Sites.Label != "" {
			ts[i].Site = string(rune('a' + i%3))
		}
	}
	w.must(Added{At: w.at, Targets: ts})
	return w
}

// begun is draft, started.
func begun(t fataler, n int, p Plan) *world {
	t.Helper()
	w := draft(t, n, p)
	w.must(Started{At: w.at, Who: "ada"})
	return w
}

// rows returns what a caller loads for ev.
func (w *world) rows(ev Event) []Job {
	one := func(d fleet.DeviceID) []Job {
		if j, ok := w.jobs[d]; ok {
			return []Job{j}
		}
		return nil
	}
	all := func(keep func(Job) bool) (jobs []Job) {
		for _, j := range slices.SortedFunc(maps.Values(w.jobs), Compare) { // not the order of ids: it must not matter
			if keep(j) {
				jobs = append(jobs, j)
			}
		}
		return jobs
	}
	switch ev := ev.(type) {
	case Added:
		return all(func(j Job) bool {
			return slices.ContainsFunc(ev.Targets, func(t Target) bool { return t.Device == j.Device })
		})
	case AbortedBy:
		return all(func(j Job) bool { return j.State.InFlight() })
	case Swept:
		jobs := all(func(j Job) bool { return !j.State.Finished() })
		return jobs[:min(len(jobs), 7)]
	case Ticked:
		return all(func(j Job) bool {
			return (j.State.InFlight() || j.State == Waiting) && (!j.Deadline.After(ev.At) || j.GrantedAt.After(ev.At.Add(time.Minute)))
		})
	case Asked:
		return one(ev.Device)
	case Reported:
		return one(ev.Device)
	case Confirmed:
		return one(ev.Device)
	case Reverted:
		return one(ev.Device)
	case Excluded:
		return one(ev.Device)
	case Unhealthy:
		return one(ev.Device)
	case RetriedBy:
		return all(func(j Job) bool { return j.State.Failure() })
	}
	return nil
}

// step does one Step as a store would and checks it.
func (w *world) step(ev Event) ([]Effect, error) {
	w.t.Helper()
	in := w.rows(ev)
	before, stages, rows := w.r, slices.Clone(w.r.Stages), slices.Clone(in)
	n, changed, fx, err := Step(w.r, in, ev)
	if !reflect.DeepEqual(w.r.Stages, stages) || !reflect.DeepEqual(in, rows) {
		w.t.Fatalf("%T%+v changed its input", ev, ev)
	}
	if err != nil {
		if !reflect.DeepEqual(n, before) || len(changed)+len(fx) > 0 {
			w.t.Fatalf("%T%+v was refused (%v) and changed something", ev, ev, err)
		}
		return nil, err
	}
	w.checkHeader(before, n, fx)
	w.r = n
	for _, j := range changed {
		w.checkRow(ev, j)
		w.jobs[j.Device] = j
	}
	if err := CheckAll(n, maps.Values(w.jobs)); err != nil {
		w.t.Fatalf("after %T%+v: %v", ev, ev, err)
	}
	for _, f := range fx {
		switch f := f.(type) {
		case Decision:
			w.history = append(w.history, f)
		case Alert:
			w.alerts = append(w.alerts, f.Text)
		case Grant:
			attempt := fmt.Sprint(f.Device, "/", w.jobs[f.Device].Attempts, w.jobs[f.Device].GrantedAt)
			if first, ok := w.grants[attempt]; ok && !first.Equal(f.Deadline) {
				w.t.Fatalf("%s was granted until %v, then until %v", attempt, first, f.Deadline)
			}
			w.grants[attempt] = f.Deadline
		}
	}
	return fx, nil
}

// checkHeader holds a step to the transition table, by its decisions, and to the meaning of Rev.
func (w *world) checkHeader(before, after Rollout, fx []Effect) {
	w.t.Helper()
	state := before.State
	for i, f := range fx {
		switch f := f.(type) {
		case Decision:
			if f.From != state || f.To != f.From && !f.From.CanGo(f.To) || f.Text == "" || f.Code == "" {
				w.t.Fatalf("%s: decision %+v", state, f)
			}
			state = f.To
		case WakeAt:
			if i != len(fx)-1 {
				w.t.Fatalf("WakeAt is not the last effect: %+v", fx)
			}
		}
	}
	if state != after.State {
		w.t.Fatalf("decisions lead to %s, the header says %s", state, after.State)
	}
	a, b := before, after
	a.Rev, b.Rev = 0, 0
	if same := reflect.DeepEqual(a, b); same != (before.Rev == after.Rev) || !same && after.Rev != before.Rev+1 {
		w.t.Fatalf("rev %d, then %d; unchanged: %v", before.Rev, after.Rev, same)
	}
}

// checkRow holds a changed row to the transition table.
func (w *world) checkRow(ev Event, j Job) {
	w.t.Helper()
	old, had := w.jobs[j.Device]
	if !had {
		if _, ok := ev.(Added); !ok || j.State != Pending || j.Rev != 1 {
			w.t.Fatalf("%T made the row %+v", ev, j)
		}
		return
	}
	if j.Rev != old.Rev+1 {
		w.t.Fatalf("%T: rev of %s was %d, is %d", ev, j.Device, old.Rev, j.Rev)
	}
	if j.State != old.State && !old.State.CanGo(j.State) {
		w.t.Fatalf("%T: %s went from %s to %s", ev, j.Device, old.State, j.State)
	}
	if _, ok := ev.(Reported); ok && j.State == Succeeded {
		w.t.Fatalf("%s succeeded by its own word", j.Device)
	}
}

func (w *world) must(ev Event) []Effect {
	w.t.Helper()
	fx, err := w.step(ev)
	if err != nil {
		w.t.Fatalf("%T%+v: %v", ev, ev, err)
	}
	return fx
}

// pass lets time pass.
func (w *world) pass(d time.Duration) { w.at = w.at.Add(d) }

// asked is what a caller says when it offers the release to d.
func (w *world) asked(d fleet.DeviceID) Asked {
	ev := Asked{At: w.at, Device: d, From: "before"}
	for _, j := range w.jobs {
		if j.Site == "" || j.Site != w.jobs[d].Site {
			continue
		}
		ev.SiteSize++
		if j.State.InFlight() {
			ev.Disrupted++
		}
	}
	return ev
}

// ask offers the release and returns "" for a grant, else the refusal.
func (w *world) ask(d fleet.DeviceID) Refusal {
	w.t.Helper()
	for _, f := range w.must(w.asked(d)) {
		switch f := f.(type) {
		case Grant:
			return ""
		case Refuse:
			return f.Why
		}
	}
	w.t.Fatalf("no answer to %s", d)
	return ""
}

// order returns the ids of the jobs in state s, in rank order.
func (w *world) order(s JobState) (ids []fleet.DeviceID) {
	for _, j := range slices.SortedFunc(maps.Values(w.jobs), Compare) {
		if j.State == s {
			ids = append(ids, j.Device)
		}
	}
	return ids
}

// offer grants n pending devices in rank order and returns them.
func (w *world) offer(n int) []fleet.DeviceID {
	w.t.Helper()
	ids := w.order(Pending)[:n]
	for _, d := range ids {
		if why := w.ask(d); why != "" {
			w.t.Fatalf("%s was refused: %s", d, why)
		}
	}
	return ids
}

func (w *world) report(d fleet.DeviceID, r Report, percent int) {
	w.t.Helper()
	w.must(Reported{At: w.at, Device: d, Report: r, Percent: percent})
}

// succeed confirms the devices by sessions that begin a second from now.
func (w *world) succeed(ids ...fleet.DeviceID) {
	w.t.Helper()
	w.pass(time.Second)
	for _, d := range ids {
		w.must(Confirmed{At: w.at, Device: d, Session: w.at})
	}
}

func (w *world) fail(ids ...fleet.DeviceID) {
	w.t.Helper()
	for _, d := range ids {
		w.must(Reported{At: w.at, Device: d, Report: ReportFailed, Text: "no space"})
	}
}

func (w *world) tick(online int) []Effect {
	w.t.Helper()
	return w.must(Ticked{At: w.at, OnlinePending: online})
}

// sweep passes what is open in batches until nothing is.
func (w *world) sweep() {
	w.t.Helper()
	for n := 0; w.r.Sweep != ""; n++ {
		if n > len(w.jobs) {
			w.t.Fatalf("the sweep does not end")
		}
		w.must(Swept{At: w.at})
	}
}

func (w *world) want(s State, stage int) {
	w.t.Helper()
	if w.r.State != s || w.r.Stage != stage {
		w.t.Fatalf("%s in stage %d (%s), want %s in stage %d", w.r.State, w.r.Stage, w.r.Reason, s, stage)
	}
}

func (w *world) wantJob(d fleet.DeviceID, s JobState) {
	w.t.Helper()
	if w.jobs[d].State != s {
		w.t.Fatalf("%s is %s, want %s", d, w.jobs[d].State, s)
	}
}

// has returns the effects of one type.
func has[E Effect](fx []Effect) (found []E) {
	for _, f := range fx {
		if e, ok := f.(E); ok {
			found = append(found, e)
		}
	}
	return found
}

// percent is a plan with stages of these percentages, without soak.
func percent(ps ...int) Plan {
	p := Plan{MaxInFlight: 1000}
	for _, n := range ps {
		p.Stages = append(p.Stages, Stage{Percent: n})
	}
	return p
}

func (p Plan) with(f func(*Plan)) Plan { f(&p); return p }

func tolerate(n int) func(*Plan) { return func(p *Plan) { p.MaxFailures = n } }

func soak(d time.Duration) func(*Plan) { return func(p *Plan) { p.Soak = d } }

func targets(ids ...fleet.DeviceID) (ts []Target) {
	for _, d := range ids {
		ts = append(ts, Target{Device: d})
	}
	return ts
}

// restart is what a restart of the program does to the records: nothing is left but what JSON keeps.
func (w *world) restart() {
	w.t.Helper()
	var r Rollout
	b, err := json.Marshal(w.r)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil || !reflect.DeepEqual(r, w.r) {
		w.t.Fatalf("%v: %+v came back as %+v", err, w.r, r)
	}
}
