package ca

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"go.step.sm/crypto/x509util"

	"muster/internal/pki"
	"muster/internal/wire"
)

// deviceTemplate is the part of a device certificate that is the same for all (DESIGN §4). The rest comes from the order.
// It is ready JSON and not a text/template: smallstep would compile that for each certificate, with nothing to fill in.
const deviceTemplate = `{"keyUsage":["digitalSignature"],"extKeyUsage":["clientAuth"]}`

// profile makes a certificate from an order. It is at once all the options that smallstep takes.
type profile struct {
	order    pki.Order
	key      any // parsed order.PublicKey
	validity pki.Validity
	uri      *url.URL
}

func newProfile(o pki.Order, v pki.Validity) (*profile, error) {
	key, err := x509.ParsePKIXPublicKey(o.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	uri, err := url.Parse(wire.CertUser(o.Device, o.Serial))
	if err != nil {
		return nil, fmt.Errorf("user name: %w", err)
	}
	return &profile{order: o, key: key, validity: v, uri: uri}, nil
}

// Options implements provisioner.CertificateOptions: our template, whatever the request says.
func (p *profile) Options(provisioner.SignOptions) []x509util.Option {
	return []x509util.Option{func(_ *x509.CertificateRequest, o *x509util.Options) error {
		o.CertBuffer = bytes.NewBufferString(deviceTemplate)
		return nil
	}}
}

// identity implements provisioner.CertificateModifier. It does not embed the profile: smallstep asks each option for one
// interface only, and would take it for CertificateOptions again.
type identity struct{ of *profile }

// Modify fills in who the certificate is for.
func (i identity) Modify(c *x509.Certificate, _ provisioner.SignOptions) error {
	p := i.of
	c.PublicKey = p.key
	c.PublicKeyAlgorithm = x509.UnknownPublicKeyAlgorithm // that of the key, not of the carrier
	c.SerialNumber = p.order.Serial.Big()
	c.Subject = pkix.Name{CommonName: string(p.order.Device)}
	c.DNSNames = []string{string(p.order.Device)}
	c.URIs = []*url.URL{p.uri}
	c.NotBefore, c.NotAfter = p.validity.NotBefore, p.validity.NotAfter
	return nil
}

// Extensions that a device certificate has, and no other.
var deviceExtensions = []asn1.ObjectIdentifier{
	{2, 5, 29, 14}, // subjectKeyIdentifier
	{2, 5, 29, 35}, // authorityKeyIdentifier
	{2, 5, 29, 15}, // keyUsage
	{2, 5, 29, 37}, // extKeyUsage
	{2, 5, 29, 17}, // subjectAltName
}

// verify returns an error that names the first way in which c is not what the order asked for. It trusts nothing of what
// happened before: a certificate that a device could abuse must not leave this package. x509.CreateCertificate has
// checked the signature against the issuer's key already.
func (p *profile) verify(c, issuer *x509.Certificate) error {
	user := wire.CertUser(p.order.Device, p.order.Serial)
	switch {
	case c.SerialNumber.Cmp(p.order.Serial.Big()) != 0:
		return fmt.Errorf("serial")
	case !bytes.Equal(c.RawSubjectPublicKeyInfo, p.order.PublicKey):
		return fmt.Errorf("public key")
	case len(c.Subject.Names) != 1 || c.Subject.CommonName != string(p.order.Device):
		return fmt.Errorf("subject")
	case len(c.DNSNames) != 1 || c.DNSNames[0] != string(p.order.Device):
		return fmt.Errorf("DNS name")
	case len(c.URIs) != 1 || c.URIs[0].String() != user:
		return fmt.Errorf("URI")
	case len(c.EmailAddresses)+len(c.IPAddresses) != 0:
		return fmt.Errorf("other names")
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return fmt.Errorf("key usage")
	case len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || len(c.UnknownExtKeyUsage) != 0:
		return fmt.Errorf("extended key usage")
	case c.IsCA || c.BasicConstraintsValid:
		return fmt.Errorf("basic constraints")
	case !c.NotBefore.Equal(p.validity.NotBefore) || !c.NotAfter.Equal(p.validity.NotAfter) || c.NotAfter.After(issuer.NotAfter):
		return fmt.Errorf("validity")
	case !bytes.Equal(c.RawIssuer, issuer.RawSubject) || !bytes.Equal(c.AuthorityKeyId, issuer.SubjectKeyId):
		return fmt.Errorf("issuer")
	}
	for i, e := range c.Extensions {
		known := slices.ContainsFunc(deviceExtensions, e.Id.Equal)
		twice := slices.ContainsFunc(c.Extensions[:i], func(o pkix.Extension) bool { return o.Id.Equal(e.Id) })
		if !known || twice {
			return fmt.Errorf("extension %s", e.Id)
		}
	}
	return nil
}

// span returns the validity of a certificate.
func span(c *x509.Certificate) pki.Validity {
	return pki.Validity{NotBefore: c.NotBefore, NotAfter: c.NotAfter}
}

// left returns how long v still holds at time at.
func left(v pki.Validity, at time.Time) time.Duration { return v.NotAfter.Sub(at) }
