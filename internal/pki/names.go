package pki

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"

	"muster/internal/fleet"
)

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// Names are who a request or a certificate says it is: its subject and its alternative names of every kind, those that
// crypto/x509 drops included.
type Names struct {
	subject pkix.RDNSequence
	alt     [][]byte // GeneralName, DER; sorted
}

// RequestNames returns the names of a request (PKCS #10, DER). The errors are coded refusals.
func RequestNames(der []byte) (Names, error) {
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return Names{}, &fleet.Error{Kind: fleet.Invalid, Code: CodeMalformed, Msg: "not a PKCS #10 certificate request in DER", Err: err}
	}
	return names(req.RawSubject, req.Extensions)
}

// CertificateNames returns the names of a certificate.
func CertificateNames(c *x509.Certificate) (Names, error) { return names(c.RawSubject, c.Extensions) }

func names(subject []byte, list []pkix.Extension) (n Names, err error) {
	if rest, err := asn1.Unmarshal(subject, &n.subject); err != nil || len(rest) > 0 {
		return Names{}, malformed("the subject is damaged")
	}
	for _, e := range list {
		if !e.Id.Equal(oidSubjectAltName) {
			continue
		}
		var all []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &all); err != nil || len(rest) > 0 || len(all) == 0 {
			return Names{}, malformed("the subjectAltName extension is damaged")
		}
		for _, v := range all {
			n.alt = append(n.alt, v.FullBytes)
		}
	}
	slices.SortFunc(n.alt, bytes.Compare)
	return n, nil
}

// Equal reports whether n and o are the same names, as RFC 7030 §4.2.2 asks: the same subject, attribute by attribute, and
// the same alternative names. Which string type a value has, and the order of alternative names, do not matter.
func (n Names) Equal(o Names) bool {
	return slices.EqualFunc(n.subject, o.subject, func(a, b pkix.RelativeDistinguishedNameSET) bool {
		return slices.EqualFunc(a, b, sameAttribute)
	}) && slices.EqualFunc(n.alt, o.alt, bytes.Equal)
}

func sameAttribute(a, b pkix.AttributeTypeAndValue) bool {
	x, ok := a.Value.(string)
	y, too := b.Value.(string)
	return ok && too && x == y && a.Type.Equal(b.Type)
}

// OwnDNS reports whether n has no alternative name, or the DNS name of device id alone.
func (n Names) OwnDNS(id fleet.DeviceID) bool {
	const dNSName = 2 // RFC 5280 §4.2.1.6
	if len(n.alt) == 0 {
		return true
	}
	own, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: dNSName, Bytes: []byte(id)})
	return err == nil && len(n.alt) == 1 && bytes.Equal(n.alt[0], own)
}
