// Package ceremony makes and uses root CAs: it signs roots, intermediates and cross-certificates, and keeps the folder in
// which a root lives on a machine of its own, with a record of all that was signed. It needs no network and no musterd
// (DESIGN §7; facts in pki.md §1.7).
package ceremony

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

const year = 365 * 24 * time.Hour

// Lives of CA certificates where nothing else is asked for, and how far before its making one holds: clocks of brokers and
// devices are wrong by less.
const (
	RootLife         = 25 * year
	IntermediateLife = 5 * year
	Backdate         = 24 * time.Hour
)

// MaxName is the longest common name of a CA, in bytes (RFC 5280 appendix A, ub-common-name).
const MaxName = 64

// rootPathLen lets a root sign another root: root, cross-certificate, intermediate, leaf.
const rootPathLen = 2

// Profile says what an intermediate is for.
type Profile string

// The two intermediates of a fleet.
const (
	DeviceCA Profile = "device-ca" // signs device certificates, clientAuth only
	ServerCA Profile = "server-ca" // signs certificates of the broker and of HTTPS listeners, serverAuth only
)

// Use returns the one extended key usage of a profile; ok is false for what is none.
func (p Profile) Use() (use x509.ExtKeyUsage, ok bool) {
	switch p {
	case DeviceCA:
		return x509.ExtKeyUsageClientAuth, true
	case ServerCA:
		return x509.ExtKeyUsageServerAuth, true
	}
	return 0, false
}

// words are how a profile is called in the names of intermediates.
func (p Profile) words() string {
	if p == DeviceCA {
		return "devices"
	}
	return "servers"
}

// Signer is a CA certificate with its key.
type Signer struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// Terms of a CA certificate.
type Terms struct {
	At   time.Time     // now
	Name string        // common name
	Life time.Duration // from At
}

// template is what all CA certificates have in common.
func (t Terms) template(pub crypto.PublicKey, pathLen int) (*x509.Certificate, error) {
	if t.At.IsZero() || t.Life < time.Hour || t.Life > 100*year || t.Name == "" || len(t.Name) > MaxName || !printable(t.Name) {
		return nil, fleet.Errorf(fleet.Invalid, "a CA certificate needs a name of 1 to %d printable characters, and a life of an hour to a hundred years", MaxName)
	}
	serial, err := NewSerial()
	if err != nil {
		return nil, err
	}
	id, err := KeyID(pub)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial.Big(), Subject: pkix.Name{CommonName: t.Name}, SubjectKeyId: id,
		NotBefore: t.At.Add(-Backdate).UTC().Truncate(time.Second), NotAfter: t.At.Add(t.Life).UTC().Truncate(time.Second),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: pathLen, MaxPathLenZero: pathLen == 0,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// SignRoot returns a root certificate for key, signed by itself.
func SignRoot(t Terms, key crypto.Signer) (*x509.Certificate, error) {
	tpl, err := t.template(key.Public(), rootPathLen)
	if err != nil {
		return nil, err
	}
	return create(tpl, tpl, key.Public(), key)
}

// SignIntermediate returns the certificate of an intermediate for a public key (SubjectPublicKeyInfo, DER), which must be EC
// P-256 or P-384. Its end is cut to the root's. Errors: Invalid for terms that make no sense, Unprocessable for the key,
// Conflict if the key is the root's own.
func SignIntermediate(t Terms, p Profile, root Signer, publicKey []byte) (*x509.Certificate, error) {
	use, ok := p.Use()
	if !ok {
		return nil, fleet.Errorf(fleet.Invalid, "a profile is %s or %s", DeviceCA, ServerCA)
	}
	pub, err := caKey(publicKey, root)
	if err != nil {
		return nil, err
	}
	tpl, err := t.template(pub, 0)
	if err != nil {
		return nil, err
	}
	tpl.ExtKeyUsage = []x509.ExtKeyUsage{use}
	if t.Name == root.Cert.Subject.CommonName {
		return nil, fleet.Errorf(fleet.Invalid, "an intermediate must not be called like its root: choose another name")
	}
	return under(root, tpl, pub)
}

// CrossSign returns a certificate for the name and the key of other, a root, signed by root: who trusts only root accepts
// what other signed (RFC 4210 §4.4, NewWithOld and OldWithNew). It ends with the first of the two. Errors: Invalid if other
// is no root, Conflict if it has root's key, Unprocessable if root may not sign roots.
func CrossSign(at time.Time, root Signer, other *x509.Certificate) (*x509.Certificate, error) {
	if err := CheckRoot(other); err != nil {
		return nil, err
	}
	if bytes.Equal(other.RawSubject, root.Cert.RawSubject) {
		return nil, fleet.Errorf(fleet.Conflict, "both roots are called %q: a chain could not tell them apart", other.Subject.CommonName)
	}
	if limited(root.Cert) && root.Cert.MaxPathLen < rootPathLen {
		return nil, fleet.Errorf(fleet.Unprocessable, "the path length of %q is %d, so that nobody would accept a root under it; sign the intermediates' requests with both roots instead",
			root.Cert.Subject.CommonName, root.Cert.MaxPathLen)
	}
	pub, err := caKey(other.RawSubjectPublicKeyInfo, root)
	if err != nil {
		return nil, err
	}
	tpl, err := Terms{At: at, Name: "cross", Life: year}.template(pub, 1)
	if err != nil {
		return nil, err
	}
	tpl.RawSubject, tpl.SubjectKeyId, tpl.NotAfter = other.RawSubject, other.SubjectKeyId, other.NotAfter
	return under(root, tpl, pub)
}

func limited(c *x509.Certificate) bool { return c.MaxPathLen > 0 || c.MaxPathLenZero }

// under signs tpl with root, within root's life.
func under(root Signer, tpl *x509.Certificate, pub crypto.PublicKey) (*x509.Certificate, error) {
	if tpl.NotBefore.Before(root.Cert.NotBefore) {
		tpl.NotBefore = root.Cert.NotBefore
	}
	if tpl.NotAfter.After(root.Cert.NotAfter) {
		tpl.NotAfter = root.Cert.NotAfter
	}
	if now := tpl.NotBefore.Add(Backdate); !tpl.NotAfter.After(now) {
		return nil, fleet.Errorf(fleet.Unprocessable, "the root %q ended %s: nothing can be signed with it", root.Cert.Subject.CommonName, root.Cert.NotAfter.Format(time.DateOnly))
	}
	return create(tpl, root.Cert, pub, root.Key)
}

func create(tpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", tpl.Subject.CommonName, err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", tpl.Subject.CommonName, err)
	}
	return c, nil
}

