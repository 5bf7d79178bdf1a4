package httpapi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"muster/api"
	"muster/internal/dispatch"
	"muster/internal/firmware"
	"muster/internal/fleet"
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
	r, err := s.c.Rollouts.Create(c.ctx, c.at, spec, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showRollout(r))
}

func rolloutSpec(in api.NewRollout) (s dispatch.Spec, err error) {
	if in.ID == "" {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails (crypto/rand)
		in.ID = "r" + hex.EncodeToString(b[:])
	}
	if s.ID, err = idInvalid(fleet.ParseRolloutID(in.ID)); err != nil {
		return s, err
	}
	if s.Product, err = idInvalid(fleet.ParseProductID(in.Product)); err != nil {
		return s, err
	}
	if s.Version, err = idInvalid(firmware.ParseVersion(in.Version)); err != nil {
		return s, err
	}
	if s.Plan, err = readPlan(in.Plan); err != nil {
		return s, err
	}
	s.Labels = in.Target.Labels
	if len(in.Target.Devices) > 1000 {
		return s, fleet.Coded(fleet.Invalid, "too_many_devices", "target: name at most 1000 devices, or choose them by label")
	}
	for _, d := range in.Target.Devices {
		id, err := idInvalid(fleet.ParseDeviceID(d))
		if err != nil {
			return s, err
		}
		s.Devices = append(s.Devices, id)
	}
	return s, nil
}

// readPlan reads the policy; the rules about it are rollout's.
func readPlan(in api.Plan) (rollout.Plan, error) {
	p := rollout.Plan{MaxFailures: in.MaxFailures, MaxInFlight: in.MaxInFlight}
	for _, st := range in.Stages {
		p.Stages = append(p.Stages, rollout.Stage{Name: st.Name, Count: st.Count, Percent: st.Percent})
	}
	for _, f := range []struct {
		name, text string
		to         *time.Duration
		min, max   time.Duration
	}{
		{"device_timeout", in.DeviceTimeout, &p.DeviceTimeout, rollout.MinTimeout, rollout.MaxTimeout},
		{"soak", in.Soak, &p.Soak, 0, rollout.MaxSoak},
		{"offline_grace", in.OfflineGrace, &p.OfflineGrace, rollout.MinOfflineGrace, rollout.MaxOfflineGrace},
	} {
		if f.text == "" {
			continue
		}
		d, err := duration(f.name, f.text, f.min, f.max)
		if err != nil {
			return p, err
		}
		*f.to = d
	}
	return p, nil
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
	out := api.JobList{Items: []api.Job{}}
	for _, j := range jobs {
		out.Items = append(out.Items, showJob(j))
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
		out.Items = append(out.Items, api.Decision{
			At: d.At, Code: string(d.Code), From: string(d.From), To: string(d.To), Stage: d.Stage, Who: d.Who, Text: d.Text,
		})
	}
	return ok(out)
}

func showRollout(r rollout.Rollout) api.Rollout {
	out := api.Rollout{
		ID: string(r.ID), Rev: r.Rev, State: api.RolloutState(r.State), StateAt: r.StateAt, Code: string(r.Code), Reason: r.Reason,
		Product: string(r.Release.Product), Version: r.Release.Version, ImageHash: string(r.Release.Image),
		Plan:    showPlan(r.Plan),
		Targets: r.Targets, Stage: r.Stage, Counts: showCounts(r.Total), InFlight: r.Total.InFlight(), Failures: r.Failures,
		Stages: []api.RolloutStage{}, CreatedAt: r.CreatedAt, CreatedBy: r.CreatedBy, StartedAt: r.StartedAt, EndedAt: r.EndedAt,
	}
	for i, st := range r.Stages {
		plan := r.Plan.Stages[i]
		out.Stages = append(out.Stages, api.RolloutStage{
			Number: i + 1, Name: plan.Name, Count: plan.Count, Percent: plan.Percent,
			Quota:  min(r.Plan.Quota(i+1, r.Targets)+st.Extra, r.Targets),
			Counts: showCounts(st.Counts), Started: st.Counts.Sum(), InFlight: st.Counts.InFlight(), Failures: st.Counts.Failures(),
			OpenedAt: st.OpenedAt, DoneAt: st.DoneAt, ClosedAt: st.ClosedAt,
		})
	}
	return out
}

func showPlan(p rollout.Plan) api.Plan {
	out := api.Plan{
		MaxFailures: p.MaxFailures, MaxInFlight: p.MaxInFlight, DeviceTimeout: p.DeviceTimeout.String(),
		Soak: p.Soak.String(), OfflineGrace: p.OfflineGrace.String(), Stages: []api.Stage{},
	}
	for _, st := range p.Stages {
		out.Stages = append(out.Stages, api.Stage{Name: st.Name, Count: st.Count, Percent: st.Percent})
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

func showJob(j rollout.Job) api.Job {
	return api.Job{
		Device: string(j.Device), State: api.JobState(j.State), StateAt: j.StateAt, Stage: j.Stage, Report: string(j.Report), Percent: j.Percent,
		GrantedAt: j.GrantedAt, Deadline: j.Deadline, FinishedAt: j.FinishedAt, Late: j.Late, Cause: string(j.Cause.Kind), Text: j.Cause.Text,
	}
}
