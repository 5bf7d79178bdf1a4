package rollout

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"muster/internal/fleet"
)

// The rank is part of what was promised for a rollout that runs: it must never change.
func TestRank(t *testing.T) {
	for _, c := range []struct {
		id fleet.RolloutID
		d  fleet.DeviceID
	}{{"r1", "d1"}, {"a", "b"}, {fleet.RolloutID(strings.Repeat("r", 40)), fleet.DeviceID(strings.Repeat("d", 40))}} {
		sum := sha256.Sum256([]byte(string(c.id) + "\x00" + string(c.d)))
		if got, want := Rank(c.id, c.d), binary.BigEndian.Uint64(sum[:8]); got != want {
			t.Errorf("%v: %x, want %x", c, got, want)
		}
	}
	if got := Rank("r1", "d1"); got != 0x8d1342dedbc6ae00 {
		t.Errorf("rank of d1 in r1 is now %#x", got)
	}
	if Rank("a", "bc") == Rank("ab", "c") || Rank("r1", "d1") == Rank("r2", "d1") {
		t.Error("the rank does not depend on both ids")
	}
	jobs := []Job{{Rank: 2, Device: "a"}, {Rank: 1, Device: "c"}, {Rank: 1, Device: "b"}}
	slices.SortFunc(jobs, Compare)
	if jobs[0].Device != "b" || jobs[1].Device != "c" || jobs[2].Device != "a" {
		t.Errorf("%+v", jobs)
	}
}

func TestAdd(t *testing.T) {
	w := draft(t, 2, percent(100))
	ids := []fleet.DeviceID{"x", "d1", "x", "a"}
	w.must(Added{At: w.at, Targets: targets(ids...)})
	if !slices.Equal(ids, []fleet.DeviceID{"x", "d1", "x", "a"}) {
		t.Errorf("the caller's slice is now %v", ids)
	}
	if w.r.Targets != 4 || len(w.jobs) != 4 {
		t.Errorf("%d targets, %d rows", w.r.Targets, len(w.jobs))
	}
	if fx := w.must(Added{At: w.at, Targets: targets("x")}); len(fx) != 0 {
		t.Errorf("%v", fx)
	}
	if _, err := w.step(Added{At: w.at, Targets: targets("b", "Not an id")}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("%v", err)
	}
	full := w.r
	full.Targets = MaxTargets - 1
	full, _, _, err := Step(full, nil, Added{At: w.at, Targets: targets("the-last")})
	if err != nil || full.Targets != MaxTargets {
		t.Errorf("%v, %d targets", err, full.Targets)
	}
	if _, _, _, err := Step(full, nil, Added{At: w.at, Targets: targets("one-more")}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("%v", err)
	}
}

func TestStartValidatesThePlan(t *testing.T) {
	w := draft(t, 3, Plan{Stages: []Stage{{Count: 5}, {Percent: 100}}})
	if _, err := w.step(Started{At: w.at}); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "holds only 3") {
		t.Errorf("%v", err)
	}
	w.want(Draft, 0)
	if _, err := draft(t, 0, Plan{}).step(Started{At: epoch}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("%v", err)
	}
}

func TestNew(t *testing.T) {
	r, err := New(Spec{ID: "r1", Release: release, Plan: Plan{}, By: "ada"}, epoch.In(time.FixedZone("far", 9*3600)))
	if err != nil || r.State != Draft || r.CreatedBy != "ada" || r.CreatedAt != epoch || r.StateAt != epoch || r.Rev != 1 {
		t.Errorf("%v %+v", err, r)
	}
	if Check(r) != nil || r.Last() || r.Room(epoch, nil) != 0 || r.Quota() != 0 || !reflect.DeepEqual(r.Plan, Plan{}.WithDefaults()) {
		t.Errorf("%v %+v", Check(r), r)
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Spec{ID: "Not an id", Release: release, Plan: Plan{}, By: "ada"}, epoch); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("%v", err)
	}
	if _, err := New(Spec{ID: "r1", Release: release, Plan: Plan{Soak: -1}, By: "ada"}, epoch); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("%v", err)
	}
	if _, err := New(Spec{ID: "r1", Release: release, Plan: Plan{}, By: "ada"}, time.Time{}); !fleet.Is(err, fleet.Internal) {
		t.Errorf("%v", err)
	}
}

