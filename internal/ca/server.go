package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"slices"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// ServerLife is how long a server certificate holds.
const ServerLife = year

// Server is a server certificate with its key, as the files that listeners and the broker read.
type Server struct {
	Chain []byte // PEM: leaf, server intermediate
	Key   []byte // PEM, PKCS #8, not encrypted: RabbitMQ and musterd start without an operator
}

// NewServer makes a key and a certificate for a server that is known by names: DNS names and IP addresses, at least one.
// Calling it again is the renewal: each certificate has a key and a serial of its own.
func (h *Hierarchy) NewServer(at time.Time, names []string) (Server, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Server{}, fmt.Errorf("ca: %w", err)
	}
	chain, err := h.SignServer(at, key.Public(), names)
	if err != nil {
		return Server{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Server{}, fmt.Errorf("ca: %w", err)
	}
	return Server{Chain: chain, Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}, nil
}

// SignServer returns a certificate chain, as PEM, for a server's own key. Its common name is the first name.
func (h *Hierarchy) SignServer(at time.Time, pub crypto.PublicKey, names []string) ([]byte, error) {
	if h.Server.Key == nil {
		return nil, fleet.Errorf(fleet.Unavailable, "ca: the key of the server CA is not here")
	}
	dns, ips, err := serverNames(names)
	if err != nil {
		return nil, err
	}
	issuer := h.Server.Cert
	v := pki.Validity{NotBefore: at.Add(-time.Hour), NotAfter: at.Add(ServerLife)}.Within(pki.Validity{NotBefore: issuer.NotBefore, NotAfter: issuer.NotAfter})
	if !v.NotAfter.After(at) {
		return nil, fleet.Errorf(fleet.Unavailable, "ca: the server CA has expired")
	}
	serial, err := NewSerial()
	if err != nil {
		return nil, err
	}
	id, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial.Big(),
		Subject:      pkix.Name{CommonName: cutName(names[0])},
		NotBefore:    v.NotBefore,
		NotAfter:     v.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     dns,
		IPAddresses:  ips,
		SubjectKeyId: id,
	}, issuer, pub, h.Server.Key)
	if err != nil {
		return nil, fmt.Errorf("ca: server certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("ca: server certificate: %w", err)
	}
	if h.Cross != nil {
		return toPEM(leaf, issuer, h.Cross), nil
	}
	return toPEM(leaf, issuer), nil
}

// IssuedServer reports whether a server certificate, leaf first, comes from this hierarchy: whether its chain leads to one of
// the roots. Ends do not count, so that one that has expired is still ours to renew.
func (h *Hierarchy) IssuedServer(chain []*x509.Certificate) bool {
	if len(chain) == 0 {
		return false
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, p := range []Pair{h.Root, h.Spare} {
		if p.Cert != nil {
			roots.AddCert(p.Cert)
		}
	}
	between.AddCert(h.Server.Cert)
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: chain[0].NotBefore.Add(time.Second), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err == nil
}

// SignedServer reports whether a server certificate, leaf first, was signed by the server CA of this hierarchy.
func (h *Hierarchy) SignedServer(chain []*x509.Certificate) bool {
	return len(chain) > 0 && bytes.Equal(chain[0].AuthorityKeyId, h.Server.Cert.SubjectKeyId) && chain[0].CheckSignatureFrom(h.Server.Cert) == nil
}

// cutName keeps a common name to the 64 characters that X.520 allows; clients look at the alternative names.
func cutName(s string) string { return s[:min(len(s), 64)] }

// serverNames splits names into DNS names and addresses, each once.
func serverNames(names []string) (dns []string, ips []net.IP, err error) {
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			if !slices.ContainsFunc(ips, ip.Equal) {
				ips = append(ips, ip)
			}
			continue
		}
		if !plainHost(n) {
			return nil, nil, fleet.Errorf(fleet.Invalid, "ca: %q is neither a host name in lower case nor an IP address", n[:min(len(n), 80)])
		}
		if !slices.Contains(dns, n) {
			dns = append(dns, n)
		}
	}
	if len(dns)+len(ips) == 0 {
		return nil, nil, fleet.Errorf(fleet.Invalid, "ca: a server certificate needs at least one host name or IP address")
	}
	return dns, ips, nil
}

// plainHost reports whether s is a DNS name of a-z, 0-9, - and dots (RFC 1123 §2.1), without wildcards.
func plainHost(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	label := 0
	for i := range len(s) {
		c := s[i]
		switch {
		case c == '.':
			if label == 0 || s[i-1] == '-' {
				return false
			}
			label = 0
			continue
		case c == '-' && label == 0, c != '-' && (c < 'a' || c > 'z') && (c < '0' || c > '9'):
			return false
		}
		if label++; label > 63 {
			return false
		}
	}
	return label > 0 && s[len(s)-1] != '-'
}
