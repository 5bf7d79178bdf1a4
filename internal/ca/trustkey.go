package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.step.sm/crypto/pemutil"

	"muster/internal/fleet"
)

// Files of the trust key, by which bundles are signed: the public half goes to every device, the other one can be kept
// offline, as the roots' keys are.
const (
	fileTrustKey    = "trust" + extKey
	fileTrustPublic = "trust.pub.pem"
)

// TrustKey returns the key by which trust bundles are signed, from a hierarchy's folder; signer is nil if it is kept
// elsewhere. Where there was none it makes one, under the passphrase.
func TrustKey(dir string, passphrase []byte) (public *ecdsa.PublicKey, signer crypto.Signer, err error) {
	public, err = readTrustPublic(filepath.Join(dir, fileTrustPublic))
	if errors.Is(err, fs.ErrNotExist) {
		return makeTrustKey(dir, passphrase)
	}
	if err != nil {
		return nil, nil, err
	}
	path := filepath.Join(dir, fileTrustKey)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return public, nil, nil
	}
	if signer, err = loadKey(path, passphrase); err != nil {
		return nil, nil, err
	}
	if !public.Equal(signer.Public()) {
		return nil, nil, fleet.Errorf(fleet.Invalid, "ca: %s and %s do not belong together: restore both from a backup", fileTrustKey, fileTrustPublic)
	}
	return public, signer, nil
}

func readTrustPublic(path string) (*ecdsa.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fleet.Errorf(fleet.Invalid, "ca: %s is not a public key in PEM", path)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	pub, ok := key.(*ecdsa.PublicKey)
	if err != nil || !ok || pub.Curve != elliptic.P256() {
		return nil, fleet.Errorf(fleet.Invalid, "ca: %s is not an EC P-256 key", path)
	}
	return pub, nil
}

// makeTrustKey makes the pair. The private half is on disk first, so that no device ever gets a public one without it.
func makeTrustKey(dir string, passphrase []byte) (*ecdsa.PublicKey, crypto.Signer, error) {
	path := filepath.Join(dir, fileTrustKey)
	key, err := loadKey(path, passphrase) // a crash may have come in between
	if _, missing := os.Stat(path); errors.Is(missing, fs.ErrNotExist) {
		fresh, genErr := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if genErr != nil {
			return nil, nil, fmt.Errorf("ca: %w", genErr)
		}
		block, serErr := pemutil.Serialize(fresh, pemutil.WithPKCS8(true), pemutil.WithPassword(passphrase))
		if serErr != nil {
			return nil, nil, fmt.Errorf("ca: trust key: %w", serErr)
		}
		key, err = fresh, replaceWith(path, pem.EncodeToMemory(block), 0o600)
	}
	if err != nil {
		return nil, nil, err
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, nil, fleet.Errorf(fleet.Invalid, "ca: %s is not an EC key", path)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, nil, fmt.Errorf("ca: %w", err)
	}
	return pub, key, replaceWith(filepath.Join(dir, fileTrustPublic), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644)
}

// replaceWith writes a file that appears whole or not at all.
func replaceWith(path string, data []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("ca: %w", err)
	}
	if err := writeFile(tmp, data, mode); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return syncDir(filepath.Dir(path))
}
