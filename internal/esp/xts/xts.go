// Package xts is XTS-AES (IEEE 1619-2018, NIST SP 800-38E) over data units that are numbered by their address, as flash
// encryption and encrypted NVS of Espressif's chips use it (esp32.md §3.2, §4.5). Units are whole blocks: there is no
// ciphertext stealing. The package works in place and does no I/O.
package xts

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"slices"

	"muster/internal/fleet"
)

// BlockSize is the size of an AES block, bytes.
const BlockSize = aes.BlockSize

// Cipher has the two AES keys of XTS. It may be used by several goroutines at once.
type Cipher struct {
	data, tweak cipher.Block
}

// New returns the cipher for a key of 32 bytes (XTS-AES-128) or 64 bytes (XTS-AES-256): the data key, then the tweak
// key. Any other length is Invalid.
func New(key []byte) (*Cipher, error) {
	if len(key) != 32 && len(key) != 64 {
		return nil, fleet.Coded(fleet.Invalid, "xts-key", "an XTS key of %d bytes: use 32 bytes for XTS-AES-128 or 64 for XTS-AES-256", len(key))
	}
	half := len(key) / 2
	data, err := aes.NewCipher(key[:half])
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "data key")
	}
	tweak, err := aes.NewCipher(key[half:])
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "tweak key")
	}
	return &Cipher{data: data, tweak: tweak}, nil
}

// String keeps the key out of any print.
func (c *Cipher) String() string { return "xts.Cipher" }

// GoString keeps the key out of %#v.
func (c *Cipher) GoString() string { return c.String() }

// Encrypt encrypts b in place. b holds consecutive data units of unit bytes each (the last may be shorter); the tweak
// of a unit is the address of its first byte. unit and len(b) are multiples of 16; Encrypt panics if they are not,
// because the format packages have checked it.
func (c *Cipher) Encrypt(b []byte, unit int, address uint64) {
	c.crypt(b, unit, address, false)
}

// Decrypt undoes Encrypt.
func (c *Cipher) Decrypt(b []byte, unit int, address uint64) {
	c.crypt(b, unit, address, true)
}

// batch is how much is worked on at once, bytes. Each step runs over the whole batch before the next one starts: then the
// blocks are independent of one another, and none is read back before its write has left the store buffer, which makes
// it several times as fast as block by block.
const batch = 2048

func (c *Cipher) crypt(b []byte, unit int, address uint64, decrypt bool) {
	if unit <= 0 || unit%BlockSize != 0 || len(b)%BlockSize != 0 {
		panic("xts: not a whole number of blocks")
	}
	tweaks := make([]byte, min(len(b), max(unit, batch-batch%unit)))
	for len(b) > 0 {
		n := min(len(tweaks), len(b))
		t := tweaks[:n]
		c.fill(t, unit, address)
		subtle.XORBytes(b, b[:n], t)
		if decrypt {
			for off := 0; off < n; off += BlockSize {
				c.data.Decrypt(b[off:off+BlockSize], b[off:off+BlockSize])
			}
		} else {
			for off := 0; off < n; off += BlockSize {
				c.data.Encrypt(b[off:off+BlockSize], b[off:off+BlockSize])
			}
		}
		subtle.XORBytes(b, b[:n], t)
		b, address = b[n:], address+uint64(n)
	}
}

// fill writes the tweak of each block to t. The first block of a unit has the encrypted address; a block more multiplies
// it by α in GF(2¹²⁸), that is a shift with the reduction by x¹²⁸+x⁷+x²+x+1.
func (c *Cipher) fill(t []byte, unit int, address uint64) {
	for off := 0; off < len(t); off += unit {
		binary.LittleEndian.PutUint64(t[off:], address+uint64(off))
		binary.LittleEndian.PutUint64(t[off+8:], 0)
	}
	for off := 0; off < len(t); off += unit {
		c.tweak.Encrypt(t[off:off+BlockSize], t[off:off+BlockSize])
	}
	for u := range slices.Chunk(t, unit) {
		lo, hi := binary.LittleEndian.Uint64(u), binary.LittleEndian.Uint64(u[8:])
		for rest := u[BlockSize:]; len(rest) >= BlockSize; rest = rest[BlockSize:] {
			carry := uint64(int64(hi) >> 63)
			hi = hi<<1 | lo>>63
			lo = lo<<1 ^ carry&0x87
			binary.LittleEndian.PutUint64(rest, lo)
			binary.LittleEndian.PutUint64(rest[8:], hi)
		}
	}
}
