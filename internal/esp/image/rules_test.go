package image_test

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/fleet"
)

// build returns an application of one segment for the chip, after change had its way with header and descriptor.
func build(t testing.TB, chip esp.ChipID, change func(*image.Header, *image.AppDesc, *image.Part)) []byte {
	t.Helper()
	h := image.NewHeader(chip)
	d := image.AppDesc{Version: "1.0.0", ProjectName: "sensor", IDFVersion: "v5.5"}
	p := image.Part{Load: 0x3FFB0000, Data: bytes.Repeat([]byte{0x5A}, 1024)}
	if change != nil {
		change(&h, &d, &p)
	}
	b, err := d.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	copy(p.Data, b)
	return write(t, h, []image.Part{p})
}

func TestRules(t *testing.T) {
	type change = func(*image.Header, *image.AppDesc, *image.Part)
	tests := []struct {
		name   string
		chip   esp.ChipID
		change change
		code   string
		sev    esp.Severity
	}{
		{"plain", 0, nil, "", ""},
		{"secure version at the ESP32's budget", 0, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.SecureVersion = 32 }, "", ""},
		{"above it", 0, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.SecureVersion = 33 }, "esp_secure_version", esp.Error},
		{"above that of most", 9, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.SecureVersion = 17 }, "esp_secure_version", esp.Error},
		{"above the C5's", 0x17, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.SecureVersion = 10 }, "esp_secure_version", esp.Error},
		{"above the C2's", 0xC, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.SecureVersion = 5 }, "esp_secure_version", esp.Error},
		{"secure version of an unknown chip", 0x7777, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.SecureVersion = 1000 }, "esp_chip_unknown", esp.Warning},
		{"no revision in between", 0, func(h *image.Header, _ *image.AppDesc, _ *image.Part) { h.MinRev, h.MaxRev = 301, 300 }, "esp_revision_range", esp.Error},
		{"a highest revision of 0 is none", 0, func(h *image.Header, _ *image.AppDesc, _ *image.Part) { h.MinRev, h.MaxRev = 301, 0 }, "", ""},
		{"reserved header bytes", 0, func(h *image.Header, _ *image.AppDesc, _ *image.Part) { h.Reserved[2] = 1 }, "esp_reserved", esp.Warning},
		{"no appended hash", 0, func(h *image.Header, _ *image.AppDesc, _ *image.Part) { h.HashPresent = 0 }, "esp_no_hash", esp.Info},
		{"mapped where it lies", 0, func(_ *image.Header, _ *image.AppDesc, p *image.Part) { p.Load = 0x3F400020 }, "", ""},
		{"mapped elsewhere in the page", 0, func(_ *image.Header, _ *image.AppDesc, p *image.Part) { p.Load = 0x3F400040 }, "esp_segment_mapping", esp.Error},
		{"mapped in a smaller page", 0xD, func(_ *image.Header, d *image.AppDesc, p *image.Part) { d.PageSizeLog2, p.Load = 13, 0x42002020 }, "", ""},
		{"the same in a large page", 0xD, func(_ *image.Header, _ *image.AppDesc, p *image.Part) { p.Load = 0x42002020 }, "esp_segment_mapping", esp.Error},
		{"no such page", 0xD, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.PageSizeLog2 = 40 }, "esp_page_size", esp.Error},
		{"arduino", 0, func(_ *image.Header, d *image.AppDesc, _ *image.Part) { d.ProjectName = "arduino-lib-builder" }, "esp_arduino_descriptor", esp.Info},
	}
	for _, tt := range tests {
		rep, err := image.Inspect(bytes.NewReader(build(t, tt.chip, tt.change)), image.App)
		if err != nil {
			t.Fatal(err)
		}
		if tt.code == "" {
			if len(rep.Findings) > 0 {
				t.Errorf("%s: %v", tt.name, rep.Findings)
			}
			continue
		}
		if len(rep.Findings) != 1 || rep.Findings[0].Code != tt.code || rep.Findings[0].Severity != tt.sev {
			t.Errorf("%s: found %v, want %s", tt.name, rep.Findings, tt.code)
		}
	}
}

