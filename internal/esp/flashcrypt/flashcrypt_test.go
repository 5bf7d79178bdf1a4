package flashcrypt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"

	"muster/internal/esp"
	"muster/internal/fleet"
)

func file(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func must(t testing.TB, kind esp.Cipher, key []byte) *Cipher {
	t.Helper()
	c, err := New(kind, key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// golden is a file that espsecure made: v5.3.1, and for esp32_k192 v4.7.0. Its name says how: cipher, configuration,
// address, plain text.
type golden struct {
	name          string
	plain, crypto []byte
	address       uint32
	cipher        *Cipher
}

var goldenName = regexp.MustCompile(`^(esp32_k256|esp32_k192|fe_xts128|fe_xts128_short16|fe_xts256)(?:_conf0x([0-9a-f]))?_0x([0-9a-f]+)_(\w+)$`)

func goldens(t testing.TB) []golden {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.bin")
	if err != nil {
		t.Fatal(err)
	}
	var all []golden
	for _, p := range paths {
		name := strings.TrimSuffix(filepath.Base(p), ".bin")
		m := goldenName.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		g := golden{name: name, plain: file(t, "pt_"+m[4]), crypto: file(t, name)}
		a, err := strconv.ParseUint(m[3], 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		g.address = uint32(a)
		switch m[1] {
		case "fe_xts128":
			g.cipher = must(t, esp.CipherXTS128, file(t, "key_fe_xts128"))
		case "fe_xts128_short16":
			g.cipher = must(t, esp.CipherXTSShort, file(t, "key_fe_xts128_short16"))
		case "fe_xts256":
			g.cipher = must(t, esp.CipherXTS256, file(t, "key_fe_xts256"))
		default:
			config := uint64(DefaultConfig)
			if m[2] != "" {
				if config, err = strconv.ParseUint(m[2], 16, 8); err != nil {
					t.Fatal(err)
				}
			}
			if g.cipher, err = NewESP32(file(t, strings.Replace(m[1], "esp32_k", "key_fe_esp32_", 1)), uint8(config)); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, g)
	}
	if len(all) < 28 {
		t.Fatalf("only %d golden files", len(all))
	}
	return all
}

func TestItMakesWhatEspsecureMakes(t *testing.T) {
	for _, g := range goldens(t) {
		got := make([]byte, len(g.plain))
		if err := g.cipher.Encrypt(got, g.plain, g.address); err != nil {
			t.Errorf("%s: %v", g.name, err)
		} else if !bytes.Equal(got, g.crypto) {
			t.Errorf("%s: differs from espsecure's", g.name)
		}
		if err := g.cipher.Decrypt(got, got, g.address); err != nil {
			t.Errorf("%s: %v", g.name, err)
		} else if !bytes.Equal(got, g.plain) {
			t.Errorf("%s: does not decrypt to its plain text", g.name)
		}
	}
}

func TestAStreamMakesTheSameAsOneCall(t *testing.T) {
	for _, g := range goldens(t) {
		for how, r := range map[string]io.Reader{
			"whole": bytes.NewReader(g.plain), "one byte": iotest.OneByteReader(bytes.NewReader(g.plain)),
			"end with data": iotest.DataErrReader(bytes.NewReader(g.plain)),
		} {
			var w bytes.Buffer
			n, err := g.cipher.EncryptStream(&w, r, g.address)
			if err != nil || n != int64(len(g.plain)) || !bytes.Equal(w.Bytes(), g.crypto) {
				t.Errorf("%s, %s: %d bytes, %v", g.name, how, n, err)
			}
		}
		var w bytes.Buffer
		if _, err := g.cipher.DecryptStream(&w, bytes.NewReader(g.crypto), g.address); err != nil || !bytes.Equal(w.Bytes(), g.plain) {
			t.Errorf("%s back: %v", g.name, err)
		}
	}
}

// A stream longer than its buffer, from the middle of a unit, is what one call makes of it.
func TestALongStream(t *testing.T) {
	plain := make([]byte, 3*streamBuffer+48)
	for i := range plain {
		plain[i] = byte(i * 7 >> 3)
	}
	kinds := map[esp.Cipher]bool{}
	for _, g := range goldens(t) {
		if kinds[g.cipher.Kind()] {
			continue
		}
		kinds[g.cipher.Kind()] = true
		for _, address := range []uint32{0x10000, 0x10010, 0x10070} {
			want := make([]byte, len(plain))
			if err := g.cipher.Encrypt(want, plain, address); err != nil {
				t.Fatal(err)
			}
			var w bytes.Buffer
			if _, err := g.cipher.EncryptStream(&w, bytes.NewReader(plain), address); err != nil || !bytes.Equal(w.Bytes(), want) {
				t.Errorf("%s at 0x%x: the stream differs: %v", g.name, address, err)
			}
		}
	}
}

// What NVS makes of its key partition on a device that generates its keys itself (esp32.md §4.6).
func TestKeysThatADeviceDerives(t *testing.T) {
	c := must(t, esp.CipherESP32, file(t, "key_fe_esp32_256"))
	for _, idf := range []string{"idf_ge_4_3", "idf_lt_4_3"} {
		got := file(t, "nvskeys_raw_pattern_"+idf)
		if err := c.Decrypt(got, got, 0x310000); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, file(t, "nvskeys_derived_esp32_0x310000_"+idf)) {
			t.Errorf("%s: other keys than the device's", idf)
		}
	}
}

func TestACipherOfEachKindEncryptsBlocksAlone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, end := drawCipher(t)
		plain := drawBlocks(t, 600)
		address := rapid.Uint32Range(0, uint32((end-uint64(len(plain)))/Align)).Draw(t, "block") * Align

		whole := make([]byte, len(plain))
		if err := c.Encrypt(whole, plain, address); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(plain); off += Align {
			one := make([]byte, Align)
			if err := c.Encrypt(one, plain[off:off+Align], address+uint32(off)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(one, whole[off:off+Align]) {
				t.Fatalf("block at +%d depends on its neighbours", off)
			}
		}
		if err := c.Decrypt(whole, whole, address); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(whole, plain) {
			t.Fatal("decrypt does not undo encrypt")
		}
	})
}

func drawCipher(t *rapid.T) (*Cipher, uint64) {
	kind := rapid.SampledFrom([]esp.Cipher{esp.CipherESP32, esp.CipherXTS128, esp.CipherXTS256, esp.CipherXTSShort}).Draw(t, "kind")
	size := rapid.SampledFrom(KeySizes(kind)).Draw(t, "size")
	key := rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "key")
	if kind != esp.CipherESP32 {
		c, err := New(kind, key)
		if err != nil {
			t.Fatal(err)
		}
		return c, 1 << 32
	}
	c, err := NewESP32(key, rapid.Uint8Max(0xF).Draw(t, "config"))
	if err != nil {
		t.Fatal(err)
	}
	return c, endESP32
}

