package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

func anyCertificate(t testing.TB) []byte {
	t.Helper()
	k := ecKey(t, elliptic.P256())
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	return toPEM("CERTIFICATE", der)
}

func TestParseChainPEM(t *testing.T) {
	one := string(anyCertificate(t))
	for _, n := range []int{1, 2, MaxChainCerts} {
		if list, err := ParseChainPEM([]byte("\n" + strings.Repeat(one+"\n\n", n))); err != nil || len(list) != n {
			t.Errorf("%d: %v %v", n, len(list), err)
		}
	}
	for name, in := range map[string]string{
		"nothing":         "",
		"blank":           " \n\t",
		"garbage before":  "hello\n" + one,
		"garbage behind":  one + "hello",
		"garbage between": one + "hello\n" + one,
		"too many":        strings.Repeat(one, MaxChainCerts+1),
		"too large":       strings.Repeat("\n", MaxChainPEM) + one,
		"headers":         strings.Replace(one, "-----\n", "-----\nProc-Type: 4,ENCRYPTED\n\n", 1),
		"a key":           one + string(toPEM("PRIVATE KEY", []byte{1})),
		"damaged first":   strings.Replace(one, "MII", "!II", 1) + one,
		"damaged last":    one + strings.Replace(one, "-----END CERTIFICATE-----", "", 1),
		"not DER":         string(toPEM("CERTIFICATE", []byte("nonsense"))),
		"trailing bytes":  string(toPEM("CERTIFICATE", append(derOf(t, one), 0))),
		"trusted":         strings.ReplaceAll(one, "CERTIFICATE", "TRUSTED CERTIFICATE"),
	} {
		_, err := ParseChainPEM([]byte(in))
		wantCode(t, err, fleet.Invalid, CodeChain)
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

func derOf(t *testing.T, text string) []byte {
	t.Helper()
	list, err := ParseChainPEM([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return list[0].Raw
}

// The request of a CA may carry any name and ask for anything, but not with any key or without having signed it.
func TestParseCACSRPEM(t *testing.T) {
	k := ecKey(t, elliptic.P384())
	asks := extension(t, oidBasicConstraints, struct{ CA bool }{true})
	asks.Subject = pkix.Name{CommonName: "acme devices 1, the second"}
	c, err := ParseCACSRPEM(toPEM("CERTIFICATE REQUEST", request(t, k, asks)))
	if err != nil || string(c.PublicKey) != string(spkiOf(t, k.Public())) {
		t.Fatal(err)
	}
	der := request(t, k, asks)
	der[len(der)-1] ^= 1
	_, err = ParseCACSRPEM(toPEM("CERTIFICATE REQUEST", der))
	wantCode(t, err, fleet.Invalid, CodeSignature)
	_, err = ParseCACSRPEM(toPEM("CERTIFICATE REQUEST", request(t, ecKey(t, elliptic.P224()), asks)))
	wantCode(t, err, fleet.Unprocessable, CodeKey)
}

// Whatever comes in: no panic, a coded error, or certificates that were all of it.
func FuzzParseChainPEM(f *testing.F) {
	one := anyCertificate(f)
	f.Add(one)
	f.Add(append(append([]byte{}, one...), one...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nA: b\n\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		list, err := ParseChainPEM(in)
		if err != nil {
			if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Code != CodeChain {
				t.Fatalf("an error without its code: %v", err)
			}
			return
		}
		if n := strings.Count(string(in), "-----BEGIN "); len(list) == 0 || len(list) > MaxChainCerts || n != len(list) {
			t.Fatalf("%d of %d blocks", len(list), n)
		}
	})
}

// Whatever comes in: no panic, a coded error or a key that a CA may have.
func FuzzParseCACSRPEM(f *testing.F) {
	f.Add(toPEM("CERTIFICATE REQUEST", request(f, ecKey(f, elliptic.P256()), named("any name"))))
	f.Add(toPEM("NEW CERTIFICATE REQUEST", request(f, ecKey(f, elliptic.P384()), x509.CertificateRequest{})))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := ParseCACSRPEM(in)
		if err != nil {
			if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Code == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		key, err := x509.ParsePKIXPublicKey(c.PublicKey)
		if _, ec := key.(*ecdsa.PublicKey); err != nil || !ec {
			t.Fatalf("%T %v", key, err)
		}
	})
}
