package pki

import (
	"time"

	"muster/internal/fleet"
)

// Closing is a promise that no connection of a broker user lives on: stored together with what made it necessary, and
// dropped once the last look found none. So a restart between the two finishes it.
type Closing struct {
	User   string         `json:"user"` // as the broker knows it: the URI of a certificate, or the device id on the fallback
	Device fleet.DeviceID `json:"device"`
	Serial fleet.Serial   `json:"serial,omitempty"` // the certificate whose record notes the end, if any
	Why    string         `json:"why"`              // shown to the client by the broker
	Since  time.Time      `json:"since"`
	// MayReturn says that the user is let in again at once, with another password: nobody looks for it later.
	MayReturn bool `json:"may_return,omitempty"`
	// LastLook is when it is looked once more, after the first looks found no connection; zero until then.
	LastLook time.Time `json:"last_look,omitzero"`
}

// Open reports whether connections of c's user may still be there: the first looks have not found all of them gone.
func (c Closing) Open() bool { return c.LastLook.IsZero() }

// ReasonAllowed reports whether an operator may give reason n to a revocation (RFC 5280 §5.3.1): 0 unspecified,
// 1 keyCompromise, 3 affiliationChanged, 4 superseded, 5 cessationOfOperation, 9 privilegeWithdrawn.
func ReasonAllowed(n int) bool {
	switch n {
	case 0, 1, 3, ReasonSuperseded, 5, 9:
		return true
	}
	return false
}

// ReasonSuperseded is the reason that muster gives when it retires a certificate that was replaced.
const ReasonSuperseded = 4
