package pki

import (
	"strings"
	"time"

	"muster/internal/fleet"
)

// BlockedKey is a key that gets no certificate, whoever asks: its private half is known to others.
type BlockedKey struct {
	SHA256 fleet.Hash // KeyHash
	Since  time.Time
	By     string // the operator
	Why    string
}

// MaxBlocklist is the largest block list, in bytes: a quarter of a million keys.
const MaxBlocklist = 16 << 20

// ParseBlocklist reads hashes of public keys (KeyHash), one a line; blank lines, and what follows a #, do not count. The
// error is Invalid and names the line.
func ParseBlocklist(text string) (map[fleet.Hash]bool, error) {
	if len(text) > MaxBlocklist {
		return nil, fleet.Errorf(fleet.Invalid, "a block list has at most %d bytes", MaxBlocklist)
	}
	out := map[fleet.Hash]bool{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		h, err := fleet.ParseHash(strings.ToLower(line))
		if err != nil {
			return nil, fleet.Errorf(fleet.Invalid, "line %d is not the SHA-256 of a public key in 64 hex digits", n)
		}
		out[h] = true
	}
	return out, nil
}
