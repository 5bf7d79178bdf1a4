package httpapi_test

import (
	"bufio"
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"muster/api"
	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/httpapi"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
)

// step lets something happen to a rollout, as the engine would.
func (w *world) step(id fleet.RolloutID, ev rollout.Event, rows ...fleet.DeviceID) (effects []rollout.Effect) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		r, err := tx.Rollout(id)
		if err != nil {
			return err
		}
		var jobs []rollout.Job
		for _, d := range rows {
			j, _, err := tx.Job(id, d)
			if err != nil {
				return err
			}
			jobs = append(jobs, j)
		}
		next, changed, fx, err := rollout.Step(r, jobs, ev)
		if err != nil {
			return err
		}
		effects = fx
		for _, j := range changed {
			if err := tx.PutJob(j); err != nil {
				return err
			}
		}
		for _, f := range fx {
			if d, ok := f.(rollout.Decision); ok {
				if err := tx.AddDecision(id, d); err != nil {
					return err
				}
			}
		}
		return tx.PutRollout(next)
	})
	return effects
}

// grant offers the release to the first device that waits for its turn.
func (w *world) grant(id fleet.RolloutID) fleet.DeviceID {
	w.t.Helper()
	var dev fleet.DeviceID
	w.update(func(tx *bolt.Tx) error {
		jobs, err := tx.PendingJobs(id, 1)
		if err == nil && len(jobs) == 1 {
			dev = jobs[0].Device
		}
		return err
	})
	for _, fx := range w.step(id, rollout.Asked{At: w.now, Device: dev}, dev) {
		if _, ok := fx.(rollout.Grant); ok {
			return dev
		}
	}
	w.t.Fatalf("%s was not granted %s", dev, id)
	return ""
}

// everything is a plan that uses every field.
const everything = `{
	"stages": [{"name":"canary","count":1,"where":"id.startsWith(\"d00\")","min_success":100,"hold":true}, {"percent":100}],
	"max_failures": 3, "fail_then": "pause",
	"limits": [{"kinds":["failed","went-dark"],"percent":10,"min_sample":5,"confidence":90,"then":"rollback"}, {"count":2,"then":"abort"}],
	"max_in_flight": 7, "device_timeout": "2h0m0s", "accept_timeout": "1m0s", "download_timeout": "10m0s", "install_timeout": "5m0s",
	"verify_for": "3m0s", "dark_after": "20m0s", "retries": 2, "retry_backoff": "1m0s", "soak": "30m0s", "offline_grace": "1h0m0s",
	"start_at": "2031-01-01T00:00:00Z", "approval": true,
	"window": {"cron":"0 2 * * *","length":"4h0m0s","zone":"Europe/Berlin","zone_label":"tz"},
	"pace": {"per_minute":100,"base":10,"factor":1.5,"every":20}, "bytes_per_second": 1000000,
	"sites": {"label":"site","percent":10},
	"health": {"bad_boots":["panic"],"reconnects":3,"unhealthy_if":"id == \"\"","compare":true,"min_sample":10,"confidence":90,"then":"pause"},
	"rollback": {"previous_slot":true,"max_failures":1,"max_in_flight":5}, "allow_downgrade": true}`

func TestEveryFieldOfAPlanArrivesAndIsShown(t *testing.T) {
	w := open(t)
	w.devices(8)
	w.publish("1.1.0")
	body := `{"id":"r1","product":"lamp","version":"1.1.0","target":{"where":"id != \"\"","labels":{},"static":true},"plan":` + everything + `}`
	var r api.Rollout
	w.want(w.send(access.Operator, "POST", "/rollouts", body), 201, "").decode(t, &r)
	var want, have any
	if err := json.Unmarshal([]byte(everything), &want); err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(r.Plan)
	if err != nil || json.Unmarshal(raw, &have) != nil || !reflect.DeepEqual(want, have) {
		t.Errorf("%v: the plan came back as\n%s", err, raw)
	}
	if r.Dynamic || r.Where != `id != ""` {
		t.Errorf("target: %q, dynamic %v", r.Where, r.Dynamic)
	}
	// The stored plan is the same as what was sent: no field is lost on the way in and made up on the way out.
	stored, err := w.Rollouts.Get(t.Context(), "r1")
	if err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(stored.Plan)
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("%s is not set: everything must name it", v.Type().Field(i).Name)
		}
	}
	// What is shown may be sent again.
	again := api.NewRollout{ID: "r2", Product: "lamp", Version: "1.1.0", Plan: r.Plan}
	var second api.Rollout
	if w.want(w.send(access.Operator, "POST", "/rollouts", again), 201, "").decode(t, &second); !reflect.DeepEqual(second.Plan, r.Plan) {
		t.Errorf("%+v", second.Plan)
	}
}

