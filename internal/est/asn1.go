package est

import (
	"crypto/x509/pkix"
	"encoding/asn1"

	"muster/internal/fleet"
)

var (
	oidData       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidSignedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
)

// certsOnly returns a CMS message that only carries certificates: SignedData without content and signers (RFC 5652 §5.1,
// RFC 8551 §3.8). certs are DER.
func certsOnly(certs ...[]byte) ([]byte, error) {
	type contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"optional"`
	}
	var all []byte
	for _, c := range certs {
		all = append(all, c...)
	}
	empty := asn1.RawValue{Tag: asn1.TagSet, IsCompound: true}
	signed, err := asn1.Marshal(struct {
		Version      int
		Digests      asn1.RawValue
		Content      contentInfo
		Certificates asn1.RawValue
		Signers      asn1.RawValue
	}{1, empty, contentInfo{Type: oidData}, tagged(0, all), empty})
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "CMS could not be written")
	}
	der, err := asn1.Marshal(contentInfo{oidSignedData, tagged(0, signed)})
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "CMS could not be written")
	}
	return der, nil
}

// tagged returns a constructed value with a tag of the context.
func tagged(tag int, content []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: content}
}

var (
	oidTemplate      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 61} // id-aa-certificationRequestInfoTemplate, RFC 9908 §3.4
	oidExtensionsIn  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 62} // id-aa-extensionReqTemplate
	oidECPublicKey   = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidP256          = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidECDSAWithSHA2 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2} // ecdsa-with-SHA256
	oidCommonName    = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidExtKeyUsage   = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidClientAuth    = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
)

type attribute struct {
	Type   asn1.ObjectIdentifier
	Values []any `asn1:"set"`
}

// attributes returns what a request of device id should hold; id may be empty where it is not known. It has both forms that
// RFC 9908 §3.4 lets stand side by side: a template, which tells subject, key and extensions exactly and which a client that knows it must
// prefer, and the loose list of RFC 7030 §4.5.2 for the clients of before.
func attributes(id fleet.DeviceID) ([]byte, error) {
	eku, err := asn1.Marshal([]asn1.ObjectIdentifier{oidClientAuth})
	if err != nil {
		return nil, err
	}
	extensions, err := asn1.Marshal(attribute{oidExtensionsIn, []any{[]pkix.Extension{{Id: oidExtKeyUsage, Value: eku}}}})
	if err != nil {
		return nil, err
	}
	curve, err := asn1.Marshal(oidP256)
	if err != nil {
		return nil, err
	}
	key, err := asn1.Marshal(pkix.AlgorithmIdentifier{Algorithm: oidECPublicKey, Parameters: asn1.RawValue{FullBytes: curve}})
	if err != nil {
		return nil, err
	}
	name, err := commonName(id)
	if err != nil {
		return nil, err
	}
	template := struct {
		Version    int
		Subject    asn1.RawValue
		Key        asn1.RawValue // [0] SubjectPublicKeyInfoTemplate, without a key
		Attributes asn1.RawValue // [1]
	}{0, asn1.RawValue{FullBytes: name}, tagged(0, key), tagged(1, extensions)}
	return asn1.Marshal([]any{
		attribute{oidTemplate, []any{template}},
		attribute{oidECPublicKey, []any{oidP256}},
		oidECDSAWithSHA2,
	})
}

// commonName returns the subject of the template: CN=id, or a CN without a value, which the client has to fill in.
func commonName(id fleet.DeviceID) ([]byte, error) {
	var rdn any = struct{ Type asn1.ObjectIdentifier }{oidCommonName}
	if id != "" {
		rdn = struct {
			Type  asn1.ObjectIdentifier
			Value string `asn1:"utf8"`
		}{oidCommonName, string(id)}
	}
	single, err := asn1.Marshal(rdn)
	if err != nil {
		return nil, err
	}
	set, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagSet, IsCompound: true, Bytes: single})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal([]asn1.RawValue{{FullBytes: set}})
}
