package xts

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/xts"
	"pgregory.net/rapid"

	"muster/internal/fleet"
)

// Vectors 1 to 4 and 10 of IEEE 1619-2007 annex B: key ‖ tweak key, data unit number, plain, cipher (vector 10 cut to
// its first two blocks).
func TestVectorsOfIEEE1619(t *testing.T) {
	for _, v := range []struct {
		key, plain, want string
		unit             uint64
	}{
		{strings.Repeat("00", 32), strings.Repeat("00", 32), "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e", 0},
		{strings.Repeat("11", 16) + strings.Repeat("22", 16), strings.Repeat("44", 32), "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0", 0x3333333333},
		{"fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0" + strings.Repeat("22", 16), strings.Repeat("44", 32), "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89", 0x3333333333},
		{"2718281828459045235360287471352662497757247093699959574966967627" + "3141592653589793238462643383279502884197169399375105820974944592",
			"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b", 0xff},
	} {
		c, err := New(unhex(t, v.key))
		if err != nil {
			t.Fatal(err)
		}
		b := unhex(t, v.plain)
		c.Encrypt(b, len(b), v.unit)
		if got := hex.EncodeToString(b); got != v.want {
			t.Errorf("unit %#x: got %s, want %s", v.unit, got, v.want)
		}
		c.Decrypt(b, len(b), v.unit)
		if got := hex.EncodeToString(b); got != v.plain {
			t.Errorf("unit %#x back: got %s, want %s", v.unit, got, v.plain)
		}
	}
}

func TestItAgreesWithTheImplementationOfXCrypto(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.SliceOfN(rapid.Byte(), 64, 64).Draw(t, "key")
		if rapid.Bool().Draw(t, "short") {
			key = key[:32]
		}
		unit := 16 * rapid.IntRange(1, 9).Draw(t, "blocks a unit")
		plain := rapid.SliceOfN(rapid.Byte(), 0, 700).Draw(t, "plain")
		plain = plain[:len(plain)&^15]
		address := rapid.Uint64().Draw(t, "address")

		other, err := xts.NewCipher(aes.NewCipher, key)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, len(plain))
		for off := 0; off < len(plain); off += unit {
			end := min(off+unit, len(plain))
			other.Encrypt(want[off:end], plain[off:end], address+uint64(off))
		}
		c, err := New(key)
		if err != nil {
			t.Fatal(err)
		}
		got := bytes.Clone(plain)
		c.Encrypt(got, unit, address)
		if !bytes.Equal(got, want) {
			t.Fatalf("got %x, want %x", got, want)
		}
		if c.Decrypt(got, unit, address); !bytes.Equal(got, plain) {
			t.Fatalf("not undone: %x, was %x", got, plain)
		}
	})
}

func TestKeysOfAnotherLengthAreRefused(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33, 48, 63, 65} {
		if _, err := New(make([]byte, n)); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestHalfABlockPanics(t *testing.T) {
	c, err := New(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range [][2]int{{15, 16}, {17, 32}, {16, 8}, {16, 0}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%d bytes in units of %d: no panic", v[0], v[1])
				}
			}()
			c.Encrypt(make([]byte, v[0]), v[1], 0)
		}()
	}
}

func TestTheKeyIsNotPrinted(t *testing.T) {
	c, err := New(bytes.Repeat([]byte{0xA7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(f, c); s != "xts.Cipher" {
			t.Errorf("%s prints %s", f, s)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
