// Package signing makes release keys and signed manifests on the operator's own machine, without a server: what the
// commands muster firmware keygen, sign and inspect do. A private key never leaves the file it was made in.
package signing

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.step.sm/crypto/pemutil"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// Keypair names the files of a release key.
type Keypair struct {
	ID      string `json:"id"`      // RFC 7638 thumbprint
	Private string `json:"private"` // PKCS #8, PEM; stays here
	Public  string `json:"public"`  // SubjectPublicKeyInfo, PEM; register it with the server
}

// Keygen makes an ES256 key: the private half in path, readable by its owner alone, the public half beside it with the
// ending .pub.pem. With a passphrase the private half is encrypted (PBES2, AES-256, PBKDF2). Files that exist are never
// overwritten: that is a Conflict.
func Keygen(path string, passphrase []byte) (Keypair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Keypair{}, fleet.Wrap(fleet.Internal, err, "make a key")
	}
	options := []pemutil.Options{pemutil.WithPKCS8(true)}
	if len(passphrase) > 0 {
		options = append(options, pemutil.WithPassword(passphrase))
	}
	private, err := pemutil.Serialize(key, options...)
	if err != nil {
		return Keypair{}, fleet.Wrap(fleet.Internal, err, "encode the private key")
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return Keypair{}, fleet.Wrap(fleet.Internal, err, "encode the public key")
	}
	public, err := firmware.NewKey(der, "")
	if err != nil {
		return Keypair{}, err
	}
	pair := Keypair{ID: public.ID, Private: path, Public: strings.TrimSuffix(path, ".pem") + ".pub.pem"}
	// The public half first: should the private one fail, what is left behind is no secret and signs nothing.
	if err := writeNew(pair.Public, public.PEM(), 0o644); err != nil {
		return Keypair{}, err
	}
	if err := writeNew(pair.Private, pem.EncodeToMemory(private), 0o600); err != nil {
		return Keypair{}, errors.Join(err, os.Remove(pair.Public))
	}
	return pair, nil
}

// LoadKey reads the private key in path for signing. passphrase is called only if the key is encrypted. A file that
// others may read is refused: the key in it must be taken as known.
func LoadKey(path string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fileError(err, "read the release key %s", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fleet.Errorf(fleet.Forbidden, "release key %s can be read by others (mode %04o); chmod 600 it, and replace it if anyone else uses this machine", path, info.Mode().Perm())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fileError(err, "read the release key %s", path)
	}
	block, _ := pem.Decode(text)
	if block == nil || !strings.HasSuffix(block.Type, "PRIVATE KEY") {
		return nil, fleet.Errorf(fleet.Invalid, "%s holds no private key in PEM; make one with: muster firmware keygen", path)
	}
	var options []pemutil.Options
	if block.Type == "ENCRYPTED PRIVATE KEY" {
		p, err := passphrase()
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "release key %s is encrypted, and its passphrase could not be read", path)
		}
		options = append(options, pemutil.WithPassword(p))
	}
	key, err := pemutil.ParseKey(text, options...)
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "release key %s cannot be read: a wrong passphrase, or not a private key", path)
	}
	signer, ok := key.(*ecdsa.PrivateKey)
	if !ok || signer.Curve != elliptic.P256() {
		return nil, fleet.Errorf(fleet.Unprocessable, "%s is not an EC P-256 key; make one with: muster firmware keygen", path)
	}
	return signer, nil
}

// Order says what to sign.
type Order struct {
	Image         string // path of the image file
	Out           string // path of the signed manifest; empty: Image with .jws behind
	Replace       bool   // overwrite Out
	Product       fleet.ProductID
	Version       firmware.Version
	Chip          string
	SecureVersion uint32
	MinVersion    firmware.Version
	MinRevision   int        // of the chip, × 100; 0: any
	MaxRevision   int        // of the chip, × 100; 0: any
	ImageHash     fleet.Hash // what the running device reports; empty: the SHA-256 of the file
}

// Signed is a signed manifest in a file.
type Signed struct {
	Path     string            `json:"path"`
	Manifest firmware.Manifest `json:"manifest"`
	KeyID    string            `json:"key_id"`
}

