package image_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/fleet"
)

// expected is what esptool's own parser says of an image: testdata/expected.json.
type expected struct {
	File     string     `json:"file"`
	Size     int64      `json:"size"`
	SHA256   fleet.Hash `json:"sha256"`
	ChipID   uint16     `json:"chip_id"`
	Chip     string     `json:"chip"`
	Segments []struct {
		Load   uint32 `json:"load_addr"`
		Length uint32 `json:"length"`
		Offset int64  `json:"file_offset"` // of the segment's header
	} `json:"segments"`
	Entry     uint32     `json:"entry"`
	FlashMode byte       `json:"flash_mode"`
	SizeFreq  byte       `json:"flash_size_freq"`
	WPPin     byte       `json:"wp_pin"`
	MinRevOld byte       `json:"min_rev"`
	MinRev    uint16     `json:"min_rev_full"`
	MaxRev    uint16     `json:"max_rev_full"`
	Checksum  byte       `json:"checksum"`
	Appended  bool       `json:"hash_appended"`
	ImageHash fleet.Hash `json:"image_sha256"`
	HashedLen int64      `json:"hashed_len"`
	App       *struct {
		SecureVersion uint32     `json:"secure_version"`
		Version       string     `json:"version"`
		Project       string     `json:"project_name"`
		Time          string     `json:"time"`
		Date          string     `json:"date"`
		IDF           string     `json:"idf_ver"`
		ELF           fleet.Hash `json:"app_elf_sha256"`
		MinBlock      uint16     `json:"min_efuse_blk_rev_full"`
		MaxBlock      uint16     `json:"max_efuse_blk_rev_full"`
		PageSize      byte       `json:"mmu_page_size_log2"`
		SPIMode       byte       `json:"spi_flash_mode"`
	} `json:"app_desc"`
}

