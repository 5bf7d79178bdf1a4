package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// site is what all servers share: one CA, one server certificate, one image, a certificate for each device.
type site struct {
	dir     string
	image   []byte
	path    string // of the image in URLs
	size    int
	clients int
	conf    []*tls.Config // one a device, identities for each client
}

// Files of a site, in its dir.
const (
	fileCA     = "ca.pem"     // root
	fileChain  = "server.pem" // the server's leaf and the intermediate
	fileKey    = "server.key"
	dirContent = "www" // holds fw/<sha16>
)

func deviceID(i int) fleet.DeviceID { return fleet.DeviceID(fmt.Sprintf("bench-%d", i)) }
func serialOf(i int) *big.Int       { return big.NewInt(int64(0x1000 + i)) }

func newSite(dir string, o options) (*site, error) {
	s := &site{dir: dir, size: o.size, clients: o.clients, image: make([]byte, o.size)}
	if _, err := rand.Read(s.image); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(s.image)
	s.path = "/fw/" + string(fleet.HashOf(sum)[:16])
	// Readable by the user that nginx and Apache run as.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, dirContent, "fw"), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, dirContent, s.path), s.image, 0o644); err != nil {
		return nil, err
	}
	return s, s.certify(o)
}

// certify makes the CA, the server's certificate and one for each device.
func (s *site) certify(o options) error {
	ca := func(name string, serial int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	root, err := sign(ca("bench root", 1), nil)
	if err != nil {
		return err
	}
	inter, err := sign(ca("bench intermediate", 2), root)
	if err != nil {
		return err
	}
	leaf, err := sign(&x509.Certificate{
		SerialNumber: big.NewInt(3), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, inter)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(leaf.key)
	if err != nil {
		return err
	}
	chain := append(pemOf("CERTIFICATE", leaf.cert.Raw), pemOf("CERTIFICATE", inter.cert.Raw)...)
	for name, b := range map[string][]byte{fileCA: pemOf("CERTIFICATE", root.cert.Raw), fileChain: chain, fileKey: pemOf("PRIVATE KEY", key)} {
		if err := os.WriteFile(filepath.Join(s.dir, name), b, 0o600); err != nil {
			return err
		}
	}
	pool := x509.NewCertPool()
	pool.AddCert(root.cert)
	version := uint16(tls.VersionTLS12)
	if o.tls13 {
		version = tls.VersionTLS13
	}
	for i := range o.clients * identities {
		uri, err := url.Parse(wire.CertUser(deviceID(i), fleet.SerialOf(serialOf(i))))
		if err != nil {
			return err
		}
		d, err := sign(&x509.Certificate{
			SerialNumber: serialOf(i), Subject: pkix.Name{CommonName: string(deviceID(i))}, DNSNames: []string{string(deviceID(i))}, URIs: []*url.URL{uri},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, inter)
		if err != nil {
			return err
		}
		s.conf = append(s.conf, &tls.Config{
			RootCAs: pool, ServerName: "localhost", MinVersion: version, MaxVersion: version,
			CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}, CurvePreferences: []tls.CurveID{tls.CurveP256},
			Certificates: []tls.Certificate{{Certificate: [][]byte{d.cert.Raw, inter.cert.Raw}, PrivateKey: d.key}},
		})
	}
	return nil
}

type signed struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// sign makes a key and a certificate of template for it by parent; nil for self-signed.
func sign(template *x509.Certificate, parent *signed) (*signed, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	by := &signed{template, key}
	if parent != nil {
		by = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &signed{cert, key}, err
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
