package image

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// TrailerKind is what follows an image in its file.
type TrailerKind string

// What may follow an image (esp32.md §1.5), and Unknown, what may not.
const (
	NoTrailer    TrailerKind = "none"
	Filler       TrailerKind = "padding"        // 0xFF alone
	Signature    TrailerKind = "secure-boot-v2" // the signature sector
	SignatureV1  TrailerKind = "secure-boot-v1" // the 68 bytes of the old scheme; refused
	ArduinoTrail TrailerKind = "arduino-signed" // the 512 bytes of Arduino's bin_signing.py (esp32.md §6.3)
	Unknown      TrailerKind = "unknown"
)

// Trailer is what follows an image in its file.
type Trailer struct {
	Kind   TrailerKind `json:"kind"`
	Offset int64       `json:"offset"` // of the first byte after the image
	Length int64       `json:"length"` // bytes

	sector []byte
}

// Sector returns the signature sector, SectorSize bytes that start at the message's end; nil unless Kind is Signature.
// The caller must not change it.
func (t Trailer) Sector() []byte { return t.sector }

// Blocks of a signature sector (esp32.md §2).
const (
	BlockSize     = 1216
	MaxBlocks     = 3
	blockMagic    = 0xE7
	blockCRC      = 1196
	arduinoLength = 512
	v1Length      = 68
)

// BlockPresent reports whether b, of BlockSize bytes, is a signature block: magic and CRC must be right, otherwise a
// device takes it for absent.
func BlockPresent(b []byte) bool {
	return b[0] == blockMagic && binary.LittleEndian.Uint32(b[blockCRC:]) == crc32.ChecksumIEEE(b[:blockCRC])
}

// rest is what was read after an image.
type rest struct {
	start   int64
	length  int64
	head    []byte // the first bytes, arduinoLength at most
	sector  []byte // what begins at the next sector, SectorSize at most
	gapFF   bool   // all bytes up to that sector are 0xFF
	allFF   bool
	table   bool  // a partition table's magic stands at 0x8000: a whole flash image
	rounded int64 // where that sector begins
}

// kind says what follows the image and, where it must not, with which code and hint.
func (t rest) kind() (k TrailerKind, code, what, hint string) {
	after := t.start + t.length - t.rounded // bytes from the next sector on
	switch {
	case t.length == 0:
		return NoTrailer, "", "", ""
	case t.allFF:
		return Filler, "", "", ""
	case t.gapFF && after == SectorSize && t.hasBlock(BlockPresent):
		return Signature, "", "", ""
	case t.gapFF && after == SectorSize && t.hasBlock(marked):
		return Unknown, "esp_signature_damaged", "the signature sector has no block whose CRC is right", "sign the image again"
	case t.gapFF && after > 0 && t.sector[0] == blockMagic:
		return Unknown, "esp_signature_length", "a signature sector begins at the next sector, but it has not exactly 4096 bytes", "sign the image again, and check how the file was copied"
	case t.length == arduinoLength && arduinoShape(t.head):
		return ArduinoTrail, "", "", ""
	case t.length == v1Length && binary.LittleEndian.Uint32(t.head) == 0:
		return SignatureV1, "esp_secure_boot_v1", "it is signed for Secure Boot v1, which muster does not support", "use Secure Boot v2 (chip revision 3.0 and later)"
	case t.table:
		return Unknown, "esp_merged_image", "a partition table follows: this is a whole flash image", "take the application's own .bin, without bootloader and partition table"
	default:
		return Unknown, "esp_trailing_data", "bytes follow the image that are neither 0xFF nor a signature sector", "take the .bin as the build made it"
	}
}

func marked(block []byte) bool { return block[0] == blockMagic }

func (t rest) hasBlock(is func([]byte) bool) bool {
	for i := range MaxBlocks {
		if is(t.sector[i*BlockSize : (i+1)*BlockSize]) {
			return true
		}
	}
	return false
}

// arduinoShape reports whether b looks like what bin_signing.py appends: a DER signature or one of 256, 384 or 512
// bytes, then zeros.
func arduinoShape(b []byte) bool {
	used := len(bytes.TrimRight(b, "\x00"))
	if used == 0 {
		return false
	}
	if b[0] == 0x30 && b[1] < 0x80 && used <= int(b[1])+2 {
		return true
	}
	// A signature may itself end in zeros, so the sizes are upper bounds: a longer one must come close to the next.
	for _, size := range []int{256, 384, 512} {
		if used <= size {
			return used > size-8
		}
	}
	return false
}
