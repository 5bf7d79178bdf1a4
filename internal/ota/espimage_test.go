package ota_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/test/espfile"

	espimage "muster/internal/esp/image"
)

// espManifest is the manifest that muster firmware sign would make of an image.
func espManifest(t *testing.T, version firmware.Version, b []byte) firmware.Manifest {
	t.Helper()
	app, err := espapp.Inspect(bytes.NewReader(b), int64(len(b)), espimage.App)
	if err != nil {
		t.Fatal(err)
	}
	m := manifest(version, b)
	m.ImageHash = ""
	if m, err = app.Complete(m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestPublishESPImage(t *testing.T) {
	w := open(t)
	b := espfile.App{MinRev: 100, MaxRev: 399, Project: "arduino-lib-builder"}.Bytes(t)
	m := espManifest(t, "1.0.0", b)
	rel, err := w.publish(m, b)
	if err != nil || rel.Manifest != m || rel.ImageHash == rel.SHA256 || rel.Chip != "esp32" {
		t.Fatalf("%+v, %v", rel, err)
	}
	if again, err := w.publish(m, b); err != nil || again != rel {
		t.Errorf("%+v, %v", again, err)
	}
	for name, c := range map[string]struct {
		change func(*firmware.Manifest)
		want   string
	}{
		"no chip":          {func(m *firmware.Manifest) { m.Chip = "" }, "unprocessable manifest_chip"},
		"another chip":     {func(m *firmware.Manifest) { m.Chip = "esp32s3" }, "unprocessable manifest_chip"},
		"the file's hash":  {func(m *firmware.Manifest) { m.ImageHash = m.SHA256 }, "unprocessable manifest_image_hash"},
		"secure version":   {func(m *firmware.Manifest) { m.SecureVersion = 1 }, "unprocessable manifest_secure_version"},
		"lowest revision":  {func(m *firmware.Manifest) { m.MinChipRevision = 0 }, "unprocessable manifest_chip_revision"},
		"highest revision": {func(m *firmware.Manifest) { m.MaxChipRevision = 0 }, "unprocessable manifest_chip_revision"},
	} {
		m := m
		m.Version = "1.1.0"
		c.change(&m)
		if _, err := w.publish(m, b); codeOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := w.cat.Releases(t.Context(), ""); err != nil || len(all) != 1 {
		t.Errorf("%d releases, %v", len(all), err)
	}
}

// What no device would take is published under no manifest, and nothing of it is kept.
func TestPublishBrokenESPImage(t *testing.T) {
	w := open(t)
	good := espfile.App{}.Bytes(t)
	files, err := filepath.Glob("../esp/image/testdata/negative/*.bin")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	cases := map[string][]byte{"trailing garbage": append(bytes.Clone(good), 1, 2, 3)}
	for _, path := range append(files, "../esp/image/testdata/bootloader_esp32.bin") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 0 && b[0] == 0xE9 {
			cases[path] = b
		}
	}
	for name, b := range cases {
		m := manifest("1.0.0", b)
		m.Chip = "esp32"
		if _, err := w.publish(m, b); !fleet.Is(err, fleet.Unprocessable) || !strings.Contains(codeOf(err), " esp_") && !strings.Contains(codeOf(err), " manifest_") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if files, err := w.blobs.List(); err != nil || len(files) != 0 {
		t.Errorf("%d images, %v", len(files), err)
	}
	raw := manifest("1.0.0", cases["trailing garbage"])
	raw.Chip = "x86"
	if _, err := w.publish(raw, cases["trailing garbage"]); err != nil {
		t.Errorf("an image of another family that begins like one: %v", err)
	}
}

func TestSecureVersionBurns(t *testing.T) {
	w := open(t)
	publish := func(version firmware.Version, secure uint32, burn bool) error {
		b := espfile.App{SecureVersion: secure, Version: string(version)}.Bytes(t)
		_, err := w.cat.Publish(t.Context(), start, ota.Upload{JWS: w.sign(espManifest(t, version, b)), Image: bytes.NewReader(b), By: "ann", BurnSecureVersion: burn})
		return err
	}
	for _, c := range []struct {
		version firmware.Version
		secure  uint32
		burn    bool
		want    string
	}{
		{"1.0.0", 0, false, ""},
		{"1.1.0", 2, false, "unprocessable secure_version_burns"},
		{"1.1.0", 2, true, ""},
		{"1.1.0", 2, false, ""}, // again: it is there already
		{"1.2.0", 2, false, ""},
		{"1.3.0", 3, false, "unprocessable secure_version_burns"},
		{"1.3.0", 1, true, "conflict secure_version_lower"},
		{"1.3.0", 33, true, "unprocessable esp_secure_version"},
	} {
		if c.secure == 33 { // which no signer would sign as an ESP32 image
			b := espfile.App{SecureVersion: 33}.Bytes(t)
			m := manifest(c.version, b)
			m.Chip, m.SecureVersion, m.ImageHash = "esp32", 33, fleet.HashOf(sha256.Sum256(b[:len(b)-32]))
			if _, err := w.cat.Publish(t.Context(), start, ota.Upload{JWS: w.sign(m), Image: bytes.NewReader(b), By: "ann", BurnSecureVersion: c.burn}); codeOf(err) != c.want {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		err := publish(c.version, c.secure, c.burn)
		if got := codeOf(err); err != nil && got != c.want || err == nil && c.want != "" {
			t.Errorf("%+v: %v", c, err)
		}
		if strings.HasSuffix(c.want, "burns") && !strings.Contains(err.Error(), "of 32 steps of the esp32 are left") {
			t.Errorf("%v", err)
		}
	}
	if got := w.audit(); slices.Contains(got, "ann firmware.publish lamp 1.3.0") || !slices.Contains(got, "ann firmware.publish lamp 1.1.0") {
		t.Errorf("%q", got)
	}
}
