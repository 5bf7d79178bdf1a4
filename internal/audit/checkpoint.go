package audit

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// CheckpointType is the type in the header of a signed checkpoint, so that nothing else signed by the same key can pass
// for one (RFC 8725 §3.11).
const CheckpointType = "muster-audit-checkpoint+jws"

// MaxCheckpoint is the longest signed checkpoint that is read, in bytes.
const MaxCheckpoint = 2 << 10

// Checkpoint says how the trail ended at a time. Signed, it vouches for every entry up to its own: their hashes are part
// of its hash.
type Checkpoint struct {
	Origin string     `json:"origin"` // of the trail's Genesis
	Seq    uint64     `json:"seq"`    // number of the last entry
	Hash   fleet.Hash `json:"hash"`   // of the last entry
	At     time.Time  `json:"at"`     // when it was signed
	KeyID  string     `json:"-"`      // RFC 7638 thumbprint of the key; in the header
}

// SignedCheckpoint is a checkpoint with its signature.
type SignedCheckpoint struct {
	Seq   uint64     `json:"seq"`
	Hash  fleet.Hash `json:"hash"`
	At    time.Time  `json:"at"`
	KeyID string     `json:"key_id"`
	JWS   string     `json:"jws"` // compact serialisation (RFC 7515 §7.1), ES256
}

// VouchesFor reports whether s is a checkpoint of the entry e, and e what was hashed. Its signature is not checked.
func (s SignedCheckpoint) VouchesFor(e Entry) bool {
	return s.Seq == e.Seq && s.Hash == e.Hash && HashEntry(e.Prev, e) == e.Hash
}

// Key is a public key that signs checkpoints, or once did.
type Key struct {
	ID        string    `json:"id"`         // RFC 7638 thumbprint
	PublicKey []byte    `json:"public_key"` // SubjectPublicKeyInfo, DER
	Since     time.Time `json:"since"`
}

// PEM returns the key as a PEM block.
func (k Key) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.PublicKey})
}

// NewKey describes the public key of an audit key. Any but EC P-256 is Unprocessable.
func NewKey(pub crypto.PublicKey, at time.Time) (Key, error) {
	id, err := keyID(pub)
	if err != nil {
		return Key{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Key{}, fleet.Wrap(fleet.Unprocessable, err, "audit key: it cannot be encoded")
	}
	return Key{ID: id, PublicKey: der, Since: at.Round(0).UTC()}, nil
}

func keyID(pub crypto.PublicKey) (string, error) {
	if k, ok := pub.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		return "", fleet.Errorf(fleet.Unprocessable, "audit key: checkpoints are signed and checked with EC P-256 keys (ES256)")
	}
	sum, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fleet.Wrap(fleet.Unprocessable, err, "audit key: no thumbprint")
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}

// Keyring holds the public keys that a verifier trusts, by id.
type Keyring map[string]*ecdsa.PublicKey

// ParseKeyring reads one or more public keys, PEM blocks of type PUBLIC KEY.
func ParseKeyring(text []byte) (Keyring, error) {
	ring := Keyring{}
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		if block.Type != "PUBLIC KEY" {
			return nil, fleet.Errorf(fleet.Invalid, "audit key: there is a PEM block %q where only PUBLIC KEY is read", block.Type)
		}
		pub, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "audit key: a public key cannot be read")
		}
		id, err := keyID(pub)
		if err != nil {
			return nil, err
		}
		ring[id] = pub.(*ecdsa.PublicKey)
		text = rest
	}
	if len(ring) == 0 {
		return nil, fleet.Errorf(fleet.Invalid, "audit key: there is no public key in PEM (-----BEGIN PUBLIC KEY-----)")
	}
	if len(bytes.TrimSpace(text)) > 0 {
		return nil, fleet.Errorf(fleet.Invalid, "audit key: there is something after the last PEM block")
	}
	return ring, nil
}

// IDs returns the ids of the keys, in order.
func (r Keyring) IDs() []string { return slices.Sorted(maps.Keys(r)) }

