package httpapi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"strings"
	"time"
	"unicode"

	"muster/api"
	"muster/internal/dispatch"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
)

func (s *Server) listRollouts(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	product, err := c.product()
	if err != nil {
		return answer{}, err
	}
	state := rollout.State(c.query.Get("state"))
	if c.query.Has("state") && !state.Known() {
		return answer{}, unknownState("state", rollout.States())
	}
	rs, err := s.c.Rollouts.List(c.ctx)
	if err != nil {
		return answer{}, err
	}
	rs = slices.DeleteFunc(rs, func(r rollout.Rollout) bool {
		return product != "" && r.Release.Product != product || state != "" && r.State != state
	})
	slices.SortFunc(rs, func(a, b rollout.Rollout) int {
		if n := b.CreatedAt.Compare(a.CreatedAt); n != 0 {
			return n
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	rs, next := cut(rs, page, func(r rollout.Rollout) string { return string(r.ID) })
	out := api.RolloutList{Items: []api.Rollout{}}
	for _, r := range rs {
		out.Items = append(out.Items, showRollout(r))
	}
	if next != "" {
		out.NextCursor = s.next(c, next)
	}
	return ok(out)
}

func unknownState[S ~string](name string, states []S) error {
	words := make([]string, len(states))
	for i, s := range states {
		words[i] = string(s)
	}
	return fleet.Coded(fleet.Invalid, "state_invalid", "%s: use one of %s", name, strings.Join(words, ", "))
}

func (s *Server) createRollout(c *call) (answer, error) {
	var in api.NewRollout
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	spec, err := rolloutSpec(in)
	if err != nil {
		return answer{}, err
	}
	if spec.ID == "" {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails (crypto/rand)
		spec.ID = fleet.RolloutID("r" + hex.EncodeToString(b[:]))
	}
	if err := s.mayShorten(c, spec, in.Certificates.Force); err != nil {
		return answer{}, err
	}
	r, err := s.c.Rollouts.Create(c.ctx, c.at, spec, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showRollout(r))
}

// mayShorten refuses a rollout of certificates whose lifetime would lock out too many devices, as a change of the policy is.
func (s *Server) mayShorten(c *call, spec dispatch.Spec, force bool) error {
	if spec.Renewal == nil || spec.Renewal.Lifetime == 0 || force {
		return nil
	}
	now, err := s.c.Certificates.CertificatePolicy(c.ctx)
	if err != nil {
		return err
	}
	i, refused, err := s.c.Certificates.TryPolicy(c.ctx, c.at, pki.Terms{Lifetime: spec.Renewal.Lifetime, Grace: min(now.Grace, spec.Renewal.Lifetime)})
	if err == nil && refused {
		err = fleet.Coded(fleet.Conflict, enroll.CodeLockOut, "refused: %s: choose a longer lifetime, or force it", i)
	}
	return err
}

func lifetimeOf(r rollout.Rollout) string {
	if r.Lifetime == 0 {
		return ""
	}
	return r.Lifetime.String()
}

func (s *Server) getRollout(c *call) (answer, error) {
	id, err := c.rollout()
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Rollouts.Get(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	return ok(showRollout(r))
}

// operate is an operation that an operator does to a rollout.
func operate(do func(Rollouts, context.Context, time.Time, fleet.RolloutID, string) (rollout.Rollout, error)) func(*Server, *call) (answer, error) {
	return func(s *Server, c *call) (answer, error) {
		id, err := c.rollout()
		if err != nil {
			return answer{}, err
		}
		r, err := do(s.c.Rollouts, c.ctx, c.at, id, c.who.Name)
		if err != nil {
			return answer{}, err
		}
		return ok(showRollout(r))
	}
}

func (s *Server) abortRollout(c *call) (answer, error) {
	id, err := c.rollout()
	if err != nil {
		return answer{}, err
	}
	var in api.RolloutAbort
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	if len(in.Why) > rollout.MaxCauseText || strings.ContainsFunc(in.Why, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return answer{}, fleet.Coded(fleet.Invalid, "why_invalid", "why: use at most %d bytes of printable text", rollout.MaxCauseText)
	}
	r, err := s.c.Rollouts.AbortFor(c.ctx, c.at, id, in.Why, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showRollout(r))
}

func (s *Server) retryRollout(c *call) (answer, error) {
	id, err := c.rollout()
	if err != nil {
		return answer{}, err
	}
	var in api.RolloutRetry
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	kind := rollout.JobState(in.Kind)
	if kind != "" && !kind.Failure() {
		return answer{}, fleet.Coded(fleet.Invalid, "kind_invalid", "kind: use one of failed, rejected, rolled-back, timed-out, went-dark")
	}
	if in.As == "" {
		if in.Start {
			return answer{}, fleet.Coded(fleet.Invalid, "start_without_as", "start: it starts the new rollout that as names; without as, the devices are tried again in the one that runs")
		}
		r, n, err := s.c.Rollouts.Retry(c.ctx, c.at, id, kind, c.who.Name)
		if err != nil {
			return answer{}, err
		}
		return ok(api.RolloutRetried{Rollout: showRollout(r), Devices: n})
	}
	as, err := idInvalid(fleet.ParseRolloutID(in.As))
	if err != nil {
		return answer{}, err
	}
	r, n, err := s.c.Rollouts.RetryAs(c.ctx, c.at, id, kind, as, c.who.Name)
	if err == nil && in.Start {
		r, err = s.c.Rollouts.Start(c.ctx, c.at, as, c.who.Name)
	}
	if err != nil {
		return answer{}, err
	}
	return created(api.RolloutRetried{Rollout: showRollout(r), Devices: n})
}

func (s *Server) listRolloutDevices(c *call) (answer, error) {
	id, err := c.rollout()
	if err != nil {
		return answer{}, err
	}
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	state := rollout.JobState(c.query.Get("state"))
	if c.query.Has("state") && !state.Known() {
		return answer{}, unknownState("state", rollout.JobStates())
	}
	jobs, more, err := s.c.Rollouts.Jobs(c.ctx, id, state, page)
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Rollouts.Get(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	out := api.JobList{Items: []api.Job{}}
	for _, j := range jobs {
		out.Items = append(out.Items, showJob(j, r.Floors))
	}
	if more && len(jobs) > 0 {
		out.NextCursor = s.next(c, string(jobs[len(jobs)-1].Device))
	}
	return ok(out)
}

func (s *Server) listRolloutDecisions(c *call) (answer, error) {
	id, err := c.rollout()
	if err != nil {
		return answer{}, err
	}
	ds, err := s.c.Rollouts.History(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	out := api.DecisionList{Items: []api.Decision{}}
	for _, d := range ds {
		out.Items = append(out.Items, showDecision(0, d))
	}
	return ok(out)
}

func showRollout(r rollout.Rollout) api.Rollout {
	out := api.Rollout{
		ID: string(r.ID), Rev: r.Rev, State: api.RolloutState(r.State), StateAt: r.StateAt, Code: string(r.Code), Reason: r.Reason,
		Product: string(r.Release.Product), Version: r.Release.Version, ImageHash: string(r.Release.Image), Size: r.Release.Size, Mode: string(r.Mode), Lifetime: lifetimeOf(r),
		Plan: showPlan(r.Plan), Where: r.Where, Dynamic: r.Dynamic, Filling: r.Filling, Sweeping: r.Sweep != "",
		Approved: api.RolloutApproval{By: r.Approved.By, At: r.Approved.At}, Undoes: string(r.Undoes), UndoneBy: string(r.UndoneBy),
		Round: r.Round, Verdicts: showVerdicts(r.Verdicts), Health: api.HealthCounts{Watched: r.Health.Watched, Bad: r.Health.Bad},
		NextGrant: r.NextGrant, WindowShut: r.Shut,
		Targets: r.Targets, Stage: r.Stage, Counts: showCounts(r.Total), InFlight: r.Total.InFlight(), Failures: r.Failures,
		Stages: []api.RolloutStage{}, CreatedAt: r.CreatedAt, CreatedBy: r.CreatedBy, StartedAt: r.StartedAt, EndedAt: r.EndedAt,
	}
	for _, f := range r.Floors {
		out.Floors = append(out.Floors, api.Floor{Version: f.Version, ImageHash: string(f.Image), Size: f.Size})
	}
	for i, st := range r.Stages {
		plan := r.Plan.Stages[i]
		out.Stages = append(out.Stages, api.RolloutStage{
			Number: i + 1, Name: plan.Name, Count: plan.Count, Percent: plan.Percent, Where: plan.Where, MinSuccess: plan.MinSuccess, Hold: plan.Hold,
			Quota:  min(r.Plan.Quota(i+1, r.Targets)+st.Extra, r.Targets),
			Counts: showCounts(st.Counts), Started: st.Counts.Sum(), InFlight: st.Counts.InFlight(), Failures: st.Counts.Failures(),
			OpenedAt: st.OpenedAt, DoneAt: st.DoneAt, HeldAt: st.HeldAt, ClosedAt: st.ClosedAt,
		})
	}
	return out
}

func showCounts(c rollout.Counts) api.Counts {
	out := api.Counts{}
	for _, st := range rollout.JobStates() {
		if n := c.Of(st); n > 0 {
			out[string(st)] = n
		}
	}
	return out
}

func showVerdicts(v rollout.Verdicts) api.Counts {
	out := api.Counts{}
	for st, n := range map[rollout.JobState]int{
		rollout.Succeeded: v.Succeeded, rollout.Failed: v.Failed, rollout.Rejected: v.Rejected, rollout.RolledBack: v.RolledBack,
		rollout.TimedOut: v.TimedOut, rollout.WentDark: v.WentDark,
	} {
		if n > 0 {
			out[string(st)] = n
		}
	}
	return out
}

// showJob shows a row; floors are those of its rollout.
func showJob(j rollout.Job, floors []rollout.Release) api.Job {
	out := api.Job{
		Device: string(j.Device), State: api.JobState(j.State), StateAt: j.StateAt, Stage: j.Stage, Ring: j.Ring, Site: j.Site,
		Attempts: j.Attempts, Last: string(j.Last), RetryAt: j.RetryAt, From: string(j.From), Unhealthy: j.Bad,
		Report: string(j.Report), Percent: j.Percent, GrantedAt: j.GrantedAt, Deadline: j.Deadline, FinishedAt: j.FinishedAt, Late: j.Late,
		Cause: string(j.Cause.Kind), Text: j.Cause.Text,
	}
	if j.Floor > 0 && j.Floor <= len(floors) {
		out.Floor = floors[j.Floor-1].Version
	}
	return out
}

func showDecision(seq uint64, d rollout.Decision) api.Decision {
	return api.Decision{Seq: seq, At: d.At, Code: string(d.Code), From: string(d.From), To: string(d.To), Stage: d.Stage, Who: d.Who, Text: d.Text}
}
