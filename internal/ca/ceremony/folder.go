package ceremony

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"muster/internal/ca/keystore"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// Files of a root's folder. They are called as in the folder that musterd init makes, which is such a folder, too.
const (
	Root  = "root"       // the root in use
	Spare = "spare-root" // signs nothing until the first is lost; devices trust it from the first day

	extCert, extKey, extURI = ".crt", ".key", ".uri"
	dirIssued               = "issued" // every certificate that was signed here, by serial
	fileRecord              = "ceremonies.log"
)

// Actor is who holds a ceremony: for the record.
type Actor struct{ User, Host string }

// NewRoots describe the two roots of a fleet.
type NewRoots struct {
	Dir        string // new folder
	Name       string // of the fleet
	At         time.Time
	Life       time.Duration     // 0: RootLife
	Passphrase []byte            // of keys in files
	Keys       map[string]string // URI of the key of Root or Spare in a key manager; none: a file in Dir
	CreateKeys bool              // make those keys
	By         Actor
}

// Create makes a root and a spare root in a new folder, which appears whole or not at all. Errors: Conflict if the folder
// exists, Invalid for what makes no sense, Unavailable for a key manager that does not answer.
func Create(ctx context.Context, o NewRoots) (_ []*x509.Certificate, err error) {
	if o.Name == "" || len(o.Name) > 40 {
		return nil, fleet.Errorf(fleet.Invalid, "the fleet's name has 1 to 40 characters")
	}
	if _, err := os.Lstat(o.Dir); err == nil {
		return nil, fleet.Errorf(fleet.Conflict, "%s exists already: a root is never overwritten; choose a new folder", o.Dir)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(filepath.Clean(o.Dir)), ".root-*") // 0700
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the folder cannot be made")
	}
	defer os.RemoveAll(tmp) // gone already if the rename succeeded
	var out []*x509.Certificate
	for _, which := range []struct{ file, name string }{{Root, o.Name + " root 1"}, {Spare, o.Name + " root 2 (spare)"}} {
		c, err := o.createOne(ctx, tmp, which.file, which.name)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if err := os.Rename(tmp, o.Dir); err != nil {
		return nil, fmt.Errorf("%s: %w", o.Dir, err)
	}
	return out, syncDir(filepath.Dir(filepath.Clean(o.Dir)))
}

func (o NewRoots) createOne(ctx context.Context, dir, file, name string) (_ *x509.Certificate, err error) {
	key, err := o.key(ctx, dir, file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeKey(key)) }()
	c, err := SignRoot(Terms{At: o.At, Name: name, Life: cmp.Or(o.Life, RootLife)}, key)
	if err != nil {
		return nil, err
	}
	if err := writeNew(filepath.Join(dir, file+extCert), toPEM(c)); err != nil {
		return nil, err
	}
	return c, record(dir, o.At, o.By, "create", file, c)
}

func (o NewRoots) key(ctx context.Context, dir, file string) (crypto.Signer, error) {
	ref := o.Keys[file]
	if ref == "" {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("key of the root: %w", err)
		}
		return key, keystore.WriteFile(filepath.Join(dir, file+extKey), key, o.Passphrase)
	}
	if o.CreateKeys {
		var err error
		if ref, err = keystore.Create(ctx, ref, o.Passphrase); err != nil {
			return nil, err
		}
	}
	key, err := keystore.Open(ctx, ref, o.Passphrase)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, file+extURI), []byte(ref+"\n"), 0o600); err != nil { // it may hold a PIN
		return nil, errors.Join(err, key.Close())
	}
	return key, nil
}

