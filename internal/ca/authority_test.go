package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// fixture is one hierarchy for all tests: making one needs no time, but its authority an RSA key.
var fixture = sync.OnceValues(func() (*Hierarchy, error) { return Create(CreateOptions{At: time.Now()}) })

func hierarchy(t testing.TB) *Hierarchy {
	t.Helper()
	h, err := fixture()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func newAuthority(t testing.TB, h *Hierarchy) *Authority {
	t.Helper()
	a, err := NewAuthority(h, pki.KeyPolicy{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func deviceKey(t testing.TB) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return spki, k
}

func order(t testing.TB, device fleet.DeviceID) pki.Order {
	t.Helper()
	spki, _ := deviceKey(t)
	s, err := NewSerial()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return pki.Order{Serial: s, Device: device, PublicKey: spki, Validity: pki.Validity{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(90 * 24 * time.Hour)}}
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSignMakesWhatTheDesignSays(t *testing.T) {
	h := hierarchy(t)
	a := newAuthority(t, h)
	o := order(t, "pump-7")
	signed, err := a.Sign(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(signed.Chain) != 2 || !bytes.Equal(signed.Chain[1], h.Device.Cert.Raw) {
		t.Fatal("the chain is not leaf and intermediate")
	}
	c := parse(t, signed.Chain[0])
	if got := fleet.SerialOf(c.SerialNumber); got != o.Serial {
		t.Errorf("serial %s", got)
	}
	if c.Subject.String() != "CN=pump-7" || len(c.DNSNames) != 1 || c.DNSNames[0] != "pump-7" || len(c.URIs) != 1 || c.URIs[0].String() != wire.CertUser("pump-7", o.Serial) {
		t.Errorf("names: %s, %v, %v", c.Subject, c.DNSNames, c.URIs)
	}
	if c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || c.IsCA {
		t.Error("uses")
	}
	if c.SignatureAlgorithm != x509.ECDSAWithSHA256 || !c.NotBefore.Equal(o.NotBefore.Truncate(time.Second)) || !c.NotAfter.Equal(o.NotAfter.Truncate(time.Second)) {
		t.Error("dates or algorithm")
	}
	if signed.NotAfter != c.NotAfter || signed.NotBefore != c.NotBefore {
		t.Error("reports other dates than it signed")
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(h.TrustBundle())
	mid := x509.NewCertPool()
	mid.AddCert(h.Device.Cert)
	for use, want := range map[x509.ExtKeyUsage]bool{x509.ExtKeyUsageClientAuth: true, x509.ExtKeyUsageServerAuth: false} {
		_, err := c.Verify(x509.VerifyOptions{Roots: roots, Intermediates: mid, KeyUsages: []x509.ExtKeyUsage{use}})
		if (err == nil) != want {
			t.Errorf("use %v: %v", use, err)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	a := newAuthority(t, hierarchy(t))
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := x509.MarshalPKIXPublicKey(p224.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*pki.Order){
		"no serial":    func(o *pki.Order) { o.Serial = "" },
		"huge serial":  func(o *pki.Order) { o.Serial = "ffffffffffffffffffffffffffffffffffffffff" },
		"device id":    func(o *pki.Order) { o.Device = "a,CN=b" },
		"no key":       func(o *pki.Order) { o.PublicKey = nil },
		"P-224":        func(o *pki.Order) { o.PublicKey = weak },
		"no time":      func(o *pki.Order) { o.NotAfter = o.NotBefore },
		"before dates": func(o *pki.Order) { o.NotAfter = o.NotBefore.Add(-time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			o := order(t, "pump-7")
			change(&o)
			if s, err := a.Sign(t.Context(), o); !fleet.Is(err, fleet.Unprocessable) || s.Chain != nil {
				t.Errorf("got %v", err)
			}
		})
	}
}

// pki.md §1.6 row 6: smallstep signs leaves that outlive their issuer.
func TestSignClampsToTheIssuer(t *testing.T) {
	now := time.Now()
	h, err := Create(CreateOptions{At: now, IntermediateLife: 30 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	a := newAuthority(t, h)
	o := order(t, "pump-7")
	signed, err := a.Sign(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if c := parse(t, signed.Chain[0]); !c.NotAfter.Equal(h.Device.Cert.NotAfter) || !signed.NotAfter.Equal(c.NotAfter) {
		t.Errorf("ends %s, its issuer %s", c.NotAfter, h.Device.Cert.NotAfter)
	}
	o = order(t, "pump-7")
	o.NotBefore = h.Device.Cert.NotAfter.Add(-MinLeft + time.Hour)
	o.NotAfter = o.NotBefore.Add(90 * 24 * time.Hour)
	if _, err := a.Sign(t.Context(), o); !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("an issuer near its end signed: %v", err)
	}
}

// Whatever reaches smallstep by another way than Sign is refused, also with a sound request.
func TestNothingElseIsReachable(t *testing.T) {
	h := hierarchy(t)
	a := newAuthority(t, h)
	_, key := deviceKey(t)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "pump-7"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.auth.SignWithContext(t.Context(), csr, provisioner.SignOptions{}); err == nil {
		t.Error("smallstep signed a request without an order")
	}
	signed, err := a.Sign(t.Context(), order(t, "pump-7"))
	if err != nil {
		t.Fatal(err)
	}
	leaf := parse(t, signed.Chain[0])
	if _, err := a.auth.RenewContext(t.Context(), leaf, nil); err == nil {
		t.Error("smallstep renewed")
	}
	if _, err := a.auth.RenewContext(t.Context(), leaf, key.Public()); err == nil {
		t.Error("smallstep rekeyed")
	}
	if _, err := a.auth.Authorize(t.Context(), "token"); err == nil {
		t.Error("smallstep took a token")
	}
	if used, err := a.ledger.UseToken("a", "b"); err == nil || used {
		t.Error("a token is good")
	}
	if err := a.ledger.StoreCertificate(leaf); !errors.Is(err, errRefused) {
		t.Error("stored a certificate that is not being signed")
	}
}

// A template that is not the order's own is stopped before it is signed.
func TestLedgerEnforces(t *testing.T) {
	a := newAuthority(t, hierarchy(t))
	o := order(t, "pump-7")
	p, err := a.prepare(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.ledger.open(p); err != nil {
		t.Fatal(err)
	}
	if err := a.ledger.open(p); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("the same serial twice: %v", err)
	}
	_, other := deviceKey(t)
	good := func() *x509.Certificate {
		return &x509.Certificate{SerialNumber: o.Serial.Big(), PublicKey: p.key, Subject: pkix.Name{CommonName: "pump-7"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	}
	if err := a.ledger.Enforce(good()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"no serial":   func(c *x509.Certificate) { c.SerialNumber = nil },
		"serial":      func(c *x509.Certificate) { c.SerialNumber = big.NewInt(7) },
		"key":         func(c *x509.Certificate) { c.PublicKey = other.Public() },
		"name":        func(c *x509.Certificate) { c.Subject.CommonName = "pump-8" },
		"CA":          func(c *x509.Certificate) { c.IsCA = true },
		"extension":   func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{{}} },
		"server":      func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"another use": func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) },
	} {
		c := good()
		change(c)
		if a.ledger.Enforce(c) == nil {
			t.Errorf("%s: let through", name)
		}
	}
	a.ledger.close(p)
	if a.ledger.Enforce(good()) == nil {
		t.Error("let through after the order was done")
	}
}

// verify is the last look; each certificate here is signed by the right CA and wrong in one thing.
func TestVerifyFindsEveryDifference(t *testing.T) {
	h := hierarchy(t)
	a := newAuthority(t, h)
	o := order(t, "pump-7")
	p, err := a.prepare(o)
	if err != nil {
		t.Fatal(err)
	}
	_, other := deviceKey(t)
	make := func(change func(*x509.Certificate), pub crypto.PublicKey, by Pair) *x509.Certificate {
		c := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, SubjectKeyId: []byte{1}}
		if err := (identity{p}).Modify(c, provisioner.SignOptions{}); err != nil {
			t.Fatal(err)
		}
		change(c)
		der, err := x509.CreateCertificate(rand.Reader, c, by.Cert, pub, by.Key)
		if err != nil {
			t.Fatal(err)
		}
		return parse(t, der)
	}
	same := func(*x509.Certificate) {}
	if err := p.verify(make(same, p.key, h.Device), h.Device.Cert); err != nil {
		t.Fatalf("a sound one: %v", err)
	}
	if p.verify(make(same, other.Public(), h.Device), h.Device.Cert) == nil {
		t.Error("another key")
	}
	if p.verify(make(same, p.key, h.Root), h.Device.Cert) == nil {
		t.Error("another issuer")
	}
	for name, change := range map[string]func(*x509.Certificate){
		"serial":     func(c *x509.Certificate) { c.SerialNumber = big.NewInt(7) },
		"subject":    func(c *x509.Certificate) { c.Subject.CommonName = "pump-8" },
		"more of it": func(c *x509.Certificate) { c.Subject.Organization = []string{"x"} },
		"DNS":        func(c *x509.Certificate) { c.DNSNames = []string{"pump-8"} },
		"two DNS":    func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "pump-8") },
		"no URI":     func(c *x509.Certificate) { c.URIs = nil },
		"mail":       func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b.c"} },
		"usage":      func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement },
		"server":     func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) },
		"no use":     func(c *x509.Certificate) { c.ExtKeyUsage = nil },
		"CA":         func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true },
		"start":      func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-time.Hour) },
		"end":        func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) },
		"extension": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: []byte{5, 0}}}
		},
	} {
		if p.verify(make(change, p.key, h.Device), h.Device.Cert) == nil {
			t.Errorf("%s: not seen", name)
		}
	}
}

