package nvs

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"slices"

	"muster/internal/esp/xts"
	"muster/internal/fleet"
)

const (
	keysSize    = 64 // data key and tweak key
	hmacKeySize = 32
)

// Keys encrypt an NVS partition with XTS-AES-256: eky for the data and tky for the tweak (esp32.md §4.5). They do not
// show in prints. Keep them like the data that they protect.
type Keys struct {
	raw [keysSize]byte
}

// GenerateKeys reads new keys from rand, which must be crypto/rand.Reader outside of tests.
func GenerateKeys(rand io.Reader) (Keys, error) {
	var k Keys
	if _, err := io.ReadFull(rand, k.raw[:]); err != nil {
		return Keys{}, noRandomness(err)
	}
	return k, nil
}

// GenerateHMACKey reads a new key for the eFuse block with purpose HMAC_UP from rand, as GenerateKeys does.
func GenerateHMACKey(rand io.Reader) ([]byte, error) {
	key := make([]byte, hmacKeySize)
	if _, err := io.ReadFull(rand, key); err != nil {
		return nil, noRandomness(err)
	}
	return key, nil
}

func noRandomness(err error) error {
	return &fleet.Error{Kind: fleet.Internal, Code: CodeRandomness, Msg: "no randomness for NVS keys", Err: err}
}

// KeysFromHMAC returns the keys that a chip derives from the 32 bytes in its HMAC_UP eFuse block (esp32.md §4.5). The
// ESP32 and the ESP32-C2 cannot do that.
func KeysFromHMAC(key []byte) (Keys, error) {
	if len(key) != hmacKeySize {
		return Keys{}, fleet.Coded(fleet.Invalid, CodeKeys, "an HMAC key of %d bytes: an eFuse block has %d", len(key), hmacKeySize)
	}
	derive := func(seed ...byte) []byte {
		m := hmac.New(sha256.New, key)
		m.Write(bytes.Repeat(seed, 8))
		return m.Sum(nil)
	}
	return ParseKeys(slices.Concat(derive(0x5A, 0x5A, 0xBE, 0xAE), derive(0xA5, 0xA5, 0xDE, 0xCE)))
}

// ParseKeys returns the keys from 64 bytes: eky, then tky.
func ParseKeys(raw []byte) (Keys, error) {
	if len(raw) != keysSize {
		return Keys{}, fleet.Coded(fleet.Invalid, CodeKeys, "NVS keys of %d bytes: they are %d, the data key and then the tweak key", len(raw), keysSize)
	}
	var k Keys
	copy(k.raw[:], raw)
	return k, nil
}

// ParseKeyPartition returns the keys from the image of an nvs_keys partition, of which it reads the first page. The image
// must be in the clear: what is read from a device's flash is flash-encrypted and goes through flashcrypt first. It is
// Invalid in size, or Unprocessable with CodeKeysEmpty if nothing was ever written, or CodeKeysCRC if it is damaged.
func ParseKeyPartition(image []byte) (Keys, error) {
	switch {
	case len(image) < PageSize || len(image)%PageSize != 0:
		return Keys{}, fleet.Coded(fleet.Invalid, CodeKeys, "an NVS key partition of %d bytes: it is 0x%x, or a multiple", len(image), PageSize)
	case allFF(image[:keysSize+4]):
		return Keys{}, fleet.Coded(fleet.Unprocessable, CodeKeysEmpty, "the NVS key partition is empty: the device generates its keys at its first start")
	case binary.LittleEndian.Uint32(image[keysSize:]) != checksum(image[:keysSize]):
		return Keys{}, fleet.Coded(fleet.Unprocessable, CodeKeysCRC, "at offset 0x%x: the checksum of the NVS keys is wrong: damaged, or still encrypted with the flash-encryption key", keysSize)
	}
	return ParseKeys(image[:keysSize])
}