func TestWhatAPlanDoesNotSay(t *testing.T) {
	w := open(t)
	w.devices(3)
	w.publish("1.1.0")
	for id, c := range map[string]struct {
		plan        string
		maxFailures *int
		verify      string
		stored      int
	}{
		"r1": {`{}`, new(0), "5m0s", 0},
		"r2": {`{"verify_for":"0s","max_failures":2}`, new(2), "0s", 2},
		"r3": {`{"limits":[{"percent":5,"min_sample":1}]}`, nil, "5m0s", rollout.MaxTargets},
		"r4": {`{"limits":[{"percent":5,"min_sample":1}],"max_failures":0}`, new(0), "5m0s", 0},
	} {
		var r api.Rollout
		w.want(w.send(access.Operator, "POST", "/rollouts", `{"id":"`+id+`","product":"lamp","version":"1.1.0","plan":`+c.plan+`}`), 201, "").decode(t, &r)
		if !reflect.DeepEqual(r.Plan.MaxFailures, c.maxFailures) || r.Plan.VerifyFor != c.verify || !r.Dynamic {
			t.Errorf("%s: %+v", id, r.Plan)
		}
		if stored, err := w.Rollouts.Get(t.Context(), fleet.RolloutID(id)); err != nil || stored.Plan.MaxFailures != c.stored {
			t.Errorf("%s: %v %v", id, stored.Plan.MaxFailures, err)
		}
	}
}

