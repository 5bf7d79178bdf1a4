package esp

import (
	"fmt"
	"slices"
)

// ChipID is the number of a chip in an image header.
type ChipID uint16

// Cipher is how a chip encrypts its flash; empty if that is not known.
type Cipher string

// Ciphers (esp32.md §3).
const (
	CipherESP32    Cipher = "aes-256-tweaked" // the ESP32's own
	CipherXTS128   Cipher = "xts-128"
	CipherXTS256   Cipher = "xts-256"
	CipherXTSShort Cipher = "xts-128-derived" // ESP32-C2: key derived from 128 bits
)

// Scheme is how an image is signed for Secure Boot v2.
type Scheme string

// Schemes (esp32.md §2).
const (
	RSA3072   Scheme = "rsa-3072"
	ECDSAP192 Scheme = "ecdsa-p192"
	ECDSAP256 Scheme = "ecdsa-p256"
	ECDSAP384 Scheme = "ecdsa-p384"
)

// Range is a range of addresses, To not included.
type Range struct{ From, To uint32 }

// Has reports whether a is in r.
func (r Range) Has(a uint32) bool { return r.From <= a && a < r.To }

// Chip is what differs between the chips. The zero value of a field means that it is not known.
type Chip struct {
	ID   ChipID
	Name string // as esptool and device reports write it
	Arch string

	Bootloader uint32 // flash offset of the second-stage bootloader

	Ciphers       []Cipher // of flash encryption, the default first
	Schemes       []Scheme // of Secure Boot v2
	Insecure      []Scheme // of those, what ESP-IDF flags insecure
	SchemeMinRev  uint16   // major*100+minor from which Secure Boot v2 exists
	KeySlots      int      // eFuse slots for key digests
	Revocable     bool     // slots can be revoked
	DigestBytes   int      // burnt bytes of a key digest
	FirstBlock    bool     // only the first signature block counts
	SecureSteps   int      // steps of the anti-rollback counter: a secure version above it can never be satisfied
	HMACNVS       bool     // can derive NVS keys from an HMAC eFuse key
	FlashMapped   []Range  // addresses that are mapped from flash
	frequencyName map[byte]string
}

// FrequencyName returns the flash frequency that the low nibble of byte 3 of an image header means, empty if unknown.
func (c Chip) FrequencyName(nibble byte) string { return c.frequencyName[nibble] }

// Maps reports whether a segment at this load address is mapped from flash rather than copied.
func (c Chip) Maps(addr uint32) bool {
	return slices.ContainsFunc(c.FlashMapped, func(r Range) bool { return r.Has(addr) })
}

// Signs reports whether the chip knows the scheme; true as well if muster does not know the chip's schemes.
func (c Chip) Signs(s Scheme) bool { return len(c.Schemes) == 0 || slices.Contains(c.Schemes, s) }

var (
	freqClassic = map[byte]string{0xF: "80m", 0: "40m", 1: "26m", 2: "20m"}
	freqC2      = map[byte]string{0xF: "60m", 0: "30m", 1: "20m", 2: "15m"}
	freqC6      = map[byte]string{0: "80m", 2: "20m"}
	freqH2      = map[byte]string{0xF: "48m", 0: "24m", 1: "16m", 2: "12m"}
	freqP4      = map[byte]string{0xF: "80m", 0: "40m", 2: "20m"}
)

