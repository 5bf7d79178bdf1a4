package image_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/fleet"
)

// FuzzParse: nothing panics; every error is a finding with an offset in the file; what is accepted and is written again
// from its header and segments has the same bytes.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/*small.bin", "testdata/bootloader*.bin", "testdata/negative/*.bin"} {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			f.Fatalf("no file fits %s (%v)", pattern, err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		rep, err := image.Parse(bytes.NewReader(b), image.Any)
		for _, finding := range rep.Findings {
			if finding.Offset < 0 || finding.Offset > int64(len(b)) || finding.Code == "" || finding.Message == "" {
				t.Errorf("%+v in a file of %d bytes", finding, len(b))
			}
		}
		if err != nil {
			if !fleet.Is(err, fleet.Unprocessable) {
				t.Fatal(err)
			}
			return
		}
		if rep.Size != int64(len(b)) || rep.Trailer.Offset != rep.Len || rep.Len+rep.Trailer.Length != rep.Size {
			t.Fatalf("%d bytes: image %d, trailer %+v", len(b), rep.Len, rep.Trailer)
		}
		if rep.Findings.Has("esp_padding") {
			return
		}
		if back := write(t, *rep.Header, partsOf(rep, b)); !bytes.Equal(back, b[:rep.Len]) {
			t.Fatal("written again it has other bytes")
		}
	})
}

// FuzzWrite: what is written is read again as it was.
func FuzzWrite(f *testing.F) {
	f.Add(uint16(0), uint32(0x400D0020), uint32(0x40080000), byte(1), []byte("0123"), []byte("abcdefgh"))
	f.Add(uint16(9), uint32(0), uint32(0x3FC80000), byte(0), []byte{}, make([]byte, 300))
	f.Fuzz(func(t *testing.T, chip uint16, entry, load uint32, hash byte, one, two []byte) {
		h := image.NewHeader(esp.ChipID(chip))
		h.Entry, h.HashPresent = entry, hash
		parts := []image.Part{{Load: load, Data: one}, {Load: load ^ 0x100, Data: two}}
		var out bytes.Buffer
		if err := image.Write(&out, h, parts); err != nil {
			if !fleet.Is(err, fleet.Invalid) || out.Len() > 0 {
				t.Fatal(err)
			}
			return
		}
		rep, err := image.Inspect(&out, image.Any)
		if err != nil {
			t.Fatal(err)
		}
		if *rep.Header != h || len(rep.Segments) != 2 || rep.Segments[0].Load != load || rep.Segments[1].Length != uint32(len(two)) {
			t.Fatalf("%+v became %+v, %+v", h, *rep.Header, rep.Segments)
		}
		for _, code := range []string{"esp_checksum", "esp_image_hash", "esp_truncated", "esp_trailing_data", "esp_hash_flag"} {
			if rep.Findings.Has(code) {
				t.Fatal(rep.Findings)
			}
		}
	})
}
