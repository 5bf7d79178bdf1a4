// Package access knows the operators: bearer tokens with a role, and the audit trail of what they did.
package access

import (
	"slices"
	"time"

	"muster/internal/audit"
	"muster/internal/fleet"
)

// Role says what a token may do. Each role may do what the one before it may.
type Role string

// Roles.
const (
	Viewer   Role = "viewer"   // read
	Operator Role = "operator" // change devices, releases, rollouts and certificates
	Admin    Role = "admin"    // tokens, signing keys
)

// roles are all roles, from the least to the most.
var roles = []Role{Viewer, Operator, Admin}

// ParseRole returns s as a Role, or an Invalid error.
func ParseRole(s string) (Role, error) {
	if !slices.Contains(roles, Role(s)) {
		return "", fleet.Errorf(fleet.Invalid, "role: use viewer, operator or admin")
	}
	return Role(s), nil
}

// May reports whether role r may do what takes role need. An unknown role may nothing, and nothing may what takes an
// unknown one.
func (r Role) May(need Role) bool {
	have, want := slices.Index(roles, r), slices.Index(roles, need)
	return want >= 0 && have >= want
}

// Token is an operator's bearer token, kept as a hash.
type Token struct {
	Name      string     `json:"name"` // unique
	SHA256    fleet.Hash `json:"sha256"`
	Role      Role       `json:"role"`
	CreatedAt time.Time  `json:"created_at"`
	ExpiresAt time.Time  `json:"expires_at,omitzero"` // zero: never
	CreatedBy string     `json:"created_by,omitempty"`
}

// Live reports whether the token works at that time.
func (t Token) Live(at time.Time) bool { return t.ExpiresAt.IsZero() || at.Before(t.ExpiresAt) }

// Entry is one line of the audit trail. Who records something fills in At, Who, What, On and Details; the store does the
// rest.
type Entry = audit.Entry
