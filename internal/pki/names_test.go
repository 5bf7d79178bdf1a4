package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/url"
	"testing"

	"muster/internal/fleet"
	"muster/internal/pki"
)

func namedRequest(t testing.TB, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	req := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "pump-7"}}
	change(req)
	der, err := x509.CreateCertificateRequest(rand.Reader, req, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestNames(t *testing.T) {
	uri := &url.URL{Scheme: "urn", Opaque: "muster:device:pump-7:1"}
	full := func(r *x509.CertificateRequest) { r.DNSNames, r.URIs = []string{"pump-7", "b"}, []*url.URL{uri} }
	base, err := pki.RequestNames(namedRequest(t, full))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*x509.CertificateRequest)
		same   bool // as full
		own    bool // the device's DNS name or none
	}{
		{"the same", full, true, false},
		{"another order", func(r *x509.CertificateRequest) { full(r); r.DNSNames = []string{"b", "pump-7"} }, true, false},
		{"another type of string", func(r *x509.CertificateRequest) {
			full(r)
			r.RawSubject = []byte{0x30, 0x11, 0x31, 0x0f, 0x30, 0x0d, 6, 3, 0x55, 4, 3, 0x0c, 6, 'p', 'u', 'm', 'p', '-', '7'} // UTF8String
		}, true, false},
		{"none", func(*x509.CertificateRequest) {}, false, true},
		{"its own", func(r *x509.CertificateRequest) { r.DNSNames = []string{"pump-7"} }, false, true},
		{"its own twice", func(r *x509.CertificateRequest) { r.DNSNames = []string{"pump-7", "pump-7"} }, false, false},
		{"its own as mail", func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"pump-7"} }, false, false},
		{"an address", func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.IPv6loopback} }, false, false},
		{"another subject", func(r *x509.CertificateRequest) { full(r); r.Subject.Country = []string{"DE"} }, false, false},
		{"one less", func(r *x509.CertificateRequest) { full(r); r.URIs = nil }, false, false},
	} {
		n, err := pki.RequestNames(namedRequest(t, c.change))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if n.Equal(base) != c.same || base.Equal(n) != c.same || n.OwnDNS("pump-7") != c.own {
			t.Errorf("%s: same %v, own %v", c.name, n.Equal(base), n.OwnDNS("pump-7"))
		}
	}
}

// A name of a kind that crypto/x509 drops counts, too.
func TestNamesOfOtherKinds(t *testing.T) {
	san := pkix.Extension{Id: []int{2, 5, 29, 17}, Value: []byte{0x30, 6, 0x88, 1, 0x2a, 0x82, 1, 'x'}} // registeredID, DNS:x
	n, err := pki.RequestNames(namedRequest(t, func(r *x509.CertificateRequest) { r.ExtraExtensions = []pkix.Extension{san} }))
	if err != nil || n.OwnDNS("x") {
		t.Errorf("own %v, %v", n.OwnDNS("x"), err)
	}
}

func FuzzRequestNames(f *testing.F) {
	f.Add(namedRequest(f, func(*x509.CertificateRequest) {}))
	f.Add(namedRequest(f, func(r *x509.CertificateRequest) { r.DNSNames = []string{"pump-7"} }))
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		n, err := pki.RequestNames(der)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) {
				t.Fatal(err)
			}
			return
		}
		n.OwnDNS("pump-7")
	})
}