func drawBlocks(t *rapid.T, most int) []byte {
	b := rapid.SliceOfN(rapid.Byte(), 0, most).Draw(t, "plain")
	return b[:len(b)&^(Align-1)]
}

// A unit's key as esp32.md §3.1 words it, bit by bit.
func TestTheTweakedKeyBitByBit(t *testing.T) {
	var order []int
	for _, last := range []int{14, 12, 10, 8} {
		for range 3 {
			for a := 23; a >= 5; a-- {
				order = append(order, a)
			}
		}
		for a := last; a >= 5; a-- {
			order = append(order, a)
		}
	}
	if len(order) != 256 {
		t.Fatalf("%d bits", len(order))
	}
	group := func(i int) int {
		switch {
		case i <= 66:
			return 0
		case i <= 131:
			return 1
		case i <= 194:
			return 2
		}
		return 3
	}
	for _, config := range []uint8{0, 1, 2, 4, 8, 0xA, 0xF} {
		f := flips(config)
		for i, address := range order {
			for bit := range f {
				want := bit == address && config>>group(i)&1 == 1
				if got := f[bit][i/8]&(0x80>>(i%8)) != 0; got != want {
					t.Fatalf("config %#x: address bit %d flips key bit %d: %v", config, bit, i, got)
				}
			}
		}
	}
}

