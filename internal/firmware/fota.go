package firmware

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"strings"
	"time"

	"muster/internal/fleet"
)

// FOTASignature is what esp32FOTA wants before an image if its sketch checks signatures: RSASSA-PKCS1-v1_5 (RFC 8017 §8.2)
// with SHA-256 over the image file alone, as many bytes as the key has (esp32.md §6.4). The image is stored without it.
type FOTASignature struct {
	Base64 string     `json:"signature"` // empty: there is none
	Key    fleet.Hash `json:"key"`       // SHA-256 of the key's SubjectPublicKeyInfo
	By     string     `json:"by"`
	At     time.Time  `json:"at"`
}

// Bytes returns the signature itself; nil if there is none.
func (s FOTASignature) Bytes() ([]byte, error) {
	if s.Base64 == "" {
		return nil, nil
	}
	b, err := base64.StdEncoding.DecodeString(s.Base64)
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "a signature for esp32FOTA is damaged")
	}
	return b, nil
}

// FOTAKey is the public half of a key that signs for esp32FOTA.
type FOTAKey struct {
	*rsa.PublicKey
	Digest fleet.Hash // SHA-256 of its SubjectPublicKeyInfo
}

// fotaBits are the sizes of keys for which a length can be set in the sketch (setSignatureLen; 512 bytes without).
const fotaBits = "2048, 3072 or 4096"

// ParseFOTAKey reads a public key in PEM, as the sketch holds it. Errors are Unprocessable (esp32fota_key).
func ParseFOTAKey(text []byte) (FOTAKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return FOTAKey{}, badFOTAKey("give the public key in PEM; it starts with -----BEGIN PUBLIC KEY----- (openssl pkey -in KEY.pem -pubout)")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return FOTAKey{}, badFOTAKey("the public key cannot be read")
	}
	return FOTAKeyOf(pub)
}

// FOTAKeyOf is ParseFOTAKey for a key in memory.
func FOTAKeyOf(pub crypto.PublicKey) (FOTAKey, error) {
	k, ok := pub.(*rsa.PublicKey)
	if !ok || k.Size() != 256 && k.Size() != 384 && k.Size() != 512 {
		return FOTAKey{}, badFOTAKey("esp32FOTA verifies RSA alone: give a key of " + fotaBits + " bits")
	}
	spki, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return FOTAKey{}, badFOTAKey("the public key cannot be read")
	}
	return FOTAKey{PublicKey: k, Digest: fleet.HashOf(sha256.Sum256(spki))}, nil
}

// Verify checks signature over the image file with this SHA-256, as the device does. The error is Unprocessable
// (esp32fota_signature).
func (k FOTAKey) Verify(image fleet.Hash, signature []byte) error {
	sum, err := hex.DecodeString(string(image))
	if err == nil {
		err = rsa.VerifyPKCS1v15(k.PublicKey, crypto.SHA256, sum, signature)
	}
	if err != nil {
		return fleet.Coded(fleet.Unprocessable, "esp32fota_signature",
			"the %d bytes are no signature of this image by this key (%d are due): sign the very file of the release, openssl dgst -sha256 -sign KEY.pem -out IMAGE.sign IMAGE", len(signature), k.Size())
	}
	return nil
}

func badFOTAKey(why string) error {
	return fleet.Coded(fleet.Unprocessable, "esp32fota_key", "%s", strings.TrimSpace(why))
}