func TestTrailers(t *testing.T) {
	app := build(t, 0, nil)
	gap := bytes.Repeat([]byte{0xFF}, 4096-len(app)%4096)
	fill := func(n int, c byte) []byte { return bytes.Repeat([]byte{c}, n) }
	arduino := append(fill(256, 0xA5), fill(256, 0)...)
	der := append([]byte{0x30, 70}, append(fill(70, 2), fill(440, 0)...)...)
	merged := append(bytes.Clone(app), fill(0x8000-len(app), 0xFF)...)
	merged = append(merged, 0xAA, 0x50)
	tests := []struct {
		name  string
		after []byte
		kind  image.TrailerKind
		code  string
	}{
		{"nothing", nil, image.NoTrailer, ""},
		{"one byte of filler", fill(1, 0xFF), image.Filler, ""},
		{"filler over sectors", fill(10_000, 0xFF), image.Filler, ""},
		{"filler of Arduino's length", fill(512, 0xFF), image.Filler, ""},
		{"what is no filler and no UTF-8", fill(100, 0xEF), image.Unknown, "esp_trailing_data"},
		{"filler with a bit gone", append(fill(9000, 0xFF), 0xFE), image.Unknown, "esp_trailing_data"},
		{"zeros", fill(512, 0), image.Unknown, "esp_trailing_data"},
		{"an RSA signature of Arduino's", arduino, image.ArduinoTrail, ""},
		{"an ECDSA signature of Arduino's", der, image.ArduinoTrail, ""},
		{"one byte more", append(bytes.Clone(arduino), 0), image.Unknown, "esp_trailing_data"},
		{"Secure Boot v1", append(fill(4, 0), fill(64, 7)...), image.SignatureV1, "esp_secure_boot_v1"},
		{"a sector of something else", append(bytes.Clone(gap), fill(4096, 1)...), image.Unknown, "esp_trailing_data"},
		{"a sector that begins like a signature", append(bytes.Clone(gap), append([]byte{0xE7, 2}, fill(4094, 0xFF)...)...), image.Unknown, "esp_signature_damaged"},
		{"half of one", append(bytes.Clone(gap), append([]byte{0xE7, 2}, fill(2046, 0xFF)...)...), image.Unknown, "esp_signature_length"},
		{"a whole flash image", merged[len(app):], image.Unknown, "esp_merged_image"},
	}
	for _, tt := range tests {
		rep, err := image.Inspect(bytes.NewReader(append(bytes.Clone(app), tt.after...)), image.App)
		if err != nil {
			t.Fatal(err)
		}
		if rep.Trailer.Kind != tt.kind || rep.Trailer.Length != int64(len(tt.after)) || rep.Trailer.Offset != int64(len(app)) {
			t.Errorf("%s: trailer is %+v", tt.name, rep.Trailer)
		}
		if tt.code == "" && rep.Err() != nil || tt.code != "" && !rep.Findings.Has(tt.code) {
			t.Errorf("%s: found %v, want %q", tt.name, rep.Findings, tt.code)
		}
		if (rep.Trailer.Sector() != nil) != (tt.kind == image.Signature) {
			t.Errorf("%s: a sector of %d bytes", tt.name, len(rep.Trailer.Sector()))
		}
	}
}

func TestWrongFilesGetAHint(t *testing.T) {
	for prefix, hint := range map[string]string{"\x7fELF\x01": "elf2image", "\xeafoo": "ESP8266", ":10": "Intel HEX", "\xaaP\x01": "partition table", "PK\x03\x04": "unpack", "\xff\xff\xff\xff": "erased"} {
		_, err := image.Parse(strings.NewReader(prefix), image.App)
		if !fleet.Is(err, fleet.Unprocessable) || !strings.Contains(err.Error(), hint) {
			t.Errorf("%q: %v", prefix, err)
		}
	}
}

func TestKinds(t *testing.T) {
	app, boot := golden(t, "app_esp32_small.bin"), golden(t, "bootloader_esp32.bin")
	described := make([]byte, 300)
	described[0] = 80
	copy(described[8:], "v5.5.1")
	newer := write(t, image.NewHeader(9), []image.Part{{Load: 0x3FCE0000, Data: described}})
	tests := []struct {
		name string
		file []byte
		want image.Kind
		kind image.Kind
		code string
	}{
		{"an application", app, image.Any, image.App, ""},
		{"an application as a bootloader", app, image.Bootloader, image.App, "esp_not_bootloader"},
		{"an old bootloader", boot, image.Any, image.Other, ""},
		{"an old bootloader as such", boot, image.Bootloader, image.Other, ""},
		{"an old bootloader as an application", boot, image.App, image.Other, "esp_descriptor_magic"},
		{"a bootloader", newer, image.Bootloader, image.Bootloader, ""},
	}
	for _, tt := range tests {
		rep, err := image.Parse(bytes.NewReader(tt.file), tt.want)
		if rep.Kind != tt.kind || (err != nil) != (tt.code != "") || !rep.Findings.Has(tt.code) && tt.code != "" {
			t.Errorf("%s: %s, %v", tt.name, rep.Kind, err)
		}
	}
}