func TestRulesOfPlansAreTold(t *testing.T) {
	w := open(t)
	w.devices(3)
	w.publish("1.0.0")
	for name, c := range map[string]struct {
		body   string
		status int
		words  string
	}{
		"no expression":           {`"target":{"where":"id =="}`, 400, "target:"},
		"field that is none":      {`"target":{"where":"colour == \"red\""}`, 400, "colour"},
		"stage's where":           {`"plan":{"stages":[{"count":1,"where":"("},{"percent":100}]}`, 400, "stage 1: where"},
		"where in the last stage": {`"plan":{"stages":[{"percent":100,"where":"id != \"\""}]}`, 400, "stage 1 is the last"},
		"unhealthy_if":            {`"plan":{"health":{"unhealthy_if":")"}}`, 400, "unhealthy_if"},
		"health unverified":       {`"plan":{"verify_for":"0s","health":{"bad_boots":["panic"]}}`, 400, "verify_for"},
		"count and percent":       {`"plan":{"stages":[{"count":1,"percent":2},{"percent":100}]}`, 400, "exactly one"},
		"shrinking stages":        {`"plan":{"stages":[{"percent":50},{"percent":20},{"percent":100}]}`, 400, "cumulative"},
		"21 stages":               {`"plan":{"stages":[` + strings.Repeat(`{"percent":1},`, 20) + `{"percent":100}]}`, 400, "use 1 to 20"},
		"too many":                {`"plan":{"stages":[{"count":99},{"percent":100}]}`, 400, "holds only 3"},
		"fail_then":               {`"plan":{"fail_then":"explode"}`, 400, "fail_then"},
		"rollback to nowhere":     {`"plan":{"fail_then":"rollback"}`, 400, "where to"},
		"rollback to nothing":     {`"plan":{"rollback":{"version":"9.9.9"}}`, 404, "9.9.9"},
		"rollback to itself":      {`"plan":{"rollback":{"version":"1.0.0"}}`, 422, "1.0.0"},
		"limit without sample":    {`"plan":{"limits":[{"percent":5}]}`, 400, "min_sample"},
		"limit of a success":      {`"plan":{"limits":[{"kinds":["succeeded"]}]}`, 400, "kinds"},
		"confidence 100":          {`"plan":{"limits":[{"percent":5,"min_sample":1,"confidence":100}]}`, 400, "confidence"},
		"cron of six fields":      {`"plan":{"window":{"cron":"0 0 2 * * *","length":"1h"}}`, 400, "cron"},
		"30 February":             {`"plan":{"window":{"cron":"0 0 30 2 *","length":"1h"}}`, 400, "never comes"},
		"zone":                    {`"plan":{"window":{"cron":"0 2 * * *","length":"1h","zone":"Mars/Olympus"}}`, 400, "time zone"},
		"window without length":   {`"plan":{"window":{"cron":"0 2 * * *"}}`, 400, "length"},
		"pace without base":       {`"plan":{"pace":{"factor":2}}`, 400, "base"},
		"pace that shrinks":       {`"plan":{"pace":{"base":2,"factor":0.5,"every":1}}`, 400, "factor"},
		"sites without label":     {`"plan":{"sites":{"count":1}}`, 400, "label"},
		"sites without budget":    {`"plan":{"sites":{"label":"site"}}`, 400, "exactly one"},
		"bytes below 0":           {`"plan":{"bytes_per_second":-1}`, 400, "bytes_per_second"},
		"11 retries":              {`"plan":{"retries":11}`, 400, "retries"},
		"in flight -1":            {`"plan":{"max_in_flight":-1}`, 400, "max_in_flight"},
		"failures -1":             {`"plan":{"max_failures":-1}`, 400, "max_failures"},
		"escape in a stage":       {`"plan":{"stages":[{"name":"\u001b[2J","percent":100}]}`, 400, "printable"},
		"device of no fleet":      {`"target":{"devices":["none"]}`, 404, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			w := *w
			w.t = t
			for _, path := range []string{"/rollouts", "/rollouts/plan"} {
				res := w.send(access.Operator, "POST", path, `{"product":"lamp","version":"1.0.0",`+c.body+`}`)
				if path == "/rollouts/plan" && res.StatusCode == 200 { // what depends on the number of targets is part of the answer
					var p api.RolloutPreview
					if res.decode(t, &p); !strings.Contains(p.Problem, c.words) {
						t.Errorf("%s: %s", path, res.body)
					}
					continue
				}
				if res.StatusCode != c.status || !strings.Contains(res.problem(t).Detail, c.words) {
					t.Errorf("%s: %d %s", path, res.StatusCode, res.body)
				}
			}
		})
	}
	var list api.RolloutList
	if w.want(w.send(access.Viewer, "GET", "/rollouts", nil), 200, "").decode(t, &list); len(list.Items) != 0 {
		t.Errorf("a refused rollout is there: %+v", list)
	}
}

func TestADryRunSaysWhatWouldBeAndStoresNothing(t *testing.T) {
	w := open(t)
	w.devices(20)
	w.publish("1.1.0")
	in := api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0", Plan: api.Plan{Stages: []api.Stage{{Name: "canary", Count: 2}, {Percent: 50}, {Percent: 100}}, Soak: "1h", MaxFailures: new(1)}}
	var p api.RolloutPreview
	w.want(w.send(access.Viewer, "POST", "/rollouts/plan", in), 200, "").decode(t, &p)
	if p.Targets != 20 || p.Scanned != 20 || len(p.Stages) != 3 || p.Stages[1].Quota != 10 || p.Stages[1].Devices != 8 || len(p.Stages[0].Sample) != 2 ||
		p.Skips["never-seen"] != 20 || !slices.Contains(p.Stops, "2 failures: halt") || len(p.Warnings) == 0 || p.Plan.VerifyFor != "5m0s" || p.Problem != "" {
		t.Errorf("%+v", p)
	}
	w.want(w.send(access.Viewer, "GET", "/rollouts/r1", nil), 404, "not_found")
	// The sample is that of the rollout with the same id.
	w.want(w.send(access.Operator, "POST", "/rollouts", in), 201, "")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/start", nil), 200, "")
	if first := w.grant("r1"); string(first) != p.Stages[0].Sample[0] {
		t.Errorf("the first is %s, the sample said %v", first, p.Stages[0].Sample)
	}
}

