package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"slices"
	"strings"

	"muster/internal/fleet"
)

// Limits of a certificate request.
const (
	MaxCSR        = 16 << 10 // bytes, DER or PEM
	maxExtensions = 32       // a device asks for none; openssl's defaults for a handful
)

// Codes of the errors that a certificate request can earn. They are part of the REST contract and stand in dn/cert.
const (
	CodeTooLarge   = "csr_too_large"         // TooLarge
	CodeMalformed  = "csr_malformed"         // Invalid
	CodeSignature  = "csr_signature"         // Invalid: not signed by its own key, or with SHA-1 or MD5
	CodePrivateKey = "private_key_submitted" // Invalid: the key must be replaced
	CodeKey        = "key_not_allowed"       // Unprocessable: kind, size or weakness
	CodeSubject    = "subject_not_allowed"   // Unprocessable: several or strange common names
	CodeExtension  = "extension_not_allowed" // Unprocessable: asks to be a CA, a server, …
	CodeIdentity   = "identity_mismatch"     // Forbidden: names another device
	CodeKeyInUse   = "key_in_use"            // Conflict: another device's key, or the CA's own
	CodeKeyRevoked = "key_revoked"           // Forbidden: the key of a revoked certificate
)

// CSR is all that is taken from a certificate request. Subject, names, usages and dates of the certificate come from
// muster alone (DESIGN §7).
type CSR struct {
	PublicKey []byte     // SubjectPublicKeyInfo, DER
	KeyHash   fleet.Hash // SHA-256 of PublicKey
	name      string     // common name; empty if it has none
}

// ForDevice returns a Forbidden error if the request names another device than id. A request without a name is any
// device's own.
func (c CSR) ForDevice(id fleet.DeviceID) error {
	if c.name != "" && c.name != string(id) {
		return fleet.Coded(fleet.Forbidden, CodeIdentity, "the request's common name is not the device id: use CN=%s, or none", id)
	}
	return nil
}

// KeyHash returns the SHA-256 of a SubjectPublicKeyInfo in DER.
func KeyHash(publicKey []byte) fleet.Hash { return fleet.HashOf(sha256.Sum256(publicKey)) }

func malformed(format string, a ...any) error {
	return fleet.Coded(fleet.Invalid, CodeMalformed, format, a...)
}

// ParseCSRPEM reads a PKCS #10 request as PEM (RFC 7468 §7): exactly one block, nothing around it. Errors are those of
// ParseCSR.
func ParseCSRPEM(text []byte, p KeyPolicy) (CSR, error) {
	der, err := UnwrapCSR(text)
	if err != nil {
		return CSR{}, err
	}
	return ParseCSR(der, p)
}

// ParseCACSRPEM reads the PKCS #10 request, as PEM, of a CA: as strictly as ParseCSRPEM, but whatever names and extensions
// stand in it. Nothing but its key, EC P-256 or P-384, is taken from it.
func ParseCACSRPEM(text []byte) (CSR, error) {
	der, err := UnwrapCSR(text)
	if err != nil {
		return CSR{}, err
	}
	req, err := parseRequest(der, KeyPolicy{})
	if err != nil {
		return CSR{}, err
	}
	return csrOf(req, "")
}

// UnwrapCSR returns the DER of the one request that text holds, PEM, with nothing around it. The errors are those of
// ParseCSR that do not need the DER to be read.
func UnwrapCSR(text []byte) ([]byte, error) {
	if len(text) > MaxCSR {
		return nil, tooLarge()
	}
	if bytes.Contains(text, []byte("PRIVATE KEY-----")) {
		return nil, privateKey()
	}
	if !bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("-----BEGIN ")) {
		return nil, malformed("not PEM: it must start with -----BEGIN CERTIFICATE REQUEST-----")
	}
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return nil, malformed("the PEM block is damaged")
	case block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST":
		return nil, malformed("the PEM block is not a CERTIFICATE REQUEST")
	case len(block.Headers) > 0:
		return nil, malformed("PEM headers are not allowed in a certificate request")
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, malformed("there is something behind the first PEM block: send exactly one request")
	case bytes.Count(text, []byte("-----BEGIN ")) != 1:
		return nil, malformed("there is more than one PEM block: send exactly one request") // pem.Decode skips a damaged one
	}
	return block.Bytes, nil
}

func tooLarge() error {
	return fleet.Coded(fleet.TooLarge, CodeTooLarge, "a certificate request has at most %d bytes", MaxCSR)
}

func privateKey() error {
	return fleet.Coded(fleet.Invalid, CodePrivateKey, "this is a private key, not a certificate request: it is compromised now, so make a new one, and send a request made from it")
}

// ParseCSR reads a PKCS #10 request in DER (RFC 2986) and checks it strictly: signed by its own key, the key as p allows,
// no trailing bytes, nothing asked for that a device must not have. Attributes such as a challenge password are ignored.
// Every error is a fleet.Error with one of the codes of this package and holds none of the input.
func ParseCSR(der []byte, p KeyPolicy) (CSR, error) {
	req, err := parseRequest(der, p)
	if err != nil {
		return CSR{}, err
	}
	name, err := commonName(req.Subject)
	if err != nil {
		return CSR{}, err
	}
	if err := checkExtensions(req.Extensions); err != nil {
		return CSR{}, err
	}
	return csrOf(req, name)
}