func closeKey(key crypto.Signer) error {
	if c, ok := key.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// Folder is an opened root: its certificate, and its key until Close.
type Folder struct {
	Signer
	dir, which string
}

// Open opens Root or Spare of a folder. Errors: NotFound if there is no such root, Invalid for a wrong passphrase or a key
// that does not belong to the certificate.
func Open(ctx context.Context, dir, which string, passphrase []byte) (*Folder, error) {
	c, err := Certificate(dir, which)
	if err != nil {
		return nil, err
	}
	key, err := openKey(ctx, dir, which, passphrase)
	if err != nil {
		return nil, err
	}
	if k, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || !k.Equal(key.Public()) {
		return nil, errors.Join(fleet.Errorf(fleet.Invalid, "certificate and key of %s in %s do not belong together", which, dir), closeKey(key))
	}
	return &Folder{Signer: Signer{Cert: c, Key: key}, dir: dir, which: which}, nil
}

// Certificate returns the certificate of Root or Spare of a folder, or a NotFound error.
func Certificate(dir, which string) (*x509.Certificate, error) {
	path := filepath.Join(dir, which+extCert)
	c, err := ReadCertificate(path)
	if err != nil {
		return nil, err
	}
	return c, CheckRoot(c)
}

// ReadCertificate reads a file that holds exactly one certificate.
func ReadCertificate(path string) (*x509.Certificate, error) {
	text, err := ReadSome(path, pki.MaxChainPEM)
	if err != nil {
		return nil, err
	}
	list, err := pki.ParseChainPEM(text)
	if err == nil && len(list) != 1 {
		err = fleet.Coded(fleet.Invalid, pki.CodeChain, "%d certificates, want one", len(list))
	}
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "%s", path)
	}
	return list[0], nil
}

// ReadSome reads a file of at most limit bytes. Errors: NotFound, Forbidden, Invalid.
func ReadSome(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fleet.Wrap(fleet.NotFound, err, "%s: there is no such file", path)
	case errors.Is(err, fs.ErrPermission):
		return nil, fleet.Wrap(fleet.Forbidden, err, "%s: not permitted", path)
	case err != nil:
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fleet.Errorf(fleet.Invalid, "%s is larger than %d bytes", path, limit)
	}
	return text, err
}

func openKey(ctx context.Context, dir, which string, passphrase []byte) (crypto.Signer, error) {
	raw, err := os.ReadFile(filepath.Join(dir, which+extURI))
	if errors.Is(err, fs.ErrNotExist) {
		path := filepath.Join(dir, which+extKey)
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, fleet.Wrap(fleet.NotFound, err, "the key of %s is not in %s: this is done where the root's key is", which, dir)
		}
		return keystore.ReadFile(path, passphrase)
	}
	if err != nil {
		return nil, err
	}
	return keystore.Open(ctx, strings.TrimSpace(string(raw)), passphrase)
}

// NeedsPassphrase reports whether the key of which is a file under a passphrase.
func NeedsPassphrase(dir, which string) bool {
	raw, err := os.ReadFile(filepath.Join(dir, which+extURI))
	return err != nil || strings.HasPrefix(string(raw), "softkms:")
}

// Close lets the key go.
func (f *Folder) Close() error { return closeKey(f.Key) }

// Intermediate is what is to be signed for an intermediate.
type Intermediate struct {
	Profile Profile
	CSR     pki.CSR
	Name    string        // empty: that of the certificate the key has, or the next number
	Life    time.Duration // 0: IntermediateLife
}

// Plan fills in what o leaves open.
func (f *Folder) Plan(o Intermediate) (Intermediate, error) {
	if _, ok := o.Profile.Use(); !ok {
		return o, fleet.Errorf(fleet.Invalid, "a profile is %s or %s", DeviceCA, ServerCA)
	}
	o.Life = cmp.Or(o.Life, IntermediateLife)
	issued, err := Issued(f.dir)
	if err != nil {
		return o, err
	}
	use, _ := o.Profile.Use()
	fleetName, _, _ := strings.Cut(f.Cert.Subject.CommonName, " root ")
	n := 1
	for _, c := range issued {
		same := bytes.Equal(c.RawSubjectPublicKeyInfo, o.CSR.PublicKey)
		mine := slices.Contains(c.ExtKeyUsage, use)
		if same && !mine {
			return o, fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this key is already that of %q: each intermediate has a key of its own", c.Subject.CommonName)
		}
		if same && o.Name == "" {
			o.Name = c.Subject.CommonName
		}
		if mine {
			n++
		}
	}
	if o.Name == "" {
		o.Name = fmt.Sprintf("%s %s %d", fleetName, o.Profile.words(), n)
	}
	return o, nil
}