// SignCheckpoint signs c. The signer holds an EC P-256 key; it may live in a hardware module.
func SignCheckpoint(c Checkpoint, signer crypto.Signer) (SignedCheckpoint, error) {
	id, err := keyID(signer.Public())
	if err != nil {
		return SignedCheckpoint{}, err
	}
	c.At = c.At.Round(0).UTC()
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: cryptosigner.Opaque(signer), KeyID: id}}
	s, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType(CheckpointType))
	if err != nil {
		return SignedCheckpoint{}, fleet.Wrap(fleet.Internal, err, "sign the checkpoint")
	}
	payload, err := json.Marshal(c, json.Deterministic(true))
	if err != nil {
		return SignedCheckpoint{}, fleet.Wrap(fleet.Internal, err, "sign the checkpoint")
	}
	jws, err := s.Sign(payload)
	if err != nil {
		return SignedCheckpoint{}, fleet.Wrap(fleet.Unavailable, err, "the audit key cannot sign now")
	}
	text, err := jws.CompactSerialize()
	if err != nil {
		return SignedCheckpoint{}, fleet.Wrap(fleet.Internal, err, "sign the checkpoint")
	}
	return SignedCheckpoint{Seq: c.Seq, Hash: c.Hash, At: c.At, KeyID: id, JWS: text}, nil
}

// OpenCheckpoint returns the checkpoint that a key of ring signed. With a nil ring the signature is not checked: the
// checkpoint is then what somebody claims. Errors are Unprocessable.
func OpenCheckpoint(text string, ring Keyring) (Checkpoint, error) {
	header, payload, err := splitCheckpoint(text)
	if err != nil {
		return Checkpoint{}, err
	}
	if ring != nil {
		key, ok := ring[header.Kid]
		if !ok {
			return Checkpoint{}, noCheckpoint("key %s signed it, which is not among the keys to check with (%s)", header.Kid, strings.Join(ring.IDs(), ", "))
		}
		sig, err := jose.ParseSignedCompact(text, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			return Checkpoint{}, noCheckpoint("it cannot be read")
		}
		if _, err := sig.Verify(key); err != nil {
			return Checkpoint{}, noCheckpoint("the signature is not that of key %s over it", header.Kid)
		}
	}
	var c Checkpoint
	if err := json.Unmarshal(payload, &c, json.RejectUnknownMembers(true)); err != nil {
		return Checkpoint{}, noCheckpoint("its payload is not the JSON object that this version of muster knows")
	}
	if _, err := fleet.ParseHash(string(c.Hash)); err != nil || c.Origin == "" || c.At.IsZero() {
		return Checkpoint{}, noCheckpoint("its payload lacks the origin, the hash or the time")
	}
	c.KeyID = header.Kid
	return c, nil
}

// checkpointHeader is the whole protected header (RFC 7515 §4). Anything more is refused.
type checkpointHeader struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
}

// splitCheckpoint checks the form and the header of a JWS in compact serialisation.
func splitCheckpoint(text string) (h checkpointHeader, payload []byte, err error) {
	parts := strings.Split(text, ".")
	if len(text) > MaxCheckpoint || len(parts) != 3 || strings.ContainsAny(text, "\r\n") {
		return h, nil, noCheckpoint("it is not a JWS in compact serialisation of at most %d bytes", MaxCheckpoint)
	}
	var raw [3][]byte
	for i, p := range parts {
		if raw[i], err = base64.RawURLEncoding.Strict().DecodeString(p); err != nil || p == "" {
			return h, nil, noCheckpoint("it is not base64url without padding")
		}
	}
	if err := json.Unmarshal(raw[0], &h, json.RejectUnknownMembers(true)); err != nil {
		return h, nil, noCheckpoint("its header holds more or less than alg, kid and typ")
	}
	if h.Alg != string(jose.ES256) || h.Typ != CheckpointType {
		return h, nil, noCheckpoint("it is not of type %s with ES256", CheckpointType)
	}
	return h, raw[1], nil
}

func noCheckpoint(format string, a ...any) error {
	return fleet.Coded(fleet.Unprocessable, "checkpoint_invalid", "checkpoint: "+format, a...)
}
