// Package ca is muster's certificate authority: the hierarchy of roots and intermediates, its files, and a smallstep
// authority embedded so that nothing of it but signing by our own profile can be reached (DESIGN §7, facts in pki.md §1.6).
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

const year = 365 * 24 * time.Hour

// Pair is a CA certificate with its key. A nil Key means that the key is kept elsewhere, as a root's should be.
type Pair struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// Hierarchy is every CA of a fleet. The intermediates are signed by Root; Spare is a second root that signs nothing until
// the first is lost, and which devices trust from the first day (pki.md §1.7).
type Hierarchy struct {
	Root, Spare Pair
	Device      Pair // signs device certificates, clientAuth only
	Server      Pair // signs certificates of the broker and of HTTPS listeners, serverAuth only
}

// CreateOptions describe a new hierarchy. Zero values mean what the comments say.
type CreateOptions struct {
	At   time.Time // now; required
	Name string    // of the fleet, in the CA names; muster

	RootLife         time.Duration // 25 years
	IntermediateLife time.Duration // 5 years
}

func (o CreateOptions) withDefaults() CreateOptions {
	if o.Name == "" {
		o.Name = "muster"
	}
	if o.RootLife == 0 {
		o.RootLife = 25 * year
	}
	if o.IntermediateLife == 0 {
		o.IntermediateLife = 5 * year
	}
	return o
}

// Create makes a new hierarchy in memory, all keys EC P-256: an ESP32 checks such a signature in a tenth of the time that
// P-384 takes. It returns an Invalid error if the options make no sense.
func Create(o CreateOptions) (*Hierarchy, error) {
	o = o.withDefaults()
	if o.At.IsZero() || o.IntermediateLife <= 0 || o.RootLife < o.IntermediateLife || len(o.Name) > 40 {
		return nil, fleet.Errorf(fleet.Invalid, "ca: a hierarchy needs a time, a name of at most 40 bytes, and a root that outlives its intermediates")
	}
	root, err := newRoot(o, o.Name+" root 1")
	if err != nil {
		return nil, err
	}
	spare, err := newRoot(o, o.Name+" root 2 (spare)")
	if err != nil {
		return nil, err
	}
	device, err := newIntermediate(o, root, o.Name+" devices 1", x509.ExtKeyUsageClientAuth)
	if err != nil {
		return nil, err
	}
	server, err := newIntermediate(o, root, o.Name+" servers 1", x509.ExtKeyUsageServerAuth)
	if err != nil {
		return nil, err
	}
	return &Hierarchy{Root: root, Spare: spare, Device: device, Server: server}, nil
}

// backdate is how far before its making a CA certificate holds: clocks of brokers and devices are wrong by less.
const backdate = 24 * time.Hour

func caTemplate(o CreateOptions, name string, life time.Duration, pathLen int) (*x509.Certificate, error) {
	serial, err := NewSerial()
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          serial.Big(),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             o.At.Add(-backdate).UTC().Truncate(time.Second),
		NotAfter:              o.At.Add(life).UTC().Truncate(time.Second),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLen:            pathLen,
		MaxPathLenZero:        pathLen == 0,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil
}

func newRoot(o CreateOptions, name string) (Pair, error) {
	tpl, err := caTemplate(o, name, o.RootLife, 1)
	if err != nil {
		return Pair{}, err
	}
	return newPair(tpl, Pair{})
}

func newIntermediate(o CreateOptions, root Pair, name string, use x509.ExtKeyUsage) (Pair, error) {
	tpl, err := caTemplate(o, name, o.IntermediateLife, 0)
	if err != nil {
		return Pair{}, err
	}
	tpl.ExtKeyUsage = []x509.ExtKeyUsage{use}
	return newPair(tpl, root)
}

// newPair makes a key and has parent sign its certificate; a zero parent means that it signs itself.
func newPair(tpl *x509.Certificate, parent Pair) (Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, fmt.Errorf("ca: %w", err)
	}
	tpl.SubjectKeyId, err = keyID(key.Public())
	if err != nil {
		return Pair{}, err
	}
	if parent.Cert == nil {
		parent = Pair{Cert: tpl, Key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent.Cert, key.Public(), parent.Key)
	if err != nil {
		return Pair{}, fmt.Errorf("ca: %s: %w", tpl.Subject.CommonName, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return Pair{}, fmt.Errorf("ca: %s: %w", tpl.Subject.CommonName, err)
	}
	return Pair{Cert: cert, Key: key}, nil
}

// keyID is the leftmost 160 bits of the SHA-256 of a key (RFC 7093 §2).
func keyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	sum := sha256.Sum256(der)
	return sum[:20], nil
}

// NewSerial returns a random serial of 128 bits, 126 of them random (RFC 5280 §4.1.2.2 wants positive, the CA/Browser
// forum at least 64 random bits).
func NewSerial() (fleet.Serial, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("ca: %w", err)
	}
	b[0] = b[0]&0x3f | 0x40
	return fleet.SerialOf(new(big.Int).SetBytes(b[:])), nil
}

// TrustBundle returns what devices trust, as PEM: both roots, the one in use first.
func (h *Hierarchy) TrustBundle() []byte { return toPEM(h.Root.Cert, h.Spare.Cert) }

// ClientCAs returns what the broker and the device listeners trust in client certificates, as PEM: the device
// intermediate and the root above it, and not the spare, which signed nothing.
func (h *Hierarchy) ClientCAs() []byte { return toPEM(h.Device.Cert, h.Root.Cert) }

// KeyHashes returns the hashes of all CA keys: no device may use one of them.
func (h *Hierarchy) KeyHashes() []fleet.Hash {
	var out []fleet.Hash
	for _, p := range h.pairs() {
		out = append(out, pki.KeyHash(p.Cert.RawSubjectPublicKeyInfo))
	}
	return out
}

func (h *Hierarchy) pairs() []Pair { return []Pair{h.Root, h.Spare, h.Device, h.Server} }

func toPEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// check returns an error that names the first thing wrong with h: who signed what, and which key belongs to which.
func (h *Hierarchy) check() error {
	for _, p := range []struct {
		name   string
		pair   Pair
		parent *x509.Certificate
		use    x509.ExtKeyUsage
	}{
		{"root", h.Root, h.Root.Cert, 0}, {"spare root", h.Spare, h.Spare.Cert, 0},
		{"device CA", h.Device, h.Root.Cert, x509.ExtKeyUsageClientAuth}, {"server CA", h.Server, h.Root.Cert, x509.ExtKeyUsageServerAuth},
	} {
		if err := p.pair.check(p.parent, p.use); err != nil {
			return fleet.Wrap(fleet.Invalid, err, "ca: the %s: %s", p.name, err.Error())
		}
	}
	return nil
}

func (p Pair) check(parent *x509.Certificate, use x509.ExtKeyUsage) error {
	switch c := p.Cert; {
	case c == nil:
		return fmt.Errorf("the certificate is missing")
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("the certificate is not one of a CA")
	case use != 0 && (len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != use):
		return fmt.Errorf("the certificate is for another use")
	case c.CheckSignatureFrom(parent) != nil:
		return fmt.Errorf("the certificate was not signed by its parent")
	}
	if p.Key == nil {
		return nil
	}
	if k, ok := p.Cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(p.Key.Public()) {
		return fmt.Errorf("certificate and key do not belong together")
	}
	return nil
}