func TestApproveAdvanceRetryRollback(t *testing.T) {
	w := open(t)
	w.devices(6)
	w.publish("1.1.0")
	in := api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0", Plan: api.Plan{
		Stages: []api.Stage{{Count: 1, Hold: true}, {Percent: 100}}, Approval: true, VerifyFor: "0s", MaxFailures: new(5), Rollback: api.RollbackPlan{PreviousSlot: true},
	}}
	var r api.Rollout
	w.want(w.send(access.Operator, "POST", "/rollouts", in), 201, "")
	if res := w.send(access.Operator, "POST", "/rollouts/r1/start", nil); res.StatusCode < 400 {
		t.Errorf("started without approval: %s", res.body)
	}
	if res := w.send(access.Operator, "POST", "/rollouts/r1/approve", nil); res.StatusCode != 403 {
		t.Errorf("approved by its creator: %d %s", res.StatusCode, res.body)
	}
	w.want(w.send(access.Admin, "POST", "/rollouts/r1/approve", nil), 200, "").decode(t, &r)
	if r.Approved.By != "t-admin" || !r.Approved.At.Equal(w.now) {
		t.Errorf("%+v", r.Approved)
	}
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/start", nil), 200, "")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/advance", nil), 409, "stage_not_done")
	first := w.grant("r1")
	w.step("r1", rollout.Confirmed{At: w.now, Device: first, Session: w.now.Add(time.Second)}, first)
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/advance", nil), 200, "").decode(t, &r)
	if r.Stage != 2 {
		t.Errorf("stage %d", r.Stage)
	}
	second := w.grant("r1")
	w.step("r1", rollout.Reported{At: w.now, Device: second, Report: rollout.ReportFailed, Text: "no space"}, second)
	var jobs api.JobList
	if w.want(w.send(access.Viewer, "GET", "/rollouts/r1/devices?state=failed", nil), 200, "").decode(t, &jobs); len(jobs.Items) != 1 || jobs.Items[0].Attempts != 1 || jobs.Items[0].Ring != 1 || !strings.Contains(jobs.Items[0].Text, "no space") {
		t.Errorf("%+v", jobs)
	}
	var did api.RolloutRetried
	if w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", `{"kind":"went-dark"}`), 200, "").decode(t, &did); did.Devices != 0 {
		t.Errorf("%+v", did)
	}
	if w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", nil), 200, "").decode(t, &did); did.Devices != 1 || did.Rollout.Counts["waiting"] != 1 {
		t.Errorf("%+v", did)
	}
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", `{"as":"r9"}`), 409, "not_over")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/rollback", nil), 200, "").decode(t, &r)
	if r.State != "rolling-back" || r.UndoneBy == "" {
		t.Errorf("%s %q", r.State, r.UndoneBy)
	}
}

