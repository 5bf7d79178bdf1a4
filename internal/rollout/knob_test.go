package rollout

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

// knob is one field of a plan: what happens with one value of it and with another must differ.
type knob struct {
	plan      func() Plan                    // without it
	set       func(*Plan)                    // with it
	n         int                            // targets; 10 if 0
	story     func(w *world) string          // what became of it
	elsewhere string                         // why the core leaves it alone, and whose test shows its effect
	draft     func(p Plan) (string, Rollout) // instead of story: before the start
}

// knobs are all fields of a plan. A field that does nothing is a defect: TestEveryFieldOfAPlanChangesSomething fails for
// one that is missing here.
var knobs = map[string]knob{
	"Plan.Stages":        {set: func(p *Plan) { p.Stages = []Stage{{Percent: 50}, {Percent: 100}} }, story: grantsNow},
	"Stage.Count":        {set: func(p *Plan) { p.Stages = []Stage{{Count: 3}, {Percent: 100}} }, story: grantsNow},
	"Stage.Percent":      {set: func(p *Plan) { p.Stages = []Stage{{Percent: 20}, {Percent: 100}} }, story: grantsNow},
	"Stage.MinSuccess":   {plan: stages, set: func(p *Plan) { p.Stages[0].MinSuccess = 80 }, story: half},
	"Stage.Hold":         {plan: stages, set: func(p *Plan) { p.Stages[0].Hold = true }, story: succeedAll},
	"Stage.Name":         {elsewhere: "for people: internal/cli shows it"},
	"Stage.Where":        {plan: stages, set: func(p *Plan) { p.Stages[0].Where = "x" }, story: grantsNow},
	"Plan.MaxFailures":   {set: func(p *Plan) { p.MaxFailures = 1 }, story: failOne},
	"Plan.FailThen":      {set: func(p *Plan) { p.FailThen = ThenAbort }, story: failOne},
	"Plan.Limits":        {plan: lenient, set: func(p *Plan) { p.Limits = []Limit{{Count: 0}} }, story: failOne},
	"Limit.Kinds":        {plan: limited(Limit{}), set: func(p *Plan) { p.Limits[0].Kinds = []JobState{TimedOut} }, story: failOne},
	"Limit.Count":        {plan: limited(Limit{}), set: func(p *Plan) { p.Limits[0].Count = 1 }, story: failOne},
	"Limit.Percent":      {plan: limited(Limit{Percent: 5, MinSample: 2}), set: func(p *Plan) { p.Limits[0].Percent = 50 }, story: failOneOfThree},
	"Limit.MinSample":    {plan: limited(Limit{Percent: 5, MinSample: 2}), set: func(p *Plan) { p.Limits[0].MinSample = 9 }, story: failOneOfThree},
	"Limit.Confidence":   {plan: limited(Limit{Percent: 20, MinSample: 2}), set: func(p *Plan) { p.Limits[0].Confidence = 95 }, story: failOneOfThree},
	"Limit.Then":         {plan: limited(Limit{}), set: func(p *Plan) { p.Limits[0].Then = ThenPause }, story: failOne},
	"Plan.MaxInFlight":   {set: func(p *Plan) { p.MaxInFlight = 2 }, story: grantsNow},
	"Plan.DeviceTimeout": {set: func(p *Plan) { p.DeviceTimeout = 10 * time.Minute }, story: silent(20 * time.Minute)},
	"Plan.AcceptTimeout": {set: func(p *Plan) { p.AcceptTimeout = time.Minute }, story: silent(20 * time.Minute)},
	"Plan.DownloadTimeout": {set: func(p *Plan) { p.DownloadTimeout = time.Minute },
		story: stuck(ReportDownloading, 20*time.Minute)},
	"Plan.InstallTimeout": {set: func(p *Plan) { p.InstallTimeout = time.Minute }, story: stuck(ReportDownloaded, 20*time.Minute)},
	"Plan.DarkAfter":      {plan: verified, set: func(p *Plan) { p.DarkAfter = time.Minute }, story: dark},
	"Plan.VerifyFor":      {set: func(p *Plan) { p.VerifyFor = time.Minute }, story: succeedOne},
	"Plan.Retries":        {set: func(p *Plan) { p.Retries, p.RetryBackoff = 1, time.Minute }, story: failOne},
	"Plan.RetryBackoff": {plan: func() Plan { p := all(); p.Retries, p.RetryBackoff = 1, time.Minute; return p },
		set: func(p *Plan) { p.RetryBackoff = time.Hour }, story: retried},
	"Plan.Soak":         {plan: stages, set: func(p *Plan) { p.Soak = time.Hour }, story: succeedAll},
	"Plan.OfflineGrace": {set: func(p *Plan) { p.OfflineGrace = time.Minute }, story: absent},
	"Plan.StartAt":      {set: func(p *Plan) { p.StartAt = epoch.Add(time.Hour) }, draft: started},
	"Plan.Approval":     {set: func(p *Plan) { p.Approval = true }, draft: started},
	"Plan.Window":       {set: func(p *Plan) { p.Window = Window{Cron: "0 6 * * *", Length: time.Hour} }, story: grantsNow},
	"Window.Cron": {plan: windowed(Window{Cron: "0 6 * * *", Length: time.Hour}), set: func(p *Plan) { p.Window.Cron = "0 0 * * *" },
		story: grantsNow},
	"Window.Length": {plan: windowed(Window{Cron: "0 22 * * *", Length: time.Hour}), set: func(p *Plan) { p.Window.Length = 4 * time.Hour },
		story: grantsNow},
	"Window.Zone":         {elsewhere: "internal/dispatch looks the location up and passes it: TestADevicesOwnZoneHasItsOwnWindow"},
	"Window.ZoneLabel":    {plan: windowed(Window{Cron: "0 6 * * *", Length: time.Hour}), set: func(p *Plan) { p.Window.ZoneLabel = "tz" }, story: shut},
	"Plan.Pace":           {set: func(p *Plan) { p.Pace = Pace{PerMinute: 2} }, story: grantsNow},
	"Pace.PerMinute":      {plan: paced(Pace{PerMinute: 2}), set: func(p *Plan) { p.Pace.PerMinute = 600 }, story: grantsNow},
	"Pace.Base":           {plan: paced(Pace{PerMinute: 600}), set: func(p *Plan) { p.Pace.Base, p.Pace.Factor, p.Pace.Every = 1, 2, 1 }, story: grantsNow},
	"Pace.Factor":         {plan: paced(Pace{Base: 1, Factor: 2, Every: 1}), set: func(p *Plan) { p.Pace.Factor = 100 }, story: growing},
	"Pace.Every":          {plan: paced(Pace{Base: 1, Factor: 100, Every: 1}), set: func(p *Plan) { p.Pace.Every = 1000 }, story: growing},
	"Plan.BytesPerSecond": {set: func(p *Plan) { p.BytesPerSecond = 4096 }, story: grantsNow},
	"Plan.Sites":          {set: func(p *Plan) { p.Sites = SiteBudget{Label: "site", Count: 1} }, story: grantsNow},
	"SiteBudget.Label":    {elsewhere: "internal/dispatch fills the sites by it: TestASiteKeepsMostOfItsDevices"},
	"SiteBudget.Count":    {plan: sites(SiteBudget{Label: "site", Count: 1}), set: func(p *Plan) { p.Sites.Count = 2 }, story: grantsNow},
	"SiteBudget.Percent":  {plan: sites(SiteBudget{Label: "site", Percent: 1}), set: func(p *Plan) { p.Sites.Percent = 100 }, story: grantsNow},
	"Plan.Health":         {plan: verified, set: func(p *Plan) { p.Health = Health{BadBoots: []string{"panic"}} }, story: watched},
	"Health.BadBoots":     {elsewhere: "internal/dispatch judges it: TestADeviceThatIsNotHealthyHasFailed/panics"},
	"Health.Reconnects":   {elsewhere: "internal/dispatch judges it: TestADeviceThatIsNotHealthyHasFailed/reconnects"},
	"Health.Expression":   {elsewhere: "internal/dispatch judges it: TestADeviceThatIsNotHealthyHasFailed/expression"},
	"Health.Compare":      {plan: healthy(Health{BadBoots: []string{"panic"}}), set: func(p *Plan) { p.Health.Compare = true }, story: watched},
	"Health.MinSample": {plan: healthy(Health{BadBoots: []string{"panic"}, Compare: true, MinSample: 5, Confidence: 90}),
		set: func(p *Plan) { p.Health.MinSample = 11 }, story: worse},
	"Health.Confidence": {plan: healthy(Health{BadBoots: []string{"panic"}, Compare: true, MinSample: 5, Confidence: 80}),
		set: func(p *Plan) { p.Health.Confidence = 99 }, story: worse},
	"Health.Then": {plan: healthy(Health{BadBoots: []string{"panic"}, Compare: true, MinSample: 5, Confidence: 80}),
		set: func(p *Plan) { p.Health.Then = ThenAbort }, story: worse},
	"Plan.Rollback":            {set: func(p *Plan) { p.Rollback.Version = "1.0.0" }, story: undo},
	"RollbackPlan.Version":     {elsewhere: "internal/dispatch makes the rollout of it: TestAFleetIsTakenBackAndForth"},
	"RollbackPlan.Previous":    {elsewhere: "internal/dispatch makes the rollout of it: TestAFleetIsTakenBackToItsOtherSlot"},
	"RollbackPlan.MaxFailures": {elsewhere: "internal/dispatch makes the rollout of it: TestARollbackThatFailsPauses"},
	"RollbackPlan.MaxInFlight": {elsewhere: "internal/dispatch makes the rollout of it: TestARollbackKeepsItsOwnCap"},
	"Plan.AllowDowngrade":      {elsewhere: "internal/dispatch judges what fits: TestOlderReleasesNeedAWord"},
}

