package rollout

import (
	"encoding/json"
	"time"

	"muster/internal/fleet"
)

// planJSON is Plan with durations as text ("1h0m0s"), the form in which it is stored.
type planJSON struct {
	Stages          []Stage      `json:"stages"`
	MaxFailures     int          `json:"max_failures"`
	FailThen        Reaction     `json:"fail_then,omitzero"`
	Limits          []Limit      `json:"limits,omitempty"`
	MaxInFlight     int          `json:"max_in_flight"`
	DeviceTimeout   string       `json:"device_timeout"`
	AcceptTimeout   string       `json:"accept_timeout,omitzero"`
	DownloadTimeout string       `json:"download_timeout,omitzero"`
	InstallTimeout  string       `json:"install_timeout,omitzero"`
	VerifyFor       string       `json:"verify_for,omitzero"`
	DarkAfter       string       `json:"dark_after,omitzero"`
	Retries         int          `json:"retries,omitzero"`
	RetryBackoff    string       `json:"retry_backoff,omitzero"`
	Soak            string       `json:"soak"`
	OfflineGrace    string       `json:"offline_grace"`
	StartAt         time.Time    `json:"start_at,omitzero"`
	Approval        bool         `json:"approval,omitzero"`
	Window          windowJSON   `json:"window,omitzero"`
	Pace            Pace         `json:"pace,omitzero"`
	BytesPerSecond  int64        `json:"bytes_per_second,omitzero"`
	Sites           SiteBudget   `json:"sites,omitzero"`
	Health          *Health      `json:"health,omitempty"`
	Rollback        RollbackPlan `json:"rollback,omitzero"`
	AllowDowngrade  bool         `json:"allow_downgrade,omitzero"`
}

type windowJSON struct {
	Cron      string `json:"cron,omitzero"`
	Length    string `json:"length,omitzero"`
	Zone      string `json:"zone,omitzero"`
	ZoneLabel string `json:"zone_label,omitzero"`
}

// text writes a duration; the zero one is empty.
func text(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.String()
}

// MarshalJSON writes durations in the form of time.Duration.String.
func (p Plan) MarshalJSON() ([]byte, error) {
	j := planJSON{
		Stages: p.Stages, MaxFailures: p.MaxFailures, FailThen: p.FailThen, Limits: p.Limits, MaxInFlight: p.MaxInFlight,
		DeviceTimeout: p.DeviceTimeout.String(), AcceptTimeout: text(p.AcceptTimeout), DownloadTimeout: text(p.DownloadTimeout),
		InstallTimeout: text(p.InstallTimeout), VerifyFor: text(p.VerifyFor), DarkAfter: text(p.DarkAfter),
		Retries: p.Retries, RetryBackoff: text(p.RetryBackoff), Soak: p.Soak.String(), OfflineGrace: p.OfflineGrace.String(),
		StartAt: p.StartAt, Approval: p.Approval,
		Window: windowJSON{p.Window.Cron, text(p.Window.Length), p.Window.Zone, p.Window.ZoneLabel},
		Pace:   p.Pace, BytesPerSecond: p.BytesPerSecond, Sites: p.Sites, Rollback: p.Rollback, AllowDowngrade: p.AllowDowngrade,
	}
	if p.Health.Set() || p.Health.Compare {
		j.Health = &p.Health
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads what MarshalJSON wrote. A duration that is missing is zero.
func (p *Plan) UnmarshalJSON(b []byte) error {
	var j planJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return fleet.Wrap(fleet.Invalid, err, "plan: not a JSON object with the fields of a plan")
	}
	q := Plan{
		Stages: j.Stages, MaxFailures: j.MaxFailures, FailThen: j.FailThen, Limits: j.Limits, MaxInFlight: j.MaxInFlight, Retries: j.Retries,
		StartAt: j.StartAt, Approval: j.Approval, Window: Window{Cron: j.Window.Cron, Zone: j.Window.Zone, ZoneLabel: j.Window.ZoneLabel},
		Pace: j.Pace, BytesPerSecond: j.BytesPerSecond, Sites: j.Sites, Rollback: j.Rollback, AllowDowngrade: j.AllowDowngrade,
	}
	if j.Health != nil {
		q.Health = *j.Health
	}
	for _, f := range []struct {
		name, text string
		to         *time.Duration
	}{
		{"device_timeout", j.DeviceTimeout, &q.DeviceTimeout},
		{"accept_timeout", j.AcceptTimeout, &q.AcceptTimeout},
		{"download_timeout", j.DownloadTimeout, &q.DownloadTimeout},
		{"install_timeout", j.InstallTimeout, &q.InstallTimeout},
		{"verify_for", j.VerifyFor, &q.VerifyFor},
		{"dark_after", j.DarkAfter, &q.DarkAfter},
		{"retry_backoff", j.RetryBackoff, &q.RetryBackoff},
		{"soak", j.Soak, &q.Soak},
		{"offline_grace", j.OfflineGrace, &q.OfflineGrace},
		{"window's length", j.Window.Length, &q.Window.Length},
	} {
		if f.text == "" {
			continue
		}
		d, err := time.ParseDuration(f.text)
		if err != nil {
			return fleet.Errorf(fleet.Invalid, "plan: %s is not a duration; write it like 90s, 30m or 24h", f.name)
		}
		*f.to = d
	}
	*p = q
	return nil
}