// Asking again gives the same grant, in every state in which the device is in flight; the deadline never moves.
func TestAskTwice(t *testing.T) {
	w := begun(t, 2, percent(100).with(tolerate(9)))
	d := w.offer(1)[0]
	deadline := w.at.Add(DefaultDeviceTimeout)
	for _, r := range []Report{"", ReportAccepted, ReportDownloading, ReportDownloaded, ReportInstalled, ReportVerifying} {
		w.pass(time.Minute)
		w.report(d, r, 50)
		before := w.r.Rev
		fx := w.must(Asked{At: w.at, Device: d})
		if !reflect.DeepEqual(fx, []Effect{Grant{d, deadline}}) || w.r.Rev != before || w.jobs[d].Attempts != 1 {
			t.Errorf("after %q: %v", r, fx)
		}
	}
	w.at = deadline.Add(-1)
	if why := w.ask(d); why != "" {
		t.Errorf("refused before the deadline: %s", why)
	}
	w.at = deadline // the tick has not come yet, but the grant is over
	if why := w.ask(d); why != JobDone {
		t.Errorf("at the deadline: %q", why)
	}
	w.wantJob(d, TimedOut)
	if why := w.ask(d); why != JobDone {
		t.Errorf("after the deadline: %q", why)
	}
	if why := w.ask("stranger"); why != NotTarget {
		t.Errorf("stranger: %q", why)
	}
}

func TestNeverGrantedAgain(t *testing.T) {
	w := begun(t, 6, percent(100).with(tolerate(9)))
	ids := w.offer(5)
	w.fail(ids[0])
	w.report(ids[1], ReportRolledBack, 0)
	w.must(Excluded{At: w.at, Device: ids[2], Why: "disabled"})
	w.succeed(ids[3])
	w.at = w.jobs[ids[4]].Deadline
	w.tick(1)
	for _, d := range ids {
		if why := w.ask(d); why != JobDone {
			t.Errorf("%s (%s): %q", d, w.jobs[d].State, why)
		}
	}
}

func TestDeadline(t *testing.T) {
	w := begun(t, 3, percent(100).with(tolerate(9)))
	ids := w.offer(2)
	w.report(ids[0], ReportDownloading, 40)
	fx := w.must(Asked{At: w.at, Device: w.order(Pending)[0]})
	if wake := has[WakeAt](fx); len(wake) != 1 || !wake[0].At.Equal(epoch.Add(DefaultDeviceTimeout)) {
		t.Errorf("%v", fx)
	}
	w.at = epoch.Add(DefaultDeviceTimeout - 1)
	w.tick(0)
	w.wantJob(ids[0], Downloading)
	// Rows that are not due may be passed; they are left alone.
	r, changed, fx, err := Step(w.r, slices.Collect(maps.Values(w.jobs)), Ticked{At: w.at})
	if err != nil || len(changed)+len(fx) > 0 || r.Rev != w.r.Rev {
		t.Errorf("%v %v %v", err, changed, fx)
	}
	w.pass(1)
	fx = w.tick(0)
	if got := has[Withdraw](fx); len(got) != 3 {
		t.Errorf("%v", fx)
	}
	c := w.jobs[ids[0]].Cause
	if c.Kind != ByDeadline || c.Text != "no success in time; last known: downloading since 2030-01-01T00:00:00Z" {
		t.Errorf("%+v", c)
	}
}

