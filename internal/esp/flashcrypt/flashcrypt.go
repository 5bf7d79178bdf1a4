// Package flashcrypt encrypts and decrypts what lies in the flash of an Espressif chip with flash encryption, byte for
// byte as the chip and espsecure do (esp32.md §3): the ESP32's own AES-256 with a key that is tweaked by the address,
// and XTS-AES on all other chips. What must be encrypted, and where, is for the caller to know (esp32.md §3.3).
//
// Neither scheme authenticates: decrypting with a wrong key or at a wrong address gives noise and no error.
package flashcrypt

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// Align is what addresses and lengths must be a multiple of, bytes.
const Align = 16

// Codes of errors.
const (
	CodeKey     = "flash-key"     // not a key of that cipher
	CodeConfig  = "flash-config"  // not a FLASH_CRYPT_CONFIG
	CodeAddress = "flash-address" // not aligned, or outside of what the chip can map
	CodeLength  = "flash-length"  // not whole blocks
	CodeRead    = "flash-read"    // the source of a stream failed
	CodeWrite   = "flash-write"   // the target of a stream failed
)

// Cipher is one flash-encryption key in use. It may be used by several goroutines at once.
type Cipher struct {
	kind esp.Cipher
	end  uint64 // first address beyond what can be encrypted
	mode mode
}

// mode works on whole blocks at an aligned address; dst may be src.
type mode interface {
	encrypt(dst, src []byte, address uint32) error
	decrypt(dst, src []byte, address uint32) error
}

// KeySizes returns the lengths of a key file, bytes, that New takes for the cipher, the usual one first; none for a
// cipher that is not known.
func KeySizes(kind esp.Cipher) []int {
	switch kind {
	case esp.CipherESP32:
		return []int{32, 24}
	case esp.CipherXTS128:
		return []int{32}
	case esp.CipherXTS256:
		return []int{64}
	case esp.CipherXTSShort:
		return []int{16}
	}
	return nil
}

// GenerateKey reads a new key of the usual length from rand, which must be crypto/rand.Reader outside of tests.
func GenerateKey(kind esp.Cipher, rand io.Reader) ([]byte, error) {
	sizes := KeySizes(kind)
	if len(sizes) == 0 {
		return nil, unknown()
	}
	key := make([]byte, sizes[0])
	if _, err := io.ReadFull(rand, key); err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "no randomness for a flash-encryption key")
	}
	return key, nil
}

// New returns the cipher for a key as it stands in espsecure's key file. For the ESP32 it is NewESP32 with the
// configuration that Espressif recommends. A key of a wrong length is Invalid.
func New(kind esp.Cipher, key []byte) (*Cipher, error) {
	switch kind {
	case esp.CipherESP32:
		return NewESP32(key, DefaultConfig)
	case esp.CipherXTS128:
		return newXTS(kind, key, 32)
	case esp.CipherXTS256:
		return newXTS(kind, key, 64)
	case esp.CipherXTSShort:
		c, err := newXTS(kind, expandShort(key), 32)
		if err != nil {
			return nil, keyError(kind, len(key))
		}
		return c, nil
	}
	return nil, unknown()
}

// expandShort makes the XTS-AES-128 key of an ESP32-C2 that has only 128 bits of key in its eFuses.
func expandShort(key []byte) []byte {
	if len(key) != 16 {
		return nil
	}
	sum := sha256.Sum256(key)
	return sum[:]
}

// Kind returns which cipher it is.
func (c *Cipher) Kind() esp.Cipher { return c.kind }

// String names the cipher and keeps the key out of any print.
func (c *Cipher) String() string { return "flashcrypt.Cipher(" + string(c.kind) + ")" }

// GoString keeps the key out of %#v.
func (c *Cipher) GoString() string { return c.String() }

// Encrypt writes to dst what must stand in flash at the address so that the chip reads src. dst has the length of src
// and is src itself or does not overlap it. Address and length must be multiples of Align, and the end must be within
// the chip's address space; else it is Invalid and dst is as it was.
func (c *Cipher) Encrypt(dst, src []byte, address uint32) error {
	return c.crypt(dst, src, address, c.mode.encrypt)
}