func TestSignConcurrently(t *testing.T) {
	a := newAuthority(t, hierarchy(t))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 5 {
				id := fleet.DeviceID(fmt.Sprintf("pump-%d-%d", i, j))
				o := order(t, id)
				s, err := a.Sign(context.Background(), o)
				if err != nil {
					t.Error(err)
					return
				}
				if c := parse(t, s.Chain[0]); c.Subject.CommonName != string(id) || fleet.SerialOf(c.SerialNumber) != o.Serial {
					t.Errorf("%s got a certificate for %s", id, c.Subject)
				}
			}
		})
	}
	wg.Wait()
	if n := len(a.ledger.orders); n != 0 {
		t.Errorf("%d orders are still open", n)
	}
}

func BenchmarkSign(b *testing.B) {
	a := newAuthority(b, hierarchy(b))
	o := order(b, "pump-7")
	b.Run("bare", func(b *testing.B) {
		p, err := a.prepare(o)
		if err != nil {
			b.Fatal(err)
		}
		c := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		if err := (identity{p}).Modify(c, provisioner.SignOptions{}); err != nil {
			b.Fatal(err)
		}
		h := hierarchy(b)
		for b.Loop() {
			if _, err := x509.CreateCertificate(rand.Reader, c, h.Device.Cert, p.key, h.Device.Key); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("authority", func(b *testing.B) {
		for b.Loop() {
			if _, err := a.Sign(b.Context(), o); err != nil {
				b.Fatal(err)
			}
		}
	})
}
