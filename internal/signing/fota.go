package signing

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// FOTAEnding makes of an image's name that of its signature for esp32FOTA.
const FOTAEnding = ".esp32fota"

// FOTA is a signature for esp32FOTA as it lies in a file: with the key that verifies it, so that a mistake shows at once.
type FOTA struct {
	Signature string `json:"signature"`  // RSASSA-PKCS1-v1_5 with SHA-256 over the image file, base64
	PublicKey string `json:"public_key"` // PEM
}

// FOTASigned says what SignFOTA wrote.
type FOTASigned struct {
	Path  string     `json:"path"`
	Image string     `json:"image"`
	Bytes int        `json:"bytes"` // of the signature: what setSignatureLen of the sketch must say
	Key   fleet.Hash `json:"key"`
}

// LoadFOTAKey reads a private key that signs for esp32FOTA: RSA of 2048, 3072 or 4096 bits, in PEM or in a key manager. passphrase is
// called only if the key is encrypted. A file that others may read is refused.
func LoadFOTAKey(path string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	key, err := loadPrivate(path, "esp32FOTA key", passphrase)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fleet.Errorf(fleet.Unprocessable, "%s is no key that signs", path)
	}
	_, err = firmware.FOTAKeyOf(signer.Public())
	return signer, err
}

// SignFOTA signs the image in a file for esp32FOTA and writes the signature beside it, to image with FOTAEnding. The image is
// the one that is uploaded: one with a Secure Boot signature is signed with it. replace: an old signature may be overwritten.
func SignFOTA(image string, signer crypto.Signer, replace bool) (FOTASigned, error) {
	f, err := openImage(image)
	if err != nil {
		return FOTASigned{}, err
	}
	defer f.Close()
	hash, _, err := f.hash()
	if err != nil {
		return FOTASigned{}, err
	}
	sum, err := hex.DecodeString(string(hash))
	if err != nil {
		return FOTASigned{}, err
	}
	signature, err := signer.Sign(rand.Reader, sum, crypto.SHA256)
	if err != nil {
		return FOTASigned{}, fleet.Wrap(fleet.Internal, err, "the key does not sign")
	}
	return keepFOTA(image, hash, signer.Public(), signature, replace)
}

// KeepFOTA is SignFOTA with a signature that was made elsewhere, openssl dgst -sha256 -sign. Both arguments behind image are
// paths; the key is the public half, in PEM.
func KeepFOTA(image, signature, key string, replace bool) (FOTASigned, error) {
	text, err := readSome(key, maxPublicPEM)
	if err != nil {
		return FOTASigned{}, err
	}
	k, err := firmware.ParseFOTAKey(text)
	if err != nil {
		return FOTASigned{}, err
	}
	b, err := readSome(signature, 512)
	if err != nil {
		return FOTASigned{}, err
	}
	f, err := openImage(image)
	if err != nil {
		return FOTASigned{}, err
	}
	defer f.Close()
	hash, _, err := f.hash()
	if err != nil {
		return FOTASigned{}, err
	}
	return keepFOTA(image, hash, k.PublicKey, b, replace)
}

func keepFOTA(image string, hash fleet.Hash, public crypto.PublicKey, signature []byte, replace bool) (FOTASigned, error) {
	k, err := firmware.FOTAKeyOf(public)
	if err != nil {
		return FOTASigned{}, err
	}
	if err := k.Verify(hash, signature); err != nil {
		return FOTASigned{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(k.PublicKey)
	if err != nil {
		return FOTASigned{}, err
	}
	text, err := json.Marshal(FOTA{
		Signature: base64.StdEncoding.EncodeToString(signature), PublicKey: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
	}, jsontext.WithIndent("  "))
	if err != nil {
		return FOTASigned{}, err
	}
	out := FOTASigned{Path: image + FOTAEnding, Image: image, Bytes: len(signature), Key: k.Digest}
	write := writeNew
	if replace {
		write = writeOver
	}
	return out, write(out.Path, append(text, '\n'), 0o644)
}

// ReadFOTA reads what SignFOTA wrote.
func ReadFOTA(path string) (FOTA, error) {
	text, err := readSome(path, 8<<10)
	if err != nil {
		return FOTA{}, err
	}
	var out FOTA
	if err := json.Unmarshal(text, &out, json.RejectUnknownMembers(true)); err != nil {
		return FOTA{}, fleet.Wrap(fleet.Invalid, err, "%s is no signature for esp32FOTA; make it with: muster firmware sign IMAGE --esp32fota KEY", path)
	}
	return out, nil
}
