package rollout

import "time"

// Penalty is the record of a device that keeps failing, over all rollouts.
type Penalty struct {
	Failures []time.Time `json:"failures,omitempty"` // recent failed attempts, oldest first
	Until    time.Time   `json:"until,omitzero"`     // no rollout offers it anything before
}

// PenaltyRule sends a device to the penalty box that fails Failures times within Within: for For.
type PenaltyRule struct {
	Failures int // 0: no penalties
	Within   time.Duration
	For      time.Duration
}

// Failed returns p after one more failed attempt.
func (r PenaltyRule) Failed(p Penalty, at time.Time) Penalty {
	if r.Failures == 0 {
		return Penalty{}
	}
	at = utc(at)
	var recent []time.Time
	for _, f := range p.Failures {
		if at.Sub(f) < r.Within {
			recent = append(recent, f)
		}
	}
	p.Failures = append(recent, at)
	if len(p.Failures) >= r.Failures {
		p.Failures, p.Until = nil, at.Add(r.For)
	}
	return p
}
