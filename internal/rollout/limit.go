package rollout

import (
	"fmt"
	"math"
	"slices"
)

// Verdicts are the devices that have a verdict in this round, by kind: what the stop rules judge.
type Verdicts struct {
	Succeeded  int `json:"succeeded,omitzero"`
	Failed     int `json:"failed,omitzero"`
	Rejected   int `json:"rejected,omitzero"`
	RolledBack int `json:"rolled_back,omitzero"`
	TimedOut   int `json:"timed_out,omitzero"`
	WentDark   int `json:"went_dark,omitzero"`
}

// of returns the counter of s, nil if s is no verdict.
func (v *Verdicts) of(s JobState) *int {
	switch s {
	case Succeeded:
		return &v.Succeeded
	case Failed:
		return &v.Failed
	case Rejected:
		return &v.Rejected
	case RolledBack:
		return &v.RolledBack
	case TimedOut:
		return &v.TimedOut
	case WentDark:
		return &v.WentDark
	}
	return nil
}

// Failures returns how many of the verdicts are failures of the given kinds, of any kind if there are none.
func (v Verdicts) Failures(kinds ...JobState) int {
	if len(kinds) == 0 {
		kinds = failureStates
	}
	n := 0
	for _, k := range failureStates {
		if slices.Contains(kinds, k) {
			n += *v.of(k)
		}
	}
	return n
}

// passed reports whether v is more than l tolerates, and says so in words.
func (l Limit) passed(v Verdicts) (string, bool) {
	n := v.Failures(l.Kinds...)
	what := "failures"
	if len(l.Kinds) == 1 {
		what = string(l.Kinds[0])
	}
	if l.Percent == 0 {
		return fmt.Sprintf("%d %s, %d tolerated", n, what, l.Count), n > l.Count
	}
	sample := v.Succeeded + v.Failures()
	if sample < l.MinSample || n == 0 {
		return "", false
	}
	if l.Confidence == 0 {
		return fmt.Sprintf("%d %s of %d devices, %d %% tolerated", n, what, sample, l.Percent), n*100 > l.Percent*sample
	}
	low, _ := wilson(n, sample, l.Confidence)
	return fmt.Sprintf("%d %s of %d devices: at least %.1f %% at %d %% confidence, %d %% tolerated", n, what, sample, 100*low, l.Confidence, l.Percent),
		low*100 > float64(l.Percent)
}

// wilson returns the one-sided bounds of the rate behind k of n at a confidence in percent: the score interval of E. B.
// Wilson (1927), which holds for small n. Each bound alone has that confidence.
func wilson(k, n, confidence int) (low, high float64) {
	if n == 0 {
		return 0, 1
	}
	z := quantile(float64(confidence) / 100)
	p, m := float64(k)/float64(n), float64(n)
	centre := p + z*z/(2*m)
	spread := z * math.Sqrt(p*(1-p)/m+z*z/(4*m*m))
	d := 1 + z*z/m
	return max((centre-spread)/d, 0), min((centre+spread)/d, 1)
}

// quantile returns the p-quantile of the standard normal distribution.
func quantile(p float64) float64 { return math.Sqrt2 * math.Erfinv(2*p-1) }

// rate returns how many grants a minute p allows after so many successes; 0 is no limit.
func (p Pace) rate(succeeded int) float64 {
	if p.Base == 0 {
		return float64(p.PerMinute)
	}
	r := float64(p.Base) * math.Pow(p.Factor, float64(succeeded/p.Every))
	if p.PerMinute > 0 {
		r = min(r, float64(p.PerMinute))
	}
	return min(r, MaxPerMinute)
}

func (p Pace) validate() error {
	switch {
	case p == Pace{}:
	case p.PerMinute < 0 || p.PerMinute > MaxPerMinute || p.Base < 0 || p.Base > MaxPerMinute:
		return invalid("pace: per_minute and base are grants, up to %d", MaxPerMinute)
	case p.Base == 0 && (p.Factor != 0 || p.Every != 0):
		return invalid("pace: factor and every need base, the rate to begin with")
	case p.Base > 0 && (!(p.Factor > 1) || p.Factor > MaxFactor || p.Every < 1 || p.Every > MaxTargets):
		return invalid("pace: base grows by factor (over 1, up to %d) after each every (1 to %d) successes", MaxFactor, MaxTargets)
	case p.Base > 0 && p.PerMinute > 0 && p.Base > p.PerMinute:
		return invalid("pace: base is %d, above per_minute %d", p.Base, p.PerMinute)
	}
	return nil
}