// What the last of a row of reports leaves behind. Reports come in any order, twice, and from liars.
func TestReports(t *testing.T) {
	type report struct {
		r       Report
		percent int
	}
	for name, c := range map[string]struct {
		in      []report
		state   JobState
		last    Report
		percent int
	}{
		"accepted":               {[]report{{ReportAccepted, 0}}, Accepted, ReportAccepted, 0},
		"straight":               {[]report{{ReportAccepted, 0}, {ReportDownloading, 30}, {ReportDownloading, 60}}, Downloading, ReportDownloading, 60},
		"progress goes back":     {[]report{{ReportDownloading, 60}, {ReportDownloading, 30}}, Downloading, ReportDownloading, 60},
		"out of range":           {[]report{{ReportDownloading, 1 << 40}}, Downloading, ReportDownloading, 100},
		"below range":            {[]report{{ReportDownloading, -5}}, Downloading, ReportDownloading, 0},
		"accepted is late":       {[]report{{ReportDownloading, 10}, {ReportAccepted, 90}}, Downloading, ReportDownloading, 10},
		"downloading is late":    {[]report{{ReportInstalled, 100}, {ReportDownloading, 60}}, Installed, ReportInstalled, 100},
		"downloaded":             {[]report{{ReportDownloaded, 100}, {ReportDownloading, 99}}, Downloaded, ReportDownloaded, 100},
		"rebooting":              {[]report{{ReportInstalled, 100}, {ReportRebooting, 0}}, Rebooting, ReportRebooting, 100},
		"verifying":              {[]report{{ReportVerifying, 0}, {ReportRebooting, 0}}, Rebooting, ReportVerifying, 0},
		"failed":                 {[]report{{ReportFailed, 0}, {ReportInstalled, 100}}, Failed, ReportFailed, 0},
		"rejected":               {[]report{{ReportAccepted, 0}, {ReportRejected, 0}}, Rejected, ReportRejected, 0},
		"rolled back":            {[]report{{ReportInstalled, 100}, {ReportRolledBack, 0}}, RolledBack, ReportRolledBack, 100},
		"failed, then more":      {[]report{{ReportFailed, 0}, {ReportRolledBack, 0}}, Failed, ReportFailed, 0},
		"says that it succeeded": {[]report{{"succeeded", 100}}, Offered, "", 0},
		"nonsense":               {[]report{{"", 7}, {"\x00", 7}}, Offered, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := begun(t, 1, percent(100).with(tolerate(9)))
			d := w.offer(1)[0]
			for _, r := range c.in {
				w.report(d, r.r, r.percent)
				once := w.jobs[d]
				w.pass(time.Second)
				w.report(d, r.r, r.percent) // delivered twice
				if !reflect.DeepEqual(once, w.jobs[d]) {
					t.Errorf("%v twice: %+v, then %+v", r, once, w.jobs[d])
				}
			}
			if j := w.jobs[d]; j.State != c.state || j.Report != c.last || j.Percent != c.percent {
				t.Errorf("%s, %q, %d %%", j.State, j.Report, j.Percent)
			}
		})
	}
}

// Progress within a state changes the row and leaves the header alone.
func TestProgressLeavesTheHeader(t *testing.T) {
	w := begun(t, 1, percent(100))
	d := w.offer(1)[0]
	w.report(d, ReportDownloading, 1)
	rev, row := w.r.Rev, w.jobs[d].Rev
	w.report(d, ReportDownloading, 2)
	if w.r.Rev != rev || w.jobs[d].Rev != row+1 {
		t.Errorf("header rev %d, was %d; row rev %d, was %d", w.r.Rev, rev, w.jobs[d].Rev, row)
	}
}

// A device that has no grant cannot report itself into one.
func TestReportsWithoutAGrant(t *testing.T) {
	w := begun(t, 1, percent(100))
	for r := range reports {
		w.report("d0", r, 50)
		w.report("stranger", r, 50)
	}
	w.wantJob("d0", Pending)
	if w.r.Failures != 0 {
		t.Errorf("%d failures", w.r.Failures)
	}
	for _, ev := range []Event{
		Confirmed{At: w.at, Device: "stranger", Session: w.at},
		Reverted{At: w.at, Device: "stranger", Session: w.at},
		Reverted{At: w.at, Device: "d0", Session: w.at},
		Excluded{At: w.at, Device: "stranger"},
	} {
		before := w.r.Rev
		if fx := w.must(ev); len(fx) > 0 || w.r.Rev != before {
			t.Errorf("%T: %v", ev, fx)
		}
	}
	w.wantJob("d0", Pending)
}