func TestARolloutThatIsOverIsTriedAgainAsAnother(t *testing.T) {
	w := open(t)
	w.devices(6)
	w.publish("1.1.0")
	in := api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0", Plan: api.Plan{Stages: []api.Stage{{Percent: 100}}, MaxFailures: new(5), VerifyFor: "0s", Soak: "1h"}}
	w.want(w.send(access.Operator, "POST", "/rollouts", in), 201, "")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/start", nil), 200, "")
	var bad []fleet.DeviceID
	for range 3 {
		d := w.grant("r1")
		w.step("r1", rollout.Reported{At: w.now, Device: d, Report: rollout.ReportFailed}, d)
		bad = append(bad, d)
	}
	w.update(func(tx *bolt.Tx) error { return tx.PutPenalty(bad[0], rollout.Penalty{Until: w.now.Add(time.Hour)}) })
	var r api.Rollout
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/abort", `{"why":"drains batteries"}`), 200, "").decode(t, &r)
	if !strings.Contains(r.Reason, "drains batteries") {
		t.Errorf("%q", r.Reason)
	}
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", nil), 409, "conflict")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", `{"as":"r2","kind":"timed-out"}`), 422, "nothing_failed")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", `{"as":"r1"}`), 409, "rollout_exists")
	var did api.RolloutRetried
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", `{"as":"r2"}`), 201, "").decode(t, &did)
	if did.Devices != 3 || did.Rollout.ID != "r2" || did.Rollout.State != "draft" || did.Rollout.Targets != 3 || did.Rollout.Plan.Soak != "1h0m0s" || len(did.Rollout.Stages) != 2 {
		t.Errorf("%+v", did)
	}
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/retry", `{"as":"r3","start":true}`), 201, "").decode(t, &did)
	if did.Rollout.State != "running" {
		t.Errorf("%s", did.Rollout.State)
	}
	w.update(func(tx *bolt.Tx) error {
		if p, err := tx.Penalty(bad[0]); err != nil || !p.Until.IsZero() {
			t.Errorf("the penalty stands: %+v %v", p, err)
		}
		return nil
	})
}

func TestWhyAndPardon(t *testing.T) {
	w := open(t)
	w.devices(2)
	w.publish("1.1.0")
	w.want(w.send(access.Operator, "POST", "/rollouts", api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0"}), 201, "")
	w.update(func(tx *bolt.Tx) error { return tx.PutPenalty("d001", rollout.Penalty{Until: w.now.Add(time.Hour)}) })
	codes := func() (out []string) {
		var why api.Why
		w.want(w.send(access.Viewer, "GET", "/devices/d001/why", nil), 200, "").decode(t, &why)
		if !why.Blocked {
			t.Error("nothing blocks it")
		}
		for _, r := range why.Reasons {
			out = append(out, r.Code)
		}
		return out
	}
	if got := codes(); !slices.Contains(got, "penalty") || got[0] != "no-credentials" {
		t.Errorf("%v", got)
	}
	w.want(w.send(access.Operator, "POST", "/devices/d001/pardon", nil), 200, "")
	if got := codes(); slices.Contains(got, "penalty") {
		t.Errorf("%v", got)
	}
	if w.audit() != "t-operator device.pardon d001" {
		t.Error(w.audit())
	}
}

// event is one server-sent event.
type event struct{ name, id, data string }

// follow opens an event stream over a real server.
func (w *world) follow(url string, c *http.Client, last string) *http.Response {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), "GET", url+api.Base+"/rollouts/r1/events", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+w.Tokens[access.Viewer])
	req.Header.Set("Accept", "text/event-stream")
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	res, err := c.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = res.Body.Close() })
	return res
}

// next reads the next event; its name is empty at the end of the stream.
func next(t testing.TB, b *bufio.Scanner) (e event) {
	t.Helper()
	for b.Scan() {
		field, value, _ := strings.Cut(b.Text(), ": ")
		switch field {
		case "event":
			e.name = value
		case "id":
			e.id = value
		case "data":
			e.data = value
		case "":
			if e.name != "" {
				return e
			}
		}
	}
	return event{}
}

// serve starts a real server with the limits of the product, but short.
func (w *world) serve() (*httptest.Server, *http.Server) {
	ts := httptest.NewUnstartedServer(w.srv)
	ts.Config = httpapi.HTTPServer(w.srv, slog.New(slog.DiscardHandler))
	ts.Config.ReadTimeout, ts.Config.WriteTimeout = 200*time.Millisecond, 200*time.Millisecond
	ts.StartTLS()
	w.t.Cleanup(ts.Close)
	return ts, ts.Config
}

