package signing

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.step.sm/crypto/pemutil"

	"muster/internal/esp"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
	"muster/test/espfile"
)

type keyDigest = secureboot.KeyDigest

var pss = &rsa.PSSOptions{SaltLength: 32, Hash: crypto.SHA256}

const keys = "../esp/secureboot/testdata/"

// private copies a key of the golden files to where only its owner may read it.
func private(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(keys + name)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, name, string(b))
}

func bootKey(t *testing.T, name string) crypto.Signer {
	t.Helper()
	k, err := LoadSecureBootKey(private(t, name), never)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func releaseKey(t *testing.T) (crypto.Signer, string) {
	t.Helper()
	pair, err := Keygen(filepath.Join(t.TempDir(), "release.pem"), nil)
	if err != nil {
		t.Fatal(err)
	}
	k, err := LoadKey(pair.Private, never)
	if err != nil {
		t.Fatal(err)
	}
	return k, pair.Public
}

func look(t *testing.T, l Look) Report {
	t.Helper()
	r, err := Inspect(l)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSignSecureBoot(t *testing.T) {
	for name, c := range map[string]struct {
		chip   esp.ChipID
		keys   []string
		scheme esp.Scheme
	}{
		"RSA, as many as fit": {0x09, []string{"sb_rsa3072_a.pem", "sb_rsa3072_b.pem", "sb_rsa3072_c.pem"}, esp.RSA3072},
		"P-256":               {0x0D, []string{"sb_ecdsa256.pem"}, esp.ECDSAP256},
		"P-384":               {0x7777, []string{"sb_ecdsa384.pem"}, esp.ECDSAP384},
	} {
		plain := espfile.App{Chip: c.chip, SecureVersion: 1}.Bytes(t)
		image := write(t, "app.bin", string(plain))
		o := SecureBootOrder{Image: image}
		for _, k := range c.keys {
			o.Signers = append(o.Signers, bootKey(t, k))
		}
		s, err := SignSecureBoot(o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s.Path != strings.TrimSuffix(image, ".bin")+".signed.bin" || s.Size != 8192 || len(s.Keys) != len(c.keys) {
			t.Errorf("%s: %+v", name, s)
		}
		if now, err := os.ReadFile(image); err != nil || !bytes.Equal(now, plain) {
			t.Errorf("%s: the image itself changed: %v", name, err)
		}
		if _, err := SignSecureBoot(o); !fleet.Is(err, fleet.Conflict) {
			t.Errorf("%s: overwritten: %v", name, err)
		}

		release, public := releaseKey(t)
		rel, err := Sign(Order{Image: s.Path, Product: "lamp", Version: "1.0.0"}, release)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		r := look(t, Look{File: s.Path, Public: public})
		if r.Err() != nil || !r.Verified || *r.Manifest != rel.Manifest || rel.Manifest.Size != s.Size || rel.Manifest.SecureVersion != 1 || !rel.ESP {
			t.Errorf("%s: %+v, %v", name, r, r.Err())
		}
		if rel.Manifest.ImageHash == rel.Manifest.SHA256 || rel.Manifest.ImageHash != r.App.Image.ImageHash {
			t.Errorf("%s: a device names its image by %s", name, rel.Manifest.ImageHash)
		}
		for i, b := range r.App.SecureBoot.Blocks {
			if b.Scheme != c.scheme || b.Status != "valid" || b.Key != s.Keys[i] {
				t.Errorf("%s: block %+v", name, b)
			}
		}
	}
}

// A key in a hardware module sees the digest alone.
func TestDetached(t *testing.T) {
	for name, sign := range map[string]crypto.SignerOpts{"sb_rsa3072_a": nil, "sb_ecdsa256": crypto.SHA256, "sb_ecdsa384": crypto.SHA384} {
		image := write(t, "app.bin", string(espfile.App{Chip: 0x7777}.Bytes(t)))
		out := filepath.Join(t.TempDir(), "digest.bin")
		public, err := LoadSecureBootPublicKey(keys + name + ".pub.pem")
		if err != nil {
			t.Fatal(err)
		}
		r, err := RequestSecureBoot(image, out, public, false)
		if err != nil {
			t.Fatal(err)
		}
		digest, err := os.ReadFile(out)
		if err != nil || hex.EncodeToString(digest) != r.Digest || r.Key != public.Digest() || !strings.Contains(r.OpenSSL, out) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		if _, err := RequestSecureBoot(image, out, public, false); !fleet.Is(err, fleet.Conflict) {
			t.Errorf("%s: overwritten: %v", name, err)
		}
		if sign == nil {
			sign = pss
		}
		sig, err := bootKey(t, name+".pem").Sign(rand.Reader, digest, sign)
		if err != nil {
			t.Fatal(err)
		}
		made := Made{Key: public, Signature: write(t, "sig", string(sig))}
		s, err := SignSecureBoot(SecureBootOrder{Image: image, Made: []Made{made}})
		if err != nil || !slices.Equal(s.Keys, []keyDigest{public.Digest()}) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
		other := write(t, "other.bin", string(espfile.App{Chip: 0x7777, Body: "other"}.Bytes(t)))
		if _, err := SignSecureBoot(SecureBootOrder{Image: other, Made: []Made{made}}); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: a signature of another image: %v", name, err)
		}
		if _, err := os.Stat(SignedName(other)); err == nil {
			t.Errorf("%s: a signed image was written in spite of it", name)
		}
	}
}

func TestAppendSignature(t *testing.T) {
	image := write(t, "app.bin", string(espfile.App{Chip: 0x09}.Bytes(t)))
	a, b := bootKey(t, "sb_rsa3072_a.pem"), bootKey(t, "sb_rsa3072_b.pem")
	one, err := SignSecureBoot(SecureBootOrder{Image: image, Signers: []crypto.Signer{a}})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		keep bool
		want int
	}{"append": {true, 2}, "anew": {false, 1}} {
		s, err := SignSecureBoot(SecureBootOrder{Image: one.Path, Out: filepath.Join(t.TempDir(), "x"), Append: c.keep, Signers: []crypto.Signer{b}})
		if err != nil || len(s.Keys) != c.want || s.Size != one.Size {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if _, err := SignSecureBoot(SecureBootOrder{Image: one.Path, Out: filepath.Join(t.TempDir(), "x"), Append: true, Signers: []crypto.Signer{a}}); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("the same key twice: %v", err)
	}
	if _, err := SignSecureBoot(SecureBootOrder{Image: image, Out: filepath.Join(t.TempDir(), "x")}); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("nobody signs: %v", err)
	}
}

func TestSecureBootKeys(t *testing.T) {
	k := bootKey(t, "sb_rsa3072_a.pem")
	for name, options := range map[string][]pemutil.Options{
		"PKCS #8, encrypted":     {pemutil.WithPKCS8(true), pemutil.WithPassword([]byte("correct horse"))},
		"the old way, encrypted": {pemutil.WithPassword([]byte("correct horse"))},
	} {
		block, err := pemutil.Serialize(k, options...)
		if err != nil {
			t.Fatal(err)
		}
		path := write(t, "k.pem", string(pem.EncodeToMemory(block)))
		got, err := LoadSecureBootKey(path, func() ([]byte, error) { return []byte("correct horse"), nil })
		if err != nil || !k.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(got.Public()) {
			t.Errorf("%s: %v", name, err)
		}
		for why, ask := range map[string]func() ([]byte, error){"none": never, "wrong": func() ([]byte, error) { return []byte("wrong"), nil }} {
			if _, err := LoadSecureBootKey(path, ask); !fleet.Is(err, fleet.Invalid) {
				t.Errorf("%s, passphrase %s: %v", name, why, err)
			}
		}
	}
	_, public := releaseKey(t)
	if got, err := LoadSecureBootPublicKey(public); err != nil || got.Scheme() != esp.ECDSAP256 {
		t.Errorf("%v, %v", got.Scheme(), err)
	}
	for name, path := range map[string]string{
		"private": private(t, "sb_rsa3072_a.pem"), "not PEM": write(t, "k", "hello"), "broken": write(t, "k", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
		"no certificate": write(t, "k", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
	} {
		if _, err := LoadSecureBootPublicKey(path); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	open := private(t, "sb_rsa3072_a.pem")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSecureBootKey(open, never); !fleet.Is(err, fleet.Forbidden) {
		t.Error(err)
	}
}

// A release over an image that a device would refuse is not signed, nor is one whose flags contradict the image.
func TestSignChecksImage(t *testing.T) {
	release, _ := releaseKey(t)
	good := espfile.App{SecureVersion: 2, MaxRev: 399, Project: "toaster"}.Bytes(t)
	broken := bytes.Clone(good)
	broken[100] ^= 1
	for name, c := range map[string]struct {
		image []byte
		o     Order
		code  string
	}{
		"broken":         {broken, Order{}, "esp_checksum"},
		"cut":            {good[:20], Order{}, "esp_truncated"},
		"one byte":       {good[:1], Order{}, "esp_truncated"},
		"chip":           {good, Order{Chip: "esp32s3"}, "manifest_chip"},
		"secure version": {good, Order{SecureVersion: 3}, "manifest_secure_version"},
		"revision":       {good, Order{MaxRevision: 500}, "manifest_chip_revision"},
		"image hash":     {good, Order{ImageHash: fleet.HashOf([32]byte{1})}, "manifest_image_hash"},
	} {
		c.o.Image, c.o.Product, c.o.Version = write(t, "app.bin", string(c.image)), "lamp", "1.0.0"
		_, err := Sign(c.o, release)
		if e, ok := err.(*fleet.Error); !ok || e.Code != c.code {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(c.o.Image + ".jws"); err == nil {
			t.Errorf("%s: wrote a manifest", name)
		}
	}
	s, err := Sign(Order{Image: write(t, "app.bin", string(good)), Product: "lamp", Version: "1.0.0"}, release)
	if err != nil || s.Manifest.Chip != "esp32" || s.Manifest.SecureVersion != 2 || s.Manifest.MaxChipRevision != 399 || !s.Findings.Has("esp_name_differs") || s.Steps == "" {
		t.Errorf("%+v, %v", s, err)
	}
	raw, err := Sign(Order{Image: write(t, "app.bin", string(broken)), Product: "lamp", Version: "1.0.0", Chip: "x86"}, release)
	if err != nil || raw.ESP || raw.Manifest.ImageHash != raw.Manifest.SHA256 {
		t.Errorf("a raw image that begins like one: %+v, %v", raw, err)
	}
}

func TestInspectPair(t *testing.T) {
	release, _ := releaseKey(t)
	good := espfile.App{SecureVersion: 2}.Bytes(t)
	sign := func(content []byte, o Order) string {
		o.Image, o.Product, o.Version = write(t, "app.bin", string(content)), "lamp", "1.0.0"
		if _, err := Sign(o, release); err != nil {
			t.Fatal(err)
		}
		return o.Image
	}
	espImage, raw, both := sign(good, Order{}), sign([]byte("an image"), Order{}), sign(good, Order{MinVersion: "0.5.0"})
	x86 := sign(good, Order{Chip: "x86"})
	if err := os.Remove(both + ".jws"); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		l    Look
		app  bool
		raw  bool
		m    bool
		code string
	}{
		"ESP32 with manifest":       {Look{File: espImage}, true, false, true, ""},
		"ESP32 alone":               {Look{File: both}, true, false, false, ""},
		"ESP32, manifest named":     {Look{File: both, Manifest: espImage + ".jws"}, true, false, true, ""},
		"manifest alone":            {Look{File: espImage + ".jws"}, false, false, true, ""},
		"raw with manifest":         {Look{File: raw}, false, true, true, ""},
		"raw that begins like one":  {Look{File: x86}, false, true, true, ""},
		"manifest of another":       {Look{File: espImage, Manifest: raw + ".jws"}, true, false, true, "image_mismatch"},
		"raw, manifest of another":  {Look{File: raw, Manifest: espImage + ".jws"}, false, false, true, "image_mismatch"},
		"neither":                   {Look{File: write(t, "x", "\x7fELF...")}, true, false, false, "esp_magic"},
		"empty":                     {Look{File: write(t, "x", "")}, true, false, false, "esp_empty"},
		"a manifest that is no JWS": {Look{File: write(t, "x", "eyJhbGciOi")}, false, false, false, "manifest_malformed"},
		"its manifest is no JWS":    {Look{File: espImage, Manifest: raw}, true, false, false, "manifest_malformed"},
	} {
		r := look(t, c.l)
		if (r.App != nil) != c.app || r.Raw != c.raw || (r.Manifest != nil) != c.m {
			t.Errorf("%s: %+v", name, r)
		}
		if (r.Err() != nil) != (c.code != "") || c.code != "" && !r.Findings.Has(c.code) {
			t.Errorf("%s: %v: %v", name, r.Err(), r.Findings)
		}
	}
	for name, l := range map[string]Look{
		"no file":     {File: filepath.Join(t.TempDir(), "none")},
		"no manifest": {File: espImage, Manifest: filepath.Join(t.TempDir(), "none")},
		"no key":      {File: espImage, Public: filepath.Join(t.TempDir(), "none")},
	} {
		if _, err := Inspect(l); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