// caKey returns the key of a CA below root.
func caKey(spki []byte, root Signer) (crypto.PublicKey, error) {
	if err := (pki.KeyPolicy{}).CheckKey(spki); err != nil {
		return nil, err
	}
	if bytes.Equal(spki, root.Cert.RawSubjectPublicKeyInfo) {
		return nil, fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this is the key of the root itself")
	}
	return x509.ParsePKIXPublicKey(spki)
}

// CheckRoot returns an Invalid error if c is not the certificate of a root that muster can use.
func CheckRoot(c *x509.Certificate) error {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fleet.Errorf(fleet.Invalid, "%q is not the certificate of a CA", c.Subject.CommonName)
	case !bytes.Equal(c.RawSubject, c.RawIssuer) || c.CheckSignatureFrom(c) != nil:
		return fleet.Errorf(fleet.Invalid, "%q is not a root: it did not sign itself", c.Subject.CommonName)
	case !ok || key.Curve != elliptic.P256() && key.Curve != elliptic.P384():
		return fleet.Errorf(fleet.Invalid, "the key of %q is not EC P-256 or P-384: devices could not check it", c.Subject.CommonName)
	case len(c.SubjectKeyId) == 0 || c.KeyUsage&x509.KeyUsageCRLSign == 0:
		return fleet.Errorf(fleet.Invalid, "%q has no subject key identifier, or may not sign CRLs", c.Subject.CommonName)
	}
	return nil
}

// CheckIntermediate returns an Invalid error if c is not an intermediate for p, signed by root and good at time at.
func CheckIntermediate(c *x509.Certificate, p Profile, root *x509.Certificate, at time.Time) error {
	use, _ := p.Use()
	switch {
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fleet.Errorf(fleet.Invalid, "%q is not the certificate of a CA", c.Subject.CommonName)
	case len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != use || len(c.UnknownExtKeyUsage) != 0:
		return fleet.Errorf(fleet.Invalid, "%q is not for profile %s: sign the request with --profile %s", c.Subject.CommonName, p, p)
	case c.CheckSignatureFrom(root) != nil:
		return fleet.Errorf(fleet.Invalid, "%q was not signed by %q", c.Subject.CommonName, root.Subject.CommonName)
	case !c.MaxPathLenZero:
		return fleet.Errorf(fleet.Invalid, "%q may sign further CAs: its path length must be 0", c.Subject.CommonName)
	case c.KeyUsage&x509.KeyUsageCRLSign == 0 || len(c.SubjectKeyId) == 0:
		return fleet.Errorf(fleet.Invalid, "%q has no subject key identifier, or may not sign CRLs", c.Subject.CommonName)
	case at.Before(c.NotBefore) || !at.Before(c.NotAfter):
		return fleet.Errorf(fleet.Invalid, "%q holds from %s to %s, not now: check the clocks of both machines", c.Subject.CommonName, c.NotBefore.Format(time.DateTime), c.NotAfter.Format(time.DateTime))
	}
	return nil
}

// KeyID is the leftmost 160 bits of the SHA-256 of a key (RFC 7093 §2).
func KeyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("key id: %w", err)
	}
	sum := sha256.Sum256(der)
	return sum[:20], nil
}

// NewSerial returns a random serial of 128 bits, 126 of them random (RFC 5280 §4.1.2.2 wants positive, the CA/Browser
// forum at least 64 random bits).
func NewSerial() (fleet.Serial, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("serial: %w", err)
	}
	b[0] = b[0]&0x3f | 0x40
	return fleet.SerialOf(new(big.Int).SetBytes(b[:])), nil
}

// Request returns a certificate request (PKCS #10, DER) for the key of an intermediate.
func Request(name string, key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return nil, fmt.Errorf("request of %s: %w", name, err)
	}
	return der, nil
}
