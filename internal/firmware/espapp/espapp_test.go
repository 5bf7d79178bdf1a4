package espapp_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/fleet"
	"muster/test/espfile"
)

const esp32c6 = esp.ChipID(0x0D)

func look(t testing.TB, b []byte) *espapp.App {
	t.Helper()
	a, err := espapp.Inspect(bytes.NewReader(b), int64(len(b)), image.App)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// manifest is what a release says before the image was read.
func manifest(b []byte) firmware.Manifest {
	return firmware.Manifest{Product: "lamp", Version: "1.0.0", Size: int64(len(b)), SHA256: fleet.HashOf(sha256.Sum256(b))}
}

func code(err error) string {
	if e, ok := err.(*fleet.Error); ok {
		return e.Code
	}
	return ""
}

func TestRecognise(t *testing.T) {
	for _, c := range []struct {
		first byte
		chip  string
		want  bool
	}{
		{0xE9, "", true}, {0xE9, "esp32", true}, {0xE9, "esp32c61", true},
		{0xE9, "esp8266", false}, {0xE9, "x86", false}, {'M', "esp32", false}, {0, "", false},
	} {
		if got := espapp.Recognise(c.first, c.chip); got != c.want {
			t.Errorf("%#x for %q: %v", c.first, c.chip, got)
		}
	}
}

func TestComplete(t *testing.T) {
	b := espfile.App{SecureVersion: 3, MinRev: 300, MaxRev: 399}.Bytes(t)
	body := sha256.Sum256(b[:len(b)-32])
	want := manifest(b)
	want.Chip, want.ImageHash, want.SecureVersion, want.MinChipRevision, want.MaxChipRevision = "esp32", fleet.HashOf(body), 3, 300, 399
	a := look(t, b)
	got, err := a.Complete(manifest(b))
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
	if a.Steps() != "29 of 32 steps of the esp32 are left" {
		t.Error(a.Steps())
	}
	if again, err := a.Complete(want); err != nil || again != want {
		t.Errorf("%+v, %v", again, err)
	}
	narrow := want
	narrow.MinChipRevision, narrow.MaxChipRevision = 301, 302
	if got, err := a.Complete(narrow); err != nil || got != narrow {
		t.Errorf("a narrower range: %+v, %v", got, err)
	}
}

// What a manifest says that is not so is refused, by its signer and by the server alike.
func TestContradictions(t *testing.T) {
	b := espfile.App{SecureVersion: 3, MinRev: 300, MaxRev: 399}.Bytes(t)
	a := look(t, b)
	good, err := a.Complete(manifest(b))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*firmware.Manifest)
		code   string
	}{
		"chip":             {func(m *firmware.Manifest) { m.Chip = "esp32s3" }, "manifest_chip"},
		"image hash":       {func(m *firmware.Manifest) { m.ImageHash = m.SHA256 }, "manifest_image_hash"},
		"secure version":   {func(m *firmware.Manifest) { m.SecureVersion = 4 }, "manifest_secure_version"},
		"lowest revision":  {func(m *firmware.Manifest) { m.MinChipRevision = 200 }, "manifest_chip_revision"},
		"highest revision": {func(m *firmware.Manifest) { m.MaxChipRevision = 400 }, "manifest_chip_revision"},
	} {
		m := good
		c.change(&m)
		if err := a.Agree(m); code(err) != c.code || !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := a.Complete(m); code(err) != c.code {
			t.Errorf("%s, by the signer: %v", name, err)
		}
	}
	for name, empty := range map[string]func(*firmware.Manifest){
		"no chip":             func(m *firmware.Manifest) { m.Chip = "" },
		"no secure version":   func(m *firmware.Manifest) { m.SecureVersion = 0 },
		"no highest revision": func(m *firmware.Manifest) { m.MaxChipRevision = 0 },
	} {
		m := good
		empty(&m)
		if err := a.Agree(m); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: a manifest may not leave it out: %v", name, err)
		}
	}
}

// A chip that muster does not know yet is carried through.
func TestUnknownChip(t *testing.T) {
	a := look(t, espfile.App{Chip: 0x7777}.Bytes(t))
	m, err := a.Complete(firmware.Manifest{Chip: "esp32x9"})
	if err != nil || m.Chip != "esp32x9" || a.Steps() != "" {
		t.Errorf("%+v, %q, %v", m, a.Steps(), err)
	}
}

