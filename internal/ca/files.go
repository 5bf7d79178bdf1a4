package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.step.sm/crypto/pemutil"

	"muster/internal/ca/ceremony"
	"muster/internal/ca/keystore"
	"muster/internal/fleet"
)

// Files of a hierarchy in its folder. Keys are PKCS #8 under the passphrase.
const (
	fileRoot, fileSpare    = "root", "spare-root"
	fileDevice, fileServer = "device-ca", "server-ca"
	fileBundle             = "trust-bundle.pem"
	fileClientCAs          = "client-cas.pem"
	extCert, extKey        = ".crt", ".key"
)

// MinPassphrase is the shortest passphrase, in bytes, that protects the keys.
const MinPassphrase = keystore.MinPassphrase

// Write puts h into the new folder dir: certificates for all to read, keys (mode 0600) under passphrase. The folder
// appears whole or not at all. Keys in a key manager stay there. It returns a Conflict error if dir exists.
func Write(h *Hierarchy, dir string, passphrase []byte) error {
	if len(passphrase) < MinPassphrase {
		return fleet.Errorf(fleet.Invalid, "ca: the passphrase must have at least %d bytes", MinPassphrase)
	}
	if _, err := os.Lstat(dir); err == nil {
		return fleet.Errorf(fleet.Conflict, "ca: %s exists already: a CA is never overwritten; move it away first", dir)
	}
	if err := h.check(); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".ca-*")
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	defer os.RemoveAll(tmp) // gone already if the rename succeeded
	if err := writeAll(h, tmp, passphrase); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return syncDir(filepath.Dir(dir))
}

func writeAll(h *Hierarchy, dir string, passphrase []byte) error {
	for name, p := range h.named() {
		if err := writeFile(filepath.Join(dir, name+extCert), toPEM(p.Cert), 0o644); err != nil {
			return err
		}
		if _, elsewhere := p.Key.(*keystore.Key); p.Key == nil || elsewhere {
			continue
		}
		if err := keystore.WriteFile(filepath.Join(dir, name+extKey), p.Key, passphrase); err != nil {
			return fmt.Errorf("ca: %w", err)
		}
	}
	if err := writeFile(filepath.Join(dir, fileBundle), h.TrustBundle(), 0o644); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, fileClientCAs), h.ClientCAs(), 0o644); err != nil {
		return err
	}
	return syncDir(dir)
}

func (h *Hierarchy) named() map[string]*Pair {
	return map[string]*Pair{fileRoot: &h.Root, fileSpare: &h.Spare, fileDevice: &h.Device, fileServer: &h.Server}
}

// writeFile writes a new file and waits for the disk.
func writeFile(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return nil
}

// Keys name the keys of the two intermediates that lie in a key manager, by URI (package keystore); an empty one is a file
// of the hierarchy's folder.
type Keys struct{ Device, Server string }

// Load is LoadWith for keys in files.
func Load(dir string, passphrase []byte) (*Hierarchy, error) {
	return LoadWith(context.Background(), dir, passphrase, Keys{})
}

// LoadWith reads a hierarchy from its folder and checks that its parts belong together. The keys of the roots may be
// missing: they are kept offline. Those of the two intermediates may not. Errors say which file or key is wrong and what
// to do. A key manager that does not answer is none: see Check. Close lets go of the key managers.
func LoadWith(ctx context.Context, dir string, passphrase []byte, keys Keys) (_ *Hierarchy, err error) {
	h := &Hierarchy{}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	for name, p := range h.named() {
		cert, err := pemutil.ReadCertificate(filepath.Join(dir, name+extCert))
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "ca: %s cannot be read: run `musterd init`, or restore it from a backup", filepath.Join(dir, name+extCert))
		}
		p.Cert = cert
		if name == fileRoot || name == fileSpare {
			continue // muster signs with the intermediates only
		}
		ref := map[string]string{fileDevice: keys.Device, fileServer: keys.Server}[name]
		p.Key, err = OpenKey(ctx, filepath.Join(dir, name+extKey), ref, passphrase)
		if public, ok := cert.PublicKey.(*ecdsa.PublicKey); ok && ref != "" && fleet.Is(err, fleet.Unavailable) {
			// Devices must be let in while a key manager is away: only signing waits for it.
			p.Key, err = keystore.Later(ref, passphrase, public)
		}
		if err != nil {
			return nil, err
		}
	}
	if cross := filepath.Join(dir, fileCross+extCert); exists(cross) {
		if h.Cross, err = pemutil.ReadCertificate(cross); err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "ca: %s cannot be read: restore it from a backup", cross)
		}
	}
	return h, h.check()
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// OpenKey opens the key that ref names, or without one the encrypted file path.
func OpenKey(ctx context.Context, path, ref string, passphrase []byte) (crypto.Signer, error) {
	if ref == "" {
		return loadKey(path, passphrase)
	}
	key, err := keystore.Open(ctx, ref, passphrase)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	return key, nil
}

