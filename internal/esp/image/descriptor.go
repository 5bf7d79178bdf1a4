package image

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// Where descriptors are (esp32.md §1.4): the first bytes of the first segment's data.
const (
	descOffset   = HeaderSize + SegmentHeader
	AppDescSize  = 256
	bootDescSize = 80

	appDescMagic  = 0xABCD5432
	bootDescMagic = 80
)

// arduinoProject is the project name in every image that is built with Arduino's ready-made core.
const arduinoProject = "arduino-lib-builder"

// AppDesc is esp_app_desc_t (esp32.md §1.4). The strings are what stands before their first NUL.
type AppDesc struct {
	SecureVersion uint32     `json:"secure_version"`
	Reserved      [8]byte    `json:"-"`
	Version       string     `json:"version"`      // 31 bytes at most
	ProjectName   string     `json:"project_name"` // 31 bytes at most
	Time          string     `json:"time"`         // 15 bytes at most
	Date          string     `json:"date"`         // 15 bytes at most
	IDFVersion    string     `json:"idf_ver"`      // 31 bytes at most
	ELFHash       [32]byte   `json:"-"`
	ELF           fleet.Hash `json:"app_elf_sha256,omitempty"` // ELFHash in digits; empty if the build did not set it
	MinBlockRev   uint16     `json:"min_efuse_blk_rev_full"`
	MaxBlockRev   uint16     `json:"max_efuse_blk_rev_full"`
	PageSizeLog2  byte       `json:"mmu_page_size_log2"` // 0 in old images: 64 KiB
	SPIMode       byte       `json:"spi_flash_mode"`     // since ESP-IDF 6.1; 0: unknown
	Rest          [74]byte   `json:"-"`                  // reserved
	Constant      bool       `json:"arduino_descriptor"` // Arduino's constant one: name and version say nothing about this build
}

// BootDesc is esp_bootloader_desc_t of newer bootloaders.
type BootDesc struct {
	SecureVersion byte   `json:"secure_version"`
	Version       uint32 `json:"version"`
	IDFVersion    string `json:"idf_ver"`
	BuiltAt       string `json:"date_time"`
}

// pageSize returns the size of an MMU page, in bytes, and whether the descriptor names one that a chip has.
func (d AppDesc) pageSize() (int64, bool) {
	switch {
	case d.PageSizeLog2 == 0:
		return PageSize, true
	case d.PageSizeLog2 >= 13 && d.PageSizeLog2 <= 16:
		return 1 << d.PageSizeLog2, true
	default:
		return PageSize, false
	}
}

// appString is a string field of an application descriptor.
type appString struct {
	name     string
	at, size int // in the descriptor
	value    func(*AppDesc) *string
}

var appStrings = []appString{
	{"version", 16, 32, func(d *AppDesc) *string { return &d.Version }},
	{"project_name", 48, 32, func(d *AppDesc) *string { return &d.ProjectName }},
	{"time", 80, 16, func(d *AppDesc) *string { return &d.Time }},
	{"date", 96, 16, func(d *AppDesc) *string { return &d.Date }},
	{"idf_ver", 112, 32, func(d *AppDesc) *string { return &d.IDFVersion }},
}

// readAppDesc reads b, which has AppDescSize bytes, but for its magic number. Strings that are not fit to be shown are
// left empty and found fault with.
func readAppDesc(b []byte) (AppDesc, esp.Findings) {
	d := AppDesc{
		SecureVersion: binary.LittleEndian.Uint32(b[4:]),
		Reserved:      [8]byte(b[8:]),
		ELFHash:       [32]byte(b[144:]),
		MinBlockRev:   binary.LittleEndian.Uint16(b[176:]),
		MaxBlockRev:   binary.LittleEndian.Uint16(b[178:]),
		PageSizeLog2:  b[180],
		SPIMode:       b[181],
		Rest:          [74]byte(b[182:]),
	}
	var found esp.Findings
	for _, s := range appStrings {
		text, why := readString(b[s.at : s.at+s.size])
		if why != "" {
			found = append(found, esp.Finding{
				Severity: esp.Error, Code: "esp_descriptor_string", Offset: int64(descOffset + s.at),
				Message: fmt.Sprintf("the descriptor's %s %s", s.name, why),
				Hint:    fmt.Sprintf("build with a %s of at most %d printable bytes", s.name, s.size-1),
			})
			continue
		}
		*s.value(&d) = text
	}
	if d.ELFHash != [32]byte{} {
		d.ELF = fleet.HashOf(d.ELFHash)
	}
	d.Constant = d.ProjectName == arduinoProject
	return d, found
}

// Bytes returns the descriptor as it is in an image. A string that is too long or holds a NUL or what cannot be shown
// is an Invalid error.
func (d AppDesc) Bytes() ([]byte, error) {
	b := make([]byte, AppDescSize)
	binary.LittleEndian.PutUint32(b, appDescMagic)
	binary.LittleEndian.PutUint32(b[4:], d.SecureVersion)
	copy(b[8:16], d.Reserved[:])
	for _, s := range appStrings {
		text := *s.value(&d)
		copy(b[s.at:s.at+s.size], text)
		if back, why := readString(b[s.at : s.at+s.size]); why != "" || back != text {
			return nil, fleet.Errorf(fleet.Invalid, "the descriptor's %s must have at most %d bytes, all printable", s.name, s.size-1)
		}
	}
	copy(b[144:176], d.ELFHash[:])
	binary.LittleEndian.PutUint16(b[176:], d.MinBlockRev)
	binary.LittleEndian.PutUint16(b[178:], d.MaxBlockRev)
	b[180], b[181] = d.PageSizeLog2, d.SPIMode
	copy(b[182:], d.Rest[:])
	return b, nil
}

// readString returns what stands before the first NUL of field, or why it must not be shown.
func readString(field []byte) (text, why string) {
	end := bytes.IndexByte(field, 0)
	if end < 0 {
		return "", fmt.Sprintf("has no NUL in its %d bytes", len(field))
	}
	text = string(field[:end])
	switch {
	case !utf8.ValidString(text):
		return "", "is not UTF-8"
	case strings.ContainsFunc(text, hidden):
		return "", "holds characters that cannot be printed"
	}
	return text, ""
}

// readBootDesc reads a bootloader's descriptor from the first bytes of the first segment. One byte of magic says
// little, so its strings must be in order too.
func readBootDesc(b []byte) (BootDesc, bool) {
	if len(b) < bootDescSize || b[0] != bootDescMagic {
		return BootDesc{}, false
	}
	idf, why := readString(b[8:40])
	built, whyBuilt := readString(b[40:64])
	if why != "" || whyBuilt != "" || idf == "" {
		return BootDesc{}, false
	}
	return BootDesc{SecureVersion: b[3], Version: binary.LittleEndian.Uint32(b[4:]), IDFVersion: idf, BuiltAt: built}, true
}
