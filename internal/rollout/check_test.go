package rollout

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

// Each invariant is broken by hand, once, and found.
func TestCheckFinds(t *testing.T) {
	for name, c := range map[string]struct {
		from State
		harm func(*Rollout)
		want string
	}{
		"state":              {Running, func(r *Rollout) { r.State = "odd" }, "unknown state"},
		"stages":             {Running, func(r *Rollout) { r.Stages = nil }, "0 stages, 1 planned"},
		"stage":              {Running, func(r *Rollout) { r.Stage = 2 }, "stage 2 of 1"},
		"negative stage":     {Running, func(r *Rollout) { r.Stage = -1 }, "stage -1 of 1"},
		"sum":                {Running, func(r *Rollout) { r.Targets++ }, "counts of 3 jobs, 4 targets"},
		"closed stage":       {Halted, func(r *Rollout) { r.Stage = 0 }, "stage 1 is not open"},
		"negative in stage":  {Halted, func(r *Rollout) { r.Stages[0].Counts.Accepted = -1 }, "-1 jobs accepted"},
		"negative":           {Running, func(r *Rollout) { r.Total.Skipped--; r.Total.Pending++ }, "-1 jobs skipped"},
		"pending in stage":   {Running, func(r *Rollout) { r.Stages[0].Counts.Pending = 1 }, "1 jobs pending in stages"},
		"skipped in stage":   {Running, func(r *Rollout) { r.Stages[0].Counts.Skipped = 1 }, "1 jobs skipped in stages"},
		"cancelled in stage": {Running, func(r *Rollout) { r.Stages[0].Counts.Cancelled = 1 }, "0 jobs cancelled, 1 in stages"},
		"failed not staged":  {Halted, func(r *Rollout) { r.Stages[0].Counts.Failed = 0 }, "1 jobs failed, 0 in stages"},
		"in flight":          {Halting, func(r *Rollout) { r.Plan.MaxInFlight = 0 }, "1 in flight, 0 allowed"},
		"quota":              {Halting, func(r *Rollout) { r.Plan.Stages = []Stage{{Count: 1}} }, "2 granted, stage 1 allows 1"},
		"too few failures":   {Running, func(r *Rollout) { r.Failures = -1 }, "-1 failures"},
		"too many failures":  {Halted, func(r *Rollout) { r.Failures = 2 }, "2 failures in this round, verdicts"},
		"too many verdicts":  {Halted, func(r *Rollout) { r.Failures, r.Verdicts.TimedOut = 2, 1 }, "2 failures in this round"},
		"another kind":       {Halted, func(r *Rollout) { r.Verdicts.Failed, r.Verdicts.TimedOut = 0, 1 }, "1 timed-out in this round, 0 in all"},
		"success of nobody":  {Halted, func(r *Rollout) { r.Verdicts.Succeeded = 1 }, "1 failures in this round, verdicts"},
		"more bad than seen": {Running, func(r *Rollout) { r.Health.Bad = 1 }, "1 of 0 watched devices are bad"},
		"begun schedule":     {Running, func(r *Rollout) { r.State = Scheduled }, "scheduled, and has begun"},
		"no approval":        {Running, func(r *Rollout) { r.Plan.Approval = true }, "without the approval"},
		"own approval":       {Running, func(r *Rollout) { r.Approved = Approval{By: "ada", At: epoch} }, "approved by whoever created it"},
		"still filling":      {Running, func(r *Rollout) { r.Filling = true }, "before its target was filled"},
		"nameless rollback":  {RollingBack, func(r *Rollout) { r.UndoneBy = "" }, "undone by"},
		"runs on":            {Halted, func(r *Rollout) { r.State = Running }, "running with 1 failures, 0 tolerated"},
		"begun draft":        {Running, func(r *Rollout) { r.State = Draft }, "draft, and has begun"},
		"no start":           {Running, func(r *Rollout) { r.StartedAt = time.Time{} }, "running without a start"},
		"no round":           {Running, func(r *Rollout) { r.Round = 0 }, "running without a start"},
		"halted in flight":   {Halting, func(r *Rollout) { r.State = Halted }, "halted with 1 in flight"},
		"halting for ever":   {Halted, func(r *Rollout) { r.State = Halting }, "halting with nothing in flight"},
		"no end":             {Completed, func(r *Rollout) { r.EndedAt = time.Time{} }, "completed, ended at"},
		"early end":          {Running, func(r *Rollout) { r.EndedAt = epoch }, "running, ended at"},
		"early sweep":        {Running, func(r *Rollout) { r.Sweep = Skipped }, "running and sweeping"},
		"idle sweep":         {Completed, func(r *Rollout) { r.Sweep = Skipped }, "0 jobs open, sweep"},
		"no sweep":           {Aborted, func(r *Rollout) { r.Sweep = "" }, "2 jobs open, sweep"},
		"odd sweep":          {Aborted, func(r *Rollout) { r.Sweep = Skipped }, "sweeping to skipped"},
		"done too early":     {Halting, func(r *Rollout) { r.Stages[0].DoneAt = epoch }, "stage 1 is done with 1 in flight"},
	} {
		r := inState(t, c.from).r
		if err := Check(r); err != nil {
			t.Fatalf("%s: %v before any harm", name, err)
		}
		c.harm(&r)
		if err := Check(r); !fleet.Is(err, fleet.Internal) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func TestCheckAllFinds(t *testing.T) {
	for name, c := range map[string]struct {
		state JobState // of the row that is harmed
		harm  func(*Job)
		want  string
	}{
		"rollout":          {Pending, func(j *Job) { j.Rollout = "other" }, "row of rollout other"},
		"state":            {Pending, func(j *Job) { j.State = "odd" }, "unknown state"},
		"rank":             {Pending, func(j *Job) { j.Rank++ }, "should be"},
		"stage":            {Failed, func(j *Job) { j.Stage = 2 }, "granted in stage 2, stage 1 is open"},
		"negative stage":   {Failed, func(j *Job) { j.Stage = -1 }, "granted in stage -1"},
		"no stage":         {Failed, func(j *Job) { j.Stage = 0 }, "stage 0"},
		"no attempt":       {Failed, func(j *Job) { j.Attempts = 0 }, "0 attempts"},
		"no deadline":      {Offered, func(j *Job) { j.Deadline = time.Time{} }, "deadline"},
		"no grant":         {Offered, func(j *Job) { j.GrantedAt, j.Deadline, j.Stage, j.Attempts = zero, zero, 0, 0 }, "offered, granted at"},
		"pending, granted": {Offered, func(j *Job) { j.State = Pending }, "pending, granted at"},
		"skipped, granted": {Offered, func(j *Job) { j.State = Skipped }, "skipped, granted at"},
		"no finish":        {Failed, func(j *Job) { j.FinishedAt = zero }, "failed, finished at"},
		"early finish":     {Offered, func(j *Job) { j.FinishedAt = epoch }, "offered, finished at"},
		"no round":         {Failed, func(j *Job) { j.Round = 0 }, "failed in round 0 of 1"},
		"later round":      {Failed, func(j *Job) { j.Round = 2 }, "failed in round 2 of 1"},
		"odd round":        {Offered, func(j *Job) { j.Round = 1 }, "offered in round 1"},
		"no cause":         {Failed, func(j *Job) { j.Cause = Cause{} }, "failed without a cause"},
		"late":             {Failed, func(j *Job) { j.Late = true }, "failed and late"},
		"percent":          {Offered, func(j *Job) { j.Percent = 101 }, "101 %"},
		"another state":    {Offered, func(j *Job) { j.State = Accepted }, "the header counts"},
		"another failure":  {Failed, func(j *Job) { j.State = TimedOut }, "the header counts"},
	} {
		w := inState(t, Halting) // one failed, one granted, one pending
		d := w.order(c.state)[0]
		j := w.jobs[d]
		c.harm(&j)
		w.jobs[d] = j
		if err := CheckAll(w.r, maps.Values(w.jobs)); !fleet.Is(err, fleet.Internal) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func TestCheckAllComparesHeaderAndRows(t *testing.T) {
	w := begun(t, 4, percent(50, 100).with(tolerate(3)))
	ids := w.offer(2)
	w.fail(ids[0])
	w.succeed(ids[1])
	w.fail(w.offer(1)...)
	w.want(Running, 2)

	moved := maps.Clone(w.jobs)
	j := moved[ids[0]]
	j.Stage = 2 // the totals agree, the stages do not
	moved[ids[0]] = j
	if err := CheckAll(w.r, maps.Values(moved)); err == nil || !strings.Contains(err.Error(), "stage 1 counts") {
		t.Errorf("%v", err)
	}
	r := w.r
	r.Failures--
	r.Verdicts.Failed--
	if err := CheckAll(r, maps.Values(w.jobs)); err == nil || !strings.Contains(err.Error(), "the header has verdicts") {
		t.Errorf("%v", err)
	}
	r.State = "odd"
	if err := CheckAll(r, slices.Values([]Job(nil))); err == nil || !strings.Contains(err.Error(), "unknown state") {
		t.Errorf("%v", err)
	}
}