func TestFailureText(t *testing.T) {
	for in, want := range map[string]string{
		"ESP_ERR_OTA_VALIDATE_FAILED":        "ESP_ERR_OTA_VALIDATE_FAILED",
		" \x1b[2Jpwned\r\n ":                 "[2Jpwned",
		"\xff\xfeü":                          "ü",
		strings.Repeat("x", 5000):            strings.Repeat("x", 200),
		"x" + strings.Repeat("ü", 300):       "x" + strings.Repeat("ü", 99),
		strings.Repeat("\x00", 1000) + "end": "",
	} {
		w := begun(t, 1, percent(100))
		d := w.offer(1)[0]
		w.must(Reported{At: w.at, Device: d, Report: ReportFailed, Text: in})
		got := w.jobs[d].Cause
		if got.Kind != ByReport || got.Text != want || len(got.Text) > MaxCauseText || !utf8.ValidString(got.Text) {
			t.Errorf("%.20q: %q", in, got)
		}
	}
}

// Only a session that began after the grant is a success.
func TestConfirm(t *testing.T) {
	const s = time.Second
	for name, c := range map[string]struct {
		session time.Duration // after the grant
		want    JobState
	}{
		"before the grant": {-1, Offered}, "at the grant": {0, Offered}, "after": {1, Succeeded}, "later": {5 * s, Succeeded},
	} {
		w := begun(t, 2, percent(100))
		d := w.offer(1)[0]
		granted := w.at
		w.pass(10 * s)
		w.must(Confirmed{At: w.at, Device: d, Session: granted.Add(c.session)})
		if w.wantJob(d, c.want); w.jobs[d].Late {
			t.Errorf("%s: late", name)
		}
		w.must(Confirmed{At: w.at, Device: d}) // no session at all
		w.wantJob(d, c.want)
	}
}

// A device that has the image before its turn is no success of the rollout, and passes no canary.
func TestHasImageAlready(t *testing.T) {
	w := begun(t, 3, percent(30, 100))
	d := w.order(Pending)[0]
	w.must(Confirmed{At: w.at, Device: d, Session: w.at})
	w.wantJob(d, Skipped)
	if w.jobs[d].Cause.Kind != HasImage || w.r.Room(w.at, nil) != 1 {
		t.Errorf("%+v, room %d", w.jobs[d].Cause, w.r.Room(w.at, nil))
	}
	w.tick(0)
	w.want(Running, 1)
}

// Late success corrects the record and the counts.
func TestLateSuccess(t *testing.T) {
	ends := map[JobState]func(*world, fleet.DeviceID){
		Failed:    func(w *world, d fleet.DeviceID) { w.fail(d) },
		TimedOut:  func(w *world, d fleet.DeviceID) { w.at = w.jobs[d].Deadline; w.tick(1) },
		Cancelled: func(w *world, d fleet.DeviceID) { w.must(Excluded{At: w.at, Device: d, Why: "disabled"}) },
	}
	for state, end := range ends {
		w := begun(t, 3, percent(100).with(tolerate(1)))
		d := w.offer(1)[0]
		end(w, d)
		w.wantJob(d, state)
		w.succeed(d)
		w.wantJob(d, Succeeded)
		if j := w.jobs[d]; !j.Late || j.Cause.Kind == "" || w.r.Failures != 0 || w.r.Total.Failures() != 0 || w.r.Stages[0].Counts.Succeeded != 1 {
			t.Errorf("%s: %+v, %+v", state, j, w.r.Total)
		}
		w.fail(w.offer(1)...) // the limit is free again
		w.want(Running, 1)
	}
}

// A late success never undoes a halt: an operator decides.
func TestLateSuccessLeavesAHalt(t *testing.T) {
	w := begun(t, 3, percent(100))
	d := w.offer(1)[0]
	w.at = w.jobs[d].Deadline
	w.tick(2)
	w.want(Halted, 1)
	w.succeed(d)
	w.want(Halted, 1)
	if w.r.Failures != 0 || w.r.Total.Succeeded != 1 {
		t.Errorf("failures %d, %+v", w.r.Failures, w.r.Total)
	}
}

