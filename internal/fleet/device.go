package fleet

import (
	"encoding/json"
	"time"
)

// Device is what operators and muster know of a device: who it is and which credentials are its own. What the device
// says of itself is its Status.
type Device struct {
	ID        DeviceID          `json:"id"`
	Rev       uint64            `json:"rev"` // raised by every write; a writer with an older one is refused
	Product   ProductID         `json:"product"`
	Hardware  string            `json:"hardware,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Groups    []string          `json:"groups,omitempty"` // sorted, each once
	CreatedAt time.Time         `json:"created_at"`

	// Disabled devices are refused at every door until enabled again.
	Disabled   bool      `json:"disabled,omitempty"`
	DisabledAt time.Time `json:"disabled_at,omitzero"`

	// Current and Next are the two certificate slots (DESIGN §7). Both let the device in. Next becomes Current when the
	// device has connected with it.
	Current Serial `json:"current,omitempty"`
	Next    Serial `json:"next,omitempty"`

	// RenewSince is when the device was first asked to renew; zero if it was not. Cleared by promotion.
	RenewSince time.Time `json:"renew_since,omitzero"`
	// RenewAsked is when the last pass asked it: it is not asked again at once.
	RenewAsked time.Time `json:"renew_asked,omitzero"`

	// Passwords are the fallback credentials that work now: more than one only while a rotation is under way.
	Passwords []Password `json:"passwords,omitempty"`

	// RecoveryOff, if not empty, says why the fallback is closed to this device: its certificate was revoked.
	RecoveryOff string `json:"recovery_off,omitempty"`
}

// Password is one fallback password of a device, kept as SHA-256 only: it has 256 random bits, so a slow hash would only
// arm connect floods (DESIGN §4).
type Password struct {
	SHA256 Hash      `json:"sha256"`
	Since  time.Time `json:"since"`
	With   Serial    `json:"with,omitempty"` // the certificate it was delivered with; empty for an operator's
}

// Status is the last known state of a device: what it said and how it is connected.
type Status struct {
	Device DeviceID `json:"device"`

	Online      bool      `json:"online"`
	ConnectedAt time.Time `json:"connected_at,omitzero"` // of the present or last session
	LostAt      time.Time `json:"lost_at,omitzero"`      // end of the last session
	LastSeen    time.Time `json:"last_seen,omitzero"`    // last message or connection event
	Vhost       string    `json:"vhost,omitempty"`       // of the present or last session
	Peer        string    `json:"peer,omitempty"`        // its address
	Serial      Serial    `json:"serial,omitempty"`      // certificate of the session, as the broker saw it
	Connection  string    `json:"connection,omitempty"`  // the broker's name for the session
	LastSerial  Serial    `json:"last_serial,omitempty"` // newest certificate it ever connected with

	HelloAt       time.Time `json:"hello_at,omitzero"`  // when it last said what it runs
	PolledAt      time.Time `json:"polled_at,omitzero"` // when it last asked for an update over HTTPS
	Version       string    `json:"version,omitempty"`
	Image         Hash      `json:"image,omitempty"`
	Hardware      string    `json:"hardware,omitempty"`
	Chip          string    `json:"chip,omitempty"`
	SecureVersion uint32    `json:"secure_version,omitempty"`
	ChipRevision  int       `json:"chip_revision,omitempty"` // silicon revision × 100, as ESP-IDF counts: v3.1 is 301; 0 = unknown
	Boot          string    `json:"boot,omitempty"`
	Buffer        int       `json:"buffer,omitempty"` // bytes; 0 = unknown
	Bundle        int64     `json:"bundle,omitempty"` // version of the trust bundle that it trusts; 0 = that of its making

	Previous              Hash   `json:"previous,omitempty"` // image in the other slot: what boot-previous-slot would start
	PreviousSecureVersion uint32 `json:"previous_secure_version,omitempty"`

	// Boots and Sessions are the newest ones, oldest first: what an update is judged by (at most MaxBoots, MaxSessions).
	Boots    []Boot      `json:"boots,omitempty"`
	Sessions []time.Time `json:"sessions,omitempty"`

	State   json.RawMessage `json:"state,omitempty"` // merged up/state documents
	StateAt time.Time       `json:"state_at,omitzero"`
}

// Boot is why a device started, as its hello said.
type Boot struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
}

// Bounds of what a Status remembers.
const (
	MaxBoots    = 8
	MaxSessions = 32
)

// Booted notes a boot.
func (s *Status) Booted(at time.Time, reason string) {
	s.Boots = append(s.Boots, Boot{at, reason})
	s.Boots = s.Boots[max(0, len(s.Boots)-MaxBoots):]
}

// Began notes a session.
func (s *Status) Began(at time.Time) {
	s.Sessions = append(s.Sessions, at)
	s.Sessions = s.Sessions[max(0, len(s.Sessions)-MaxSessions):]
}
