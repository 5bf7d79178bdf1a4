package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

func p256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// caDER makes a CA certificate for key, signed by parent, or by itself.
func caDER(t testing.TB, name string, key crypto.Signer, parent *x509.Certificate, by crypto.Signer, change func(*x509.Certificate)) []byte {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: day0, NotAfter: day0.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if change != nil {
		change(c)
	}
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func bundle(t testing.TB) Bundle {
	t.Helper()
	oldKey, newKey := p256(t), p256(t)
	old, fresh := caDER(t, "root 1", oldKey, nil, nil, nil), caDER(t, "root 2", newKey, nil, nil, nil)
	parent, err := x509.ParseCertificate(old)
	if err != nil {
		t.Fatal(err)
	}
	return Bundle{Version: 3, Time: day0.Unix(), Roots: [][]byte{old, fresh}, Cross: [][]byte{caDER(t, "root 2", newKey, parent, oldKey, nil)}}
}

func TestABundleComesBackAsItWasSigned(t *testing.T) {
	key, b := p256(t), bundle(t)
	text, err := SignBundle(b, key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := VerifyBundle(text, &key.PublicKey)
	if err != nil || got.Version != 3 || len(got.Roots) != 2 || len(got.Cross) != 1 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if got.Follows(3) || got.Follows(4) || !got.Follows(2) {
		t.Error("an old version may take the place of a newer one")
	}
	if len(text) > 4096 {
		t.Errorf("%d bytes are much for a device", len(text))
	}
}

func TestBundlesThatDevicesMustNotTake(t *testing.T) {
	key, other, b := p256(t), p256(t), bundle(t)
	text, err := SignBundle(b, key)
	if err != nil {
		t.Fatal(err)
	}
	part := strings.Split(text, ".")
	b64 := base64.RawURLEncoding.EncodeToString
	id, _ := TrustKeyID(&key.PublicKey)
	for name, tc := range map[string]struct{ text, code string }{
		"nothing":           {"", CodeBundleMalformed},
		"no JWS":            {"hello", CodeBundleMalformed},
		"another signature": {part[0] + "." + part[1] + "." + b64(make([]byte, 64)), CodeBundleSignature},
		"another payload":   {part[0] + "." + b64([]byte(`{"v":9,"t":1,"roots":[]}`)) + "." + part[2], CodeBundleSignature},
		"alg none":          {b64([]byte(`{"alg":"none","kid":"`+id+`","typ":"`+BundleType+`"}`)) + "." + part[1] + ".", CodeBundleMalformed},
		"a key inside":      {b64([]byte(`{"alg":"ES256","kid":"`+id+`","typ":"`+BundleType+`","jwk":{}}`)) + "." + part[1] + "." + part[2], CodeBundleMalformed},
		"of another type":   {b64([]byte(`{"alg":"ES256","kid":"`+id+`","typ":"muster-release+jws"}`)) + "." + part[1] + "." + part[2], CodeBundleMalformed},
		"of another key":    {b64([]byte(`{"alg":"ES256","kid":"0011223344556677","typ":"`+BundleType+`"}`)) + "." + part[1] + "." + part[2], CodeBundleSignature},
		"too large":         {strings.Repeat("a", MaxBundle+1), CodeBundleTooLarge},
	} {
		_, err := VerifyBundle(tc.text, &key.PublicKey)
		if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Code != tc.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := VerifyBundle(text, &other.PublicKey); err == nil {
		t.Error("verified under another key")
	}
}

func TestBundlesThatAreNotSigned(t *testing.T) {
	key := p256(t)
	root := caDER(t, "root", key, nil, nil, nil)
	leaf := caDER(t, "leaf", key, nil, nil, func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = false, false, x509.KeyUsageDigitalSignature
	})
	good := bundle(t)
	for name, change := range map[string]func(*Bundle){
		"version 0":     func(b *Bundle) { b.Version = 0 },
		"no time":       func(b *Bundle) { b.Time = 0 },
		"no roots":      func(b *Bundle) { b.Roots = nil },
		"too many":      func(b *Bundle) { b.Cross = make([][]byte, MaxBundleCerts) },
		"not DER":       func(b *Bundle) { b.Roots[0] = []byte{1} },
		"a leaf":        func(b *Bundle) { b.Roots[0] = leaf },
		"twice":         func(b *Bundle) { b.Roots = [][]byte{root, root} },
		"cross as root": func(b *Bundle) { b.Roots[0] = b.Cross[0] },
		"root as cross": func(b *Bundle) { b.Cross[0] = root },
	} {
		b := good
		b.Roots, b.Cross = append([][]byte(nil), good.Roots...), append([][]byte(nil), good.Cross...)
		change(&b)
		if _, err := SignBundle(b, key); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	big, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := SignBundle(good, big); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("signed by RSA: %v", err)
	}
}

func FuzzVerifyBundle(f *testing.F) {
	key, b := p256(f), bundle(f)
	text, err := SignBundle(b, key)
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{text, "", "a.b.c", text[:len(text)-1], "." + text} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := VerifyBundle(s, &key.PublicKey)
		if err == nil && (got.Version != b.Version || len(got.Roots) != len(b.Roots) || string(got.Roots[0]) != string(b.Roots[0])) {
			t.Fatal("a bundle that was never signed")
		}
	})
}
