package firmware

import (
	"fmt"

	"muster/internal/fleet"
)

// Device is what decides whether a release fits a device: what the operator registered and what its hello said. Empty
// fields are unknown.
type Device struct {
	Product       fleet.ProductID
	Chip          string
	ChipRevision  int    // silicon revision × 100; 0: unknown
	Version       string // in the device's own words
	SecureVersion uint32 // of its anti-rollback counter
}

// Misfit is a stable word for why a release must not be offered to a device; empty if it may be.
type Misfit string

// Reasons against a release.
const (
	Fits           Misfit = ""
	WrongProduct   Misfit = "wrong-product"
	WrongChip      Misfit = "wrong-chip"
	ChipUnknown    Misfit = "chip-unknown"
	WrongRevision  Misfit = "wrong-chip-revision"
	NoRevision     Misfit = "chip-revision-unknown"
	SecureTooLow   Misfit = "secure-version-too-low"
	VersionUnknown Misfit = "version-unknown"
	BelowMinimum   Misfit = "below-min-version"
	Downgrade      Misfit = "downgrade"
	NotSigned      Misfit = "secure-boot-unsigned"
	KeyRevoked     Misfit = "secure-boot-key-revoked"
	KeyUnknown     Misfit = "secure-boot-key-unknown"
)

// Fit says whether m may be offered to d: a word for programs and a sentence for people, both empty if it may. What m
// demands and d has not told counts against it. A version that has no order (a developer's build) may be replaced by
// any release that demands no minimum. Downgrades are refused unless allowed; a secure version is never lowered,
// because the device's bootloader would not start the image.
func (m Manifest) Fit(d Device, allowDowngrade bool) (Misfit, string) {
	if d.Product != m.Product {
		return WrongProduct, fmt.Sprintf("the release is for product %s, the device is of product %s", m.Product, orNone(string(d.Product)))
	}
	if m.Chip != "" && d.Chip == "" {
		return ChipUnknown, fmt.Sprintf("the release is for %s, and the device's hello did not name its chip", m.Chip)
	}
	if m.Chip != "" && chipName(d.Chip) != m.Chip {
		return WrongChip, fmt.Sprintf("the release is for %s, the device says that it is %.24q", m.Chip, d.Chip)
	}
	if misfit, why := m.fitRevision(d.ChipRevision); misfit != Fits {
		return misfit, why
	}
	if m.SecureVersion < d.SecureVersion {
		return SecureTooLow, fmt.Sprintf("the release has secure version %d, the device's anti-rollback counter is %d", m.SecureVersion, d.SecureVersion)
	}
	runs, known := readVersion(d.Version)
	if m.MinVersion != "" && !known {
		return VersionUnknown, fmt.Sprintf("the release updates from %s on, and the device's version %.32q has no order", m.MinVersion, d.Version)
	}
	if m.MinVersion != "" && runs.Compare(m.MinVersion) < 0 {
		return BelowMinimum, fmt.Sprintf("the release updates from %s on, the device runs %s; update it to a version in between first", m.MinVersion, runs)
	}
	if known && m.Version.Compare(runs) < 0 && !allowDowngrade {
		return Downgrade, fmt.Sprintf("the release is %s, the device runs the newer %s", m.Version, runs)
	}
	return Fits, ""
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}

// fitRevision holds a chip's revision to what the image runs on.
func (m Manifest) fitRevision(rev int) (Misfit, string) {
	lo, hi := m.MinChipRevision, m.MaxChipRevision
	switch {
	case lo == 0 && hi == 0:
		return Fits, ""
	case rev == 0:
		return NoRevision, fmt.Sprintf("the release runs on %s, and the device's hello did not name its chip's revision", revisions(lo, hi))
	case rev < lo || hi > 0 && rev > hi:
		return WrongRevision, fmt.Sprintf("the release runs on %s, the device has revision %s", revisions(lo, hi), revision(rev))
	}
	return Fits, ""
}

func revision(n int) string { return fmt.Sprintf("v%d.%d", n/100, n%100) }

func revisions(lo, hi int) string {
	switch {
	case hi == 0:
		return "chip revisions from " + revision(lo) + " on"
	case lo == 0:
		return "chip revisions up to " + revision(hi)
	}
	return fmt.Sprintf("chip revisions %s to %s", revision(lo), revision(hi))
}
