// Package firmware holds releases: the signed manifest, the order of versions and what fits what. It does no I/O.
package firmware

import (
	"time"

	"muster/internal/fleet"
)

// Manifest is what a release key signs (DESIGN §8): a JWS ES256 (RFC 7515, RFC 7518 §3.4) over its JSON.
type Manifest struct {
	Product       fleet.ProductID `json:"product"`
	Version       Version         `json:"version"`
	Size          int64           `json:"size"`       // of the image, bytes
	SHA256        fleet.Hash      `json:"sha256"`     // of the whole file
	ImageHash     fleet.Hash      `json:"image_hash"` // what the running device reports; for a raw image the file's SHA-256 (esp32.md §0.2)
	Chip          string          `json:"chip,omitzero"`
	SecureVersion uint32          `json:"secure_version,omitzero"`
	MinVersion    Version         `json:"min_version,omitzero"` // versions below this one cannot be updated from
}

// Version is a semantic version (semver.org 2.0.0) without a leading v, of at most 32 bytes.
type Version string

// Release is a published image with its manifest. It never changes.
type Release struct {
	Manifest
	JWS        string    `json:"jws"`    // compact serialisation of the signed manifest
	KeyID      string    `json:"key_id"` // of the key that signed it
	UploadedAt time.Time `json:"uploaded_at"`
	UploadedBy string    `json:"uploaded_by"`
}

// Key is a public key that may sign releases of a product.
type Key struct {
	ID        string          `json:"id"`         // RFC 7638 thumbprint of the public key
	Product   fleet.ProductID `json:"product"`    // empty: of every product
	PublicKey []byte          `json:"public_key"` // SubjectPublicKeyInfo, DER
	AddedAt   time.Time       `json:"added_at"`
	AddedBy   string          `json:"added_by"`
	Revoked   bool            `json:"revoked,omitempty"`
}
