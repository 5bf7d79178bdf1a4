package firmware

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"time"

	"github.com/go-jose/go-jose/v4"

	"muster/internal/fleet"
)

// MaxKeyPEM is the longest PEM text of a public key that is read, in bytes.
const MaxKeyPEM = 4 << 10

// Key is a public key that may sign releases of a product.
type Key struct {
	ID        string          `json:"id"`         // RFC 7638 thumbprint of the public key
	Product   fleet.ProductID `json:"product"`    // empty: of every product
	PublicKey []byte          `json:"public_key"` // SubjectPublicKeyInfo, DER
	AddedAt   time.Time       `json:"added_at"`
	AddedBy   string          `json:"added_by"`
	Revoked   bool            `json:"revoked,omitempty"`
	RevokedAt time.Time       `json:"revoked_at,omitzero"`
	RevokedBy string          `json:"revoked_by,omitzero"`
}

// ParseKey reads the PEM text of one EC P-256 public key (PUBLIC KEY, RFC 7468 §13) for releases of product, which may
// be empty. Errors are Invalid, and Unprocessable for a key of another kind.
func ParseKey(text []byte, product fleet.ProductID) (Key, error) {
	if product != "" {
		if _, err := fleet.ParseProductID(string(product)); err != nil {
			return Key{}, err
		}
	}
	if len(text) > MaxKeyPEM {
		return Key{}, fleet.Errorf(fleet.TooLarge, "public key: longer than %d bytes", MaxKeyPEM)
	}
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return Key{}, fleet.Errorf(fleet.Invalid, "public key: not PEM; it starts with -----BEGIN PUBLIC KEY-----")
	case bytes.Contains([]byte(block.Type), []byte("PRIVATE")):
		return Key{}, fleet.Errorf(fleet.Invalid, "this is a private key; register its public half and consider the private one exposed")
	case block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) != 0:
		return Key{}, fleet.Errorf(fleet.Invalid, "public key: use exactly one PEM block of type PUBLIC KEY")
	}
	return NewKey(block.Bytes, product)
}

// NewKey returns the key with the SubjectPublicKeyInfo der. It must be EC P-256.
func NewKey(der []byte, product fleet.ProductID) (Key, error) {
	k := Key{Product: product, PublicKey: der}
	pub, err := k.Public()
	if err != nil {
		return Key{}, err
	}
	k.ID, err = KeyID(pub)
	return k, err
}

// Public returns the key for verifying.
func (k Key) Public() (*ecdsa.PublicKey, error) {
	pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "public key: not a SubjectPublicKeyInfo that can be read")
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fleet.Errorf(fleet.Unprocessable, "public key: release keys are EC P-256 (ES256); make one with: muster firmware keygen")
	}
	return ec, nil
}

// PEM returns the key as ParseKey reads it.
func (k Key) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.PublicKey})
}

// KeyID returns the JWK thumbprint of pub with SHA-256 (RFC 7638 §3), base64url: 43 characters.
func KeyID(pub crypto.PublicKey) (string, error) {
	sum, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fleet.Wrap(fleet.Invalid, err, "public key: no thumbprint")
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}
