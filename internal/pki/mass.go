package pki

import (
	"time"

	"muster/internal/fleet"
)

// MassRevocation is the order to revoke every certificate of an issuer, and how far it got. It is stored with each batch, so
// that a restart goes on where it was.
type MassRevocation struct {
	Issuer IssuerID  `json:"issuer"`
	Reason int       `json:"reason,omitempty"` // RFC 5280 §5.3.1
	By     string    `json:"by"`
	Since  time.Time `json:"since"`
	Total  int       `json:"total"` // certificates that held when it was ordered

	After   fleet.Serial `json:"after,omitempty"` // the last one that this pass looked at
	Found   int          `json:"found"`           // by this pass; one that finds none is the last
	Passes  int          `json:"passes"`          // that are over
	Revoked int          `json:"revoked"`
	Live    int          `json:"live"` // sessions that were known to be open
	DoneAt  time.Time    `json:"done_at,omitzero"`
}

// Done reports whether no certificate of the issuer holds any more.
func (m MassRevocation) Done() bool { return !m.DoneAt.IsZero() }

// Looked notes that a pass looked at everything up to serial after, of which so many certificates were revoked; end says
// that there is nothing behind it. A device may have got a new certificate behind the pass's back, so it is over only after a
// pass that found none.
func (m *MassRevocation) Looked(after fleet.Serial, revoked int, end bool, at time.Time) {
	m.After = after
	m.Found += revoked
	m.Revoked += revoked
	if !end {
		return
	}
	m.Passes++
	if m.Found == 0 {
		m.DoneAt = at
	}
	m.After, m.Found = "", 0
}
