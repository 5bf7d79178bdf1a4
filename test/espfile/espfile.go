// Package espfile makes ESP32 applications for tests: whole images that every parser takes, with what a test wants to vary.
package espfile

import (
	"bytes"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
)

// App says what is in an application. The zero value of a field is a sensible one.
type App struct {
	Chip          esp.ChipID // 0 is the ESP32
	Project       string     // empty: lamp
	Version       string     // empty: 1.0.0
	SecureVersion uint32
	MinRev        esp.Revision
	MaxRev        esp.Revision // 0: no limit
	Body          string       // makes one image differ from another
}

// Bytes returns the image.
func (a App) Bytes(t testing.TB) []byte {
	t.Helper()
	or := func(s, other string) string {
		if s == "" {
			return other
		}
		return s
	}
	desc, err := image.AppDesc{
		SecureVersion: a.SecureVersion, ProjectName: or(a.Project, "lamp"), Version: or(a.Version, "1.0.0"), IDFVersion: "v5.3.1", Date: "Nov 22 2026", Time: "12:34:56",
	}.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	body := []byte(a.Body)
	body = append(body, make([]byte, 4-len(body)%4)...)
	h := image.NewHeader(a.Chip)
	h.MinRev = a.MinRev
	if a.MaxRev != 0 {
		h.MaxRev = a.MaxRev
	}
	var out bytes.Buffer
	if err := image.Write(&out, h, []image.Part{{Load: 0x3f400020, Data: desc}, {Load: 0x3ffb0000, Data: body}}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