// Sign signs an intermediate, with an entry in the record before the certificate leaves the folder.
func (f *Folder) Sign(at time.Time, by Actor, o Intermediate) (*x509.Certificate, error) {
	o, err := f.Plan(o)
	if err != nil {
		return nil, err
	}
	c, err := SignIntermediate(Terms{At: at, Name: o.Name, Life: o.Life}, o.Profile, f.Signer, o.CSR.PublicKey)
	if err != nil {
		return nil, err
	}
	return c, f.keep(at, by, "sign "+string(o.Profile), c)
}

// CrossSign signs another root, with an entry in the record.
func (f *Folder) CrossSign(at time.Time, by Actor, other *x509.Certificate) (*x509.Certificate, error) {
	c, err := CrossSign(at, f.Signer, other)
	if err != nil {
		return nil, err
	}
	return c, f.keep(at, by, "cross-sign", c)
}

// keep records a certificate and puts a copy beside the root.
func (f *Folder) keep(at time.Time, by Actor, what string, c *x509.Certificate) error {
	if err := record(f.dir, at, by, what, f.which, c); err != nil {
		return err
	}
	dir := filepath.Join(f.dir, dirIssued)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("ceremony: %w", err)
	}
	if err := writeNew(filepath.Join(dir, string(fleet.SerialOf(c.SerialNumber))+extCert), toPEM(c)); err != nil {
		return err
	}
	return syncDir(f.dir)
}

// Issued returns the certificates that were signed in a folder, oldest first.
func Issued(dir string) ([]*x509.Certificate, error) {
	paths, err := filepath.Glob(filepath.Join(dir, dirIssued, "*"+extCert))
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for _, p := range paths {
		c, err := ReadCertificate(p)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	slices.SortStableFunc(out, func(a, b *x509.Certificate) int { return a.NotBefore.Compare(b.NotBefore) })
	return out, nil
}

// record appends a line to the record of a folder and waits for the disk.
func record(dir string, at time.Time, by Actor, what, which string, c *x509.Certificate) error {
	line := fmt.Sprintf("%s %s by=%q host=%q root=%s subject=%q serial=%s key_sha256=%s not_before=%s not_after=%s\n",
		at.UTC().Format(time.RFC3339), what, by.User, by.Host, which, c.Subject.CommonName, fleet.SerialOf(c.SerialNumber),
		pki.KeyHash(c.RawSubjectPublicKeyInfo), c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339))
	f, err := os.OpenFile(filepath.Join(dir, fileRecord), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("record of ceremonies: %w", err)
	}
	_, err = f.WriteString(line)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("record of ceremonies: %w", err)
	}
	return nil
}

// Record returns the text of the record of a folder; empty if nothing was done in it.
func Record(dir string) (string, error) {
	raw, err := os.ReadFile(filepath.Join(dir, fileRecord))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(raw), err
}

func toPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// writeNew writes a new file that all may read, and waits for the disk.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fleet.Wrap(fleet.Conflict, err, "%s exists already: name a new file", path)
	}
	if err != nil {
		return fmt.Errorf("ceremony: %w", err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("ceremony: %w", err)
	}
	return nil
}

// Write writes a certificate to a new file. It returns a Conflict error if the file exists.
func Write(path string, c *x509.Certificate) error { return writeNew(path, toPEM(c)) }

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("ceremony: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}
