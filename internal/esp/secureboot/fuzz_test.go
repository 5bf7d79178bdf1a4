package secureboot

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
)

// blocksIn returns the blocks of golden files.
func blocksIn(t testing.TB) [][]byte {
	t.Helper()
	var all [][]byte
	for _, name := range []string{"signed_rsa3072_x2.bin", "signed_ecdsa256.bin", "signed_ecdsa192_4kpad.bin"} {
		b, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range readSector(b[len(b)-image.SectorSize:]) {
			all = append(all, found.raw)
		}
	}
	return all
}

func TestBlocksAreWrittenAsTheyWereRead(t *testing.T) {
	all := blocksIn(t)
	if len(all) != 4 {
		t.Fatalf("%d blocks", len(all))
	}
	for i, raw := range all {
		b := readBlock(0, raw)
		if b.fault != "" || !bytes.Equal(newBlock(b.key, b.digest, b.signature()), raw) {
			t.Errorf("block %d (%s) has other bytes; %s", i, b.scheme, b.fault)
		}
	}
}

// FuzzReadBlock: whatever stands in a block whose CRC is right, nothing panics, and what is understood is written so
// that it is understood the same.
func FuzzReadBlock(f *testing.F) {
	for _, raw := range blocksIn(f) {
		f.Add(raw[:crcAt])
	}
	f.Add([]byte{0xE7, 2})
	f.Add([]byte{0xE7, 3, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		raw := make([]byte, image.BlockSize)
		copy(raw[:crcAt], b)
		raw[0] = 0xE7
		binary.LittleEndian.PutUint32(raw[crcAt:], crc32.ChecksumIEEE(raw[:crcAt]))
		sector := append(raw, bytes.Repeat([]byte{0xFF}, image.SectorSize-image.BlockSize)...)
		found := readSector(sector)
		if len(found) != 1 {
			t.Fatalf("%d blocks", len(found))
		}
		one := found[0]
		if one.fault != "" {
			return
		}
		one.key.verify(one.digest, one.signature())
		two := readBlock(0, newBlock(one.key, one.digest, one.signature()))
		if two.fault != "" || two.scheme != one.scheme || two.name != one.name || !bytes.Equal(two.digest, one.digest) {
			t.Fatalf("%+v became %+v", one, two)
		}
		a, z := one.signature(), two.signature()
		if !bytes.Equal(a.rsa, z.rsa) || one.scheme != esp.RSA3072 && (a.r.Cmp(z.r) != 0 || a.s.Cmp(z.s) != 0) {
			t.Fatal("another signature")
		}
	})
}

// FuzzReadSignature: what an operator gives as a signature never panics, and is not taken for one.
func FuzzReadSignature(f *testing.F) {
	f.Add([]byte{0x30, 6, 2, 1, 1, 2, 1, 1})
	f.Add([]byte{0x30, 6, 2, 1, 0xFF, 2, 1, 0})
	f.Add(make([]byte, 64))
	f.Add(make([]byte, 384))
	blocks := blocksIn(f)
	f.Fuzz(func(t *testing.T, sig []byte) {
		for _, raw := range blocks {
			b := readBlock(0, raw)
			got, ok := readSignature(b.scheme, sig)
			if ok && b.key.verify(b.digest, got) && !bytes.Equal(newBlock(b.key, b.digest, got), raw) {
				t.Fatalf("%x is taken for a signature", sig)
			}
		}
	})
}

// FuzzParseKey: a key that is read has a digest, and nothing panics.
func FuzzParseKey(f *testing.F) {
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		k, err := ParseKey(der)
		if err == nil && (k.scheme == "" || k.Digest() == KeyDigest{}) {
			t.Fatalf("%x is a key of no kind", der)
		}
	})
}
