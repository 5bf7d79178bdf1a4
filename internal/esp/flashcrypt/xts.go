package flashcrypt

import (
	"encoding/binary"

	"muster/internal/esp"
	"muster/internal/esp/xts"
)

// unitSize is the data unit of flash encryption with XTS-AES, bytes; units are aligned to the flash address.
const unitSize = 128

// piece is how much is reversed and encrypted at once, bytes: it stays in the processor's first cache meanwhile.
const piece = 8 << 10

// xtsMode is XTS-AES as the chips use it: the bytes of each unit are reversed before and after (esp32.md §3.2).
type xtsMode struct{ cipher *xts.Cipher }

func newXTS(kind esp.Cipher, key []byte, size int) (*Cipher, error) {
	if len(key) != size {
		return nil, keyError(kind, len(key))
	}
	c, err := xts.New(key)
	if err != nil {
		return nil, err
	}
	return &Cipher{kind: kind, end: 1 << 32, mode: xtsMode{c}}, nil
}

func (m xtsMode) encrypt(dst, src []byte, address uint32) error {
	reversed(dst, src, address, m.cipher.Encrypt)
	return nil
}

func (m xtsMode) decrypt(dst, src []byte, address uint32) error {
	reversed(dst, src, address, m.cipher.Decrypt)
	return nil
}

// inPlace is a direction of xts.Cipher.
type inPlace func(b []byte, unit int, address uint64)

// reversed runs crypt over src unit by unit. A unit of which src holds only a part is laid into a whole one: its other
// blocks do not matter, because XTS works on each block alone.
func reversed(dst, src []byte, address uint32, crypt inPlace) {
	if head := int(address % unitSize); head != 0 {
		n := min(unitSize-head, len(src))
		part(dst[:n], src[:n], head, address-uint32(head), crypt)
		dst, src, address = dst[n:], src[n:], address+uint32(n)
	}
	for len(src) >= unitSize {
		n := min(len(src)&^(unitSize-1), piece)
		reverseUnits(dst[:n], src[:n])
		crypt(dst[:n], unitSize, uint64(address))
		reverseUnits(dst[:n], dst[:n])
		dst, src, address = dst[n:], src[n:], address+uint32(n)
	}
	if len(src) > 0 {
		part(dst, src, 0, address, crypt)
	}
}

func part(dst, src []byte, from int, unit uint32, crypt inPlace) {
	var all [unitSize]byte
	copy(all[from:], src)
	reverseUnits(all[:], all[:])
	crypt(all[:], unitSize, uint64(unit))
	reverseUnits(all[:], all[:])
	copy(dst, all[from:])
}

// reverseUnits writes to dst the units of src, each with its bytes reversed. dst may be src.
func reverseUnits(dst, src []byte) {
	for ; len(src) >= unitSize; dst, src = dst[unitSize:], src[unitSize:] {
		to, from := (*[unitSize]byte)(dst), (*[unitSize]byte)(src)
		for i := 0; i < unitSize/2; i += 8 {
			j := unitSize - 8 - i
			x, y := binary.LittleEndian.Uint64(from[i:i+8]), binary.LittleEndian.Uint64(from[j:j+8])
			binary.BigEndian.PutUint64(to[i:i+8], y)
			binary.BigEndian.PutUint64(to[j:j+8], x)
		}
	}
}
