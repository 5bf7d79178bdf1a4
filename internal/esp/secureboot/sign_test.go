package secureboot_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
)

func start(t testing.TB, file []byte, keep bool) *secureboot.Signing {
	t.Helper()
	s, err := secureboot.Start(bytes.NewReader(file), int64(len(file)), keep)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func sign(t testing.TB, file []byte, keep bool, names ...string) []byte {
	t.Helper()
	s := start(t, file, keep)
	for _, name := range names {
		if err := s.Sign(rand.Reader, signer(t, name)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return finish(t, s)
}

func code(err error) string {
	if e, ok := errors.AsType[*fleet.Error](err); ok {
		return e.Code
	}
	return fmt.Sprint(err)
}

func TestSignedImagesVerify(t *testing.T) {
	for _, names := range [][]string{{"rsa3072_a"}, {"ecdsa256"}, {"ecdsa384"}, {"rsa3072_c", "rsa3072_a", "rsa3072_b"}} {
		for _, plain := range [][]byte{padded(t), golden(t, "app_esp32_small.bin")} {
			file := sign(t, plain, false, names...)
			if len(file) != (len(plain)+4095)&^4095+4096 || !bytes.HasPrefix(file, plain) {
				t.Errorf("%v: %d bytes became %d", names, len(plain), len(file))
			}
			if _, err := image.Parse(bytes.NewReader(file), image.App); err != nil {
				t.Errorf("%v: %v", names, err)
			}
			rep := inspect(t, file)
			if rep.Err() != nil || len(rep.Blocks) != len(names) {
				t.Fatalf("%v: %+v, %v", names, rep.Blocks, rep.Findings)
			}
			for i, b := range rep.Blocks {
				if b.Key != public(t, names[i]).Digest() || b.Status != secureboot.Valid {
					t.Errorf("%v: block %d is %+v", names, i, b)
				}
			}
			if rep.Findings.Has("esp_not_secure_padded") == (len(plain)%image.PageSize == 0) {
				t.Errorf("%d bytes: %v", len(plain), rep.Findings)
			}
		}
	}
}

func TestP384SignsSHA384(t *testing.T) {
	plain := padded(t)
	file := sign(t, plain, false, "ecdsa384")
	b, sum := file[len(plain):], sha512.Sum384(plain)
	if b[0] != 0xE7 || b[1] != 3 || b[2] != 1 || !bytes.Equal(b[4:52], sum[:]) || b[52] != 3 {
		t.Errorf("the block begins with %x", b[:53])
	}
	x, y := public384(t)
	if !bytes.Equal(reversed(b[53:101]), x) || !bytes.Equal(reversed(b[101:149]), y) {
		t.Error("the point is not where it belongs")
	}
	r, s := new(big.Int).SetBytes(reversed(b[149:197])), new(big.Int).SetBytes(reversed(b[197:245]))
	if !ecdsa.Verify(signer(t, "ecdsa384").Public().(*ecdsa.PublicKey), sum[:], r, s) {
		t.Error("r and s are not where they belong")
	}
	if len(bytes.TrimLeft(b[245:1196], "\x00")) > 0 || crc32.ChecksumIEEE(b[:1196]) != binary.LittleEndian.Uint32(b[1196:]) || len(bytes.TrimLeft(b[1200:1216], "\x00")) > 0 {
		t.Error("filler or CRC is wrong")
	}
	if !esp.Erased(b[1216:]) || len(b) != 4096 {
		t.Error("the rest of the sector is not 0xFF")
	}
	// The digest of the key is over curve id and point (esp32.md §2).
	if got := inspect(t, file).Blocks[0].Key; got != public(t, "ecdsa384").Digest() {
		t.Errorf("the key has two digests: %s", got)
	}
}

func public384(t *testing.T) (x, y []byte) {
	b, err := signer(t, "ecdsa384").Public().(*ecdsa.PublicKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b[1:49], b[49:]
}

func TestAppendKeepsWhatIsThere(t *testing.T) {
	plain := padded(t)
	one := sign(t, plain, false, "rsa3072_a")
	two := sign(t, one, true, "rsa3072_b")
	if !bytes.Equal(two[:len(plain)+image.BlockSize], one[:len(plain)+image.BlockSize]) {
		t.Error("the first block has changed")
	}
	three := sign(t, two, true, "rsa3072_c")
	if got := inspect(t, three); len(got.Blocks) != 3 || got.Err() != nil {
		t.Errorf("%+v, %v", got.Blocks, got.Findings)
	}
	if err := start(t, three, true).Sign(rand.Reader, signer(t, "rsa3072_a")); code(err) != "esp_signature_full" {
		t.Errorf("a fourth: %v", err)
	}
	if err := start(t, two, true).Sign(rand.Reader, signer(t, "rsa3072_a")); code(err) != "esp_signature_twice" {
		t.Errorf("the same again: %v", err)
	}
	if err := start(t, two, true).Sign(rand.Reader, signer(t, "ecdsa256")); code(err) != "esp_signature_mixed" {
		t.Errorf("another scheme: %v", err)
	}
	if got := inspect(t, sign(t, three, false, "ecdsa256")); len(got.Blocks) != 1 || got.Blocks[0].Scheme != esp.ECDSAP256 {
		t.Errorf("signed afresh: %+v", got.Blocks)
	}
	if _, err := secureboot.Start(bytes.NewReader(golden(t, "negative/sig_other_key.bin")), 8192, true); code(err) != "esp_signature_bad" {
		t.Errorf("a bad signature is kept: %v", err)
	}
}

func TestStartRefuses(t *testing.T) {
	app := golden(t, "app_esp32_small.bin")
	arduino := append(bytes.Clone(app), append(bytes.Repeat([]byte{0xA5}, 256), make([]byte, 256)...)...)
	broken := bytes.Clone(app)
	broken[100] ^= 1
	for name, tt := range map[string]struct {
		file []byte
		code string
	}{
		"a broken image":     {broken, "esp_checksum"},
		"Arduino's trailer":  {arduino, "esp_trailing_data"},
		"no image":           {[]byte("hello"), "esp_magic"},
		"a damaged sector":   {golden(t, "negative/sig_crc_bad.bin"), "esp_signature_damaged"},
		"filler is left out": {append(bytes.Clone(app), bytes.Repeat([]byte{0xFF}, 9000)...), ""},
	} {
		s, err := secureboot.Start(bytes.NewReader(tt.file), int64(len(tt.file)), false)
		if tt.code != "" {
			if code(err) != tt.code {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err := errors.Join(err, s.Sign(rand.Reader, signer(t, "rsa3072_a"))); err != nil || len(finish(t, s)) != 8192 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := start(t, app, false).WriteTo(io.Discard); code(err) != "esp_unsigned" {
		t.Errorf("an image that nobody signed is written: %v", err)
	}
}

func TestDetachedFlow(t *testing.T) {
	for _, name := range []string{"rsa3072_a", "ecdsa256", "ecdsa384"} {
		key := public(t, name)
		s := start(t, padded(t), false)
		req, err := s.Request(key)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := signer(t, name).Sign(rand.Reader, req.Digest, req.Opts)
		if err != nil {
			t.Fatal(err)
		}
		wrong := bytes.Clone(sig)
		wrong[len(wrong)-1] ^= 1
		if err := s.Add(key, wrong); code(err) != "esp_signature_bad" {
			t.Errorf("%s: a wrong signature: %v", name, err)
		}
		if err := s.Add(key, sig[:10]); code(err) != "esp_signature_form" {
			t.Errorf("%s: a piece of one: %v", name, err)
		}
		if err := s.Add(key, sig); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if rep := inspect(t, finish(t, s)); rep.Err() != nil || rep.Blocks[0].Key != req.Key || rep.Blocks[0].Scheme != req.Scheme {
			t.Errorf("%s: %+v, %v", name, rep.Blocks, rep.Findings)
		}
		if !strings.Contains(req.OpenSSL(), fmt.Sprintf("sha%d", req.Opts.HashFunc().Size()*8)) {
			t.Errorf("%s: %s", name, req.OpenSSL())
		}
	}
	// The usual mistake: PSS with another salt, or PKCS #1 v1.5.
	s := start(t, padded(t), false)
	req, err := s.Request(public(t, "rsa3072_a"))
	if err != nil {
		t.Fatal(err)
	}
	for _, opts := range []crypto.SignerOpts{crypto.SHA256, &rsa.PSSOptions{SaltLength: 20, Hash: crypto.SHA256}} {
		sig, err := signer(t, "rsa3072_a").Sign(rand.Reader, req.Digest, opts)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Add(public(t, "rsa3072_a"), sig); code(err) != "esp_signature_bad" {
			t.Errorf("%T: %v", opts, err)
		}
	}
}

type failing struct{ crypto.Signer }

func (failing) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the token was removed")
}

type lying struct{ crypto.Signer }

func (l lying) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return l.Signer.Sign(r, bytes.Repeat([]byte{1}, len(digest)), o)
}

func TestSignersThatFail(t *testing.T) {
	s := start(t, padded(t), false)
	if err := s.Sign(rand.Reader, failing{signer(t, "rsa3072_a")}); !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("a removed token: %v", err)
	}
	if err := s.Sign(rand.Reader, lying{signer(t, "ecdsa256")}); code(err) != "esp_signature_bad" {
		t.Errorf("a signature of something else: %v", err)
	}
	if len(s.Keys()) != 0 {
		t.Errorf("signatures were kept: %v", s.Keys())
	}
}

func TestWeakKeysDoNotSign(t *testing.T) {
	short, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, padded(t), false)
	for name, k := range map[string]crypto.Signer{"RSA-2048": short, "P-521": p521} {
		if err := s.Sign(rand.Reader, k); code(err) != "esp_key" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Request(public(t, "ecdsa192")); code(err) != "esp_key" {
		t.Errorf("P-192: %v", err)
	}
	if _, err := s.Request(secureboot.Key{}); code(err) != "esp_key" {
		t.Errorf("no key: %v", err)
	}
	for name, pub := range map[string]crypto.PublicKey{
		"nothing": nil, "an empty RSA key": &rsa.PublicKey{}, "an empty ECDSA key": &ecdsa.PublicKey{}, "text": "key",
	} {
		if _, err := secureboot.KeyOf(pub); code(err) != "esp_key" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := secureboot.ParseKey([]byte("no DER")); code(err) != "esp_key" {
		t.Errorf("no DER: %v", err)
	}
}

// changing is a file that changes after it was read once.
type changing struct {
	b    []byte
	from int
}

func (c *changing) ReadAt(p []byte, off int64) (int, error) {
	c.from++
	n, err := bytes.NewReader(c.b).ReadAt(p, off)
	if c.from > 5 && n > 0 {
		p[0] ^= 1
	}
	return n, err
}

func TestFileThatChangesIsNotReleased(t *testing.T) {
	b := padded(t)
	file := &changing{b: b, from: -1 << 30}
	s, err := secureboot.Start(file, int64(len(b)), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Sign(rand.Reader, signer(t, "ecdsa256")); err != nil {
		t.Fatal(err)
	}
	file.from = 10
	if _, err := s.WriteTo(io.Discard); code(err) != "esp_file_changed" {
		t.Errorf("%v", err)
	}
}

func TestFindingsOfASigning(t *testing.T) {
	s := start(t, golden(t, "app_esp32_small.bin"), false)
	for _, name := range []string{"rsa3072_a", "rsa3072_b"} {
		if err := s.Sign(rand.Reader, signer(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	if fs := s.Findings(); len(fs) != 2 || !fs.Has("esp_not_secure_padded") || !fs.Has("esp_signature_ignored") {
		t.Errorf("%v", fs)
	}
	other := start(t, padded(t), false)
	if err := other.Sign(rand.Reader, signer(t, "ecdsa256")); err != nil {
		t.Fatal(err)
	}
	if fs := other.Findings(); len(fs) != 1 || !fs.Has("esp_signature_scheme") {
		t.Errorf("%v", fs)
	}
}
