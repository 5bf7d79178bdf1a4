package signing

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"

	"muster/internal/esp"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
)

// LoadSecureBootKey reads a private key that signs for Secure Boot v2: RSA-3072, EC P-256 or P-384, in PEM, as espsecure
// and openssl write it, or as the URI of a key manager. passphrase is called only if the key is encrypted. A file that others may read is refused.
func LoadSecureBootKey(path string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	key, err := loadPrivate(path, "Secure Boot key", passphrase)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fleet.Errorf(fleet.Unprocessable, "%s is no key that signs", path)
	}
	_, err = secureboot.KeyOf(signer.Public())
	return signer, err
}

// LoadSecureBootPublicKey reads the public half of a Secure Boot key, in PEM (PUBLIC KEY, RFC 7468 §13).
func LoadSecureBootPublicKey(path string) (secureboot.Key, error) {
	text, err := readSome(path, maxPublicPEM)
	if err != nil {
		return secureboot.Key{}, err
	}
	block, _ := pem.Decode(text)
	switch {
	case block == nil:
		return secureboot.Key{}, fleet.Errorf(fleet.Invalid, "%s holds no public key in PEM; it starts with -----BEGIN PUBLIC KEY-----", path)
	case strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return secureboot.Key{}, fleet.Errorf(fleet.Invalid, "%s is a private key; give its public half: openssl pkey -in KEY.pem -pubout", path)
	case block.Type == "CERTIFICATE":
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return secureboot.Key{}, fleet.Wrap(fleet.Invalid, err, "%s holds a certificate that cannot be read", path)
		}
		return secureboot.KeyOf(c.PublicKey)
	}
	return secureboot.ParseKey(block.Bytes)
}

const maxPublicPEM = 16 << 10

// Made is a signature that was made elsewhere.
type Made struct {
	Key       secureboot.Key
	Signature string // path: 384 bytes of RSASSA-PSS; ECDSA as DER, or r and s side by side
}

// SecureBootOrder says how to sign an image for Secure Boot v2.
type SecureBootOrder struct {
	Image   string // path
	Out     string // path of the signed image; empty: SignedName
	Append  bool   // keep the signatures that the image has
	Signers []crypto.Signer
	Made    []Made // come after the Signers
}

// SecureBootSigned is an image with a signature sector.
type SecureBootSigned struct {
	Path     string                 `json:"path"`
	Size     int64                  `json:"size"` // bytes
	Keys     []secureboot.KeyDigest `json:"keys"` // of those who signed, in order
	Findings esp.Findings           `json:"findings,omitempty"`
}

// SignedName returns where a signed image goes if nobody says: app.bin becomes app.signed.bin.
func SignedName(image string) string {
	ext := filepath.Ext(image)
	return strings.TrimSuffix(image, ext) + ".signed" + ext
}

// SignSecureBoot appends a signature sector to an image and writes both to a new file. Neither the image nor any other
// file is overwritten. Errors are those of secureboot.Signing, and of files.
func SignSecureBoot(o SecureBootOrder) (SecureBootSigned, error) {
	f, s, err := startSigning(o.Image, o.Append)
	if err != nil {
		return SecureBootSigned{}, err
	}
	defer f.Close()
	for _, signer := range o.Signers {
		if err := s.Sign(rand.Reader, signer); err != nil {
			return SecureBootSigned{}, err
		}
	}
	for _, m := range o.Made {
		sig, err := readSome(m.Signature, maxSignature)
		if err != nil {
			return SecureBootSigned{}, err
		}
		if err := s.Add(m.Key, sig); err != nil {
			return SecureBootSigned{}, err
		}
	}
	if _, err := s.Sector(); err != nil {
		return SecureBootSigned{}, err
	}
	out := SecureBootSigned{Path: o.Out, Keys: s.Keys(), Findings: s.Findings()}
	if out.Path == "" {
		out.Path = SignedName(o.Image)
	}
	if err := writeNewFrom(out.Path, s, 0o644); err != nil {
		return SecureBootSigned{}, err
	}
	info, err := os.Stat(out.Path)
	if err != nil {
		return SecureBootSigned{}, fileError(err, "read %s", out.Path)
	}
	out.Size = info.Size()
	return out, nil
}

// maxSignature is the longest signature, in bytes.
const maxSignature = 512

// Request is what a key in a hardware module must sign.
type Request struct {
	Path    string               `json:"path"`   // file with the digest
	Digest  string               `json:"digest"` // hex
	Scheme  esp.Scheme           `json:"scheme"`
	Key     secureboot.KeyDigest `json:"key"`
	OpenSSL string               `json:"openssl"` // the command, with OpenSSL, as an example
}

// RequestSecureBoot writes the digest that key must sign to out, which must not exist. The signature goes to
// SignSecureBoot.
func RequestSecureBoot(image, out string, key secureboot.Key, keep bool) (Request, error) {
	f, s, err := startSigning(image, keep)
	if err != nil {
		return Request{}, err
	}
	defer f.Close()
	r, err := s.Request(key)
	if err != nil {
		return Request{}, err
	}
	command := strings.NewReplacer("digest.bin", out, "signature.bin", out+".sig").Replace(r.OpenSSL())
	return Request{Path: out, Digest: r.String(), Scheme: r.Scheme, Key: r.Key, OpenSSL: command}, writeNew(out, r.Digest, 0o644)
}

func startSigning(path string, keep bool) (*imageFile, *secureboot.Signing, error) {
	f, err := openImage(path)
	if err != nil {
		return nil, nil, err
	}
	s, err := secureboot.Start(f, f.size, keep)
	if err != nil {
		_ = f.Close() // only read
		return nil, nil, fileError(err, "read the image %s", path)
	}
	return f, s, nil
}