// Evidence that is there before the tick counts, however late: a limit of 0 does not halt on a success.
func TestSuccessBeforeTheTick(t *testing.T) {
	for _, after := range []time.Duration{-1, 0, time.Minute} {
		w := begun(t, 2, percent(100))
		d := w.offer(1)[0]
		w.at = w.jobs[d].Deadline.Add(after)
		w.must(Confirmed{At: w.at, Device: d, Session: w.at})
		w.wantJob(d, Succeeded)
		w.want(Running, 1)
		if w.jobs[d].Late != (after >= 0) {
			t.Errorf("%v after the deadline: late is %v", after, w.jobs[d].Late)
		}
	}
}

func TestRevert(t *testing.T) {
	w := begun(t, 9, percent(100).with(tolerate(9)))
	ids := w.offer(4)
	// Power lost during the download: the old image is no news.
	w.report(ids[0], ReportDownloading, 50)
	w.pass(time.Second)
	w.must(Reverted{At: w.at, Device: ids[0], Session: w.at})
	w.wantJob(ids[0], Downloading)

	// The hello of the session that reported the image installed, delivered again: not after the report.
	began := w.at
	w.pass(time.Second)
	w.report(ids[1], ReportInstalled, 100)
	for _, session := range []time.Time{began, w.at} {
		w.must(Reverted{At: w.at, Device: ids[1], Session: session})
		w.wantJob(ids[1], Installed)
	}
	w.must(Reverted{At: w.at, Device: ids[1], Session: w.at.Add(1)})
	w.wantJob(ids[1], RolledBack)
	if w.jobs[ids[1]].Cause.Kind != ByRollback {
		t.Errorf("%+v", w.jobs[ids[1]].Cause)
	}

	// Rolled back is for good, even if the image shows up again.
	w.succeed(ids[1])
	w.wantJob(ids[1], RolledBack)

	// A success is taken back by a later session only; evidence out of order changes nothing.
	w.succeed(ids[2])
	confirmed := w.at
	for _, session := range []time.Time{began, confirmed} {
		w.must(Reverted{At: w.at, Device: ids[2], Session: session})
		w.wantJob(ids[2], Succeeded)
	}
	w.must(Reverted{At: w.at, Device: ids[2], Session: confirmed.Add(1)})
	w.wantJob(ids[2], RolledBack)
	if got := w.jobs[ids[2]].Session; !got.Equal(confirmed.Add(1)) {
		t.Errorf("the evidence is the session of %v", got)
	}
	if w.r.Failures != 2 {
		t.Errorf("%d failures", w.r.Failures)
	}
}

// When the rollout is over, another image is another rollout's business.
func TestRevertAfterTheEnd(t *testing.T) {
	w := begun(t, 1, percent(100))
	w.succeed(w.offer(1)...)
	w.want(Completed, 1)
	w.pass(time.Hour)
	w.must(Reverted{At: w.at, Device: "d0", Session: w.at})
	w.wantJob("d0", Succeeded)
}

func TestExclude(t *testing.T) {
	w := begun(t, 4, percent(100))
	flying := w.offer(1)[0]
	fx := w.must(Excluded{At: w.at, Device: flying, Why: "disabled"})
	w.wantJob(flying, Cancelled)
	if len(has[Withdraw](fx)) != 1 || w.r.Failures != 0 {
		t.Errorf("%v, failures %d", fx, w.r.Failures)
	}
	waiting := w.order(Pending)[0]
	if fx := w.must(Excluded{At: w.at, Device: waiting, Why: "removed"}); len(fx) != 0 {
		t.Errorf("%v", fx)
	}
	w.wantJob(waiting, Skipped)
	if c := w.jobs[waiting].Cause; c != (Cause{ByCaller, "removed"}) {
		t.Errorf("%+v", c)
	}
	w.succeed(w.offer(2)...)
	w.want(Completed, 1)
	before := w.jobs[flying]
	w.must(Excluded{At: w.at, Device: flying, Why: "removed"})
	if w.jobs[flying] != before {
		t.Error("a finished job was excluded")
	}
}

