package firmware

import (
	"fmt"
	"slices"
	"strings"
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

// Bootable says whether a device could start the image of r if its key slots hold keys, which are all of its product, revoked
// ones included: as Fit does, a word and a sentence, both empty if it could. A product without keys has no Secure Boot. An
// image that no live slot accepts must not be offered: some chips burn a key when they see it (esp32.md §2).
func (r Release) Bootable(keys []SecureBootKey) (Misfit, string) {
	if len(keys) == 0 {
		return Fits, ""
	}
	if r.BootKeys == "" {
		return NotSigned, fmt.Sprintf("product %s has Secure Boot, and the image of %s has no signature that is on record: sign it, or upload the same file again", r.Product, r.Version)
	}
	revoked := false
	for have := range strings.FieldsSeq(r.BootKeys) {
		i := slices.IndexFunc(keys, func(k SecureBootKey) bool { return burnt(r.Chip, k.Digest) == burnt(r.Chip, fleet.Hash(have)) })
		switch {
		case i < 0:
		case slices.ContainsFunc(keys, func(k SecureBootKey) bool {
			return k.Revoked && burnt(r.Chip, k.Digest) == burnt(r.Chip, fleet.Hash(have))
		}):
			revoked = true
		default:
			return Fits, ""
		}
	}
	if revoked {
		return KeyRevoked, fmt.Sprintf("the image of %s is signed for Secure Boot with a key of %s that was revoked: release it signed with one that is not", r.Version, r.Product)
	}
	return KeyUnknown, fmt.Sprintf("no Secure Boot key of %s signed the image of %s", r.Product, r.Version)
}

// burnt is as much of a digest as a chip has in its eFuses, in hex digits (esp32.md §1.6).
func burnt(chip string, digest fleet.Hash) fleet.Hash {
	if chip == "esp32c2" {
		return digest[:min(32, len(digest))]
	}
	return digest
}