// With the 3/4 coding scheme the chip repeats a part of the key (esp32.md §3.1).
func TestTheShortKeyOfCoding34(t *testing.T) {
	short := file(t, "key_fe_esp32_192")
	long := append(bytes.Clone(short), short[8:16]...)
	plain := file(t, "pt_count256")
	a, b := make([]byte, len(plain)), make([]byte, len(plain))
	if err := must(t, esp.CipherESP32, short).Encrypt(a, plain, 0x8000); err != nil {
		t.Fatal(err)
	}
	if err := must(t, esp.CipherESP32, long).Encrypt(b, plain, 0x8000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("24 bytes of key are not stretched as the chip stretches them")
	}
}

func TestRefusals(t *testing.T) {
	esp32 := must(t, esp.CipherESP32, make([]byte, 32))
	xts := must(t, esp.CipherXTS128, make([]byte, 32))
	for _, v := range []struct {
		name    string
		c       *Cipher
		address uint32
		n       int
		code    string
	}{
		{"address within a block", esp32, 0x10008, 16, CodeAddress},
		{"address within a block, XTS", xts, 1, 16, CodeAddress},
		{"half a block", esp32, 0x10000, 24, CodeLength},
		{"half a block, XTS", xts, 0x10000, 17, CodeLength},
		{"above 24 bits", esp32, 0x1000000, 16, CodeAddress},
		{"across 24 bits", esp32, 0xFFFFF0, 32, CodeAddress},
		{"across 32 bits", xts, 0xFFFFFFF0, 32, CodeAddress},
	} {
		dst := bytes.Repeat([]byte{7}, v.n)
		for how, err := range map[string]error{
			"encrypt": v.c.Encrypt(dst, make([]byte, v.n), v.address),
			"decrypt": v.c.Decrypt(dst, make([]byte, v.n), v.address),
			"stream":  streamErr(v.c, make([]byte, v.n), v.address),
		} {
			if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.Invalid || e.Code != v.code {
				t.Errorf("%s, %s: %v", v.name, how, err)
			}
		}
		if !bytes.Equal(dst, bytes.Repeat([]byte{7}, v.n)) {
			t.Errorf("%s: something was written", v.name)
		}
	}
	if err := xts.Encrypt(make([]byte, 16), make([]byte, 16), 0xFFFFFFF0); err != nil {
		t.Errorf("the last block of the address space: %v", err)
	}
	if err := esp32.Encrypt(make([]byte, 16), make([]byte, 16), 0xFFFFF0); err != nil {
		t.Errorf("the last block of the ESP32: %v", err)
	}
	if err := xts.Encrypt(make([]byte, 16), make([]byte, 32), 0); !fleet.Is(err, fleet.Internal) {
		t.Errorf("too little room: %v", err)
	}
}

func streamErr(c *Cipher, b []byte, address uint32) error {
	_, err := c.EncryptStream(io.Discard, bytes.NewReader(b), address)
	return err
}

func TestKeysAndConfigurationsThatAreRefused(t *testing.T) {
	for _, v := range []struct {
		kind esp.Cipher
		n    int
	}{
		{esp.CipherESP32, 16}, {esp.CipherESP32, 31}, {esp.CipherESP32, 64}, {esp.CipherXTS128, 16}, {esp.CipherXTS128, 64},
		{esp.CipherXTS256, 32}, {esp.CipherXTSShort, 32}, {esp.CipherXTSShort, 0}, {"", 32}, {"rot13", 32},
	} {
		_, err := New(v.kind, make([]byte, v.n))
		if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.Invalid || e.Code != CodeKey {
			t.Errorf("%s with %d bytes: %v", v.kind, v.n, err)
		}
	}
	if _, err := NewESP32(make([]byte, 32), 0x10); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("FLASH_CRYPT_CONFIG 0x10: %v", err)
	}
}