func TestDoubts(t *testing.T) {
	for name, c := range map[string]struct {
		app  espfile.App
		want string
	}{
		"the same":          {espfile.App{}, ""},
		"v before":          {espfile.App{Version: "v1.0.0"}, ""},
		"another version":   {espfile.App{Version: "0.9.0"}, "esp_version_differs"},
		"another name":      {espfile.App{Project: "toaster"}, "esp_name_differs"},
		"Arduino's, always": {espfile.App{Project: "arduino-lib-builder", Version: "esp-idf: v4.4.7 38eeba213a"}, ""},
	} {
		b := c.app.Bytes(t)
		a := look(t, b)
		m, err := a.Complete(manifest(b))
		if err != nil {
			t.Errorf("%s: it only warns: %v", name, err)
		}
		var got []string
		for _, f := range a.Doubts(m) {
			if f.Severity != esp.Warning || !strings.Contains(string(b[f.Offset:f.Offset+32]), strings.Split(f.Message, `"`)[1]) {
				t.Errorf("%s: %s", name, f)
			}
			got = append(got, f.Code)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Every image that a device would refuse is refused, with the code of the reason.
func TestBroken(t *testing.T) {
	files, err := filepath.Glob("../../esp/image/testdata/negative/*.bin")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, path := range append(files, "../../esp/image/testdata/bootloader_esp32.bin") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		a := look(t, b)
		if err := a.Agree(manifest(b)); !fleet.Is(err, fleet.Unprocessable) || code(err) == "" {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := a.Complete(manifest(b)); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func signed(t testing.TB, b []byte, keys ...*ecdsa.PrivateKey) []byte {
	t.Helper()
	s, err := secureboot.Start(bytes.NewReader(b), int64(len(b)), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if err := s.Sign(rand.Reader, k); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if _, err := s.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func newKey(t testing.TB, c elliptic.Curve) (*ecdsa.PrivateKey, secureboot.KeyDigest) {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := secureboot.KeyOf(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return k, pub.Digest()
}

func TestAccepted(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		k1, d1 := newKey(t, curve)
		k2, d2 := newKey(t, curve)
		_, d3 := newKey(t, curve)
		plain := espfile.App{Chip: esp32c6}.Bytes(t)
		if curve == elliptic.P384() {
			plain = espfile.App{Chip: 0x7777}.Bytes(t) // whose schemes are not known
		}
		both := look(t, signed(t, plain, k1, k2))
		if err := both.Err(); err != nil {
			t.Fatal(err)
		}
		if a, b := look(t, plain).Image.ImageHash, both.Image.ImageHash; a != b {
			t.Errorf("a signature changed how a device names its image: %s, %s", a, b)
		}
		for _, c := range []struct {
			app  *espapp.App
			keys []secureboot.Slot
			code string
		}{
			{both, []secureboot.Slot{{Key: d1}}, ""},
			{both, []secureboot.Slot{{Key: d2}}, ""},
			{both, []secureboot.Slot{{Key: d1, Revoked: true}, {Key: d2}}, ""},
			{both, []secureboot.Slot{{Key: d3}}, "esp_key_unknown"},
			{both, []secureboot.Slot{{Key: d1, Revoked: true}}, "esp_key_revoked"},
			{both, nil, "esp_key_unknown"},
			{look(t, plain), []secureboot.Slot{{Key: d1}}, "esp_unsigned"},
		} {
			if err := c.app.Accepted(c.keys); code(err) != c.code {
				t.Errorf("%v: %v, want %q", c.keys, err, c.code)
			}
		}
	}
}

// Whatever one byte of an image becomes, the manifest of the good image no longer fits it, or it is broken.
func TestNoByteIsFree(t *testing.T) {
	k, _ := newKey(t, elliptic.P256())
	b := signed(t, espfile.App{Chip: esp32c6, SecureVersion: 2, Body: "hello"}.Bytes(t), k)
	a := look(t, b)
	good, err := a.Complete(manifest(b))
	if err != nil {
		t.Fatal(err)
	}
	end := a.Image.MessageLen() + 1200 // what follows the first block's checksum is filler, of which the file's hash takes care
	rapid.Check(t, func(t *rapid.T) {
		bad := bytes.Clone(b)
		at := rapid.Int64Range(0, end-1).Draw(t, "offset")
		bad[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
		app, err := espapp.Inspect(bytes.NewReader(bad), int64(len(bad)), image.App)
		if err != nil {
			t.Fatal(err)
		}
		m := good
		m.SHA256 = fleet.HashOf(sha256.Sum256(bad))
		if err := app.Agree(m); err == nil && app.SecureBoot.Signed() {
			t.Fatalf("offset 0x%x may be anything", at)
		}
	})
}