// Close lets go of key managers.
func (h *Hierarchy) Close() error {
	var errs []error
	for _, p := range h.pairs() {
		if c, ok := p.Key.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// LoadRoots adds the keys of the roots that lie in dir: for a ceremony, not for a service.
func (h *Hierarchy) LoadRoots(dir string, passphrase []byte) error {
	for name, p := range map[string]*Pair{fileRoot: &h.Root, fileSpare: &h.Spare} {
		key, err := loadKey(filepath.Join(dir, name+extKey), passphrase)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		p.Key = key
	}
	return h.check()
}

// loadKey reads a key that only its owner may read.
func loadKey(path string, passphrase []byte) (crypto.Signer, error) {
	key, err := keystore.ReadFile(path, passphrase)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	return key, nil
}

// Complete writes what a hierarchy gets once its intermediates were signed elsewhere: their certificates, the trust bundle
// and the client CAs, into the folder that has the rest. Doing it again does no harm.
func Complete(h *Hierarchy, dir string) error {
	if err := h.check(); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		text []byte
	}{
		{fileDevice + extCert, toPEM(h.Device.Cert)}, {fileServer + extCert, toPEM(h.Server.Cert)},
		{fileBundle, h.TrustBundle()}, {fileClientCAs, h.ClientCAs()},
	} {
		if err := replaceWith(filepath.Join(dir, f.name), f.text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Prepare makes the folder of a hierarchy whose root is elsewhere: it gets the certificates of both roots and, unless they
// are in a key manager, new keys of the intermediates under the passphrase.
func Prepare(ctx context.Context, dir string, passphrase []byte, root, spare *x509.Certificate, keys Keys) (device, server crypto.Signer, err error) {
	for _, c := range []*x509.Certificate{root, spare} {
		if err := ceremony.CheckRoot(c); err != nil {
			return nil, nil, fmt.Errorf("ca: %w", err)
		}
	}
	if root.Equal(spare) || bytes.Equal(root.RawSubjectPublicKeyInfo, spare.RawSubjectPublicKeyInfo) || bytes.Equal(root.RawSubject, spare.RawSubject) {
		return nil, nil, fleet.Errorf(fleet.Invalid, "ca: root and spare root must have different names and keys: the spare is for the day on which the root's key is lost")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("ca: %w", err)
	}
	for name, c := range map[string]*x509.Certificate{fileRoot: root, fileSpare: spare} {
		if err := writeFile(filepath.Join(dir, name+extCert), toPEM(c), 0o644); err != nil {
			return nil, nil, err
		}
	}
	for _, k := range []struct {
		name, ref string
		to        *crypto.Signer
	}{{fileDevice, keys.Device, &device}, {fileServer, keys.Server, &server}} {
		path := filepath.Join(dir, k.name+extKey)
		if k.ref == "" {
			fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, nil, fmt.Errorf("ca: %w", err)
			}
			if err := keystore.WriteFile(path, fresh, passphrase); err != nil {
				return nil, nil, fmt.Errorf("ca: %w", err)
			}
		}
		if *k.to, err = OpenKey(ctx, path, k.ref, passphrase); err != nil {
			return nil, nil, errors.Join(err, closeKey(device))
		}
	}
	return device, server, nil
}

func closeKey(key crypto.Signer) error {
	if c, ok := key.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// Import returns the hierarchy in dir with the certificates of its intermediates, each found by its key. It writes nothing:
// see Complete. Errors are Invalid and say which certificate is wrong, or missing.
func Import(ctx context.Context, at time.Time, dir string, passphrase []byte, keys Keys, certs []*x509.Certificate) (_ *Hierarchy, err error) {
	h := &Hierarchy{}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	for name, p := range h.named() {
		switch name {
		case fileRoot, fileSpare:
			if p.Cert, err = ceremony.ReadCertificate(filepath.Join(dir, name+extCert)); err != nil {
				return nil, fmt.Errorf("ca: %w", err)
			}
		default:
			ref := map[string]string{fileDevice: keys.Device, fileServer: keys.Server}[name]
			if p.Key, err = OpenKey(ctx, filepath.Join(dir, name+extKey), ref, passphrase); err != nil {
				return nil, err
			}
		}
	}
	for _, c := range certs {
		profile, to := ceremony.DeviceCA, &h.Device
		if belongs(c, h.Server.Key) {
			profile, to = ceremony.ServerCA, &h.Server
		} else if !belongs(c, h.Device.Key) {
			return nil, fleet.Errorf(fleet.Invalid, "ca: %q is for neither of the keys here: was it made from these requests?", c.Subject.CommonName)
		}
		if err := ceremony.CheckIntermediate(c, profile, h.Root.Cert, at); err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		to.Cert = c
	}
	if h.Device.Cert == nil || h.Server.Cert == nil {
		return nil, fleet.Errorf(fleet.Invalid, "ca: two certificates are needed, made from device-ca.csr and server-ca.csr")
	}
	return h, h.check()
}

func belongs(c *x509.Certificate, key crypto.Signer) bool {
	k, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(key.Public())
}
