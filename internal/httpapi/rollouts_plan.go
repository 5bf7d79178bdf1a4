package httpapi

import (
	"time"

	"muster/api"
	"muster/internal/dispatch"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
)

// defaultVerify is how long a device is verified if the caller says nothing. A program that embeds rollout.Plan gets 0.
const defaultVerify = 5 * time.Minute

// maxPreviews is how many walks through the whole fleet are served at once: dry runs, previews, bulk changes.
const maxPreviews = 2

// walk takes one of their places; done gives it back.
func (s *Server) walk() (done func(), err error) {
	select {
	case s.previews <- struct{}{}:
		return func() { <-s.previews }, nil
	default:
		return nil, fleet.Coded(fleet.TooMany, "too_many_previews", "%d previews are under way, which is as many as may be: try again", maxPreviews)
	}
}

// maxNamed is how many devices a target may name.
const maxNamed = 1000

// planRollout says what a rollout would do.
func (s *Server) planRollout(c *call) (answer, error) {
	var in api.NewRollout
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	spec, err := rolloutSpec(in)
	if err != nil {
		return answer{}, err
	}
	select { // each reads the whole fleet
	case s.previews <- struct{}{}:
		defer func() { <-s.previews }()
	default:
		return answer{}, fleet.Coded(fleet.TooMany, "too_many_previews", "%d rollouts are planned at this moment, which is as many as may be: try again", maxPreviews)
	}
	p, err := s.c.Rollouts.Plan(c.ctx, c.at, spec, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showPreview(p))
}

