package httpapi

import (
	"time"

	"muster/api"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (s *Server) renewCertificates(c *call) (answer, error) {
	var in api.RenewalPass
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	p := enroll.RenewOptions{All: in.All, Limit: in.Limit, DryRun: in.DryRun, By: c.who.Name}
	var err error
	if in.Issuer != "" {
		if p.Issuer, err = issuerID(in.Issuer); err != nil {
			return answer{}, err
		}
	}
	if in.Within != "" {
		if p.Within, err = duration("within", in.Within, time.Second, maxWithin); err != nil {
			return answer{}, err
		}
	}
	if in.Over != "" {
		if p.Over, err = duration("over", in.Over, time.Second, maxWithin); err != nil {
			return answer{}, err
		}
	}
	if in.Limit < 0 || in.Limit > 100_000 {
		return answer{}, fleet.Coded(fleet.Invalid, "limit_invalid", "limit: use 1 to 100000")
	}
	if len(in.Devices) > 1000 {
		return answer{}, fleet.Coded(fleet.Invalid, "too_many_devices", "devices: name at most 1000 in one call")
	}
	for _, d := range in.Devices {
		id, err := idInvalid(fleet.ParseDeviceID(d))
		if err != nil {
			return answer{}, err
		}
		p.Devices = append(p.Devices, id)
	}
	r, err := s.c.Certificates.RenewPass(c.ctx, c.at, p)
	if err != nil {
		return answer{}, err
	}
	out := api.RenewalReport{
		DryRun: in.DryRun, Due: r.Due, Already: r.Already, Offline: r.Offline, More: r.More, Spread: r.Spread,
		Asked: names(r.Asked), Waiting: names(r.Waiting), Skipped: []api.RenewalSkip{},
	}
	for _, k := range r.Skipped {
		out.Skipped = append(out.Skipped, api.RenewalSkip{Device: string(k.Device), Why: k.Why})
	}
	return ok(out)
}

func names(ids []fleet.DeviceID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = string(id)
	}
	return out
}

func (s *Server) getCertificateStatus(c *call) (answer, error) {
	f, err := s.c.Certificates.FleetStatus(c.ctx, c.at)
	if err != nil {
		return answer{}, err
	}
	out := api.CertificateStatus{Due: f.Due, Asked: f.Asked, Oldest: f.Oldest, Barred: f.Barred, Without: f.Without}
	add := func(within string, h enroll.Horizon) {
		out.Horizons = append(out.Horizons, api.CertificateHorizon{Within: within, Devices: h.Devices, First: string(h.First)})
	}
	add("ended", f.Ended)
	for _, h := range f.Horizons {
		add(h.Within.String(), h)
	}
	add("later", f.Later)
	return ok(out)
}

func (s *Server) forecastCertificates(c *call) (answer, error) {
	limit, err := c.limit()
	if err != nil {
		return answer{}, err
	}
	o := enroll.ForecastOptions{Limit: limit}
	if c.query.Has("within") {
		if o.Within, err = duration("within", c.query.Get("within"), time.Second, maxWithin); err != nil {
			return answer{}, err
		}
	}
	f, err := s.c.Certificates.Forecast(c.ctx, c.at, o)
	if err != nil {
		return answer{}, err
	}
	out := api.CertificateForecast{
		Devices: f.Devices, Renews: f.Counts[pki.Renews], AtRisk: f.Counts[pki.AtRisk], LockingOut: f.Counts[pki.WillLockOut], LockedOut: f.Counts[pki.LockedOut],
		More: f.More, Items: []api.DeviceForecast{},
	}
	for _, r := range f.Rows {
		out.Items = append(out.Items, api.DeviceForecast{
			Device: string(r.Device), Serial: string(r.Serial), Outlook: api.DeviceForecastOutlook(r.Outlook), At: r.At, Why: r.Why,
			LastSeen: r.LastSeen, Online: r.Online, Fallback: r.Fallback,
		})
	}
	return ok(out)
}

func (s *Server) getCertificatePolicy(c *call) (answer, error) {
	p, err := s.c.Certificates.CertificatePolicy(c.ctx)
	if err != nil {
		return answer{}, err
	}
	return ok(showPolicy(p))
}

func showPolicy(p pki.Policy) api.CertificatePolicy {
	out := api.CertificatePolicy{
		Lifetime: p.Lifetime.String(), Grace: p.Grace.String(), Since: p.Since, By: p.By,
		Settings: showTerms(p.Settings), Why: p.Why,
	}
	if p.Refused != (pki.Terms{}) {
		out.Refused = showTerms(p.Refused)
	}
	return out
}

func showTerms(t pki.Terms) api.CertificateTerms {
	return api.CertificateTerms{Lifetime: t.Lifetime.String(), Grace: t.Grace.String()}
}

func (s *Server) setCertificatePolicy(c *call) (answer, error) {
	var in api.NewCertificatePolicy
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	now, err := s.c.Certificates.CertificatePolicy(c.ctx)
	if err != nil {
		return answer{}, err
	}
	t := now.Terms
	if in.Lifetime != "" {
		if t.Lifetime, err = duration("lifetime", in.Lifetime, pki.MinLifetime, pki.MaxLifetime); err != nil {
			return answer{}, err
		}
	}
	if in.Grace != "" {
		if t.Grace, err = duration("grace", in.Grace, 0, pki.MaxLifetime); err != nil {
			return answer{}, err
		}
	}
	var i pki.Impact
	refused := false
	if in.DryRun {
		i, refused, err = s.c.Certificates.TryPolicy(c.ctx, c.at, t)
		now.Terms = t
	} else {
		now, i, err = s.c.Certificates.SetPolicy(c.ctx, c.at, t, in.Force, c.who.Name)
	}
	if err != nil {
		return answer{}, err
	}
	return ok(api.CertificatePolicyReport{Policy: showPolicy(now), DryRun: in.DryRun, Devices: i.Devices, Lost: i.Lost, Sample: names(i.Sample), Refused: refused})
}