// parseRequest reads a request and checks its frame, key and signature.
func parseRequest(der []byte, p KeyPolicy) (*x509.CertificateRequest, error) {
	if len(der) > MaxCSR {
		return nil, tooLarge()
	}
	if isPrivateKey(der) {
		return nil, privateKey()
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, &fleet.Error{Kind: fleet.Invalid, Code: CodeMalformed, Msg: "not a PKCS #10 certificate request in DER", Err: err}
	}
	// The key is judged before the signature: checking one of a huge RSA key costs milliseconds (faults.md §7.1).
	if err := p.check(req.PublicKey, req.RawSubjectPublicKeyInfo); err != nil {
		return nil, err
	}
	return req, checkSignature(req)
}

func csrOf(req *x509.CertificateRequest, name string) (CSR, error) {
	// The key is written anew, so that one key has one form and one hash.
	spki, err := x509.MarshalPKIXPublicKey(req.PublicKey)
	if err != nil {
		return CSR{}, &fleet.Error{Kind: fleet.Unprocessable, Code: CodeKey, Msg: "the public key cannot be used", Err: err}
	}
	return CSR{PublicKey: spki, KeyHash: KeyHash(spki), name: name}, nil
}

// isPrivateKey reports whether der has the frame of a private key: PKCS #1, SEC 1 and PKCS #8 all start with a version,
// a request with a sequence. The frame is enough: parsing RSA keys of any size would cost too much.
func isPrivateKey(der []byte) bool {
	var outer, first asn1.RawValue
	if _, err := asn1.Unmarshal(der, &outer); err != nil || outer.Tag != asn1.TagSequence {
		return false
	}
	if _, err := asn1.Unmarshal(outer.Bytes, &first); err != nil {
		return false
	}
	return first.Class == asn1.ClassUniversal && first.Tag == asn1.TagInteger && len(first.Bytes) == 1 && first.Bytes[0] <= 1
}

// allowedSignatures are SHA-2 with the keys that a KeyPolicy can allow. What crypto/x509 would accept beyond it changes
// with its version.
var allowedSignatures = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
	x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
}

func checkSignature(req *x509.CertificateRequest) error {
	if !slices.Contains(allowedSignatures, req.SignatureAlgorithm) {
		return fleet.Coded(fleet.Invalid, CodeSignature, "the request is signed with an algorithm that is not allowed: use SHA-256")
	}
	if err := req.CheckSignature(); err != nil {
		return &fleet.Error{Kind: fleet.Invalid, Code: CodeSignature, Msg: "the request is not signed by its own key", Err: err}
	}
	return nil
}

var oidCommonName = asn1.ObjectIdentifier{2, 5, 4, 3}

// commonName returns the one common name of s, empty if it has none. With two, Go would take the last and RabbitMQ both.
func commonName(s pkix.Name) (string, error) {
	name, found := "", false
	for _, a := range s.Names {
		if !a.Type.Equal(oidCommonName) {
			continue
		}
		text, ok := a.Value.(string)
		if found || !ok || !plainName(text) {
			return "", fleet.Coded(fleet.Unprocessable, CodeSubject, "the subject must have one common name at most, of 1 to 64 letters, digits, - and _")
		}
		name, found = text, true
	}
	return name, nil
}

func plainName(s string) bool {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return len(s) >= 1 && len(s) <= 64 && strings.Trim(s, allowed) == ""
}

var (
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidClientAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
)

// checkExtensions refuses a request that asks for more than a device gets. None of it would reach the certificate, but
// whoever asks for a CA is either attacking or mistaken about what it will get. Names of others are ignored.
func checkExtensions(list []pkix.Extension) error {
	if len(list) > maxExtensions {
		return malformed("the request has more than %d extensions", maxExtensions)
	}
	for i, e := range list {
		if slices.ContainsFunc(list[:i], func(o pkix.Extension) bool { return o.Id.Equal(e.Id) }) {
			return malformed("the request has an extension twice")
		}
		var err error
		switch {
		case e.Id.Equal(oidBasicConstraints):
			err = checkBasicConstraints(e.Value)
		case e.Id.Equal(oidKeyUsage):
			err = checkKeyUsage(e.Value)
		case e.Id.Equal(oidExtKeyUsage):
			err = checkExtKeyUsage(e.Value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func refuseExtension(what string) error {
	return fleet.Coded(fleet.Unprocessable, CodeExtension, "the request asks for %s; a device certificate is for clientAuth only: leave the extension out", what)
}

func checkBasicConstraints(der []byte) error {
	var v struct {
		CA      bool `asn1:"optional"`
		PathLen int  `asn1:"optional,default:-1"`
	}
	rest, err := asn1.Unmarshal(der, &v)
	if err != nil || len(rest) > 0 {
		return malformed("the basicConstraints extension is damaged")
	}
	if v.CA {
		return refuseExtension("a CA certificate (basicConstraints)")
	}
	return nil
}

func checkKeyUsage(der []byte) error {
	var v asn1.BitString
	rest, err := asn1.Unmarshal(der, &v)
	if err != nil || len(rest) > 0 {
		return malformed("the keyUsage extension is damaged")
	}
	const keyCertSign, cRLSign = 5, 6 // RFC 5280 §4.2.1.3
	if v.At(keyCertSign) != 0 || v.At(cRLSign) != 0 {
		return refuseExtension("the right to sign certificates (keyUsage)")
	}
	return nil
}

func checkExtKeyUsage(der []byte) error {
	var v []asn1.ObjectIdentifier
	rest, err := asn1.Unmarshal(der, &v)
	if err != nil || len(rest) > 0 {
		return malformed("the extKeyUsage extension is damaged")
	}
	for _, oid := range v {
		if !oid.Equal(oidClientAuth) {
			return refuseExtension("another use than clientAuth (extKeyUsage)")
		}
	}
	return nil
}
