// Package firmware holds releases: the signed manifest, the order of versions and what fits what (DESIGN §8). It does
// no I/O and reads no clock.
//
// A manifest is signed offline (Sign) and checked by the server, which knows public keys only (Verify). What Verify
// returns is the one thing from which a release can be made, so nothing unsigned can be published by mistake.
package firmware

import (
	"strings"
	"time"

	"muster/internal/fleet"
)

// Limits of a manifest.
const (
	MaxImageSize = 128 << 20 // bytes: the largest flash of any ESP32 (esp32.md §1.1)
	MaxChipLen   = 24        // bytes

	MaxChipRevision = 9999 // v99.99
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

	// Silicon revisions that the image runs on, × 100 as ESP-IDF counts (v3.1 is 301), both ends included; 0: no limit.
	MinChipRevision int `json:"min_chip_revision,omitzero"`
	MaxChipRevision int `json:"max_chip_revision,omitzero"`
}

// Release is a published image with its manifest. It never changes.
type Release struct {
	Manifest
	MD5        string    `json:"md5"`    // of the whole file, 32 lower-case hex digits: what Arduino's updater compares (esp32.md §6.1)
	JWS        string    `json:"jws"`    // compact serialisation of the signed manifest
	KeyID      string    `json:"key_id"` // of the key that signed it
	UploadedAt time.Time `json:"uploaded_at"`
	UploadedBy string    `json:"uploaded_by"`

	// Floor: no device below this release may skip it on its way to a newer one.
	Floor    bool      `json:"floor,omitempty"`
	FloorWhy string    `json:"floor_why,omitempty"`
	FloorBy  string    `json:"floor_by,omitempty"`
	FloorAt  time.Time `json:"floor_at,omitzero"`

	// BootKeys are the digests of the keys whose Secure Boot signatures the image has where its chip looks, in that order,
	// with a space between two.
	BootKeys string `json:"boot_keys,omitempty"`

	// FOTA is for clients that check it (esp32FOTA); it is no part of the image.
	FOTA FOTASignature `json:"esp32fota,omitzero"`
}

// pathPrefix and pathDigits make a Path: short, because it travels in a message of at most 150 bytes.
const (
	pathPrefix = "/fw/"
	pathDigits = 16
)

// Path returns where the device API serves the image: /fw/ and the first 16 digits of its SHA-256. The bytes below a
// path never change.
func (m Manifest) Path() string {
	return pathPrefix + string(m.SHA256[:min(pathDigits, len(m.SHA256))])
}

// Names reports whether s, the first 16 or all 64 digits of a SHA-256, names the image of m.
func (m Manifest) Names(s string) bool {
	return (len(s) == pathDigits || len(s) == 64) && strings.HasPrefix(string(m.SHA256), s)
}

// Validate returns an Unprocessable error that says what is wrong with m, whoever signed it.
func (m Manifest) Validate() error {
	if _, err := fleet.ParseProductID(string(m.Product)); err != nil {
		return bad("product: use 1 to %d of a-z, 0-9 and -, neither first nor last a -", fleet.MaxDeviceIDLen)
	}
	if _, err := ParseVersion(string(m.Version)); err != nil {
		return bad("version: %s", err)
	}
	if m.Size < 1 || m.Size > MaxImageSize {
		return bad("size is %d; an image has 1 to %d bytes", m.Size, MaxImageSize)
	}
	if _, err := fleet.ParseHash(string(m.SHA256)); err != nil {
		return bad("sha256: use 64 lower-case hex digits")
	}
	if _, err := fleet.ParseHash(string(m.ImageHash)); err != nil {
		return bad("image_hash: use 64 lower-case hex digits; for a raw image those of sha256")
	}
	if len(m.Chip) > MaxChipLen || m.Chip != chipName(m.Chip) {
		return bad("chip: use at most %d of a-z and 0-9, like esp32s3", MaxChipLen)
	}
	switch lo, hi := m.MinChipRevision, m.MaxChipRevision; {
	case lo < 0 || lo > MaxChipRevision || hi < 0 || hi > MaxChipRevision:
		return bad("min_chip_revision, max_chip_revision: a revision is major × 100 + minor, like 301 for v3.1, at most %d", MaxChipRevision)
	case hi > 0 && hi < lo:
		return bad("max_chip_revision %d is below min_chip_revision %d, so no chip could run it", hi, lo)
	}
	if m.MinVersion == "" {
		return nil
	}
	if _, err := ParseVersion(string(m.MinVersion)); err != nil {
		return bad("min_version: %s", err)
	}
	if m.MinVersion.Compare(m.Version) >= 0 {
		return bad("min_version %s is not below version %s, so no older device could ever take this release", m.MinVersion, m.Version)
	}
	return nil
}

// SameChip reports whether two names are of one chip, in esptool's words or ESP-IDF's.
func SameChip(a, b string) bool { return chipName(a) == chipName(b) }

// chipName returns s as muster compares chips: esptool's "ESP32-S3" and ESP-IDF's "esp32s3" are one chip. What is
// neither letter, digit nor separator is dropped.
func chipName(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z':
			return r + 'a' - 'A'
		case 'a' <= r && r <= 'z', '0' <= r && r <= '9':
			return r
		}
		return -1
	}, s)
}

func bad(format string, a ...any) error {
	return fleet.Coded(fleet.Unprocessable, "manifest_invalid", "manifest: "+format, a...)
}
