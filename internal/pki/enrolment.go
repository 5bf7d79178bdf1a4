package pki

import (
	"time"

	"muster/internal/fleet"
)

// Bounds of an enrolment password's life.
const (
	MinEnrolment = time.Minute
	MaxEnrolment = 90 * 24 * time.Hour
)

// Enrolment is a password with which a device that has no certificate yet asks for its first one, once (RFC 7030 §3.2.3).
// It is kept as SHA-256 only: it has 256 random bits. A device has at most one.
type Enrolment struct {
	Device fleet.DeviceID `json:"device"`
	SHA256 fleet.Hash     `json:"sha256"`
	Since  time.Time      `json:"since"`
	Until  time.Time      `json:"until"` // it does not work from then on
	By     string         `json:"by"`    // operator

	// Of a password that was used: the key that it is bound to, and the certificate that it brought; empty while an operator
	// has not approved the key. The same key gets the same certificate again until Until, so that a lost answer does not lock the device out.
	UsedAt  time.Time    `json:"used_at,omitzero"`
	KeyHash fleet.Hash   `json:"key_hash,omitempty"`
	Serial  fleet.Serial `json:"serial,omitempty"`
}