// The plans that fields are added to.
func all() Plan      { return percent(100) }
func stages() Plan   { return percent(50, 100).with(tolerate(9)) }
func lenient() Plan  { return all().with(tolerate(MaxTargets)) }
func verified() Plan { p := lenient(); p.VerifyFor = 10 * time.Minute; return p }
func limited(l Limit) func() Plan {
	return func() Plan { p := lenient(); p.Limits = []Limit{l}; return p }
}
func windowed(w Window) func() Plan  { return func() Plan { p := all(); p.Window = w; return p } }
func paced(pace Pace) func() Plan    { return func() Plan { p := all(); p.Pace = pace; return p } }
func sites(s SiteBudget) func() Plan { return func() Plan { p := all(); p.Sites = s; return p } }
func healthy(h Health) func() Plan   { return func() Plan { p := verified(); p.Health = h; return p } }

// The stories. Each says in words what a plan came to.

// grantsNow offers the release to everybody at once.
func grantsNow(w *world) string {
	n := 0
	for _, d := range w.order(Pending) {
		if w.ask(d) == "" {
			n++
		}
	}
	return fmt.Sprint(n, " granted at once")
}

func state(w *world) string {
	return fmt.Sprint(w.r.State, " in stage ", w.r.Stage, ": ", outcome(w.r.Total), w.r.Total.Waiting)
}

