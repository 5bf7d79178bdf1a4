package flashcrypt

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"math/bits"
	"slices"

	"muster/internal/esp"
	"muster/internal/fleet"
)

const (
	// DefaultConfig is the FLASH_CRYPT_CONFIG that Espressif recommends: all of the key is tweaked. The eFuse itself is 0
	// until it is burnt.
	DefaultConfig = 0xF

	keySize  = 32 // bytes of the AES key, and of a unit of flash that shares one
	lowBit   = 5  // lowest and highest address bit that can tweak a key bit
	highBit  = 23
	endESP32 = 1 << (highBit + 1) // the hardware has no address bits above; espsecure goes on and makes what no chip reads
)

// esp32Mode is the ESP32's scheme (esp32.md §3.1): each 32-byte unit of flash has its own AES-256 key, which is the
// eFuse key with the bits flipped that the unit's address selects.
type esp32Mode struct {
	key   keyWords
	flips [highBit + 1]keyWords // by address bit, what it flips in the key
}

// keyWords is an AES key, or what is flipped in one, eight bytes a word.
type keyWords [keySize / 8]uint64

func wordsOf(b []byte) (w keyWords) {
	for i := range w {
		w[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return w
}

// NewESP32 returns the ESP32's cipher for a key of 32 bytes, or of 24 with the 3/4 coding scheme, and the
// FLASH_CRYPT_CONFIG of the device's eFuses, 0 to 0xF. Anything else is Invalid.
func NewESP32(key []byte, config uint8) (*Cipher, error) {
	if config > 0xF {
		return nil, fleet.Coded(fleet.Invalid, CodeConfig, "FLASH_CRYPT_CONFIG 0x%x: use 0 to 0xF; devices have 0xF unless somebody chose otherwise", config)
	}
	m := &esp32Mode{}
	switch len(key) {
	case 32:
		m.key = wordsOf(key)
	case 24: // esp32.md §3.1: the last 8 bytes are bytes 8 to 15 again
		m.key = wordsOf(slices.Concat(key, key[8:16]))
	default:
		return nil, keyError(esp.CipherESP32, len(key))
	}
	for bit, f := range flips(config) {
		m.flips[bit] = wordsOf(f[:])
	}
	return &Cipher{kind: esp.CipherESP32, end: endESP32, mode: m}, nil
}

// flips spreads the table of esp32.md §3.1 over the key: key bit i, counted from the highest bit of byte 0, is flipped
// by one address bit, if the configuration enables i's quarter of the key.
func flips(config uint8) (f [highBit + 1][keySize]byte) {
	bit := 0
	for quarter, last := range []int{14, 12, 10, 8} {
		for _, from := range []int{highBit, highBit, highBit, last} {
			for address := from; address >= lowBit; address-- {
				if config&(1<<quarter) != 0 {
					f[address][bit/8] |= 0x80 >> (bit % 8)
				}
				bit++
			}
		}
	}
	return f
}

// flip flips in words what the address bits flip that are set in address.
func (m *esp32Mode) flip(words *keyWords, address uint32) {
	const used = (1<<(highBit+1) - 1) &^ (1<<lowBit - 1)
	for left := address & used; left != 0; left &= left - 1 {
		f := &m.flips[bits.TrailingZeros32(left)]
		for i := range words {
			words[i] ^= f[i]
		}
	}
}

func unitCipher(words keyWords) (cipher.Block, error) {
	var key [keySize]byte
	for i, w := range words {
		binary.LittleEndian.PutUint64(key[8*i:], w)
	}
	c, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "key of a flash unit")
	}
	return c, nil
}

// encrypt uses AES decryption, as the hardware does.
func (m *esp32Mode) encrypt(dst, src []byte, address uint32) error {
	return m.each(dst, src, address, cipher.Block.Decrypt)
}

func (m *esp32Mode) decrypt(dst, src []byte, address uint32) error {
	return m.each(dst, src, address, cipher.Block.Encrypt)
}

func (m *esp32Mode) each(dst, src []byte, address uint32, do func(c cipher.Block, dst, src []byte)) error {
	copy(dst, src)
	words, at := m.key, uint32(0)
	for b := dst; len(b) > 0; {
		n := min(keySize-int(address%keySize), len(b))
		m.flip(&words, at^address) // from one unit to the next, few address bits change
		at = address
		c, err := unitCipher(words)
		if err != nil {
			return err
		}
		for block := range slices.Chunk(b[:n], aes.BlockSize) {
			slices.Reverse(block)
			do(c, block, block)
			slices.Reverse(block)
		}
		b, address = b[n:], address+uint32(n)
	}
	return nil
}
