package firmware

import (
	"strings"

	"golang.org/x/mod/semver"

	"muster/internal/fleet"
)

// MaxVersionLen is the longest version, in bytes: esp_app_desc_t has room for 32 (esp32.md §1.4).
const MaxVersionLen = 32

// Version is a semantic version (semver.org 2.0.0) without a leading v, of at most MaxVersionLen bytes. It has no build
// metadata: versions that differ only in it have no order (semver §10), so neither could be an update of the other.
type Version string

// ParseVersion returns s as a Version, or an Invalid error that says what is allowed.
func ParseVersion(s string) (Version, error) {
	if len(s) > MaxVersionLen {
		return "", fleet.Errorf(fleet.Invalid, "version longer than %d bytes", MaxVersionLen)
	}
	if strings.HasPrefix(s, "v") {
		return "", fleet.Errorf(fleet.Invalid, "version with a leading v; write 1.2.3")
	}
	if strings.Contains(s, "+") {
		return "", fleet.Errorf(fleet.Invalid, "version with build metadata (after +), which has no order; put it behind a - or leave it out")
	}
	// Canonical fills in what the shorthands 1 and 1.2 leave out; they are not semantic versions.
	if v := "v" + s; semver.Canonical(v) != v {
		return "", fleet.Errorf(fleet.Invalid, "not a semantic version; write MAJOR.MINOR.PATCH, like 1.2.3 or 1.2.3-rc.1")
	}
	return Version(s), nil
}

// Compare returns -1, 0 or 1 as v is below, equal to or above w (semver §11). Both must come from ParseVersion; anything
// else is below every version.
func (v Version) Compare(w Version) int { return semver.Compare("v"+string(v), "v"+string(w)) }

// readVersion reads what a device says of itself more kindly than ParseVersion: a leading v and build metadata are
// habits of firmware builds and do not change the order.
func readVersion(s string) (Version, bool) {
	s, _, _ = strings.Cut(strings.TrimPrefix(s, "v"), "+")
	v, err := ParseVersion(s)
	return v, err == nil
}