// rolloutSpec reads what a rollout is to be; its ID is empty if none was given.
func rolloutSpec(in api.NewRollout) (s dispatch.Spec, err error) {
	if in.ID != "" {
		if s.ID, err = idInvalid(fleet.ParseRolloutID(in.ID)); err != nil {
			return s, err
		}
	}
	if s.Product, err = idInvalid(fleet.ParseProductID(in.Product)); err != nil {
		return s, err
	}
	switch {
	case in.Certificates.Renew && in.Version != "":
		return s, fleet.Coded(fleet.Invalid, "rollout_invalid", "send either version or certificates: a rollout is of firmware or of certificates")
	case in.Certificates.Renew:
		s.Renewal = &dispatch.Renewal{}
		if in.Certificates.Lifetime != "" {
			if s.Renewal.Lifetime, err = duration("lifetime", in.Certificates.Lifetime, pki.MinLifetime, pki.MaxLifetime); err != nil {
				return s, err
			}
		}
	default:
		if s.Version, err = idInvalid(firmware.ParseVersion(in.Version)); err != nil {
			return s, err
		}
	}
	if s.Plan, err = readPlan(in.Plan); err != nil {
		return s, err
	}
	t := in.Target
	if len(t.Where) > rollout.MaxExpression {
		return s, fleet.Coded(fleet.Invalid, "target_invalid", "target: where has at most %d bytes", rollout.MaxExpression)
	}
	if len(t.Labels) > 16 {
		return s, fleet.Coded(fleet.Invalid, "label_invalid", "target: at most 16 labels")
	}
	if len(t.Devices) > maxNamed {
		return s, fleet.Coded(fleet.Invalid, "too_many_devices", "target: name at most %d devices, or choose them by label or expression", maxNamed)
	}
	s.Where, s.Labels, s.Static = t.Where, t.Labels, t.Static
	for _, d := range t.Devices {
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
	p := rollout.Plan{
		FailThen: rollout.Reaction(in.FailThen), MaxInFlight: in.MaxInFlight, Retries: in.Retries, StartAt: in.StartAt, Approval: in.Approval,
		Window:         rollout.Window{Cron: in.Window.Cron, Zone: in.Window.Zone, ZoneLabel: in.Window.ZoneLabel},
		Pace:           rollout.Pace{PerMinute: in.Pace.PerMinute, Base: in.Pace.Base, Factor: in.Pace.Factor, Every: in.Pace.Every},
		BytesPerSecond: in.BytesPerSecond,
		Sites:          rollout.SiteBudget{Label: in.Sites.Label, Count: in.Sites.Count, Percent: in.Sites.Percent},
		Health: rollout.Health{
			BadBoots: in.Health.BadBoots, Reconnects: in.Health.Reconnects, Expression: in.Health.UnhealthyIf, Compare: in.Health.Compare,
			MinSample: in.Health.MinSample, Confidence: in.Health.Confidence, Then: rollout.Reaction(in.Health.Then),
		},
		Rollback: rollout.RollbackPlan{
			Version: in.Rollback.Version, Previous: in.Rollback.PreviousSlot, MaxFailures: in.Rollback.MaxFailures, MaxInFlight: in.Rollback.MaxInFlight,
		},
		AllowDowngrade: in.AllowDowngrade, VerifyFor: defaultVerify,
	}
	switch {
	case in.MaxFailures != nil:
		p.MaxFailures = *in.MaxFailures
	case len(in.Limits) > 0:
		p.MaxFailures = rollout.MaxTargets // only the limits judge
	}
	for _, st := range in.Stages {
		p.Stages = append(p.Stages, rollout.Stage{Name: st.Name, Count: st.Count, Percent: st.Percent, Where: st.Where, MinSuccess: st.MinSuccess, Hold: st.Hold})
	}
	for _, l := range in.Limits {
		p.Limits = append(p.Limits, readLimit(l))
	}
	return p, readDurations(in, &p)
}

func readLimit(l api.Limit) rollout.Limit {
	out := rollout.Limit{Count: l.Count, Percent: l.Percent, MinSample: l.MinSample, Confidence: l.Confidence, Then: rollout.Reaction(l.Then)}
	for _, k := range l.Kinds {
		out.Kinds = append(out.Kinds, rollout.JobState(k))
	}
	return out
}

func readDurations(in api.Plan, p *rollout.Plan) error {
	for _, f := range []struct {
		name, text string
		to         *time.Duration
		min, max   time.Duration
	}{
		{"device_timeout", in.DeviceTimeout, &p.DeviceTimeout, rollout.MinTimeout, rollout.MaxTimeout},
		{"accept_timeout", in.AcceptTimeout, &p.AcceptTimeout, 0, rollout.MaxTimeout},
		{"download_timeout", in.DownloadTimeout, &p.DownloadTimeout, 0, rollout.MaxTimeout},
		{"install_timeout", in.InstallTimeout, &p.InstallTimeout, 0, rollout.MaxTimeout},
		{"verify_for", in.VerifyFor, &p.VerifyFor, 0, rollout.MaxSoak},
		{"dark_after", in.DarkAfter, &p.DarkAfter, rollout.MinTimeout, rollout.MaxTimeout},
		{"retry_backoff", in.RetryBackoff, &p.RetryBackoff, rollout.MinTimeout, rollout.MaxTimeout},
		{"soak", in.Soak, &p.Soak, 0, rollout.MaxSoak},
		{"offline_grace", in.OfflineGrace, &p.OfflineGrace, rollout.MinOfflineGrace, rollout.MaxOfflineGrace},
		{"window: length", in.Window.Length, &p.Window.Length, time.Minute, rollout.MaxWindow},
	} {
		if f.text == "" {
			continue
		}
		d, err := duration(f.name, f.text, f.min, f.max)
		if err != nil {
			return err
		}
		*f.to = d
	}
	return nil
}

// showPlan shows a plan in the form in which it may be given again.
func showPlan(p rollout.Plan) api.Plan {
	out := api.Plan{
		Stages: []api.Stage{}, FailThen: api.Reaction(p.FailThen), MaxInFlight: p.MaxInFlight, DeviceTimeout: p.DeviceTimeout.String(),
		AcceptTimeout: span(p.AcceptTimeout), DownloadTimeout: span(p.DownloadTimeout), InstallTimeout: span(p.InstallTimeout),
		VerifyFor: p.VerifyFor.String(), DarkAfter: span(p.DarkAfter), Retries: p.Retries, RetryBackoff: span(p.RetryBackoff),
		Soak: p.Soak.String(), OfflineGrace: p.OfflineGrace.String(), StartAt: p.StartAt, Approval: p.Approval,
		Window:         api.Window{Cron: p.Window.Cron, Length: span(p.Window.Length), Zone: p.Window.Zone, ZoneLabel: p.Window.ZoneLabel},
		Pace:           api.Pace{PerMinute: p.Pace.PerMinute, Base: p.Pace.Base, Factor: p.Pace.Factor, Every: p.Pace.Every},
		BytesPerSecond: p.BytesPerSecond,
		Sites:          api.SiteBudget{Label: p.Sites.Label, Count: p.Sites.Count, Percent: p.Sites.Percent},
		Health: api.Health{
			BadBoots: p.Health.BadBoots, Reconnects: p.Health.Reconnects, UnhealthyIf: p.Health.Expression, Compare: p.Health.Compare,
			MinSample: p.Health.MinSample, Confidence: p.Health.Confidence, Then: api.Reaction(p.Health.Then),
		},
		Rollback: api.RollbackPlan{
			Version: p.Rollback.Version, PreviousSlot: p.Rollback.Previous, MaxFailures: p.Rollback.MaxFailures, MaxInFlight: p.Rollback.MaxInFlight,
		},
		AllowDowngrade: p.AllowDowngrade,
	}
	if p.MaxFailures < rollout.MaxTargets || len(p.Limits) == 0 {
		out.MaxFailures = &p.MaxFailures
	}
	for _, st := range p.Stages {
		out.Stages = append(out.Stages, api.Stage{Name: st.Name, Count: st.Count, Percent: st.Percent, Where: st.Where, MinSuccess: st.MinSuccess, Hold: st.Hold})
	}
	for _, l := range p.Limits {
		a := api.Limit{Count: l.Count, Percent: l.Percent, MinSample: l.MinSample, Confidence: l.Confidence, Then: api.Reaction(l.Then)}
		for _, k := range l.Kinds {
			a.Kinds = append(a.Kinds, api.FailureKind(k))
		}
		out.Limits = append(out.Limits, a)
	}
	return out
}

// span writes a duration; none is empty.
func span(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}

func showPreview(p dispatch.Preview) api.RolloutPreview {
	r := p.Rollout
	out := api.RolloutPreview{
		Product: string(r.Release.Product), Version: r.Release.Version, Where: r.Where, Dynamic: r.Dynamic, Plan: showPlan(r.Plan),
		Scanned: p.Scanned, Targets: p.Targets, Online: p.Online, Stages: []api.PreviewStage{}, Skips: p.Skips, Floors: p.Floors,
		Bytes: p.Bytes, Duration: p.Duration.Round(time.Second).String(), Stops: append([]string{}, p.Stops...), Warnings: append([]string{}, p.Warnings...),
	}
	if err := p.Problem(); err != nil {
		q, _ := problemOf(err)
		out.Problem = q.Detail
	}
	for _, st := range p.Stages {
		plan := r.Plan.Stages[st.Number-1]
		a := api.PreviewStage{
			Number: st.Number, Name: plan.Name, Count: plan.Count, Percent: plan.Percent, Where: plan.Where,
			Quota: st.Quota, Devices: st.Devices, Duration: st.Duration.Round(time.Second).String(), Sample: []string{},
		}
		for _, id := range st.Sample {
			a.Sample = append(a.Sample, string(id))
		}
		out.Stages = append(out.Stages, a)
	}
	return out
}
