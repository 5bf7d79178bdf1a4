package secureboot_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
)

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// padded is the small application with the padding of --secure-pad-v2, as the vectors have it.
func padded(t testing.TB) []byte {
	t.Helper()
	small := golden(t, "app_esp32_small.bin")
	rep, err := image.Parse(bytes.NewReader(small), image.App)
	if err != nil {
		t.Fatal(err)
	}
	var parts []image.Part
	for _, s := range rep.Segments {
		parts = append(parts, image.Part{Load: s.Load, Data: small[s.Offset : s.Offset+int64(s.Length)]})
	}
	var out bytes.Buffer
	if err := image.Write(&out, *rep.Header, append(parts, image.SecurePad(parts))); err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(out.Bytes()); !bytes.Equal(sum[:], golden(t, "padv2.sha256")) {
		t.Fatal("the padded image is not that of esptool")
	}
	return out.Bytes()
}

// signer returns the private key in sb_NAME.pem.
func signer(t testing.TB, name string) crypto.Signer {
	t.Helper()
	block, _ := pem.Decode(golden(t, "sb_"+name+".pem"))
	if block.Type == "EC PRIVATE KEY" {
		k, err := x509.ParseECPrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	k, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// public returns the public key in sb_NAME.pub.pem.
func public(t testing.TB, name string) secureboot.Key {
	t.Helper()
	block, _ := pem.Decode(golden(t, "sb_"+name+".pub.pem"))
	k, err := secureboot.ParseKey(block.Bytes)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return k
}

// signed are the images that espsecure signed, with the keys of their blocks and the image without signature.
type signedFile struct {
	name  string
	file  []byte
	plain []byte
	keys  []string
}

func signedFiles(t testing.TB) []signedFile {
	small, pad := golden(t, "app_esp32_small.bin"), padded(t)
	c6 := golden(t, "signed_ecdsa256.bin")
	return []signedFile{
		{"signed_rsa3072.bin", append(bytes.Clone(pad), golden(t, "signed_rsa3072.sector")...), pad, []string{"rsa3072_a"}},
		{"signed_rsa3072_4kpad.bin", golden(t, "signed_rsa3072_4kpad.bin"), small, []string{"rsa3072_a"}},
		{"signed_rsa3072_x2.bin", golden(t, "signed_rsa3072_x2.bin"), small, []string{"rsa3072_a", "rsa3072_b"}},
		{"signed_ecdsa256.bin", c6, c6[:len(c6)-image.SectorSize], []string{"ecdsa256"}},
		{"signed_ecdsa192_4kpad.bin", golden(t, "signed_ecdsa192_4kpad.bin"), small, []string{"ecdsa192"}},
	}
}

func inspect(t testing.TB, file []byte) *secureboot.Report {
	t.Helper()
	img, err := image.Inspect(bytes.NewReader(file), image.Any)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := secureboot.Inspect(bytes.NewReader(file), img)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestKeyDigestsAreThoseOfEspsecure(t *testing.T) {
	for _, name := range []string{"rsa3072_a", "rsa3072_b", "ecdsa192", "ecdsa256"} {
		if got := public(t, name).Digest(); !bytes.Equal(got[:], golden(t, "digest_sb_"+name+".bin")) {
			t.Errorf("%s has the digest %s", name, got)
		}
	}
	for _, name := range []string{"rsa3072_a", "rsa3072_b", "rsa3072_c", "ecdsa256", "ecdsa384"} {
		k, err := secureboot.KeyOf(signer(t, name).Public())
		if err != nil || k.Digest() != public(t, name).Digest() || k.Scheme() != public(t, name).Scheme() {
			t.Errorf("%s: private and public key differ (%v)", name, err)
		}
	}
}

func TestEspsecureSignatures(t *testing.T) {
	for _, f := range signedFiles(t) {
		rep := inspect(t, f.file)
		if err := rep.Err(); err != nil || len(rep.Blocks) != len(f.keys) {
			t.Errorf("%s: %d blocks, %v", f.name, len(rep.Blocks), err)
			continue
		}
		for i, b := range rep.Blocks {
			k := public(t, f.keys[i])
			if b.Status != secureboot.Valid || b.Key != k.Digest() || b.Scheme != k.Scheme() || b.Index != i {
				t.Errorf("%s: block %d is %+v", f.name, i, b)
			}
			if _, err := rep.Check(secureboot.Policy{Keys: []secureboot.Slot{{Key: k.Digest()}}}); err != nil {
				t.Errorf("%s: key %d: %v", f.name, i, err)
			}
		}
	}
}

// TestDetachedSignaturesGiveTheSameBytes takes the signatures out of espsecure's files and puts them together again.
func TestDetachedSignaturesGiveTheSameBytes(t *testing.T) {
	for _, f := range signedFiles(t) {
		if f.keys[0] == "ecdsa192" {
			continue // muster does not sign with it: TestWeakKeysDoNotSign
		}
		s, err := secureboot.Start(bytes.NewReader(f.plain), int64(len(f.plain)), false)
		if err != nil {
			t.Fatal(err)
		}
		for i, name := range f.keys {
			if err := s.Add(public(t, name), detached(f.file, i, public(t, name).Scheme())); err != nil {
				t.Fatalf("%s: %v", f.name, err)
			}
		}
		if got := finish(t, s); !bytes.Equal(got, f.file) {
			t.Errorf("%s: other bytes than espsecure's", f.name)
		}
	}
}

// detached returns the signature of block i as a signer would hand it out.
func detached(file []byte, i int, scheme esp.Scheme) []byte {
	b := file[len(file)-image.SectorSize+i*image.BlockSize:]
	if scheme == esp.RSA3072 {
		return reversed(b[812:1196])
	}
	return append(reversed(b[101:133]), reversed(b[133:165])...)
}

func reversed(b []byte) []byte {
	r := make([]byte, len(b))
	for i := range b {
		r[len(b)-1-i] = b[i]
	}
	return r
}

func finish(t testing.TB, s *secureboot.Signing) []byte {
	t.Helper()
	var out bytes.Buffer
	n, err := s.WriteTo(&out)
	if err != nil || n != int64(out.Len()) {
		t.Fatalf("%d of %d bytes: %v", n, out.Len(), err)
	}
	return out.Bytes()
}

func TestNegativeFiles(t *testing.T) {
	trust := secureboot.Policy{Keys: []secureboot.Slot{{Key: public(t, "rsa3072_a").Digest()}, {Key: public(t, "rsa3072_b").Digest()}}}
	tests := map[string]struct {
		status secureboot.Status
		code   string // of the signature's findings
		image  string // of the image's
	}{
		"sig_body_flip.bin":          {secureboot.WrongImage, "esp_signature_image", "esp_checksum"},
		"sig_other_key.bin":          {secureboot.BadSignature, "esp_signature_bad", ""},
		"sig_crc_bad.bin":            {"", "", "esp_signature_damaged"},
		"sig_not_sector_aligned.bin": {"", "", "esp_signature_length"},
	}
	for name, want := range tests {
		file := golden(t, "negative/"+name)
		img, err := image.Inspect(bytes.NewReader(file), image.App)
		if err != nil {
			t.Fatal(err)
		}
		if (img.Err() != nil) != (want.image != "") || want.image != "" && !img.Findings.Has(want.image) {
			t.Errorf("%s: the image has %v", name, img.Findings)
		}
		rep := inspect(t, file)
		if want.status == "" {
			if rep.Signed() {
				t.Errorf("%s: a damaged block counts: %+v", name, rep.Blocks)
			}
		} else if len(rep.Blocks) != 1 || rep.Blocks[0].Status != want.status || !rep.Findings.Has(want.code) {
			t.Errorf("%s: %+v, %v", name, rep.Blocks, rep.Findings)
		}
		if _, err := rep.Check(trust); err == nil {
			t.Errorf("%s is trusted", name)
		}
	}
}