// FlashDecrypter is what KeysOfDevice needs of a flashcrypt.Cipher.
type FlashDecrypter interface {
	Decrypt(dst, src []byte, address uint32) error
}

// KeysOfDevice returns the keys that a device with flash encryption has generated itself for an nvs_keys partition at
// the offset: they follow from its flash-encryption key alone (esp32.md §4.6). oldIDF is for ESP-IDF before 4.3.
func KeysOfDevice(flash FlashDecrypter, offset uint32, oldIDF bool) (Keys, error) {
	pattern := []byte{0xFF, 0x99, 0xEE, 0x88}
	if oldIDF {
		pattern = []byte{0xFF, 0xFF, 0xEE, 0xEE}
	}
	var raw []byte
	for _, b := range pattern {
		raw = append(raw, bytes.Repeat([]byte{b}, keysSize/len(pattern))...)
	}
	if err := flash.Decrypt(raw, raw, offset); err != nil {
		return Keys{}, err
	}
	return ParseKeys(raw)
}

// Bytes returns the keys as ParseKeys reads them.
func (k Keys) Bytes() []byte { return bytes.Clone(k.raw[:]) }

// Partition returns the image of an nvs_keys partition of one page, in the clear. On a device it must be flash-encrypted
// for its offset.
func (k Keys) Partition() []byte {
	image := bytes.Clone(ff)
	copy(image, k.raw[:])
	binary.LittleEndian.PutUint32(image[keysSize:], checksum(k.raw[:]))
	return image
}

// String keeps the keys out of any print.
func (k Keys) String() string { return "nvs.Keys" }

// GoString keeps the keys out of %#v.
func (k Keys) GoString() string { return k.String() }

// Encrypt returns the encrypted form of a partition in the clear: each entry is encrypted for its offset, headers and
// bitmaps stay as they are. It is Invalid if the image is not a partition in size.
func Encrypt(image []byte, k Keys) ([]byte, error) { return cryptCopy(image, k, false) }

// Decrypt returns the clear form of an encrypted partition, damage included. With a wrong key it returns noise and no
// error; Decode notices.
func Decrypt(image []byte, k Keys) ([]byte, error) { return cryptCopy(image, k, true) }

func cryptCopy(image []byte, k Keys, decrypt bool) ([]byte, error) {
	if err := checkImage(image); err != nil {
		return nil, err
	}
	out := bytes.Clone(image)
	if err := crypt(out, k, decrypt); err != nil {
		return nil, err
	}
	return out, nil
}

func checkImage(image []byte) error {
	if len(image) == 0 || len(image)%PageSize != 0 || len(image) > MaxSize {
		return fleet.Coded(fleet.Invalid, CodeSize, "%d bytes are not an NVS partition: it is a multiple of 0x%x and at most 0x%x", len(image), PageSize, MaxSize)
	}
	return nil
}

// crypt works in place. What the bitmap calls empty is in the clear; so is an erased entry that was never written.
func crypt(image []byte, k Keys, decrypt bool) error {
	c, err := xts.New(k.raw[:])
	if err != nil {
		return err
	}
	do := c.Encrypt
	if decrypt {
		do = c.Decrypt
	}
	for off := 0; off < len(image); off += PageSize {
		p := page(image[off : off+PageSize])
		if p.state() == wordEmpty {
			continue
		}
		for i := 0; i < pageEntries; {
			n := p.cipherRun(i)
			if n == 0 {
				i++
				continue
			}
			do(p.payload(i, n*entrySize), entrySize, uint64(off+entriesOffset+i*entrySize))
			i += n
		}
	}
	return nil
}

// cipherRun returns how many entries from i on are encrypted on an encrypted partition.
func (p page) cipherRun(i int) int {
	n := 0
	for ; i+n < pageEntries; n++ {
		s := p.slot(i + n)
		if s == slotEmpty || s == slotErased && p.erased(i+n) {
			break
		}
	}
	return n
}
