package rollout

import (
	"encoding/json"
	"time"
	"unicode"
	"unicode/utf8"

	"muster/internal/fleet"
)

// Limits of a plan. Validate refuses what is outside.
const (
	MaxStages       = 20         // stages
	MaxStageName    = 40         // bytes
	MaxTargets      = 10_000_000 // devices in one rollout
	MaxMaxInFlight  = 100_000    // devices
	MinTimeout      = time.Second
	MaxTimeout      = 30 * 24 * time.Hour
	MaxSoak         = 30 * 24 * time.Hour
	MinOfflineGrace = time.Second
	MaxOfflineGrace = 90 * 24 * time.Hour
)

// Defaults of a plan, see Plan.WithDefaults.
const (
	DefaultMaxInFlight   = 100
	DefaultDeviceTimeout = time.Hour
	DefaultOfflineGrace  = 7 * 24 * time.Hour
)

// Stage opens the release to a part of the targets, counted from the first stage on (cumulative). Exactly one of Count
// and Percent is set.
type Stage struct {
	Name    string `json:"name,omitzero"`    // for people; may be empty
	Count   int    `json:"count,omitzero"`   // devices
	Percent int    `json:"percent,omitzero"` // of all targets, 1 to 100, rounded up
}

// Plan is the policy of a rollout. It does not change after the rollout was created. The package comment gives the
// exact meaning of each field.
type Plan struct {
	Stages        []Stage
	MaxFailures   int           // failures that are tolerated in the whole rollout; one more halts it
	MaxInFlight   int           // devices that may hold a grant at once
	DeviceTimeout time.Duration // from the grant to success
	Soak          time.Duration // how long a stage that is done is watched before the next one opens
	OfflineGrace  time.Duration // how long the last stage waits for devices that are offline
}

// planJSON is Plan with durations as text ("1h0m0s"), the form in which it is stored.
type planJSON struct {
	Stages        []Stage `json:"stages"`
	MaxFailures   int     `json:"max_failures"`
	MaxInFlight   int     `json:"max_in_flight"`
	DeviceTimeout string  `json:"device_timeout"`
	Soak          string  `json:"soak"`
	OfflineGrace  string  `json:"offline_grace"`
}

// MarshalJSON writes durations in the form of time.Duration.String.
func (p Plan) MarshalJSON() ([]byte, error) {
	return json.Marshal(planJSON{p.Stages, p.MaxFailures, p.MaxInFlight,
		p.DeviceTimeout.String(), p.Soak.String(), p.OfflineGrace.String()})
}

