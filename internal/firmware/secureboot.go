package firmware

import (
	"time"

	"muster/internal/fleet"
)

// SecureBootKey is a key that the devices of a product trust to sign their images (Secure Boot v2, esp32.md §2). Once a
// product has one, every image of it needs the signature of one that is not revoked.
type SecureBootKey struct {
	Product   fleet.ProductID `json:"product"`
	Digest    fleet.Hash      `json:"digest"`           // what is burnt into the eFuses
	Scheme    string          `json:"scheme,omitempty"` // empty if only the digest was registered
	AddedAt   time.Time       `json:"added_at"`
	AddedBy   string          `json:"added_by"`
	Revoked   bool            `json:"revoked,omitempty"`
	RevokedAt time.Time       `json:"revoked_at,omitzero"`
	RevokedBy string          `json:"revoked_by,omitempty"`
}
