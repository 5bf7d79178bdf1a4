package image

import (
	"encoding/binary"
	"fmt"

	"muster/internal/esp"
)

// Sizes and limits of the format (esp32.md §1.1 to §1.3), in bytes unless they count.
const (
	HeaderSize    = 24
	SegmentHeader = 8
	MaxSegments   = 16       // ESP_IMAGE_MAX_SEGMENTS, a count
	MaxSegment    = 16 << 20 // a segment must be smaller
	MaxSize       = 16 << 20 // of a file: ESP-IDF refuses a partition above it
	HashSize      = 32
	SectorSize    = 4096    // of flash, and of the signature sector
	PageSize      = 1 << 16 // of the MMU, where the descriptor names no other

	magic        = 0xE9
	checksumSeed = 0xEF
	wpDisabled   = 0xEE
)

// Header is the extended image header (esp32.md §1.1). What follows from the rest of the image, the number of segments,
// is not in it.
type Header struct {
	SPIMode     byte         `json:"spi_mode"`
	SPISpeed    byte         `json:"spi_speed"` // low nibble of byte 3; what it means depends on the chip
	SPISize     byte         `json:"spi_size"`  // high nibble of byte 3: 2 to the power of it in MiB
	Entry       uint32       `json:"entry"`
	WPPin       byte         `json:"wp_pin"` // 0xEE: disabled
	PinDrive    [3]byte      `json:"-"`
	Chip        esp.ChipID   `json:"chip_id"`
	MinRevOld   byte         `json:"min_chip_rev"`      // legacy, ignored by devices
	MinRev      esp.Revision `json:"min_chip_rev_full"` // major*100+minor
	MaxRev      esp.Revision `json:"max_chip_rev_full"` // major*100+minor; 0 and 65535 are no limit
	Reserved    [4]byte      `json:"-"`
	HashPresent byte         `json:"hash_appended"` // 0 or 1
}

// NewHeader returns a header for the chip with what esptool writes where it is told nothing.
func NewHeader(chip esp.ChipID) Header {
	return Header{Chip: chip, SPIMode: 2, SPISize: 2, WPPin: wpDisabled, MaxRev: 0xFFFF, HashPresent: 1}
}

// MaxRevision returns the highest revision that the image runs on, false if there is no limit.
func (h Header) MaxRevision() (esp.Revision, bool) {
	return h.MaxRev, h.MaxRev != 0 && h.MaxRev != 0xFFFF
}

// FlashMode returns the name of the SPI mode, empty if it has none.
func (h Header) FlashMode() string {
	names := [...]string{"qio", "qout", "dio", "dout", "fast_read", "slow_read"}
	if int(h.SPIMode) < len(names) {
		return names[h.SPIMode]
	}
	return ""
}

// FlashSize returns the flash size that the header names, in bytes; 0 if the number means nothing.
func (h Header) FlashSize() int64 {
	if h.SPISize > 7 {
		return 0
	}
	return 1 << (20 + h.SPISize)
}

// FlashFrequency returns the name of the flash frequency, empty if muster does not know what it means on this chip.
func (h Header) FlashFrequency() string {
	chip, _ := esp.ChipByID(h.Chip)
	return chip.FrequencyName(h.SPISpeed)
}

// bytes returns the header as it is in the file.
func (h Header) bytes(segments int) [HeaderSize]byte {
	var b [HeaderSize]byte
	b[0], b[1], b[2], b[3] = magic, byte(segments), h.SPIMode, h.SPISpeed&0xF|h.SPISize<<4
	binary.LittleEndian.PutUint32(b[4:], h.Entry)
	b[8] = h.WPPin
	copy(b[9:12], h.PinDrive[:])
	binary.LittleEndian.PutUint16(b[12:], uint16(h.Chip))
	b[14] = h.MinRevOld
	binary.LittleEndian.PutUint16(b[15:], uint16(h.MinRev))
	binary.LittleEndian.PutUint16(b[17:], uint16(h.MaxRev))
	copy(b[19:23], h.Reserved[:])
	b[23] = h.HashPresent
	return b
}

// readHeader reads b, which has HeaderSize bytes, but for the magic byte and the number of segments.
func readHeader(b []byte) Header {
	return Header{
		SPIMode:     b[2],
		SPISpeed:    b[3] & 0xF,
		SPISize:     b[3] >> 4,
		Entry:       binary.LittleEndian.Uint32(b[4:]),
		WPPin:       b[8],
		PinDrive:    [3]byte(b[9:12]),
		Chip:        esp.ChipID(binary.LittleEndian.Uint16(b[12:])),
		MinRevOld:   b[14],
		MinRev:      esp.Revision(binary.LittleEndian.Uint16(b[15:])),
		MaxRev:      esp.Revision(binary.LittleEndian.Uint16(b[17:])),
		Reserved:    [4]byte(b[19:23]),
		HashPresent: b[23],
	}
}

// Use says what a device does with a segment.
type Use string

// Uses.
const (
	Mapped  Use = "flash" // mapped from flash
	Loaded  Use = "ram"   // copied into memory
	Padding Use = "padding"
)

// loadFrom is the lowest load address that a bootloader loads; below it a segment is skipped (esp32.md §1.2).
const loadFrom = 0x10000000

// Segment is where a segment is and where it goes.
type Segment struct {
	Load   uint32 `json:"load_addr"`
	Length uint32 `json:"length"` // of the data, bytes
	Offset int64  `json:"offset"` // of the data in the file; its header is the 8 bytes before
	Use    Use    `json:"use"`
}

func (s Segment) String() string {
	return fmt.Sprintf("%d bytes for 0x%08x", s.Length, s.Load)
}

// useOf says what chip does with a segment at the load address. For a chip that muster does not know it is never Mapped.
func useOf(chip esp.Chip, load uint32) Use {
	switch {
	case load < loadFrom:
		return Padding
	case chip.Maps(load):
		return Mapped
	default:
		return Loaded
	}
}
