package httpapi

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"

	"muster/internal/fleet"
)

// cursors makes the opaque cursors of lists: the place after which the next page begins, authenticated together with the
// list and the filters that it belongs to. A forged one, or one of another list, is refused before the store is asked.
type cursors struct{ key []byte }

const cursorTag = 16 // bytes of HMAC-SHA-256

func (c cursors) tag(list, after string) []byte {
	m := hmac.New(sha256.New, c.key)
	m.Write([]byte(list))
	m.Write([]byte{0})
	m.Write([]byte(after))
	return m.Sum(nil)[:cursorTag]
}

// make returns the cursor for what comes after the item after of list.
func (c cursors) make(list, after string) string {
	return base64.RawURLEncoding.EncodeToString(append(c.tag(list, after), after...))
}

// open returns what make was given, or an Invalid error.
func (c cursors) open(list, cursor string) (string, error) {
	bad := fleet.Coded(fleet.Invalid, "cursor_invalid", "cursor: it is not one of this list with these filters; begin again without it")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(cursor)
	if err != nil || len(raw) < cursorTag {
		return "", bad
	}
	after := string(raw[cursorTag:])
	if !hmac.Equal(raw[:cursorTag], c.tag(list, after)) {
		return "", bad
	}
	return after, nil
}
