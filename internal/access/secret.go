package access

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"strings"

	"muster/internal/fleet"
)

// Prefix marks a token, so that people and secret scanners recognise one.
const Prefix = "mst_"

// secretLen is the length of a token: Prefix and 256 bits as base64url without padding.
const secretLen = len(Prefix) + 43

// newSecret returns a token that nobody can guess.
func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return Prefix + base64.RawURLEncoding.EncodeToString(b[:])
}

// hashOf returns the hash under which a token is kept, false if s cannot be a token. A token has full entropy, so one
// SHA-256 is enough (DESIGN §4).
func hashOf(s string) (fleet.Hash, bool) {
	if len(s) != secretLen || !strings.HasPrefix(s, Prefix) {
		return "", false
	}
	// Strict: of the spellings that decode to the same 32 bytes, only the one that was given out is the token.
	if _, err := base64.RawURLEncoding.Strict().DecodeString(s[len(Prefix):]); err != nil || strings.ContainsAny(s, "\r\n") {
		return "", false
	}
	return fleet.HashOf(sha256.Sum256([]byte(s))), true
}
