package pki

import (
	"fmt"
	"time"

	"muster/internal/fleet"
)

// Terms are how long certificates hold: what an operator can change while muster runs.
type Terms struct {
	Lifetime time.Duration `json:"lifetime"` // of a device certificate
	Grace    time.Duration `json:"grace"`    // from superseded to revoked
}

// Bounds of Terms.
const (
	MinLifetime = time.Second
	MaxLifetime = 50 * 365 * 24 * time.Hour
)

// Check returns an Invalid error if t makes no sense.
func (t Terms) Check() error {
	switch {
	case t.Lifetime < MinLifetime || t.Lifetime > MaxLifetime:
		return fleet.Errorf(fleet.Invalid, "lifetime: use %s to %s", MinLifetime, MaxLifetime)
	case t.Grace < 0 || t.Grace > t.Lifetime:
		return fleet.Errorf(fleet.Invalid, "grace: use 0 to the lifetime, %s", t.Lifetime)
	}
	return nil
}

// Policy is the Terms in force, and where they come from. Those of the settings are kept beside them: a change of the
// settings is a proposal, as one by an operator is.
type Policy struct {
	Terms
	Settings Terms     `json:"settings"` // of the settings when they were last looked at
	Since    time.Time `json:"since"`
	By       string    `json:"by,omitempty"` // operator; empty: the settings
	// Refused is what the settings ask for and did not get, and Why, until somebody decides.
	Refused Terms  `json:"refused,omitzero"`
	Why     string `json:"why,omitempty"`
}

// Impact counts what new terms would do to a fleet.
type Impact struct {
	Devices int              // with a certificate
	Lost    int              // that would renew in time under the terms in force, and not under the new ones
	Sample  []fleet.DeviceID // of them, at most MaxSample
}

// MaxSample bounds Impact.Sample.
const MaxSample = 20

// Over reports whether the share of devices lost is more than most, which is a fraction.
func (i Impact) Over(most float64) bool { return float64(i.Lost) > most*float64(i.Devices) }

// String says it in words.
func (i Impact) String() string {
	if i.Devices == 0 {
		return "no device has a certificate"
	}
	return fmt.Sprintf("%d of %d devices (%.2g %%) are away for so long at times that they would miss their renewal", i.Lost, i.Devices, 100*float64(i.Lost)/float64(i.Devices))
}