// Decrypt writes to dst what the chip reads where src stands in flash at the address. The rules are those of Encrypt.
func (c *Cipher) Decrypt(dst, src []byte, address uint32) error {
	return c.crypt(dst, src, address, c.mode.decrypt)
}

func (c *Cipher) crypt(dst, src []byte, address uint32, do func(dst, src []byte, address uint32) error) error {
	if len(dst) != len(src) {
		return fleet.Coded(fleet.Internal, CodeLength, "room for %d bytes, but %d to encrypt or decrypt", len(dst), len(src))
	}
	if err := c.check(uint64(address), len(src)); err != nil {
		return err
	}
	return do(dst, src, address)
}

func (c *Cipher) check(address uint64, n int) error {
	if address%Align != 0 {
		return fleet.Coded(fleet.Invalid, CodeAddress, "flash address 0x%x: use a multiple of %d", address, Align)
	}
	if n%Align != 0 {
		return fleet.Coded(fleet.Invalid, CodeLength, "%d bytes from flash address 0x%x: flash encryption works on whole blocks: pad with 0xFF to a multiple of %d", n, address, Align)
	}
	if address+uint64(n) > c.end {
		return fleet.Coded(fleet.Invalid, CodeAddress, "%d bytes from flash address 0x%x: %s ends at 0x%x", n, address, c.kind, c.end)
	}
	return nil
}

// Pad returns b with 0xFF, which is what erased flash reads as, up to a multiple of Align. It does not change b.
func Pad(b []byte) []byte {
	short := -len(b) & (Align - 1)
	return append(bytes.Clone(b), bytes.Repeat([]byte{0xFF}, short)...)
}

// streamBuffer is a multiple of every unit, so that each piece starts at the same place within its unit.
const streamBuffer = 64 << 10

// EncryptStream encrypts r, which starts at the address, to w until r ends, and returns the bytes written. It holds
// 64 KiB at most. The rules are those of Encrypt; what breaks them at the end of r is found only there, when what came
// before is already written.
func (c *Cipher) EncryptStream(w io.Writer, r io.Reader, address uint32) (int64, error) {
	return c.stream(w, r, address, c.mode.encrypt)
}

// DecryptStream decrypts as EncryptStream encrypts.
func (c *Cipher) DecryptStream(w io.Writer, r io.Reader, address uint32) (int64, error) {
	return c.stream(w, r, address, c.mode.decrypt)
}

func (c *Cipher) stream(w io.Writer, r io.Reader, start uint32, do func(dst, src []byte, address uint32) error) (int64, error) {
	buf := make([]byte, streamBuffer)
	var done int64
	for {
		n, err := io.ReadFull(r, buf)
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return done, &fleet.Error{Kind: fleet.Unprocessable, Code: CodeRead, Msg: "cannot read what is to be encrypted or decrypted", Err: err}
		}
		at := uint64(start) + uint64(done)
		if err := c.check(at, n); err != nil {
			return done, err
		}
		if err := do(buf[:n], buf[:n], uint32(at)); err != nil {
			return done, err
		}
		wrote, err := w.Write(buf[:n])
		done += int64(wrote)
		if err != nil {
			return done, &fleet.Error{Kind: fleet.Unprocessable, Code: CodeWrite, Msg: "cannot write what was encrypted or decrypted", Err: err}
		}
		if last {
			return done, nil
		}
	}
}

func keyError(kind esp.Cipher, n int) error {
	return fleet.Coded(fleet.Invalid, CodeKey, "a flash-encryption key of %d bytes: %s takes %s", n, kind, map[esp.Cipher]string{
		esp.CipherESP32:    "32 bytes, or 24 with the 3/4 coding scheme",
		esp.CipherXTS128:   "32 bytes",
		esp.CipherXTS256:   "64 bytes",
		esp.CipherXTSShort: "16 bytes",
	}[kind])
}

func unknown() error {
	return fleet.Coded(fleet.Invalid, CodeKey, "flash-encryption cipher: use %s, %s, %s or %s", esp.CipherESP32, esp.CipherXTS128, esp.CipherXTS256, esp.CipherXTSShort)
}
