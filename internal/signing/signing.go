// Package signing makes release keys, signed manifests and Secure Boot signatures on the operator's own machine, without
// a server: what the commands muster firmware keygen, sign and inspect do. A private key never leaves the file it was
// made in.
package signing

import (
	"bytes"
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

	"muster/internal/ca/keystore"
	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
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

// LoadKey reads the private key of a release in path, or opens it in a key manager if path is a URI. passphrase is called only if the key is encrypted. A file that
// others may read is refused: the key in it must be taken as known.
func LoadKey(path string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	key, err := loadPrivate(path, "release key", passphrase)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if ok {
		var pub *ecdsa.PublicKey
		pub, ok = signer.Public().(*ecdsa.PublicKey)
		ok = ok && pub.Curve == elliptic.P256()
	}
	if !ok {
		return nil, fleet.Errorf(fleet.Unprocessable, "%s is not an EC P-256 key; make one with: muster firmware keygen", keystore.Show(path))
	}
	return signer, nil
}

// loadPrivate reads the private key in path, in any PEM form, or opens the one that path names as the URI of a key manager.
// It calls it what in errors.
func loadPrivate(path, what string, passphrase func() ([]byte, error)) (any, error) {
	if file := fileOf(path); file != "" {
		path = file
	} else if inManager(path) {
		return openManaged(path, what)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fileError(err, "read the %s %s", what, path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fleet.Errorf(fleet.Forbidden, "%s %s can be read by others (mode %04o); chmod 600 it, and replace it if anyone else uses this machine", what, path, info.Mode().Perm())
	}
	text, err := readSome(path, maxPrivatePEM)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || !strings.HasSuffix(block.Type, "PRIVATE KEY") {
		return nil, fleet.Errorf(fleet.Invalid, "%s holds no private key in PEM; make one with: muster firmware keygen", path)
	}
	var options []pemutil.Options
	if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" { // PKCS #8, and OpenSSL's old form
		p, err := passphrase()
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "%s %s is encrypted, and its passphrase could not be read", what, path)
		}
		options = append(options, pemutil.WithPassword(p))
	}
	key, err := pemutil.ParseKey(text, options...)
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "%s %s cannot be read: a wrong passphrase, or not a private key", what, path)
	}
	return key, nil
}

// maxPrivatePEM is more than any private key that muster reads, in bytes.
const maxPrivatePEM = 64 << 10

// Order says what to sign. What is empty comes from the image if that is an ESP32's; what is not must agree with it.
type Order struct {
	Image         string // path of the image file
	Out           string // path of the signed manifest; empty: that of the image with .jws behind
	Replace       bool   // overwrite Out
	Product       fleet.ProductID
	Version       firmware.Version
	Chip          string
	SecureVersion uint32
	MinVersion    firmware.Version
	MinRevision   int        // of the chip, × 100; 0: any
	MaxRevision   int        // of the chip, × 100; 0: any
	ImageHash     fleet.Hash // what the running device reports; empty, and not an ESP32's: the SHA-256 of the file
}

// Signed is a signed manifest in a file.
type Signed struct {
	Path     string            `json:"path"`
	Manifest firmware.Manifest `json:"manifest"`
	KeyID    string            `json:"key_id"`
	ESP      bool              `json:"esp"`                // the image is an ESP32's and was checked whole
	Steps    string            `json:"steps,omitempty"`    // how far its chip's anti-rollback counter can still rise
	Findings esp.Findings      `json:"findings,omitempty"` // what is worth saying before it goes out
}

// Sign makes the manifest of an image, signs it and writes it. It does not touch the image. An ESP32 image must be an
// application that every device would take.
func Sign(o Order, signer crypto.Signer) (Signed, error) {
	s := Signed{Path: o.Out, Manifest: firmware.Manifest{
		Product: o.Product, Version: o.Version, ImageHash: o.ImageHash, Chip: o.Chip, SecureVersion: o.SecureVersion, MinVersion: o.MinVersion,
		MinChipRevision: o.MinRevision, MaxChipRevision: o.MaxRevision,
	}}
	if err := s.describe(o.Image); err != nil {
		return Signed{}, err
	}
	jws, err := firmware.Sign(s.Manifest, signer)
	if err != nil {
		return Signed{}, err
	}
	if s.KeyID, err = firmware.KeyID(signer.Public()); err != nil {
		return Signed{}, err
	}
	if s.Path == "" {
		s.Path = o.Image + ".jws"
	}
	write := writeNew
	if o.Replace {
		write = writeOver
	}
	return s, write(s.Path, []byte(jws+"\n"), 0o644)
}

// describe puts into the manifest what the image in path says.
func (s *Signed) describe(path string) error {
	f, err := openImage(path)
	if err != nil {
		return err
	}
	defer f.Close()
	m := &s.Manifest
	if m.SHA256, m.Size, err = f.hash(); err != nil {
		return err
	}
	if s.ESP = f.size > 0 && espapp.Recognise(f.first, m.Chip); !s.ESP {
		if m.ImageHash == "" {
			m.ImageHash = m.SHA256
		}
		return nil
	}
	app, err := espapp.Inspect(f, f.size, image.App)
	if err != nil {
		return fileError(err, "read the image %s", path)
	}
	if *m, err = app.Complete(*m); err != nil {
		return err
	}
	if app.Image.SHA256 != m.SHA256 {
		return fleet.Coded(fleet.Conflict, "esp_file_changed", "%s changed while it was read: sign it again", path)
	}
	s.Steps, s.Findings = app.Steps(), append(app.Findings(), app.Doubts(*m)...)
	return nil
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

// imageFile is an image that is open.
type imageFile struct {
	*os.File
	size  int64 // bytes
	first byte  // of the file; 0 if it is empty
}

func openImage(path string) (*imageFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fileError(err, "read the image %s", path)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fleet.Errorf(fleet.Invalid, "%s is not a file", path)
	}
	first := make([]byte, 1)
	if err == nil && info.Size() > 0 {
		_, err = f.ReadAt(first, 0)
	}
	if err != nil {
		return nil, errors.Join(fileError(err, "read the image %s", path), f.Close())
	}
	return &imageFile{File: f, size: info.Size(), first: first[0]}, nil
}

// hash returns the SHA-256 of the file and its size; of a file that is too large for a release only the beginning.
func (f *imageFile) hash() (fleet.Hash, int64, error) {
	sum := sha256.New()
	n, err := io.Copy(sum, io.NewSectionReader(f, 0, firmware.MaxImageSize+1))
	if err != nil {
		return "", 0, fileError(err, "read the image %s", f.Name())
	}
	return fleet.HashOf([32]byte(sum.Sum(nil))), n, nil
}

// writeNew writes a file that must not exist, whole or not at all.
func writeNew(path string, b []byte, mode fs.FileMode) error {
	return writeNewFrom(path, bytes.NewReader(b), mode)
}

func writeNewFrom(path string, from io.WriterTo, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fleet.Errorf(fleet.Conflict, "%s exists and is not overwritten; choose another name, or move it away", path)
	}
	if err != nil {
		return fileError(err, "write %s", path)
	}
	_, err = from.WriteTo(f)
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

// fileError says what failed; what is an error of muster's own says that already.
func fileError(err error, format string, a ...any) error {
	if _, ours := errors.AsType[*fleet.Error](err); ours {
		return err
	}
	kind := fleet.Internal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		kind, format = fleet.NotFound, format+": there is no such file"
	case errors.Is(err, fs.ErrPermission):
		kind, format = fleet.Forbidden, format+": not permitted"
	}
	return fleet.Wrap(kind, err, format, a...)
}
