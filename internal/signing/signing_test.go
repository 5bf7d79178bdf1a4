package signing

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

func never() ([]byte, error) { return nil, errors.New("asked for a passphrase") }

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeygenSignInspect(t *testing.T) {
	for name, passphrase := range map[string][]byte{"plain": nil, "encrypted": []byte("correct horse")} {
		dir := t.TempDir()
		pair, err := Keygen(filepath.Join(dir, "release.pem"), passphrase)
		if err != nil {
			t.Fatal(err)
		}
		if pair.Public != filepath.Join(dir, "release.pub.pem") {
			t.Errorf("public key in %s", pair.Public)
		}
		info, err := os.Stat(pair.Private)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("private key: %v, %v", info.Mode(), err)
		}
		text, err := os.ReadFile(pair.Private)
		if err != nil || strings.Contains(string(text), "BEGIN ENCRYPTED PRIVATE KEY") != (passphrase != nil) {
			t.Errorf("%s: %v", name, err)
		}
		ask := never
		if passphrase != nil {
			ask = func() ([]byte, error) { return passphrase, nil }
		}
		signer, err := LoadKey(pair.Private, ask)
		if err != nil {
			t.Fatal(err)
		}
		image := write(t, "app.bin", "an image")
		got, err := Sign(Order{Image: image, Product: "lamp", Version: "1.2.3", Chip: "esp32", SecureVersion: 2, MinVersion: "1.0.0"}, signer)
		if err != nil {
			t.Fatal(err)
		}
		sum := fleet.HashOf(sha256.Sum256([]byte("an image")))
		want := firmware.Manifest{Product: "lamp", Version: "1.2.3", Size: 8, SHA256: sum, ImageHash: sum, Chip: "esp32", SecureVersion: 2, MinVersion: "1.0.0"}
		if got.Manifest != want || got.KeyID != pair.ID || got.Path != image+".jws" {
			t.Errorf("%s: signed %+v", name, got)
		}
		for public, verified := range map[string]bool{"": false, pair.Public: true} {
			r, err := Inspect(Look{File: got.Path, Public: public})
			if err != nil || r.Err() != nil || *r.Manifest != want || r.KeyID != pair.ID || r.Verified != verified {
				t.Errorf("%s: %+v, %v", name, r, err)
			}
		}
		stranger, err := Keygen(filepath.Join(dir, "stranger"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := Inspect(Look{File: got.Path, Public: stranger.Public}); err != nil || r.Err() == nil || r.Verified || !r.Findings.Has("key_unknown") {
			t.Errorf("%s: a stranger's key: %+v, %v", name, r, err)
		}
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "release.pem")
	if _, err := Keygen(path, nil); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Keygen(path, nil); !fleet.Is(err, fleet.Conflict) {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "release.pub.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := Keygen(path, nil); !fleet.Is(err, fleet.Conflict) { // the public half alone is gone
		t.Error(err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the private key changed: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "release.pub.pem")); err == nil {
		t.Error("a public key of nothing was left behind")
	}

	signer, err := LoadKey(path, never)
	if err != nil {
		t.Fatal(err)
	}
	o := Order{Image: write(t, "app.bin", "x"), Product: "lamp", Version: "1.0.0"}
	if _, err := Sign(o, signer); err != nil {
		t.Fatal(err)
	}
	o.Version = "1.0.1"
	if _, err := Sign(o, signer); !fleet.Is(err, fleet.Conflict) {
		t.Error(err)
	}
	o.Replace = true
	s, err := Sign(o, signer)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Inspect(Look{File: s.Path}); err != nil || r.Manifest.Version != "1.0.1" {
		t.Errorf("%+v, %v", r, err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(s.Path), ".muster-*")); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestLoadKeyRefuses(t *testing.T) {
	dir := t.TempDir()
	locked, err := Keygen(filepath.Join(dir, "locked.pem"), []byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	open, err := Keygen(filepath.Join(dir, "open.pem"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open.Private, 0o640); err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(open.Public)
	if err != nil {
		t.Fatal(err)
	}
	ed25519 := "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n-----END PRIVATE KEY-----\n"
	for name, c := range map[string]struct {
		path string
		ask  func() ([]byte, error)
		kind fleet.Kind
	}{
		"missing":             {filepath.Join(dir, "none"), never, fleet.NotFound},
		"readable by others":  {open.Private, never, fleet.Forbidden},
		"wrong passphrase":    {locked.Private, func() ([]byte, error) { return []byte("wrong"), nil }, fleet.Invalid},
		"no passphrase":       {locked.Private, never, fleet.Invalid},
		"public key":          {write(t, "k", string(public)), never, fleet.Invalid},
		"not PEM":             {write(t, "k", "hello"), never, fleet.Invalid},
		"broken":              {write(t, "k", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), never, fleet.Invalid},
		"key of another kind": {write(t, "k", ed25519), never, fleet.Unprocessable},
	} {
		if _, err := LoadKey(c.path, c.ask); !fleet.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "correct horse") {
			t.Errorf("%s: the error tells the passphrase", name)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	pair, err := Keygen(filepath.Join(t.TempDir(), "k"), nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := LoadKey(pair.Private, never)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    Order
		kind fleet.Kind
	}{
		"no image":    {Order{Image: filepath.Join(t.TempDir(), "none"), Product: "lamp", Version: "1.0.0"}, fleet.NotFound},
		"a folder":    {Order{Image: t.TempDir(), Product: "lamp", Version: "1.0.0"}, fleet.Invalid},
		"empty image": {Order{Image: write(t, "a", ""), Product: "lamp", Version: "1.0.0"}, fleet.Unprocessable},
		"version":     {Order{Image: write(t, "a", "x"), Product: "lamp", Version: "v1"}, fleet.Unprocessable},
		"product":     {Order{Image: write(t, "a", "x"), Version: "1.0.0"}, fleet.Unprocessable},
	} {
		if _, err := Sign(c.o, signer); !fleet.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(c.o.Image + ".jws"); err == nil {
			t.Errorf("%s: wrote a manifest", name)
		}
	}
	long := write(t, "m", strings.Repeat("a", firmware.MaxJWS+10))
	if _, err := ReadManifest(long); !fleet.Is(err, fleet.TooLarge) {
		t.Error(err)
	}
}

// A key may be named by a URI: of a file, or of a key manager that this program was not built with.
func TestKeysByURI(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key.pem")
	if _, err := Keygen(key, nil); err != nil {
		t.Fatal(err)
	}
	want, err := LoadKey(key, never)
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"softkms:" + key, "softkms:path=" + key} {
		if got, err := LoadKey(ref, never); err != nil || !want.Public().(*ecdsa.PublicKey).Equal(got.Public()) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	for _, load := range []func(string, func() ([]byte, error)) (crypto.Signer, error){LoadKey, LoadSecureBootKey, LoadFOTAKey} {
		_, err := load("pkcs11:token=t;object=o?pin-value=1234", never)
		if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "make pkcs11") || strings.Contains(err.Error(), "1234") {
			t.Errorf("got %v", err)
		}
	}
	if _, err := LoadKey("no-such:file", never); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("a file whose name has a colon: %v", err)
	}
}