func TestEventsTellWhatHappensUntilTheEnd(t *testing.T) {
	w := open(t)
	w.srv.SetNow(time.Now) // tokens are checked as of now
	w.now = time.Now().UTC()
	w.freshTokens(t)
	w.devices(3)
	w.publish("1.1.0")
	w.want(w.send(access.Operator, "POST", "/rollouts", api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0", Plan: api.Plan{VerifyFor: "0s"}}), 201, "")
	ts, _ := w.serve()
	res := w.follow(ts.URL, ts.Client(), "")
	if res.StatusCode != 200 || res.Header.Get("Content-Type") != "text/event-stream" || res.Header.Get("Cache-Control") != "no-store" {
		t.Fatalf("%d %v", res.StatusCode, res.Header)
	}
	b := bufio.NewScanner(res.Body)
	b.Buffer(nil, 1<<20)
	if e := next(t, b); e.name != "rollout" || !strings.Contains(e.data, `"state":"draft"`) {
		t.Fatalf("%+v", e)
	}
	// Longer than the timeouts of the server later, events still come.
	deadline := time.Now().Add(600 * time.Millisecond)
	for time.Now().Before(deadline) {
		w.want(w.send(access.Viewer, "GET", "/rollouts/r1", nil), 200, "")
	}
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/start", nil), 200, "")
	var seen []event
	for len(seen) < 3 {
		e := next(t, b)
		if e.name == "" {
			t.Fatalf("the stream ended after %+v", seen)
		}
		seen = append(seen, e)
	}
	if seen[0].name != "rollout" || !strings.Contains(seen[0].data, `"state":"running"`) || seen[1].name != "decision" || seen[1].id == "" || !strings.Contains(seen[1].data, `"code":"started"`) {
		t.Errorf("%+v", seen)
	}
	// Another one begins after what it has seen.
	late := bufio.NewScanner(w.follow(ts.URL, ts.Client(), seen[1].id).Body)
	if e := next(t, late); e.name != "rollout" {
		t.Errorf("%+v", e)
	}
	if e := next(t, late); e.name != "decision" || e.id != seen[2].id {
		t.Errorf("%+v, want %+v", e, seen[2])
	}
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/abort", nil), 200, "")
	w.step("r1", rollout.Swept{At: w.now}, w.pending("r1")...)
	var last event
	for e := next(t, b); e.name != ""; e = next(t, b) {
		last = e
	}
	if last.name != "end" || !strings.Contains(last.data, `"aborted"`) {
		t.Errorf("%+v", last)
	}
}

func (w *world) pending(id fleet.RolloutID) (out []fleet.DeviceID) {
	w.update(func(tx *bolt.Tx) error {
		jobs, err := tx.PendingJobs(id, 100)
		for _, j := range jobs {
			out = append(out, j.Device)
		}
		return err
	})
	return out
}

// freshTokens makes the tokens anew, as of the real time.
func (w *world) freshTokens(t testing.TB) {
	t.Helper()
	for role := range w.Tokens {
		secret, _, err := w.Access.Create(context.Background(), time.Now(), "now-"+string(role), role, 0, "test")
		if err != nil {
			t.Fatal(err)
		}
		w.Tokens[role] = secret
	}
}

func TestStreamsAreBoundedAndEndWithTheServer(t *testing.T) {
	w := open(t)
	w.srv.SetNow(time.Now)
	w.now = time.Now().UTC()
	w.freshTokens(t)
	w.devices(1)
	w.publish("1.1.0")
	w.want(w.send(access.Operator, "POST", "/rollouts", api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0"}), 201, "")
	ts, srv := w.serve()
	var open []*bufio.Scanner
	for range httpapi.MaxStreams {
		open = append(open, bufio.NewScanner(w.follow(ts.URL, ts.Client(), "").Body))
		if e := next(t, open[len(open)-1]); e.name != "rollout" {
			t.Fatalf("%+v", e)
		}
	}
	res := w.follow(ts.URL, ts.Client(), "")
	var raw bytes.Buffer
	if _, err := raw.ReadFrom(res.Body); err != nil || res.StatusCode != 503 || !strings.Contains(raw.String(), "too_many_streams") {
		t.Errorf("%d %s %v", res.StatusCode, raw.String(), err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		t.Errorf("the streams hold the server up: %v", err)
	}
	for _, b := range open {
		if e := next(t, b); e.name != "" {
			t.Errorf("%+v", e)
		}
	}
}
