package keystore

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/fleet"
)

var passphrase = []byte("correct horse battery")

func ecKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestCheck(t *testing.T) {
	for ref, words := range map[string]string{
		"softkms:path=/x/y": "", "softkms:/x/y": "",
		"": "named by a URI", "device-ca.key": "named by a URI", "softkms:": "no path", "softkms:name=x": "no path", "vault:x": "no key manager is called",
		strings.Repeat("x", 100) + ":": "no key manager is called",
	} {
		err := Check(ref)
		if words == "" && err != nil || words != "" && (!fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), words)) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	// What is not compiled in says how to come by it.
	for kind, tag := range managers {
		if slices.Contains(Kinds(), kind) {
			continue
		}
		want := "-tags " + tag
		if err := Check(kind + ":token=x"); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", kind, err)
		}
		if _, err := Open(t.Context(), kind+":token=x", nil); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", kind, err)
		}
		if _, err := Create(t.Context(), kind+":token=x", nil); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

func TestSecretsOfAURIAreNotShown(t *testing.T) {
	for in, want := range map[string]string{
		"pkcs11:token=m;object=k?pin-value=1234":                "pkcs11:token=m;object=k?pin-value=***",
		"pkcs11:token=m?pin-source=/p&module-path=/m":           "pkcs11:token=m?pin-source=/p&module-path=/m",
		"azurekms:name=k;client-secret=s3;vault=v":              "azurekms:name=k;client-secret=***;vault=v",
		"pkcs11:PIN-VALUE=0;object=k":                           "pkcs11:PIN-VALUE=***;object=k",
		`no key "pkcs11:object=k?pin-value=1234" in this token`: `no key "pkcs11:object=k?pin-value=***" in this token`,
		"": "",
	} {
		if got := Show(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.key")
	k := ecKey(t, elliptic.P384())
	if err := WriteFile(path, k, []byte("short")); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a short passphrase: %v", err)
	}
	if err := WriteFile(path, k, passphrase); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, k, passphrase); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("overwritten: %v", err)
	}
	opened, err := Open(t.Context(), "softkms:path="+path, passphrase)
	if err != nil || !k.PublicKey.Equal(opened.Public()) {
		t.Fatal(err)
	}
	if err := opened.Check(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(opened.Close(), opened.Close()); err != nil {
		t.Error(err)
	}
	if err := opened.Check(); !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("signs after Close: %v", err)
	}
	for name, change := range map[string]func(){
		"mode": func() { _ = os.Chmod(path, 0o640) },
		"size": func() { _ = os.Chmod(path, 0o600); _ = os.Truncate(path, maxPEM+1) },
		"plain": func() {
			_ = os.WriteFile(path, []byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"), 0o600)
		},
		"gone": func() { _ = os.Remove(path) },
	} {
		if name == "gone" {
			continue // last
		}
		change()
		if _, err := ReadFile(path, passphrase); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	made, err := Create(t.Context(), "softkms:path="+path+".2", passphrase)
	if err != nil || made != "softkms:path="+path+".2" {
		t.Error(made, err)
	}
	if _, err := Create(t.Context(), "softkms:path="+path+".2", passphrase); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("made twice: %v", err)
	}
}

// manager is a key manager that can be made to hang, to fail, or to hold another key.
type manager struct {
	key          *ecdsa.PrivateKey
	hang         chan struct{} // if not nil, calls wait for it
	fail         bool
	opens, signs atomic.Int32
}

func (m *manager) Public() crypto.PublicKey { return m.key.Public() }

func (m *manager) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	m.signs.Add(1)
	if m.hang != nil {
		<-m.hang
	}
	if m.fail {
		return nil, errors.New("CKR_DEVICE_REMOVED for pkcs11:object=k?pin-value=1234")
	}
	return m.key.Sign(r, digest, o)
}

// handle is a session of a manager.
type handle struct{ *manager }

func (m *manager) open() (crypto.Signer, io.Closer, error) {
	m.opens.Add(1)
	return &handle{m}, nil, nil
}

func TestAHangingKeyManagerHoldsUpNobodyForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &manager{key: ecKey(t, elliptic.P256())}
		k, err := newKey(t.Context(), "pkcs11:object=k", m.open, Timeout)
		if err != nil {
			t.Fatal(err)
		}
		m.hang = make(chan struct{})
		for range 3 * maxCalls {
			start := time.Now()
			if err := k.Check(); !fleet.Is(err, fleet.Unavailable) || !strings.Contains(err.Error(), "does not answer") {
				t.Fatal(err)
			}
			if took := time.Since(start); took != Timeout {
				t.Fatalf("took %s", took)
			}
		}
		if n := m.signs.Load(); n != maxCalls {
			t.Errorf("%d calls were left behind, at most %d may be", n, maxCalls)
		}
		close(m.hang) // it answers again
		synctest.Wait()
		if err := k.Check(); err != nil {
			t.Error(err)
		}
	})
}

func TestOpeningEndsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		never := make(chan struct{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := newKey(ctx, "x", func() (crypto.Signer, io.Closer, error) { <-never; return nil, nil, errors.New("too late") }, Timeout)
		if !fleet.Is(err, fleet.Unavailable) || time.Since(start) != time.Second {
			t.Error(err, time.Since(start))
		}
		close(never) // the call left behind finds nobody; it must not panic
	})
}

func TestAKeyIsOpenedAgainAfterAFailure(t *testing.T) {
	m := &manager{key: ecKey(t, elliptic.P256())}
	k, err := newKey(t.Context(), "pkcs11:object=k", m.open, Timeout)
	if err != nil {
		t.Fatal(err)
	}
	m.fail = true
	if err := k.Check(); !fleet.Is(err, fleet.Unavailable) || strings.Contains(err.Error(), "1234") {
		t.Errorf("%v", err)
	}
	m.fail = false
	if err := k.Check(); err != nil || m.opens.Load() != 2 {
		t.Errorf("%v after %d", err, m.opens.Load())
	}
	m.fail = true
	_ = k.Check()
	m.fail, m.key = false, ecKey(t, elliptic.P256())
	if err := k.Check(); !fleet.Is(err, fleet.Unavailable) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("a foreign key: %v", err)
	}
}

func TestOnlyECKeys(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []crypto.Signer{weak, ecKey(t, elliptic.P521())} {
		if _, err := newKey(t.Context(), "x", func() (crypto.Signer, io.Closer, error) { return s, nil, nil }, Timeout); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%T: %v", s, err)
		}
	}
}

// Whatever is in a key file: no panic, and no key without its passphrase.
func FuzzParseKey(f *testing.F) {
	path := filepath.Join(f.TempDir(), "k")
	if err := WriteFile(path, ecKey(f, elliptic.P256()), passphrase); err != nil {
		f.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n"))
	f.Add([]byte(nil))
	f.Add(text[:len(text)/2])
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > maxPEM {
			return
		}
		if _, err := parseKey("k", in, []byte("another passphrase")); err != nil && !fleet.Is(err, fleet.Invalid) {
			t.Fatal(err)
		}
	})
}

// Whatever a URI is: no panic, and what is shown holds nothing more to hide.
func FuzzCheck(f *testing.F) {
	for _, s := range []string{"pkcs11:token=m;object=k?pin-value=1", "softkms:path=/x", "softkms:/x", ":", "%", "awskms:key-id=%zz"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_ = Check(s)
		if shown := Show(s); Show(shown) != shown {
			t.Fatalf("%q → %q", s, shown)
		}
	})
}
