package secureboot_test

import (
	"bytes"
	"testing"

	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
)

// accepted reports whether an upload would take the file, and what was found in it.
func accepted(t *testing.T, file []byte, keys ...string) (bool, *secureboot.Report) {
	t.Helper()
	var trust secureboot.Policy
	for _, k := range keys {
		trust.Keys = append(trust.Keys, secureboot.Slot{Key: public(t, k).Digest()})
	}
	img, err := image.Inspect(bytes.NewReader(file), image.App)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := secureboot.Inspect(bytes.NewReader(file), img)
	if err != nil {
		t.Fatal(err)
	}
	_, err = rep.Check(trust)
	return img.Err() == nil && err == nil, rep
}

// TestDamagedFilesAreRefused flips a bit in every place, and ends the file in every place.
func TestDamagedFilesAreRefused(t *testing.T) {
	for _, f := range []signedFile{
		{name: "signed_rsa3072_4kpad.bin", keys: []string{"rsa3072_a"}},
		{name: "signed_ecdsa192_4kpad.bin", keys: []string{"ecdsa192"}},
	} {
		good := golden(t, f.name)
		if ok, _ := accepted(t, good, f.keys...); !ok {
			t.Fatalf("%s is refused", f.name)
		}
		for at := 0; at < len(good); at += 23 {
			bad := bytes.Clone(good)
			bad[at] ^= 1 << (at % 8)
			ok, rep := accepted(t, bad, f.keys...)
			filler := at >= 4096+1200
			if ok != filler || ok && !rep.Findings.Has("esp_signature_filler") {
				t.Errorf("%s: bit %d of byte 0x%x flipped: accepted is %v, %v", f.name, at%8, at, ok, rep.Findings)
			}
		}
		for n := 0; n < len(good); n += 37 {
			if ok, _ := accepted(t, good[:n], f.keys...); ok {
				t.Errorf("%s: its first %d bytes are accepted", f.name, n)
			}
		}
	}
}