// UnmarshalJSON reads what MarshalJSON wrote. A duration that is missing is zero.
func (p *Plan) UnmarshalJSON(b []byte) error {
	var j planJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return fleet.Wrap(fleet.Invalid, err, "plan: not a JSON object with the fields of a plan")
	}
	q := Plan{Stages: j.Stages, MaxFailures: j.MaxFailures, MaxInFlight: j.MaxInFlight}
	for _, f := range []struct {
		name, text string
		to         *time.Duration
	}{
		{"device_timeout", j.DeviceTimeout, &q.DeviceTimeout},
		{"soak", j.Soak, &q.Soak},
		{"offline_grace", j.OfflineGrace, &q.OfflineGrace},
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

// WithDefaults returns p with a default for each field that is zero and may not be: three stages (one device, 10 %,
// everyone), MaxInFlight, DeviceTimeout and OfflineGrace. MaxFailures 0 and Soak 0 mean what they say.
func (p Plan) WithDefaults() Plan {
	if len(p.Stages) == 0 {
		p.Stages = []Stage{{Name: "canary", Count: 1}, {Percent: 10}, {Percent: 100}}
	}
	if p.MaxInFlight == 0 {
		p.MaxInFlight = DefaultMaxInFlight
	}
	if p.DeviceTimeout == 0 {
		p.DeviceTimeout = DefaultDeviceTimeout
	}
	if p.OfflineGrace == 0 {
		p.OfflineGrace = DefaultOfflineGrace
	}
	return p
}

// Quota returns how many of targets devices stage number (from 1) opens, counted from the first stage on: never more
// than targets, and at least one if there is a target.
func (p Plan) Quota(stage, targets int) int {
	if stage < 1 || stage > len(p.Stages) {
		return 0
	}
	s := p.Stages[stage-1]
	n := s.Count
	if s.Percent > 0 {
		n = (targets*s.Percent + 99) / 100
	}
	return min(n, targets)
}

// Validate returns an Invalid error that says what is wrong with p as a plan for this number of devices.
func (p Plan) Validate(targets int) error {
	if err := p.validateFields(); err != nil {
		return err
	}
	if targets < 1 {
		return invalid("the target holds no device: nothing to roll out to")
	}
	if targets > MaxTargets {
		return invalid("the target holds %d devices; at most %d can be in one rollout", targets, MaxTargets)
	}
	for i, s := range p.Stages {
		n := i + 1
		if s.Count > targets {
			return invalid("stage %d: count is %d, but the target holds only %d; use a percentage or a smaller count", n, s.Count, targets)
		}
		if q, before := p.Quota(n, targets), p.Quota(n-1, targets); q < before {
			return invalid("stage %d reaches %d of %d devices, fewer than the %d of the stage before; stages are cumulative", n, q, targets, before)
		}
	}
	if last := len(p.Stages); p.Stages[last-1].Percent != 100 && p.Quota(last, targets) != targets {
		return invalid("stage %d is the last and reaches %d of %d devices; let it be percent 100", last, p.Quota(last, targets), targets)
	}
	return nil
}

// validateFields checks all that does not depend on the number of targets.
func (p Plan) validateFields() error {
	if len(p.Stages) < 1 || len(p.Stages) > MaxStages {
		return invalid("%d stages; use 1 to %d", len(p.Stages), MaxStages)
	}
	for i, s := range p.Stages {
		if err := s.validate(i + 1); err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		b := p.Stages[i-1]
		if s.Count > 0 && b.Count >= s.Count || s.Percent > 0 && b.Percent >= s.Percent {
			return invalid("stage %d adds no device to the stage before; stages are cumulative, so let each be larger", i+1)
		}
	}
	switch {
	case p.MaxFailures < 0 || p.MaxFailures > MaxTargets:
		return invalid("max_failures is %d; use 0 (halt at the first failure) to %d", p.MaxFailures, MaxTargets)
	case p.MaxInFlight < 1 || p.MaxInFlight > MaxMaxInFlight:
		return invalid("max_in_flight is %d; use 1 to %d", p.MaxInFlight, MaxMaxInFlight)
	case p.DeviceTimeout < MinTimeout || p.DeviceTimeout > MaxTimeout:
		return invalid("device_timeout is %v; use %v to %v", p.DeviceTimeout, MinTimeout, MaxTimeout)
	case p.Soak < 0 || p.Soak > MaxSoak:
		return invalid("soak is %v; use 0s to %v", p.Soak, MaxSoak)
	case p.OfflineGrace < MinOfflineGrace || p.OfflineGrace > MaxOfflineGrace:
		return invalid("offline_grace is %v; use %v to %v", p.OfflineGrace, MinOfflineGrace, MaxOfflineGrace)
	}
	return nil
}

func (s Stage) validate(n int) error {
	switch {
	case s.Count < 0 || s.Count > MaxTargets:
		return invalid("stage %d: count is %d; use 1 to %d", n, s.Count, MaxTargets)
	case s.Percent < 0 || s.Percent > 100:
		return invalid("stage %d: percent is %d; use 1 to 100", n, s.Percent)
	case (s.Count > 0) == (s.Percent > 0):
		return invalid("stage %d: set exactly one of count and percent", n)
	case len(s.Name) > MaxStageName || !printable(s.Name):
		return invalid("stage %d: use a name of at most %d bytes of printable text", n, MaxStageName)
	}
	return nil
}

func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

func invalid(format string, a ...any) error {
	return fleet.Errorf(fleet.Invalid, "plan: "+format, a...)
}
