package firmware

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// MaxJWS is the longest signed manifest that is read, in bytes.
const MaxJWS = 4 << 10

// Typ is the type in the header of a signed manifest, so that no other token signed by the same key can pass for one
// (RFC 8725 §3.11).
const Typ = "muster-release+jws"

// header is the whole protected header (RFC 7515 §4). Anything more, above all jwk, x5c, b64 and crit, is refused.
type header struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
}

// Sign returns m, signed by signer, in compact serialisation (RFC 7515 §7.1). The signer must hold an EC P-256 key; it
// may live in a hardware module.
func Sign(m Manifest, signer crypto.Signer) (string, error) {
	if err := m.Validate(); err != nil {
		return "", err
	}
	pub, ok := signer.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return "", fleet.Errorf(fleet.Unprocessable, "release keys are EC P-256 (ES256); make one with: muster firmware keygen")
	}
	id, err := KeyID(pub)
	if err != nil {
		return "", err
	}
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(signer), KeyID: id}}
	s, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType(Typ))
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "sign the manifest")
	}
	payload, err := json.Marshal(m, json.Deterministic(true))
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "sign the manifest")
	}
	jws, err := s.Sign(payload)
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "sign the manifest")
	}
	return jws.CompactSerialize()
}

// Verified is a manifest that a registered key signed. It comes from Verify alone; its zero value is refused wherever a
// Verified is wanted.
type Verified struct {
	manifest Manifest
	jws      string
	keyID    string
}

// Manifest returns what was signed.
func (v Verified) Manifest() Manifest { return v.manifest }

// KeyID returns the id of the key that signed it.
func (v Verified) KeyID() string { return v.keyID }

// JWS returns the compact serialisation that was verified.
func (v Verified) JWS() string { return v.jws }

// Release returns the release of v. The caller has compared the image with the manifest; md5 is the image's.
func (v Verified) Release(md5, by string, at time.Time) (Release, error) {
	if v.jws == "" {
		return Release{}, fleet.Errorf(fleet.Internal, "a release without a verified manifest")
	}
	return Release{Manifest: v.manifest, MD5: md5, JWS: v.jws, KeyID: v.keyID, UploadedAt: at, UploadedBy: by}, nil
}

// Verify reads a signed manifest: compact serialisation, ES256, a header of alg, kid and typ only, a key that keys
// knows, that is not revoked and may sign for the product, and a payload that is a valid Manifest and nothing more.
// Errors are Unprocessable (TooLarge beyond MaxJWS) with a code: manifest_malformed, key_unknown, key_revoked,
// key_product, signature_invalid, manifest_invalid. They hold no raw input.
func Verify(jws string, keys func(kid string) (Key, bool)) (Verified, error) {
	h, err := readHeader(jws)
	if err != nil {
		return Verified{}, err
	}
	key, ok := keys(h.Kid)
	if !ok || key.ID != h.Kid {
		return Verified{}, refuse("key_unknown", "no registered key has the id that it names; register the public key first, or sign with a registered one")
	}
	if key.Revoked {
		return Verified{}, refuse("key_revoked", "key %s is revoked; sign with another key", key.ID)
	}
	payload, err := checkSignature(jws, key)
	if err != nil {
		return Verified{}, err
	}
	m, err := readManifest(payload)
	if err != nil {
		return Verified{}, err
	}
	if key.Product != "" && key.Product != m.Product {
		return Verified{}, refuse("key_product", "key %s signs for product %s, the manifest is for product %s", key.ID, key.Product, m.Product)
	}
	return Verified{manifest: m, jws: jws, keyID: key.ID}, nil
}

// Inspect returns the manifest and the key id that an unverified JWS claims, for people to look at.
func Inspect(jws string) (Manifest, string, error) {
	h, err := readHeader(jws)
	if err != nil {
		return Manifest{}, "", err
	}
	payload, err := base64.RawURLEncoding.Strict().DecodeString(strings.Split(jws, ".")[1])
	if err != nil {
		return Manifest{}, "", refuse("manifest_malformed", "the payload is not base64url")
	}
	m, err := readManifest(payload)
	return m, h.Kid, err
}

// readHeader checks all that can be checked before a key is looked up. Only the compact form has exactly two dots and
// no brace; an empty part would be a detached payload or a missing signature.
func readHeader(jws string) (header, error) {
	if len(jws) > MaxJWS {
		return header{}, fleet.Coded(fleet.TooLarge, "manifest_malformed", "signed manifest longer than %d bytes", MaxJWS)
	}
	part := strings.Split(jws, ".")
	if len(part) != 3 || part[0] == "" || part[1] == "" || part[2] == "" {
		return header{}, refuse("manifest_malformed", "not a JWS in compact serialisation (header.payload.signature)")
	}
	for _, p := range part {
		if _, err := base64.RawURLEncoding.Strict().DecodeString(p); err != nil || strings.ContainsAny(p, "\r\n") {
			return header{}, refuse("manifest_malformed", "not base64url without padding and line breaks")
		}
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(part[0])
	if err != nil {
		return header{}, refuse("manifest_malformed", "the header is not base64url")
	}
	var h header
	if err := json.Unmarshal(raw, &h, json.RejectUnknownMembers(true)); err != nil {
		return header{}, &fleet.Error{Kind: fleet.Unprocessable, Code: "manifest_malformed", Msg: "signed manifest: its header holds more or less than alg, kid and typ", Err: err}
	}
	if h.Alg != string(jose.ES256) {
		return header{}, refuse("manifest_malformed", "its algorithm is not ES256")
	}
	if h.Typ != Typ {
		return header{}, refuse("manifest_malformed", "its type is not %s, so it was signed for something else", Typ)
	}
	return h, nil
}

// checkSignature returns the payload of jws if key signed it.
func checkSignature(jws string, key Key) ([]byte, error) {
	pub, err := key.Public()
	if err != nil {
		return nil, err
	}
	if id, err := KeyID(pub); err != nil || id != key.ID {
		return nil, fleet.Errorf(fleet.Internal, "key %s is stored with another public key", key.ID)
	}
	sig, err := jose.ParseSignedCompact(jws, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, &fleet.Error{Kind: fleet.Unprocessable, Code: "manifest_malformed", Msg: "signed manifest: not a JWS that can be read", Err: err}
	}
	payload, err := sig.Verify(pub)
	if err != nil {
		return nil, refuse("signature_invalid", "the signature is not that of key %s over this manifest", key.ID)
	}
	return payload, nil
}

// readManifest reads the payload strictly: unknown or duplicate names may carry a demand that this version of muster
// would ignore.
func readManifest(payload []byte) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(payload, &m, json.RejectUnknownMembers(true)); err != nil {
		return Manifest{}, &fleet.Error{Kind: fleet.Unprocessable, Code: "manifest_invalid", Msg: "manifest: not the JSON object that this version of muster knows", Err: err}
	}
	return m, m.Validate()
}

func refuse(code, format string, a ...any) error {
	return fleet.Coded(fleet.Unprocessable, code, "signed manifest: "+format, a...)
}