// A row that finishes during the sweep by other means ends the sweep all the same.
func TestSweepEndsByOtherMeans(t *testing.T) {
	last := map[string]func(*world) Event{
		"excluded":  func(w *world) Event { return Excluded{At: w.at, Device: "d0"} },
		"has image": func(w *world) Event { return Confirmed{At: w.at, Device: "d0", Session: w.at} },
		"swept":     func(w *world) Event { return Swept{At: w.at} },
	}
	for name, ev := range last {
		w := begun(t, 1, percent(100))
		w.must(AbortedBy{At: w.at})
		if w.r.Sweep != Cancelled {
			t.Fatalf("%s: sweep %q", name, w.r.Sweep)
		}
		w.must(ev(w))
		if w.r.Sweep != "" || w.r.SweepWhy != (Cause{}) {
			t.Errorf("%s: sweep %q", name, w.r.Sweep)
		}
	}
	w := begun(t, 1, percent(100)) // no sweep is on: nothing happens
	if fx := w.must(Swept{At: w.at}); len(fx) > 0 || w.r.Total.Pending != 1 {
		t.Errorf("%v %+v", fx, w.r.Total)
	}
}

// Mistakes of a caller are errors, and leave no trace.
func TestCallerMistakes(t *testing.T) {
	w := begun(t, 2, percent(100))
	d := w.offer(1)[0]
	row := w.jobs[d]
	foreign, cyclic := row, row
	foreign.Rollout = "other"
	cyclic.Stage = 9
	due := row.Deadline
	for name, c := range map[string]struct {
		jobs []Job
		ev   Event
	}{
		"no event":      {nil, nil},
		"no time":       {nil, Ticked{}},
		"foreign row":   {[]Job{foreign}, Ticked{At: due}},
		"row twice":     {[]Job{row, row}, Ticked{At: due}},
		"aborted twice": {[]Job{row, row}, AbortedBy{At: due}},
		"wrong stage":   {[]Job{cyclic}, Ticked{At: due}},
		"pointer":       {nil, &Ticked{At: due}},
	} {
		r, jobs, fx, err := Step(w.r, c.jobs, c.ev)
		if !fleet.Is(err, fleet.Internal) || !reflect.DeepEqual(r, w.r) || len(jobs)+len(fx) > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The records survive JSON unchanged, whatever zone and clock reading the caller's times had.
func TestJSON(t *testing.T) {
	zone := time.FixedZone("far", 9*3600)
	w := begun(t, 4, percent(50, 100).with(tolerate(3)))
	w.at = time.Now().In(zone)
	d := w.offer(1)[0]
	w.report(d, ReportDownloading, 7)
	w.fail(d)
	w.succeed(d)
	w.offer(1)
	w.must(AbortedBy{At: w.at, Who: "bob"})
	for _, v := range []any{&w.r, w.jobs, w.history} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		back := reflect.New(reflect.TypeOf(v))
		if err := json.Unmarshal(b, back.Interface()); err != nil {
			t.Fatal(err)
		}
		if got := back.Elem().Interface(); !reflect.DeepEqual(got, v) {
			t.Errorf("%s came back as %+v", b, got)
		}
		if strings.Contains(string(b), "+09:00") {
			t.Errorf("a time is not UTC: %s", b)
		}
	}
	b, err := json.Marshal(w.jobs[d])
	if err != nil || !strings.Contains(string(b), `"rank":"`) || !strings.Contains(string(b), `"state":"succeeded"`) {
		t.Errorf("%v %s", err, b)
	}
}

// What a device said about one attempt does not count for the next one, however late it comes.
func TestReportsOfTheAttemptBefore(t *testing.T) {
	w := begun(t, 1, percent(100).with(func(p *Plan) { p.Retries, p.RetryBackoff = 2, time.Minute }))
	d := w.offer(1)[0]
	w.fail(d)
	said := w.at
	w.pass(2 * time.Minute)
	w.ask(d)
	for _, late := range []Report{ReportFailed, ReportDownloading, ReportInstalled} {
		w.must(Reported{At: said, Device: d, Report: late})
		w.wantJob(d, Offered)
	}
	w.report(d, ReportVerifying, 0) // no attempt begins with this
	w.wantJob(d, Offered)
	w.report(d, ReportAccepted, 0)
	w.report(d, ReportInstalled, 0)
	w.wantJob(d, Installed)
}
