package rollout

import (
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"muster/internal/fleet"
)

// Limits of a plan. Validate refuses what is outside.
const (
	MaxStages       = 20         // stages
	MaxStageName    = 40         // bytes
	MaxExpression   = 2048       // bytes
	MaxTargets      = 10_000_000 // devices in one rollout
	MaxMaxInFlight  = 100_000    // devices
	MinTimeout      = time.Second
	MaxTimeout      = 30 * 24 * time.Hour
	MaxSoak         = 30 * 24 * time.Hour
	MinOfflineGrace = time.Second
	MaxOfflineGrace = 90 * 24 * time.Hour
	MaxRetries      = 10
	MaxLimits       = 20
	MaxPerMinute    = 1_000_000 // grants
	MaxFactor       = 100

	MinBytesPerSecond = 4096
)

// Defaults of a plan, see Plan.WithDefaults.
const (
	DefaultMaxInFlight   = 100
	DefaultDeviceTimeout = time.Hour
	DefaultOfflineGrace  = 7 * 24 * time.Hour
	DefaultDarkAfter     = 15 * time.Minute
	DefaultRetryBackoff  = 5 * time.Minute
)

// Stage opens the release to a part of the targets, counted from the first stage on (cumulative). Exactly one of Count
// and Percent is set.
type Stage struct {
	Name       string `json:"name,omitzero"`        // for people; may be empty
	Count      int    `json:"count,omitzero"`       // devices
	Percent    int    `json:"percent,omitzero"`     // of all targets, 1 to 100, rounded up
	Where      string `json:"where,omitzero"`       // a target expression: only devices that match it (or an earlier stage) may be granted here
	MinSuccess int    `json:"min_success,omitzero"` // percent of the devices granted in it that must succeed, rounded up; 0: one device
	Hold       bool   `json:"hold,omitzero"`        // when it is done, an operator must advance
}

// Limit stops the rollout when failures are more than it tolerates. Exactly one of Count and Percent is set, or both are
// 0: then the first failure of these kinds is one too many.
type Limit struct {
	Kinds      []JobState `json:"kinds,omitempty"`     // failed, rejected, rolled-back, timed-out, went-dark; empty: all
	Count      int        `json:"count,omitzero"`      // tolerated failures
	Percent    int        `json:"percent,omitzero"`    // tolerated percentage of the devices that have a verdict (succeeded or failed)
	MinSample  int        `json:"min_sample,omitzero"` // with Percent: verdicts before it judges at all
	Confidence int        `json:"confidence,omitzero"` // with Percent: 50 to 99; the lower bound at that confidence must be above Percent
	Then       Reaction   `json:"then,omitzero"`       // empty: halt
}

// Reaction is what the engine does when a limit is passed.
type Reaction string

// The reactions, from mild to hard.
const (
	ThenPause    Reaction = "pause"    // no new grants
	ThenHalt     Reaction = "halt"     // no new grants; halted when nothing is in flight
	ThenAbort    Reaction = "abort"    // what is queued is cancelled, for good
	ThenRollback Reaction = "rollback" // Plan.Rollback
)

// Pace limits how many devices are granted the release in a minute. With Base, the rate begins there and is multiplied by
// Factor after each Every successes, up to PerMinute. The words are those of AWS IoT Jobs (maximumPerMinute,
// baseRatePerMinute, incrementFactor, numberOfSucceededThings).
type Pace struct {
	PerMinute int     `json:"per_minute,omitzero"` // grants; 0: no limit
	Base      int     `json:"base,omitzero"`
	Factor    float64 `json:"factor,omitzero"` // over 1
	Every     int     `json:"every,omitzero"`  // successes
}

// SiteBudget limits how many devices that share a label's value are disrupted at once: in flight. A device
// without the label is in no site. At least one device per site may always go.
type SiteBudget struct {
	Label   string `json:"label,omitzero"`
	Count   int    `json:"count,omitzero"`
	Percent int    `json:"percent,omitzero"` // of the targets of the site, rounded up
}