// Sign hashes the image, signs its manifest and writes it. It does not touch the image.
func Sign(o Order, signer crypto.Signer) (Signed, error) {
	m := firmware.Manifest{
		Product: o.Product, Version: o.Version, ImageHash: o.ImageHash, Chip: o.Chip, SecureVersion: o.SecureVersion, MinVersion: o.MinVersion,
		MinChipRevision: o.MinRevision, MaxChipRevision: o.MaxRevision,
	}
	var err error
	if m.SHA256, m.Size, err = hashFile(o.Image); err != nil {
		return Signed{}, err
	}
	if m.ImageHash == "" {
		m.ImageHash = m.SHA256
	}
	jws, err := firmware.Sign(m, signer)
	if err != nil {
		return Signed{}, err
	}
	id, err := firmware.KeyID(signer.Public())
	if err != nil {
		return Signed{}, err
	}
	out := o.Out
	if out == "" {
		out = o.Image + ".jws"
	}
	write := writeNew
	if o.Replace {
		write = writeOver
	}
	return Signed{Path: out, Manifest: m, KeyID: id}, write(out, []byte(jws+"\n"), 0o644)
}

// Report is what a signed manifest says.
type Report struct {
	Manifest firmware.Manifest `json:"manifest"`
	KeyID    string            `json:"key_id"`
	Verified bool              `json:"verified"` // by the public key that was given; without one nothing was proven
}

// Inspect reads the signed manifest in path. With public, the path of a public key, the signature must be that key's;
// with an empty one nothing is verified.
func Inspect(path, public string) (Report, error) {
	jws, err := ReadManifest(path)
	if err != nil {
		return Report{}, err
	}
	if public == "" {
		m, id, err := firmware.Inspect(jws)
		return Report{Manifest: m, KeyID: id}, err
	}
	text, err := readSome(public, firmware.MaxKeyPEM)
	if err != nil {
		return Report{}, err
	}
	key, err := firmware.ParseKey(text, "")
	if err != nil {
		return Report{}, err
	}
	v, err := firmware.Verify(jws, func(kid string) (firmware.Key, bool) { return key, kid == key.ID })
	if err != nil {
		return Report{}, err
	}
	return Report{Manifest: v.Manifest(), KeyID: v.KeyID(), Verified: true}, nil
}

// ReadManifest returns the signed manifest in path as it is sent to the server.
func ReadManifest(path string) (string, error) {
	b, err := readSome(path, firmware.MaxJWS)
	return strings.TrimSpace(string(b)), err
}

// readSome reads a file of at most max bytes and some white space.
func readSome(path string, max int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fileError(err, "read %s", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, max+3))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fileError(err, "read %s", path)
	}
	if int64(len(b)) > max+2 {
		return nil, fleet.Errorf(fleet.TooLarge, "%s is longer than %d bytes; is it another file?", path, max)
	}
	return b, nil
}

func hashFile(path string) (fleet.Hash, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, fileError(err, "read the image %s", path)
	}
	sum := sha256.New()
	n, err := io.Copy(sum, io.LimitReader(f, firmware.MaxImageSize+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return "", 0, fileError(err, "read the image %s", path)
	}
	return fleet.HashOf([32]byte(sum.Sum(nil))), n, nil
}

// writeNew writes a file that must not exist, whole or not at all.
func writeNew(path string, b []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fleet.Errorf(fleet.Conflict, "%s exists and is not overwritten; choose another name, or move it away", path)
	}
	if err != nil {
		return fileError(err, "write %s", path)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fileError(err, "write %s", path), os.Remove(path))
	}
	return nil
}

// writeOver replaces a file in one step.
func writeOver(path string, b []byte, mode fs.FileMode) error {
	temp := filepath.Join(filepath.Dir(path), ".muster-"+rand.Text())
	if err := writeNew(temp, b, mode); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(fileError(err, "write %s", path), os.Remove(temp))
	}
	return nil
}

func fileError(err error, format string, a ...any) error {
	kind := fleet.Internal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		kind, format = fleet.NotFound, format+": there is no such file"
	case errors.Is(err, fs.ErrPermission):
		kind, format = fleet.Forbidden, format+": not permitted"
	}
	return fleet.Wrap(kind, err, format, a...)
}