// chips is esp32.md §1.6 with the address maps and frequencies of esptool's targets.
var chips = []Chip{
	{
		ID: 0x0000, Name: "esp32", Arch: "xtensa", Bootloader: 0x1000,
		Ciphers: []Cipher{CipherESP32},
		Schemes: []Scheme{RSA3072}, SchemeMinRev: 300, KeySlots: 1, DigestBytes: 32, FirstBlock: true, SecureSteps: 32,
		FlashMapped: []Range{{0x3F400000, 0x3F800000}, {0x400D0000, 0x40400000}}, frequencyName: freqClassic,
	},
	{
		ID: 0x0002, Name: "esp32s2", Arch: "xtensa", Bootloader: 0x1000,
		Ciphers: []Cipher{CipherXTS128, CipherXTS256},
		Schemes: []Scheme{RSA3072}, KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16, HMACNVS: true,
		FlashMapped: []Range{{0x3F000000, 0x3F3F0000}, {0x40080000, 0x40B80000}}, frequencyName: freqClassic,
	},
	{
		ID: 0x0005, Name: "esp32c3", Arch: "riscv", Bootloader: 0,
		Ciphers: []Cipher{CipherXTS128},
		Schemes: []Scheme{RSA3072}, SchemeMinRev: 3, KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16, HMACNVS: true,
		FlashMapped: []Range{{0x3C000000, 0x3C800000}, {0x42000000, 0x42800000}}, frequencyName: freqClassic,
	},
	{
		ID: 0x0009, Name: "esp32s3", Arch: "xtensa", Bootloader: 0,
		Ciphers: []Cipher{CipherXTS128, CipherXTS256},
		Schemes: []Scheme{RSA3072}, KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16, HMACNVS: true,
		FlashMapped: []Range{{0x3C000000, 0x3E000000}, {0x42000000, 0x44000000}}, frequencyName: freqClassic,
	},
	{
		ID: 0x000C, Name: "esp32c2", Arch: "riscv", Bootloader: 0,
		Ciphers: []Cipher{CipherXTS128, CipherXTSShort},
		Schemes: []Scheme{ECDSAP192, ECDSAP256}, KeySlots: 1, DigestBytes: 16, SecureSteps: 4,
		FlashMapped: []Range{{0x3C000000, 0x3C400000}, {0x42000000, 0x42400000}}, frequencyName: freqC2,
	},
	{
		ID: 0x000D, Name: "esp32c6", Arch: "riscv", Bootloader: 0,
		Ciphers: []Cipher{CipherXTS128},
		Schemes: []Scheme{RSA3072, ECDSAP192, ECDSAP256}, KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16, HMACNVS: true,
		FlashMapped: []Range{{0x42000000, 0x43000000}}, frequencyName: freqC6,
	},
	{
		ID: 0x0010, Name: "esp32h2", Arch: "riscv", Bootloader: 0,
		Ciphers: []Cipher{CipherXTS128},
		Schemes: []Scheme{RSA3072, ECDSAP192, ECDSAP256}, Insecure: []Scheme{ECDSAP192, ECDSAP256},
		KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16, HMACNVS: true,
		FlashMapped: []Range{{0x42000000, 0x43000000}}, frequencyName: freqH2,
	},
	{
		ID: 0x0012, Name: "esp32p4", Arch: "riscv", Bootloader: 0x2000,
		Ciphers: []Cipher{CipherXTS128, CipherXTS256},
		Schemes: []Scheme{RSA3072, ECDSAP192, ECDSAP256}, Insecure: []Scheme{ECDSAP192, ECDSAP256},
		KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16, HMACNVS: true,
		FlashMapped: []Range{{0x40000000, 0x4C000000}}, frequencyName: freqP4,
	},
	{
		ID: 0x0014, Name: "esp32c61", Arch: "riscv", Bootloader: 0,
		Ciphers: []Cipher{CipherXTS128},
		Schemes: []Scheme{ECDSAP192, ECDSAP256, ECDSAP384}, Insecure: []Scheme{ECDSAP192, ECDSAP256},
		KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 16,
		FlashMapped: []Range{{0x42000000, 0x44000000}}, frequencyName: freqP4,
	},
	{
		ID: 0x0017, Name: "esp32c5", Arch: "riscv", Bootloader: 0x2000,
		Ciphers: []Cipher{CipherXTS128, CipherXTS256},
		Schemes: []Scheme{RSA3072, ECDSAP192, ECDSAP256, ECDSAP384}, Insecure: []Scheme{ECDSAP192, ECDSAP256},
		KeySlots: 3, Revocable: true, DigestBytes: 32, SecureSteps: 9, HMACNVS: true,
		FlashMapped: []Range{{0x42000000, 0x44000000}}, frequencyName: freqP4,
	},
	{ID: 0x0019, Name: "esp32h21", Arch: "riscv", Bootloader: 0},
	{ID: 0x001C, Name: "esp32h4", Arch: "riscv", Bootloader: 0x2000},
	{ID: 0x0020, Name: "esp32s31", Arch: "riscv", Bootloader: 0x2000},
}

// Chips returns every chip that muster knows, by id.
func Chips() []Chip { return slices.Clone(chips) }

// ChipByID returns the chip with the id.
func ChipByID(id ChipID) (Chip, bool) {
	return find(func(c Chip) bool { return c.ID == id })
}

// ChipByName returns the chip with the name, written as in Chip.Name.
func ChipByName(name string) (Chip, bool) {
	return find(func(c Chip) bool { return c.Name == name })
}

// String returns the chip's name, and the number of an id that muster does not know.
func (id ChipID) String() string {
	if c, ok := ChipByID(id); ok {
		return c.Name
	}
	return fmt.Sprintf("chip-0x%04x", uint16(id))
}

func find(f func(Chip) bool) (Chip, bool) {
	if i := slices.IndexFunc(chips, f); i >= 0 {
		return chips[i], true
	}
	return Chip{}, false
}

// Revision is a chip revision as major*100+minor.
type Revision uint16

// String returns v1.2 for 102.
func (r Revision) String() string { return fmt.Sprintf("v%d.%d", r/100, r%100) }