// Health says what a device must not do while it is verified (Plan.VerifyFor).
type Health struct {
	BadBoots   []string `json:"bad_boots,omitempty"`   // boot reasons in hello, like panic or brownout
	Reconnects int      `json:"reconnects,omitzero"`   // sessions while it is verified; more are bad; 0: not judged
	Expression string   `json:"unhealthy_if,omitzero"` // over the fields of a target expression, state included
	Compare    bool     `json:"compare,omitzero"`      // do not fail the single device; compare with those that wait for their turn
	MinSample  int      `json:"min_sample,omitzero"`   // with Compare: devices in each group; default 20
	Confidence int      `json:"confidence,omitzero"`   // with Compare: 50 to 99, default 95
	Then       Reaction `json:"then,omitzero"`         // with Compare; empty: halt
}

// Set reports whether anything is judged.
func (h Health) Set() bool { return len(h.BadBoots) > 0 || h.Reconnects > 0 || h.Expression != "" }

// RollbackPlan says how the fleet is taken back: to a named release, or each device to the image that it ran before, from
// its other slot and without a download. The rollback is a rollout of its own in one stage; when it fails, it pauses.
type RollbackPlan struct {
	Version     string `json:"version,omitzero"`
	Previous    bool   `json:"previous_slot,omitzero"`
	MaxFailures int    `json:"max_failures,omitzero"` // failures that the rollback tolerates; one more pauses it
	MaxInFlight int    `json:"max_in_flight,omitzero"`
}

// Set reports whether there is a way back.
func (b RollbackPlan) Set() bool { return b.Version != "" || b.Previous }

// Plan is the policy of a rollout. It does not change after the rollout was created. The package comment gives the
// exact meaning of each field.
type Plan struct {
	Stages      []Stage
	MaxFailures int      // failures that are tolerated in the whole rollout; one more brings FailThen
	FailThen    Reaction // empty: halt
	Limits      []Limit  // further stop rules
	MaxInFlight int      // devices that may hold a grant at once

	DeviceTimeout   time.Duration // from the grant to a session with the new image
	AcceptTimeout   time.Duration // from the grant to any answer; 0: none
	DownloadTimeout time.Duration // without progress of a download; 0: none
	InstallTimeout  time.Duration // from downloaded to installed; 0: none
	VerifyFor       time.Duration // from the session with the new image to success: it must stay healthy so long
	DarkAfter       time.Duration // after the installation, or while verifying: silent for so long is gone dark
	Retries         int           // further attempts after failed and timed out
	RetryBackoff    time.Duration // before the second attempt; doubled with each further one

	Soak         time.Duration // how long a stage that is done is watched before the next one opens
	OfflineGrace time.Duration // how long the last stage waits for devices that are offline

	StartAt  time.Time // not before; zero: at once
	Approval bool      // somebody other than the creator must approve it
	Window   Window    // grants only then

	Pace           Pace
	BytesPerSecond int64 // for the downloads of all devices together; 0: no limit
	Sites          SiteBudget
	Health         Health
	Rollback       RollbackPlan
	AllowDowngrade bool // devices that run a newer version are targets too; a secure version is never lowered
}

// WithDefaults returns p with a default for each field that is zero and may not be: three stages (one device, 10 %,
// everyone), MaxInFlight, DeviceTimeout, DarkAfter, RetryBackoff and OfflineGrace. MaxFailures 0, VerifyFor 0 and Soak 0
// mean what they say.
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
	if p.DarkAfter == 0 {
		p.DarkAfter = DefaultDarkAfter
	}
	if p.OfflineGrace == 0 {
		p.OfflineGrace = DefaultOfflineGrace
	}
	if p.Retries > 0 && p.RetryBackoff == 0 {
		p.RetryBackoff = DefaultRetryBackoff
	}
	if p.Health.Compare && p.Health.MinSample == 0 {
		p.Health.MinSample = 20
	}
	if p.Health.Compare && p.Health.Confidence == 0 {
		p.Health.Confidence = 95
	}
	if p.Rollback.Set() && p.Rollback.MaxInFlight == 0 {
		p.Rollback.MaxInFlight = p.MaxInFlight
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
		n = share(s.Percent, targets)
	}
	return min(n, targets)
}

// share returns percent of n, rounded up: any share of what is not empty is at least one.
func share(percent, n int) int { return (n*percent + 99) / 100 }

// Ring returns the first stage (from 1) in which a device may be granted, by which of the stages' expressions it matches:
// the first stage without one, or the first that matches, whichever comes first.
func (p Plan) Ring(matches func(stage int) bool) int {
	for i, s := range p.Stages {
		if s.Where == "" || matches(i+1) {
			return i + 1
		}
	}
	return len(p.Stages)
}

