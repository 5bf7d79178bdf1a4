package devapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// maxChain is the longest chain of a device certificate: leaf, intermediate, root.
const maxChain = 3

// MutualTLS returns the configuration of the listener for certificates. cert returns the server's own certificate and
// roots the CAs of devices; both are asked at each handshake, so that a rotation needs no restart. TLS 1.2 stays: 1.3 is
// off by default in every ESP32 release to date (esp32.md §0.9).
//
// Sessions are not resumed: a resumed one would carry a verdict from before a CA was retired.
func MutualTLS(cert func(*tls.ClientHelloInfo) (*tls.Certificate, error), roots func() *x509.CertPool) *tls.Config {
	conf := PasswordTLS(cert)
	conf.ClientAuth = tls.RequireAndVerifyClientCert
	conf.VerifyConnection = func(s tls.ConnectionState) error {
		_, _, err := identify(s)
		return err
	}
	outer := conf.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool := roots()
		if pool == nil { // would mean the system's CAs
			return nil, fleet.Errorf(fleet.Unavailable, "no device CA is known yet")
		}
		c := conf.Clone()
		c.ClientCAs = pool
		return c, nil
	}
	return outer
}

// PasswordTLS returns the configuration of the recovery listener: no client certificate is asked for, because an expired
// one would end the handshake (DESIGN §9).
func PasswordTLS(cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS12,
		GetCertificate:   cert,
		NextProtos:       []string{"http/1.1", "http/1.0"}, // curl --http1.0 offers the latter alone
		CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384},
		CipherSuites: []uint16{ // of TLS 1.2: forward secrecy and AEAD only
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		SessionTicketsDisabled: true,
		// Small first records help browsers paint; an image only wants to be through.
		DynamicRecordSizingDisabled: true,
	}
}

// identify returns who a verified client certificate names. Everything that DESIGN §4 puts into a device certificate must
// be there and agree: one URI with the device and this very serial, one DNS name with the device, a key that muster certifies.
func identify(s tls.ConnectionState) (fleet.DeviceID, fleet.Serial, error) {
	if len(s.PeerCertificates) == 0 || !shortChain(s.VerifiedChains) {
		return "", "", fleet.Errorf(fleet.Unauthorized, "no client certificate with a chain of at most %d", maxChain)
	}
	cert := s.PeerCertificates[0]
	if len(cert.URIs) != 1 {
		return "", "", fleet.Errorf(fleet.Unauthorized, "client certificate: %d URIs instead of one", len(cert.URIs))
	}
	device, serial, err := wire.ParseCertUser(cert.URIs[0].String())
	if err != nil {
		return "", "", fleet.Wrap(fleet.Unauthorized, err, "client certificate: its URI does not name a device")
	}
	switch {
	case serial != fleet.SerialOf(cert.SerialNumber):
		return "", "", fleet.Errorf(fleet.Unauthorized, "client certificate: its URI names another serial than its own")
	case len(cert.DNSNames) != 1 || cert.DNSNames[0] != string(device):
		return "", "", fleet.Errorf(fleet.Unauthorized, "client certificate: its DNS name is not the device of its URI")
	case !usable(cert.PublicKey):
		return "", "", fleet.Errorf(fleet.Unauthorized, "client certificate: its key is neither EC P-256 or P-384 nor RSA of 2048 to 4096 bits")
	case cert.IsCA:
		return "", "", fleet.Errorf(fleet.Unauthorized, "client certificate: it is a CA's")
	}
	return device, serial, nil
}

// usable reports whether muster ever certifies such a key (pki.KeyPolicy). Which of them the settings allow was asked when the
// certificate was issued.
func usable(key any) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return k.Curve == elliptic.P256() || k.Curve == elliptic.P384()
	case *rsa.PublicKey:
		return k.N.BitLen() >= 2048 && k.N.BitLen() <= 4096
	}
	return false
}

func shortChain(chains [][]*x509.Certificate) bool {
	for _, c := range chains {
		if len(c) <= maxChain {
			return true
		}
	}
	return false
}