func expectations(t *testing.T) []expected {
	t.Helper()
	var all []expected
	if err := json.Unmarshal(golden(t, "expected.json"), &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// file returns a golden image. The one that is padded for Secure Boot is made from the small one, which is the same
// application without the padding.
func file(t testing.TB, name string) []byte {
	t.Helper()
	if name != "app_esp32_padv2.bin" {
		return golden(t, name)
	}
	small := golden(t, "app_esp32_small.bin")
	rep, err := image.Parse(bytes.NewReader(small), image.App)
	if err != nil {
		t.Fatal(err)
	}
	parts := partsOf(rep, small)
	return write(t, *rep.Header, append(parts, image.SecurePad(parts)))
}

func partsOf(rep *image.Report, b []byte) []image.Part {
	var parts []image.Part
	for _, s := range rep.Segments {
		parts = append(parts, image.Part{Load: s.Load, Data: b[s.Offset : s.Offset+int64(s.Length)]})
	}
	return parts
}

func write(t testing.TB, h image.Header, parts []image.Part) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := image.Write(&out, h, parts); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestParseSaysWhatEsptoolSays(t *testing.T) {
	for _, want := range expectations(t) {
		t.Run(want.File, func(t *testing.T) {
			b := file(t, want.File)
			kind := image.Any
			if want.App != nil {
				kind = image.App
			}
			rep, err := image.Parse(bytes.NewReader(b), kind)
			if err != nil {
				t.Fatal(err)
			}
			if rep.Size != want.Size || rep.SHA256 != want.SHA256 || rep.Chip != want.Chip {
				t.Errorf("size %d, SHA-256 %s, chip %s", rep.Size, rep.SHA256, rep.Chip)
			}
			h := image.Header{
				SPIMode: want.FlashMode, SPISpeed: want.SizeFreq & 0xF, SPISize: want.SizeFreq >> 4, Entry: want.Entry, WPPin: want.WPPin,
				Chip: esp.ChipID(want.ChipID), MinRevOld: want.MinRevOld, MinRev: esp.Revision(want.MinRev), MaxRev: esp.Revision(want.MaxRev),
			}
			if want.Appended {
				h.HashPresent = 1
			}
			if *rep.Header != h {
				t.Errorf("header is\n%+v, want\n%+v", *rep.Header, h)
			}
			if len(rep.Segments) != len(want.Segments) {
				t.Fatalf("%d segments, want %d", len(rep.Segments), len(want.Segments))
			}
			for i, s := range rep.Segments {
				w := want.Segments[i]
				if s.Load != w.Load || s.Length != w.Length || s.Offset != w.Offset+image.SegmentHeader {
					t.Errorf("segment %d is %+v, want %+v", i, s, w)
				}
			}
			if rep.Checksum != want.Checksum || rep.ComputedChecksum != want.Checksum {
				t.Errorf("checksum %#x, computed %#x, want %#x", rep.Checksum, rep.ComputedChecksum, want.Checksum)
			}
			if want.Appended && (rep.ImageHash != want.ImageHash || rep.Appended != want.ImageHash || rep.BodyLen != want.HashedLen) {
				t.Errorf("hash %s over %d bytes, want %s over %d", rep.ImageHash, rep.BodyLen, want.ImageHash, want.HashedLen)
			}
			if rep.Trailer.Kind != image.NoTrailer {
				t.Errorf("trailer is %+v", rep.Trailer)
			}
			checkApp(t, rep, want)
			if back := write(t, *rep.Header, partsOf(rep, b)); !bytes.Equal(back, b) {
				t.Error("written again it has other bytes")
			}
		})
	}
}

func checkApp(t *testing.T, rep *image.Report, want expected) {
	t.Helper()
	if want.App == nil {
		if rep.App != nil || rep.Kind == image.App {
			t.Errorf("an application: %+v", rep.App)
		}
		return
	}
	d, w := rep.App, want.App
	if d == nil {
		t.Fatal("no descriptor")
	}
	if d.SecureVersion != w.SecureVersion || d.Version != w.Version || d.ProjectName != w.Project || d.Time != w.Time || d.Date != w.Date ||
		d.IDFVersion != w.IDF || d.ELF != w.ELF || d.MinBlockRev != w.MinBlock || d.MaxBlockRev != w.MaxBlock || d.PageSizeLog2 != w.PageSize || d.SPIMode != w.SPIMode {
		t.Errorf("descriptor is\n%+v, want\n%+v", *d, *w)
	}
	_, _, named := rep.Named()
	if arduino := w.Project == "arduino-lib-builder"; named == arduino || rep.Findings.Has("esp_arduino_descriptor") != arduino {
		t.Errorf("project %s: named is %v, findings %v", w.Project, named, rep.Findings)
	}
}

func TestDescriptorRoundTrip(t *testing.T) {
	for _, name := range []string{"app_esp32_full.bin", "app_esp32_arduino.bin", "app_esp32c3_small.bin", "app_esp32s3_small.bin"} {
		b := golden(t, name)
		rep, err := image.Parse(bytes.NewReader(b), image.App)
		if err != nil {
			t.Fatal(err)
		}
		back, err := rep.App.Bytes()
		if err != nil || !bytes.Equal(back, b[0x20:0x120]) {
			t.Errorf("%s: the descriptor became other bytes (%v)", name, err)
		}
	}
}

// negatives has the code for every file in testdata/negative, whose reasons are in negative.json.
var negatives = map[string]string{
	"bad_appended_sha.bin":       "esp_image_hash",
	"bad_magic.bin":              "esp_magic",
	"desc_control_chars.bin":     "esp_checksum esp_image_hash esp_descriptor_string",
	"desc_magic_wrong.bin":       "esp_checksum esp_image_hash esp_descriptor_magic",
	"desc_unterminated.bin":      "esp_checksum esp_image_hash esp_descriptor_string",
	"empty.bin":                  "esp_empty",
	"flipped_body_bit.bin":       "esp_checksum esp_image_hash",
	"flipped_header_byte.bin":    "esp_image_hash",
	"hash_flag_2.bin":            "esp_hash_flag esp_image_hash",
	"only_magic.bin":             "esp_truncated",
	"seg0_too_short.bin":         "esp_descriptor_short esp_checksum esp_image_hash esp_trailing_data",
	"seg_len_unaligned.bin":      "esp_segment_length esp_segment_length",
	"sig_body_flip.bin":          "esp_checksum esp_image_hash",
	"sig_crc_bad.bin":            "esp_signature_damaged",
	"sig_not_sector_aligned.bin": "esp_signature_length",
	"sig_other_key.bin":          "",
	"trailing_garbage.bin":       "esp_trailing_data",
	"truncated_segment.bin":      "esp_truncated",
	"truncated_sha.bin":          "esp_truncated",
}

func TestParseRefusesBrokenImages(t *testing.T) {
	var reasons map[string]string
	if err := json.Unmarshal(golden(t, "negative/negative.json"), &reasons); err != nil {
		t.Fatal(err)
	}
	if len(reasons) != len(negatives) {
		t.Fatalf("%d files with reasons, %d with codes", len(reasons), len(negatives))
	}
	for name, want := range negatives {
		rep, err := image.Inspect(bytes.NewReader(golden(t, "negative/"+name)), image.App)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got string
		for _, f := range rep.Findings {
			if f.Severity == esp.Error {
				got += " " + f.Code
			}
		}
		if got != "" {
			got = got[1:]
		}
		if got != want {
			t.Errorf("%s (%s): found %q, want %q\n%v", name, reasons[name], got, want, rep.Findings)
		}
		if err := rep.Err(); (err != nil) != (want != "") || err != nil && !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

// TestOneStreamGivesAllHashes holds the message and the hash of the file against hashing the bytes by themselves.
func TestOneStreamGivesAllHashes(t *testing.T) {
	b := golden(t, "app_esp32_full.bin")
	padded := append(bytes.Clone(b), bytes.Repeat([]byte{0xFF}, 4096-len(b)%4096)...)
	for _, trailing := range []int{0, 1, 16, len(padded) - len(b), len(padded) - len(b) + 8192} {
		whole := append(bytes.Clone(b), bytes.Repeat([]byte{0xFF}, trailing)...)
		rep, err := image.Parse(bytes.NewReader(whole), image.App)
		if err != nil {
			t.Fatal(err)
		}
		if rep.Message() != sha256.Sum256(padded) || rep.MessageLen() != int64(len(padded)) {
			t.Errorf("%d bytes follow: the message is %x over %d bytes", trailing, rep.Message(), rep.MessageLen())
		}
		if sum := sha256.Sum256(whole); string(rep.SHA256) != hex.EncodeToString(sum[:]) {
			t.Errorf("%d bytes follow: the file's hash is %s", trailing, rep.SHA256)
		}
		if rep.Len != int64(len(b)) {
			t.Errorf("the image has %d bytes, want %d", rep.Len, len(b))
		}
	}
}