// SiteLimit returns how many of a site's targets may be disrupted at once.
func (p Plan) SiteLimit(targets int) int {
	if p.Sites.Percent > 0 {
		return max(share(p.Sites.Percent, targets), 1)
	}
	return p.Sites.Count
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
	if err := p.validateStages(); err != nil {
		return err
	}
	if err := p.validateTimes(); err != nil {
		return err
	}
	if err := p.validateLimits(); err != nil {
		return err
	}
	if err := p.Window.validate(); err != nil {
		return err
	}
	if err := p.Pace.validate(); err != nil {
		return err
	}
	switch s := p.Sites; {
	case s == (SiteBudget{}):
	case s.Label == "" || len(s.Label) > 63:
		return invalid("sites: name the label whose value is the site")
	case (s.Count > 0) == (s.Percent > 0) || s.Count < 0 || s.Count > MaxTargets || s.Percent < 0 || s.Percent > 100:
		return invalid("sites: set exactly one of count (1 to %d) and percent (1 to 100)", MaxTargets)
	}
	if p.BytesPerSecond < 0 || p.BytesPerSecond > 0 && p.BytesPerSecond < MinBytesPerSecond {
		return invalid("bytes_per_second is %d; use 0 (no limit), or at least %d", p.BytesPerSecond, MinBytesPerSecond)
	}
	if err := p.validateHealth(); err != nil {
		return err
	}
	return p.validateRollback()
}

func (p Plan) validateStages() error {
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
		if s.Count > 0 && b.Count >= s.Count || s.Percent > 0 && b.Percent >= s.Percent && (b.Percent < 100 || b.Where == "") {
			return invalid("stage %d adds no device to the stage before; stages are cumulative, so let each be larger", i+1)
		}
	}
	if last := p.Stages[len(p.Stages)-1]; last.Where != "" {
		return invalid("stage %d is the last and must be open to every target: leave its where out, and choose devices by the target", len(p.Stages))
	}
	return nil
}

func (p Plan) validateTimes() error {
	switch {
	case p.MaxInFlight < 1 || p.MaxInFlight > MaxMaxInFlight:
		return invalid("max_in_flight is %d; use 1 to %d", p.MaxInFlight, MaxMaxInFlight)
	case p.DeviceTimeout < MinTimeout || p.DeviceTimeout > MaxTimeout:
		return invalid("device_timeout is %v; use %v to %v", p.DeviceTimeout, MinTimeout, MaxTimeout)
	case p.Soak < 0 || p.Soak > MaxSoak:
		return invalid("soak is %v; use 0s to %v", p.Soak, MaxSoak)
	case p.VerifyFor < 0 || p.VerifyFor > MaxSoak:
		return invalid("verify_for is %v; use 0s to %v", p.VerifyFor, MaxSoak)
	case p.DarkAfter < MinTimeout || p.DarkAfter > MaxTimeout:
		return invalid("dark_after is %v; use %v to %v", p.DarkAfter, MinTimeout, MaxTimeout)
	case p.OfflineGrace < MinOfflineGrace || p.OfflineGrace > MaxOfflineGrace:
		return invalid("offline_grace is %v; use %v to %v", p.OfflineGrace, MinOfflineGrace, MaxOfflineGrace)
	case p.Retries < 0 || p.Retries > MaxRetries:
		return invalid("retries is %d; use 0 to %d", p.Retries, MaxRetries)
	case p.Retries > 0 && (p.RetryBackoff < MinTimeout || p.RetryBackoff > MaxTimeout):
		return invalid("retry_backoff is %v; use %v to %v", p.RetryBackoff, MinTimeout, MaxTimeout)
	}
	for _, s := range []struct {
		name string
		d    time.Duration
	}{{"accept_timeout", p.AcceptTimeout}, {"download_timeout", p.DownloadTimeout}, {"install_timeout", p.InstallTimeout}} {
		if s.d != 0 && (s.d < MinTimeout || s.d > p.DeviceTimeout) {
			return invalid("%s is %v; use 0s (none), or %v to device_timeout (%v)", s.name, s.d, MinTimeout, p.DeviceTimeout)
		}
	}
	return nil
}

