package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// Bundle is what a device trusts: the roots under which it believes servers and its own certificates. It is a document of
// its own with a version, so that a device can tell a newer one from an older one that somebody replays, and say which one
// it has (pki.md §1.7). It is signed by a key that devices hold from the factory, and not by what it changes.
type Bundle struct {
	Version int64    `json:"v"`               // grows with every bundle; from 1
	Time    int64    `json:"t"`               // when it was made, seconds since 1970: no clock of a device is before it
	Roots   [][]byte `json:"roots"`           // DER, self-signed CA certificates
	Cross   [][]byte `json:"cross,omitempty"` // DER, CA certificates that lead from a new root to an old one, or back
}

// Bounds of a bundle. mbedTLS keeps the roots in RAM, and a chain of a few KiB is what an ESP32 can bear (esp32.md §7).
const (
	MaxBundleCerts = 8
	MaxBundle      = 16 << 10 // bytes, signed
)

// BundleType is the type in the header of a signed bundle, so that no other token of the same key can pass for one
// (RFC 8725 §3.11).
const BundleType = "muster-trust+jws"

// Codes of refused bundles; all Unprocessable but the first.
const (
	CodeBundleTooLarge  = "bundle_too_large" // TooLarge
	CodeBundleMalformed = "bundle_malformed"
	CodeBundleSignature = "bundle_signature" // not signed by the key that devices hold
	CodeBundleOld       = "bundle_old"       // Conflict: the version is not above the one in force
)

func badBundle(format string, a ...any) error {
	return fleet.Coded(fleet.Unprocessable, CodeBundleMalformed, "trust bundle: "+format, a...)
}

// Check returns an Unprocessable error that names the first thing wrong with b.
func (b Bundle) Check() error {
	switch {
	case b.Version < 1 || b.Version >= 1<<53:
		return badBundle("the version must be 1 or more")
	case b.Time < 1 || b.Time >= 1<<53:
		return badBundle("the time is missing")
	case len(b.Roots) == 0:
		return badBundle("without a root a device would trust nobody")
	case len(b.Roots)+len(b.Cross) > MaxBundleCerts:
		return badBundle("at most %d certificates fit a device", MaxBundleCerts)
	}
	for i, der := range b.Roots {
		c, err := caCertificate(der)
		if err != nil {
			return err
		}
		if !bytes.Equal(c.RawIssuer, c.RawSubject) || c.CheckSignatureFrom(c) != nil {
			return badBundle("root %d is not signed by itself", i+1)
		}
		for _, other := range b.Roots[:i] {
			if bytes.Equal(der, other) {
				return badBundle("root %d is there twice", i+1)
			}
		}
	}
	for i, der := range b.Cross {
		c, err := caCertificate(der)
		if err != nil {
			return err
		}
		if bytes.Equal(c.RawIssuer, c.RawSubject) {
			return badBundle("cross-certificate %d is signed by itself", i+1)
		}
	}
	return nil
}

func caCertificate(der []byte) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, &fleet.Error{Kind: fleet.Unprocessable, Code: CodeBundleMalformed, Msg: "trust bundle: a certificate cannot be read", Err: err}
	}
	if !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, badBundle("%q is not a CA's certificate", cutTo(c.Subject.CommonName, 80))
	}
	return c, nil
}

func cutTo(s string, n int) string { return s[:min(len(s), n)] }

// Pool returns the roots of a bundle that was checked.
func (b Bundle) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, der := range b.Roots {
		if c, err := x509.ParseCertificate(der); err == nil {
			pool.AddCert(c)
		}
	}
	return pool
}

// SignBundle returns b, signed by signer, in compact serialisation (RFC 7515 §7.1). The signer must hold an EC P-256 key.
func SignBundle(b Bundle, signer crypto.Signer) (string, error) {
	if err := b.Check(); err != nil {
		return "", err
	}
	pub, ok := signer.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return "", fleet.Errorf(fleet.Unprocessable, "trust keys are EC P-256 (ES256)")
	}
	id, err := TrustKeyID(pub)
	if err != nil {
		return "", err
	}
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(signer), KeyID: id}}
	s, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType(BundleType))
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "sign the trust bundle")
	}
	payload, err := json.Marshal(b, json.Deterministic(true))
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "sign the trust bundle")
	}
	jws, err := s.Sign(payload)
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "sign the trust bundle")
	}
	text, err := jws.CompactSerialize()
	if err == nil && len(text) > MaxBundle {
		err = fleet.Coded(fleet.TooLarge, CodeBundleTooLarge, "a trust bundle has at most %d bytes", MaxBundle)
	}
	return text, err
}

// TrustKeyID returns the id of a key: the first 16 hex digits of the SHA-256 of its SubjectPublicKeyInfo.
func TrustKeyID(pub *ecdsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fleet.Wrap(fleet.Unprocessable, err, "the trust key cannot be used")
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:8]), nil
}

// VerifyBundle reads a signed bundle: compact serialisation, ES256, a header of alg, kid and typ only, the signature of
// key, and a payload that is a Bundle and nothing more. It does not look at the version: see Bundle.Follows.
func VerifyBundle(text string, key *ecdsa.PublicKey) (Bundle, error) {
	if len(text) > MaxBundle {
		return Bundle{}, fleet.Coded(fleet.TooLarge, CodeBundleTooLarge, "a trust bundle has at most %d bytes", MaxBundle)
	}
	if err := checkBundleHeader(text, key); err != nil {
		return Bundle{}, err
	}
	jws, err := jose.ParseSignedCompact(text, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Bundle{}, badBundle("not a JWS in compact serialisation")
	}
	payload, err := jws.Verify(key)
	if err != nil {
		return Bundle{}, fleet.Coded(fleet.Unprocessable, CodeBundleSignature, "trust bundle: it is not signed by the key that devices hold")
	}
	var b Bundle
	if err := json.Unmarshal(payload, &b, json.RejectUnknownMembers(true)); err != nil {
		return Bundle{}, badBundle("the payload is not a bundle")
	}
	return b, b.Check()
}

// checkBundleHeader refuses every header but the one that SignBundle writes.
func checkBundleHeader(text string, key *ecdsa.PublicKey) error {
	head, rest, ok := strings.Cut(text, ".")
	if !ok || strings.Count(rest, ".") != 1 {
		return badBundle("not a JWS in compact serialisation (header.payload.signature)")
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(head)
	if err != nil {
		return badBundle("the header is not base64url")
	}
	var h struct {
		Alg string `json:"alg"`
		Kid string `json:"kid"`
		Typ string `json:"typ"`
	}
	if err := json.Unmarshal(raw, &h, json.RejectUnknownMembers(true)); err != nil || h.Alg != "ES256" || h.Typ != BundleType {
		return badBundle("the header must hold alg ES256, typ %s and kid, and nothing more", BundleType)
	}
	id, err := TrustKeyID(key)
	if err != nil {
		return err
	}
	if h.Kid != id {
		return fleet.Coded(fleet.Unprocessable, CodeBundleSignature, "trust bundle: it names another key than the one that devices hold")
	}
	return nil
}

// Follows reports whether b may take the place of version have: only a higher version may.
func (b Bundle) Follows(have int64) bool { return b.Version > have }

// Published is a bundle as muster keeps it.
type Published struct {
	Bundle
	JWS string    `json:"jws"`
	At  time.Time `json:"at"`
	By  string    `json:"by,omitempty"` // operator; empty: muster itself
}