func failOne(w *world) string { w.fail(w.offer(2)[0]); return state(w) }

func failOneOfThree(w *world) string {
	ids := w.offer(3)
	w.succeed(ids[:2]...)
	w.fail(ids[2])
	return state(w)
}

func succeedOne(w *world) string { w.succeed(w.offer(2)[0]); return state(w) }

func succeedAll(w *world) string { w.succeed(w.offer(5)...); w.tick(5); return state(w) }

func half(w *world) string {
	ids := w.offer(5)
	w.succeed(ids[:3]...)
	w.fail(ids[3:]...)
	w.tick(5)
	return state(w)
}

func silent(d time.Duration) func(*world) string {
	return func(w *world) string { w.offer(1); w.pass(d); w.tick(0); return state(w) }
}

func stuck(at Report, d time.Duration) func(*world) string {
	return func(w *world) string {
		w.report(w.offer(1)[0], at, 10)
		w.pass(d)
		w.tick(0)
		return state(w)
	}
}

// dark is a device that is lost while it is verified.
func dark(w *world) string {
	d := w.offer(1)[0]
	w.succeed(d)
	lost := w.at.Add(time.Second)
	w.pass(11 * time.Minute)
	w.must(Ticked{At: w.at, Offline: map[fleet.DeviceID]time.Time{d: lost}})
	return state(w)
}