func (p Plan) validateLimits() error {
	if p.MaxFailures < 0 || p.MaxFailures > MaxTargets {
		return invalid("max_failures is %d; use 0 (stop at the first failure) to %d", p.MaxFailures, MaxTargets)
	}
	if err := p.reaction("fail_then", p.FailThen); err != nil {
		return err
	}
	if len(p.Limits) > MaxLimits {
		return invalid("%d limits; use at most %d", len(p.Limits), MaxLimits)
	}
	for i, l := range p.Limits {
		n := i + 1
		for _, k := range l.Kinds {
			if !k.Failure() {
				return invalid("limit %d: kinds are failed, rejected, rolled-back, timed-out and went-dark", n)
			}
		}
		switch {
		case l.Count < 0 || l.Count > MaxTargets || l.Percent < 0 || l.Percent > 99 || l.Count > 0 && l.Percent > 0:
			return invalid("limit %d: set one of count (0 to %d) and percent (1 to 99)", n, MaxTargets)
		case l.Percent == 0 && (l.MinSample != 0 || l.Confidence != 0):
			return invalid("limit %d: min_sample and confidence go with percent", n)
		case l.Percent > 0 && (l.MinSample < 1 || l.MinSample > MaxTargets):
			return invalid("limit %d: a percentage needs min_sample, the number of devices with a verdict from which on it judges (1 to %d)", n, MaxTargets)
		case l.Confidence != 0 && (l.Confidence < 50 || l.Confidence > 99):
			return invalid("limit %d: confidence is %d; use 50 to 99, or 0 for the plain percentage", n, l.Confidence)
		}
		if err := p.reaction("limit's then", l.Then); err != nil {
			return err
		}
	}
	return nil
}

func (p Plan) reaction(name string, r Reaction) error {
	if !slices.Contains([]Reaction{"", ThenPause, ThenHalt, ThenAbort, ThenRollback}, r) {
		return invalid("%s: use pause, halt, abort or rollback", name)
	}
	if r == ThenRollback && !p.Rollback.Set() {
		return invalid("%s is rollback: say in rollback where to (version, or previous_slot)", name)
	}
	return nil
}

func (p Plan) validateHealth() error {
	h := p.Health
	for _, b := range h.BadBoots {
		if b == "" || len(b) > MaxStageName || !printable(b) {
			return invalid("health: a boot reason is at most %d bytes of printable text", MaxStageName)
		}
	}
	switch {
	case len(h.BadBoots) > MaxLimits:
		return invalid("health: at most %d boot reasons", MaxLimits)
	case h.Reconnects < 0 || h.Reconnects > 10_000:
		return invalid("health: reconnects is %d; use 0 (not judged) to 10000", h.Reconnects)
	case len(h.Expression) > MaxExpression:
		return invalid("health: unhealthy_if has at most %d bytes", MaxExpression)
	case h.Set() && p.VerifyFor == 0:
		return invalid("health is judged while a device is verified: set verify_for")
	case h.Compare && !h.Set():
		return invalid("health: compare needs something to compare: bad_boots, reconnects or unhealthy_if")
	case !h.Compare && (h.MinSample != 0 || h.Confidence != 0 || h.Then != ""):
		return invalid("health: min_sample, confidence and then go with compare")
	case h.Compare && (h.MinSample < 1 || h.MinSample > MaxTargets || h.Confidence < 50 || h.Confidence > 99):
		return invalid("health: use min_sample 1 to %d and confidence 50 to 99", MaxTargets)
	}
	return p.reaction("health's then", h.Then)
}

func (p Plan) validateRollback() error {
	b := p.Rollback
	switch {
	case b.Version != "" && b.Previous:
		return invalid("rollback: use version or previous_slot, not both")
	case !b.Set() && b != (RollbackPlan{}):
		return invalid("rollback: say where to: version, or previous_slot")
	case b.MaxFailures < 0 || b.MaxFailures > MaxTargets:
		return invalid("rollback: max_failures is %d; use 0 to %d", b.MaxFailures, MaxTargets)
	case b.Set() && (b.MaxInFlight < 1 || b.MaxInFlight > MaxMaxInFlight):
		return invalid("rollback: max_in_flight is %d; use 1 to %d", b.MaxInFlight, MaxMaxInFlight)
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
	case s.MinSuccess < 0 || s.MinSuccess > 100:
		return invalid("stage %d: min_success is %d; use 0 (one device) to 100 percent", n, s.MinSuccess)
	case len(s.Where) > MaxExpression:
		return invalid("stage %d: where has at most %d bytes", n, MaxExpression)
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
