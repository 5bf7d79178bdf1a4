package keystore

import (
	"crypto"
	"crypto/ecdsa"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.step.sm/crypto/pemutil"

	"muster/internal/fleet"
)

// MinPassphrase is the shortest passphrase, in bytes, that protects a key.
const MinPassphrase = 12

// maxPEM is more than an encrypted key takes, in bytes.
const maxPEM = 64 << 10

// WriteFile writes a key to the new file path: PKCS #8 under a passphrase (PBES2), readable by its owner alone. Errors:
// Invalid for a passphrase that is too short, Conflict if there is such a file.
func WriteFile(path string, key crypto.Signer, passphrase []byte) error {
	if len(passphrase) < MinPassphrase {
		return fleet.Errorf(fleet.Invalid, "the passphrase must have at least %d bytes", MinPassphrase)
	}
	private, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return fleet.Errorf(fleet.Invalid, "%s: only an EC key can be written to a file", path)
	}
	block, err := pemutil.Serialize(private, pemutil.WithPKCS8(true), pemutil.WithPassword(passphrase))
	if err != nil {
		return fmt.Errorf("key %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fleet.Wrap(fleet.Conflict, err, "%s exists already: a key is never overwritten; move it away first", path)
	}
	if err != nil {
		return fmt.Errorf("key: %w", err)
	}
	_, err = f.Write(pem.EncodeToMemory(block))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("key: %w", err)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("key: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadFile reads a key that only its owner may read, and that is encrypted. The error is Invalid and says what to do.
func ReadFile(path string, passphrase []byte) (crypto.Signer, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the key %s cannot be read", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fleet.Errorf(fleet.Invalid, "others may read the key %s: run chmod 600 on it", path)
	}
	if !info.Mode().IsRegular() || info.Size() > maxPEM {
		return nil, fleet.Errorf(fleet.Invalid, "%s is no key", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the key %s cannot be read", path)
	}
	return parseKey(path, text, passphrase)
}

func parseKey(path string, text, passphrase []byte) (crypto.Signer, error) {
	if block, _ := pem.Decode(text); block == nil || block.Type != "ENCRYPTED PRIVATE KEY" {
		return nil, fleet.Errorf(fleet.Invalid, "%s is not an encrypted PKCS #8 key", path)
	}
	key, err := pemutil.Parse(text, pemutil.WithPassword(passphrase), pemutil.WithFilename(path))
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the key %s cannot be decrypted: wrong passphrase?", path)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fleet.Errorf(fleet.Invalid, "%s holds no key that can sign", path)
	}
	return signer, nil
}
