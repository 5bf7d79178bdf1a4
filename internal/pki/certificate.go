// Package pki holds the life of a device certificate: its states and the only ways between them, the renewal window,
// and what a certificate request may hold. It does no I/O and reads no clock.
package pki

import (
	"slices"
	"time"

	"muster/internal/fleet"
)

// State is where a certificate stands (DESIGN §7). The zero State is invalid on purpose.
type State string

// States of a certificate.
const (
	Intended   State = "intended"   // recorded, not signed yet
	Issued     State = "issued"     // signed and stored; the device has not connected with it yet
	Active     State = "active"     // the device connected with it, and with none newer
	Superseded State = "superseded" // a newer one took its place
	Expired    State = "expired"
	Revoked    State = "revoked"
)

// next is the whole life of a certificate; TestTransitions holds it as approved text.
var next = map[State][]State{
	Intended:   {Issued, Superseded, Revoked, Expired},
	Issued:     {Active, Superseded, Expired, Revoked},
	Active:     {Superseded, Expired, Revoked},
	Superseded: {Expired, Revoked},
	Expired:    {Revoked},
	Revoked:    {},
}

// CanGo reports whether a certificate in state s may become to.
func (s State) CanGo(to State) bool { return slices.Contains(next[s], to) }

// Live reports whether a certificate in state s may let its device in.
func (s State) Live() bool { return s == Issued || s == Active }

// Via says by which door a request came.
type Via string

// Doors of a certificate request.
const (
	ViaOperator Via = "operator" // REST or CLI
	ViaMQTT     Via = "mqtt"     // renewal over the device's own mutual-TLS session
	ViaRecovery Via = "recovery" // the fallback vhost
	ViaEST      Via = "est"      // RFC 7030, with a certificate or an enrolment password
)

// Fetched reports whether whoever asked gets the certificate in the answer to the same request, so that it is not sent to
// the device as well.
func (v Via) Fetched() bool { return v == ViaOperator || v == ViaEST }

// Certificate is the record of one certificate from the intent to sign it on. A serial without such a record was not
// issued by muster.
type Certificate struct {
	Serial fleet.Serial   `json:"serial"`
	Device fleet.DeviceID `json:"device"`
	State  State          `json:"state"`
	Via    Via            `json:"via"`

	PublicKey []byte     `json:"public_key"`      // SubjectPublicKeyInfo, DER: all that is taken from a CSR
	KeyHash   fleet.Hash `json:"key_hash"`        // SHA-256 of PublicKey
	Chain     [][]byte   `json:"chain,omitempty"` // leaf, intermediate; DER

	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`

	IntendedAt   time.Time `json:"intended_at"`
	IssuedAt     time.Time `json:"issued_at,omitzero"`
	ActiveAt     time.Time `json:"active_at,omitzero"`
	SupersededAt time.Time `json:"superseded_at,omitzero"`
	RevokedAt    time.Time `json:"revoked_at,omitzero"`
	Reason       int       `json:"reason,omitempty"` // RFC 5280 §5.3.1, of a revocation
	By           string    `json:"by,omitempty"`     // operator who asked for or revoked it

	// Suggested is the renewal window that an operator set for it; zero: the one that its life gives.
	Suggested Window `json:"suggested,omitzero"`

	// Bare says that it was also offered without a fallback password: using it does not prove that the device holds the
	// newest password, so the older ones must live on.
	Bare bool `json:"bare,omitempty"`

	// Of a revoked or expired certificate: when its sessions were first closed, and when a later look found none.
	ClosedAt   time.Time `json:"closed_at,omitzero"`
	VerifiedAt time.Time `json:"verified_at,omitzero"`
}

// Untrusted reports whether c's key must never get a certificate again: it was revoked, and not just because muster
// retired it after a renewal.
func (c Certificate) Untrusted() bool { return c.State == Revoked && c.Reason != ReasonSuperseded }

// Become moves c to state to and notes when, or returns a Conflict error if there is no such way.
func (c *Certificate) Become(to State, at time.Time) error {
	if !c.State.CanGo(to) {
		return fleet.Errorf(fleet.Conflict, "certificate %s is %s and cannot become %s", c.Serial, c.State, to)
	}
	c.State = to
	switch to {
	case Issued:
		c.IssuedAt = at
	case Active:
		c.ActiveAt = at
	case Superseded:
		c.SupersededAt = at
	case Revoked:
		c.RevokedAt = at
	}
	return nil
}

// Request is a certificate request that waits for an operator: a new key that came over the fallback (DESIGN §9).
type Request struct {
	ID        string         `json:"id"` // the first 16 digits of KeyHash
	Device    fleet.DeviceID `json:"device"`
	PublicKey []byte         `json:"public_key"` // SubjectPublicKeyInfo, DER
	KeyHash   fleet.Hash     `json:"key_hash"`
	State     RequestState   `json:"state"`
	AskedAt   time.Time      `json:"asked_at"`
	DecidedAt time.Time      `json:"decided_at,omitzero"`
	By        string         `json:"by,omitempty"`
	Via       Via            `json:"via,omitempty"` // empty: the fallback
}

// RequestState is where a Request stands.
type RequestState string

// States of a Request.
const (
	Waiting  RequestState = "waiting"
	Approved RequestState = "approved"
	Denied   RequestState = "denied"
)

// Order is what the authority is told to sign. Everything else in a device certificate follows from it (DESIGN §4).
type Order struct {
	Serial    fleet.Serial
	Device    fleet.DeviceID
	PublicKey []byte // SubjectPublicKeyInfo, DER, of a request that was checked
	Validity
}

// Signed is what the authority made of an Order. The issuer's own end may have cut its validity short.
type Signed struct {
	Chain [][]byte // leaf, intermediate; DER
	Validity
}