func TestAStreamPassesOnWhatFails(t *testing.T) {
	c := must(t, esp.CipherXTS256, make([]byte, 64))
	broken := errors.New("cable")
	_, err := c.EncryptStream(io.Discard, iotest.ErrReader(broken), 0)
	if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Code != CodeRead || !errors.Is(err, broken) {
		t.Errorf("source: %v", err)
	}
	_, err = c.EncryptStream(badWriter{broken}, bytes.NewReader(make([]byte, 32)), 0)
	if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Code != CodeWrite || !errors.Is(err, broken) {
		t.Errorf("target: %v", err)
	}
	if n, err := c.EncryptStream(io.Discard, bytes.NewReader(nil), 0); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
}

type badWriter struct{ err error }

func (w badWriter) Write([]byte) (int, error) { return 0, w.err }

func TestGeneratedKeysFit(t *testing.T) {
	for _, kind := range []esp.Cipher{esp.CipherESP32, esp.CipherXTS128, esp.CipherXTS256, esp.CipherXTSShort} {
		source := bytes.Repeat([]byte{1, 2, 3, 4}, 16)
		key, err := GenerateKey(kind, bytes.NewReader(source))
		if err != nil || !bytes.Equal(key, source[:len(key)]) {
			t.Errorf("%s: %x, %v", kind, key, err)
		}
		must(t, kind, key)
		if _, err := GenerateKey(kind, bytes.NewReader(source[:len(key)-1])); !fleet.Is(err, fleet.Internal) {
			t.Errorf("%s with too little randomness: %v", kind, err)
		}
	}
	if _, err := GenerateKey("rot13", bytes.NewReader(nil)); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("unknown cipher: %v", err)
	}
}

func TestPad(t *testing.T) {
	for n, want := range map[int]int{0: 0, 1: 16, 15: 16, 16: 16, 17: 32} {
		in := make([]byte, n, 64)
		out := Pad(in)
		if len(out) != want || !bytes.Equal(out[:n], in) || !bytes.Equal(out[n:], bytes.Repeat([]byte{0xFF}, want-n)) {
			t.Errorf("%d bytes become %x", n, out)
		}
	}
}

func TestKeysAreNotPrinted(t *testing.T) {
	for _, c := range []*Cipher{must(t, esp.CipherESP32, bytes.Repeat([]byte{0xA7}, 32)), must(t, esp.CipherXTS128, bytes.Repeat([]byte{0xA7}, 32))} {
		for _, f := range []string{"%v", "%+v", "%#v", "%s"} {
			if s := fmt.Sprintf(f, c); s != "flashcrypt.Cipher("+string(c.Kind())+")" {
				t.Errorf("%s prints %s", f, s)
			}
		}
	}
}

func FuzzCipher(f *testing.F) {
	for _, g := range goldens(f) {
		f.Add(uint8(0xF), g.address, file(f, "key_fe_xts256"), g.plain)
		f.Add(uint8(3), g.address, file(f, "key_fe_esp32_256"), g.crypto)
	}
	f.Fuzz(func(t *testing.T, config uint8, address uint32, key, b []byte) {
		for _, kind := range []esp.Cipher{esp.CipherESP32, esp.CipherXTS128, esp.CipherXTS256, esp.CipherXTSShort} {
			c, err := New(kind, key)
			if kind == esp.CipherESP32 {
				c, err = NewESP32(key, config)
			}
			if err != nil {
				continue
			}
			got := make([]byte, len(b))
			if err := c.Encrypt(got, b, address); err != nil {
				if !fleet.Is(err, fleet.Invalid) {
					t.Fatal(err)
				}
				continue
			}
			var w bytes.Buffer
			if _, err := c.EncryptStream(&w, bytes.NewReader(b), address); err != nil || !bytes.Equal(w.Bytes(), got) {
				t.Fatalf("stream: %v", err)
			}
			if err := c.Decrypt(got, got, address); err != nil || !bytes.Equal(got, b) {
				t.Fatalf("decrypt does not undo encrypt: %v", err)
			}
			if err := c.Decrypt(got, b, address); err != nil {
				t.Fatal(err)
			}
			if err := c.Encrypt(got, got, address); err != nil || !bytes.Equal(got, b) {
				t.Fatalf("encrypt does not undo decrypt: %v", err)
			}
		}
	})
}