func retried(w *world) string {
	d := w.offer(1)[0]
	w.fail(d)
	w.pass(5 * time.Minute)
	return string(w.ask(d))
}

// absent is a rollout whose last device stays offline for an hour.
func absent(w *world) string {
	w.succeed(w.offer(9)...)
	w.tick(0)
	w.pass(time.Hour)
	w.tick(0)
	return state(w)
}

func shut(w *world) string {
	return string(w.ask(w.order(Pending)[0])) + string(w.r.Refusal(w.at, nil))
}

func growing(w *world) string {
	d := w.order(Pending)[0]
	w.ask(d)
	w.succeed(d)
	w.pass(time.Minute)
	w.offer(1)
	return w.r.NextGrant.Sub(w.at).String()
}

func watched(w *world) string {
	d := w.offer(1)[0]
	w.succeed(d)
	w.must(Unhealthy{At: w.at, Device: d, Why: "panic"})
	return fmt.Sprint(state(w), w.r.Health)
}

// worse is five devices with the update, all of them bad, against a control group of which some are.
func worse(w *world) string {
	ids := w.offer(10)
	w.succeed(ids...)
	for _, d := range ids[:6] {
		w.must(Unhealthy{At: w.at, Device: d, Why: "panic"})
	}
	w.must(Compared{At: w.at, Control: 20, Bad: 3})
	return state(w)
}

func undo(w *world) string {
	w.offer(1)
	_, err := w.step(RollbackBy{At: w.at, Who: "op"})
	return fmt.Sprint(err, w.r.State)
}

func started(p Plan) (string, Rollout) {
	r, err := New(Spec{ID: "r1", Release: release, Plan: p, By: "ada"}, epoch)
	if err != nil {
		return err.Error(), r
	}
	r, _, _, _ = Step(r, nil, Added{At: epoch, Targets: targets("d1")})
	r, _, _, err = Step(r, nil, Started{At: epoch, Who: "ada"})
	return fmt.Sprint(r.State, err), r
}

func TestEveryFieldOfAPlanChangesSomething(t *testing.T) {
	var fields []string
	for _, v := range []any{Plan{}, Stage{}, Limit{}, Window{}, Pace{}, SiteBudget{}, Health{}, RollbackPlan{}} {
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			fields = append(fields, typ.Name()+"."+typ.Field(i).Name)
		}
	}
	for name := range knobs {
		if !slices.Contains(fields, name) {
			t.Errorf("%s is no field", name)
		}
	}
	for _, name := range fields {
		k, ok := knobs[name]
		if !ok {
			t.Errorf("nothing shows that %s does anything", name)
			continue
		}
		if k.elsewhere != "" {
			continue
		}
		plan := k.plan
		if plan == nil {
			plan = all
		}
		with := plan()
		with.Stages = slices.Clone(with.Stages)
		with.Limits = slices.Clone(with.Limits)
		k.set(&with)
		tell := func(p Plan) string {
			if k.draft != nil {
				text, _ := k.draft(p)
				return text
			}
			r := release
			r.Size = 1 << 20
			w := begunWith(t, r, max(k.n, 10), p)
			return k.story(w)
		}
		if a, b := tell(plan()), tell(with); a == b {
			t.Errorf("%s changes nothing: %q either way", name, a)
		} else if testing.Verbose() {
			t.Logf("%-22s %s | %s", name, strings.TrimSpace(a), strings.TrimSpace(b))
		}
	}
}

// begunWith is begun with a release of its own, and sites and rings where the plan has them.
func begunWith(t fataler, rel Release, n int, p Plan) *world {
	t.Helper()
	w := draft(t, n, p)
	w.r.Release = rel
	if len(p.Stages) > 0 && p.Stages[0].Where != "" {
		for d, j := range w.jobs { // two devices match the first stage
			if d != "d0" && d != "d1" {
				continue
			}
			j.Ring = 1
			w.jobs[d] = j
		}
	}
	w.must(Started{At: w.at, Who: "ada"})
	return w
}