func TestCheckDeviceAndSlot(t *testing.T) {
	rep, err := image.Parse(bytes.NewReader(build(t, 5, func(h *image.Header, d *image.AppDesc, _ *image.Part) {
		h.MinRev, h.MaxRev, d.SecureVersion = 3, 199, 6
	})), image.App)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		chip esp.ChipID
		rev  esp.Revision
		ok   bool
	}{{5, 3, true}, {5, 199, true}, {5, 2, false}, {5, 200, false}, {9, 100, false}} {
		if err := rep.CheckDevice(tt.chip, tt.rev); (err == nil) != tt.ok {
			t.Errorf("%s %s: %v", tt.chip, tt.rev, err)
		}
	}
	if rep.CheckSlot(rep.Size) != nil || !fleet.Is(rep.CheckSlot(rep.Size-1), fleet.Unprocessable) {
		t.Errorf("a file of %d bytes: %v, %v", rep.Size, rep.CheckSlot(rep.Size), rep.CheckSlot(rep.Size-1))
	}
	if left, all, known := rep.SecureSteps(); left != 10 || all != 16 || !known {
		t.Errorf("%d of %d steps left, %v", left, all, known)
	}
}

func TestReadErrorIsNoFinding(t *testing.T) {
	broken := errors.New("the disk is gone")
	b := golden(t, "app_esp32_small.bin")
	for _, n := range []int{0, 10, 24, 200, 1000, len(b) - 10} {
		_, err := image.Parse(io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken)), image.App)
		if !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	if _, err := image.Parse(iotest.OneByteReader(bytes.NewReader(b)), image.App); err != nil {
		t.Errorf("byte by byte: %v", err)
	}
}

type zeros struct{ read int64 }

func (z *zeros) Read(p []byte) (int, error) {
	clear(p)
	z.read += int64(len(p))
	return len(p), nil
}

func TestEndlessFileIsBounded(t *testing.T) {
	var z zeros
	app := golden(t, "app_esp32_small.bin")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rep, err := image.Inspect(io.MultiReader(bytes.NewReader(app), &z), image.App)
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 256<<10 {
		t.Errorf("%d bytes were allocated", n)
	}
	if err != nil || len(rep.Findings) == 0 || rep.Findings[0].Code != "esp_too_large" || rep.SHA256 != "" {
		t.Errorf("%v, %v", rep.Findings, err)
	}
	if z.read > image.MaxSize+1<<20 {
		t.Errorf("%d bytes were read", z.read)
	}
}

func TestWriteRefuses(t *testing.T) {
	ok := image.Part{Load: 0x3FFB0000, Data: make([]byte, 4)}
	tests := map[string]struct {
		h     image.Header
		parts []image.Part
	}{
		"no segment":        {image.NewHeader(0), nil},
		"17 segments":       {image.NewHeader(0), bytesOf(17, ok)},
		"an odd length":     {image.NewHeader(0), []image.Part{{Data: make([]byte, 3)}}},
		"a giant":           {image.NewHeader(0), []image.Part{{Data: make([]byte, image.MaxSegment)}}},
		"more than a flash": {image.NewHeader(0), bytesOf(2, image.Part{Data: make([]byte, 12<<20)})},
		"a wrong flag":      {image.Header{HashPresent: 2}, []image.Part{ok}},
		"a wrong nibble":    {image.Header{SPISpeed: 16}, []image.Part{ok}},
	}
	for name, tt := range tests {
		var out bytes.Buffer
		if err := image.Write(&out, tt.h, tt.parts); !fleet.Is(err, fleet.Invalid) || out.Len() > 0 {
			t.Errorf("%s: %v, %d bytes written", name, err, out.Len())
		}
	}
	long := image.AppDesc{Version: strings.Repeat("v", 32)}
	if _, err := long.Bytes(); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a version of 32 bytes: %v", err)
	}
}

func bytesOf(n int, p image.Part) []image.Part {
	all := make([]image.Part, n)
	for i := range all {
		all[i] = p
	}
	return all
}

// Segments that together are larger than any flash: the file is too large, not cut off.
func TestGiantSegments(t *testing.T) {
	var z zeros
	app := bytes.Clone(golden(t, "app_esp32_small.bin")[:32])
	app[28], app[29], app[30], app[31] = 0xFC, 0xFF, 0xFF, 0
	rep, err := image.Inspect(io.MultiReader(bytes.NewReader(app), &z), image.Any)
	if err != nil || len(rep.Findings) == 0 || rep.Findings[0].Code != "esp_too_large" || rep.Findings.Has("esp_truncated") {
		t.Errorf("%v, %v", rep.Findings, err)
	}
}
