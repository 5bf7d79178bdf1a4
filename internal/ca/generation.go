package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"muster/internal/ca/ceremony"
	"muster/internal/ca/keystore"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// A generation is a whole hierarchy in a folder of its own below that of the first one, generation 0. Which of them signs and
// which are trusted is not said here but by the records of rotations (pki.Standing): so a switch is one transaction, and the
// files of a generation never change once they are complete.
const (
	fileCross = "cross"     // the root, signed by the root before it
	fileKeys  = "keys.json" // URIs of keys in a key manager
	extCSR    = ".csr"
)

// Store is where generations are kept.
type Store struct {
	Dir        string
	Passphrase []byte
	Keys       Keys // of generation 0, as the settings name them
}

func (s Store) dir(n int64) string {
	if n == 0 {
		return s.Dir
	}
	return filepath.Join(s.Dir, fmt.Sprintf("generation-%d", n))
}

// keys returns the URIs of the keys of generation n.
func (s Store) keys(n int64) (keys Keys, err error) {
	if n == 0 {
		return s.Keys, nil
	}
	text, err := os.ReadFile(filepath.Join(s.dir(n), fileKeys))
	if err != nil {
		return keys, fleet.Wrap(fleet.Invalid, err, "ca: generation %d of the CAs cannot be read: restore its folder from a backup", n)
	}
	if err := json.Unmarshal(text, &keys, json.RejectUnknownMembers(true)); err != nil {
		return keys, fleet.Wrap(fleet.Invalid, err, "ca: %s of generation %d is damaged: restore it from a backup", fileKeys, n)
	}
	return keys, nil
}

// Load reads generation n. The caller closes it.
func (s Store) Load(ctx context.Context, n int64) (*Hierarchy, error) {
	keys, err := s.keys(n)
	if err != nil {
		return nil, err
	}
	return LoadWith(ctx, s.dir(n), s.Passphrase, keys)
}

// Certificates reads the certificates of generation n, without its keys: opening those takes a while, or a ceremony.
func (s Store) Certificates(n int64) (*Hierarchy, error) {
	h := &Hierarchy{}
	for name, p := range h.named() {
		var err error
		if p.Cert, err = ceremony.ReadCertificate(filepath.Join(s.dir(n), name+extCert)); err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "ca: generation %d of the CAs cannot be read: restore its folder from a backup", n)
		}
	}
	if cross := filepath.Join(s.dir(n), fileCross+extCert); exists(cross) {
		var err error
		if h.Cross, err = ceremony.ReadCertificate(cross); err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "ca: generation %d of the CAs cannot be read: restore its folder from a backup", n)
		}
	}
	return h, h.check()
}

// SetAside renames the folder of generation n, if there is one: for one that nobody knows of, which a crash left behind, or
// which is newer than the store that was restored. Its keys may be of worth to somebody, so nothing is deleted.
func (s Store) SetAside(at time.Time, n int64) error {
	if n == 0 || !exists(s.dir(n)) {
		return nil
	}
	if err := os.Rename(s.dir(n), fmt.Sprintf("%s.unused-%s", s.dir(n), at.UTC().Format("20060102T150405.000"))); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return syncDir(s.Dir)
}

// Prepare makes the keys of generation n, which takes over from generation from, and the requests for their certificates.
// Keys in a key manager must exist; those that keys does not name are made as files. What kind leaves as it is, is taken over
// with its key. Doing it again does no harm. Errors: Invalid or Unavailable for a key in a key manager, Conflict if it is in
// use.
func (s Store) Prepare(ctx context.Context, n, from int64, kind pki.RotationKind, keys Keys) error {
	if exists(s.dir(n)) {
		return nil
	}
	if !kind.Devices() && keys.Device != "" || !kind.Servers() && keys.Server != "" {
		return fleet.Errorf(fleet.Invalid, "a rotation of kind %s has no use for that key", kind)
	}
	old, err := s.Certificates(from)
	if err != nil {
		return err
	}
	oldKeys, err := s.keys(from)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(s.Dir, ".generation-*")
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	defer os.RemoveAll(tmp) // gone already if the rename succeeded
	for _, p := range s.parts(kind, old) {
		ref, was := &keys.Device, oldKeys.Device
		if p.name == fileServer {
			ref, was = &keys.Server, oldKeys.Server
		}
		if p.fresh {
			err = s.freshKey(ctx, tmp, p, *ref, old)
		} else {
			*ref = was
			err = errors.Join(writeFile(filepath.Join(tmp, p.name+extCert), toPEM(p.was), 0o644), copyKey(s.dir(from), tmp, p.name, p.name))
		}
		if err != nil {
			return err
		}
	}
	text, err := json.Marshal(keys)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if err := errors.Join(writeFile(filepath.Join(tmp, fileKeys), text, 0o600), syncDir(tmp)); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.dir(n)); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return syncDir(s.Dir)
}

// part is one of the two intermediates of a generation.
type part struct {
	name    string
	profile ceremony.Profile
	words   string // how it is called in its request
	fresh   bool   // kind makes it anew
	was     *x509.Certificate
}

func (s Store) parts(kind pki.RotationKind, old *Hierarchy) []part {
	return []part{
		{fileDevice, ceremony.DeviceCA, "devices", kind.Devices(), old.Device.Cert},
		{fileServer, ceremony.ServerCA, "servers", kind.Servers(), old.Server.Cert},
	}
}

// freshKey makes or opens a key that is none of those in use, and writes its request.
func (s Store) freshKey(ctx context.Context, dir string, p part, ref string, old *Hierarchy) (err error) {
	var key crypto.Signer
	if ref == "" {
		key, err = newKeyFile(filepath.Join(dir, p.name+extKey), s.Passphrase)
	} else {
		key, err = keystore.Open(ctx, ref, s.Passphrase)
	}
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	defer func() { err = errors.Join(err, closeKey(key)) }()
	for _, o := range old.pairs() {
		if belongs(o.Cert, key) {
			return fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "ca: this is the key of %q: a rotation needs a new one", o.Cert.Subject.CommonName)
		}
	}
	der, err := ceremony.Request(p.words, key)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return writeFile(filepath.Join(dir, p.name+extCSR), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), 0o644)
}

func newKeyFile(path string, passphrase []byte) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return key, keystore.WriteFile(path, key, passphrase)
}

// copyKey copies an encrypted key, if there is one.
func copyKey(from, to, name, as string) error {
	text, err := os.ReadFile(filepath.Join(from, name+extKey))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return replaceWith(filepath.Join(to, as+extKey), text, 0o600)
}

// Request is a certificate request of an intermediate, for the root's ceremony.
type Request struct {
	Profile   ceremony.Profile
	PEM       []byte
	PublicKey []byte     // SubjectPublicKeyInfo, DER
	KeyHash   fleet.Hash // of it, to be compared where it is signed
}

// Requests returns what has to be signed for generation n.
func (s Store) Requests(n int64, kind pki.RotationKind) (out []Request, err error) {
	for _, p := range s.parts(kind, &Hierarchy{}) {
		if !p.fresh {
			continue
		}
		text, err := os.ReadFile(filepath.Join(s.dir(n), p.name+extCSR))
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "ca: the request of the %s of generation %d cannot be read: restore the folder from a backup", p.profile, n)
		}
		block, _ := pem.Decode(text)
		if block == nil {
			return nil, fleet.Errorf(fleet.Invalid, "ca: the request of the %s of generation %d is damaged: restore the folder from a backup", p.profile, n)
		}
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "ca: the request of the %s of generation %d is damaged: restore the folder from a backup", p.profile, n)
		}
		out = append(out, Request{p.profile, text, csr.RawSubjectPublicKeyInfo, pki.KeyHash(csr.RawSubjectPublicKeyInfo)})
	}
	return out, nil
}

// Complete gives generation n its certificates, which were signed elsewhere: those of its intermediates, for kind root also
// the new spare root, and the cross-certificate by which the root before vouches for the new one, if there is one. Each is
// recognised by what it is. The root is the one that signed the intermediates. Doing it again with the same does no harm.
// Errors are Invalid and say which certificate is wrong or missing.
func (s Store) Complete(at time.Time, n, from int64, kind pki.RotationKind, certs []*x509.Certificate) error {
	old, err := s.Certificates(from)
	if err != nil {
		return err
	}
	h, err := s.assemble(at, n, kind, old, certs)
	if err != nil {
		return err
	}
	dir := s.dir(n)
	files := map[string]*x509.Certificate{fileRoot: h.Root.Cert, fileSpare: h.Spare.Cert, fileDevice: h.Device.Cert, fileServer: h.Server.Cert, fileCross: h.Cross}
	for name, c := range files {
		if c == nil {
			continue
		}
		if err := replaceWith(filepath.Join(dir, name+extCert), toPEM(c), 0o644); err != nil {
			return err
		}
	}
	// The roots' keys go along, where they lie here.
	for as, name := range map[string]string{fileRoot: rootName(old, h.Root.Cert), fileSpare: rootName(old, h.Spare.Cert)} {
		if name == "" {
			continue
		}
		if err := copyKey(s.dir(from), dir, name, as); err != nil {
			return err
		}
	}
	return syncDir(dir)
}

// rootName returns the name of the file under which old has root c; empty if it has not.
func rootName(old *Hierarchy, c *x509.Certificate) string {
	switch {
	case c.Equal(old.Root.Cert):
		return fileRoot
	case c.Equal(old.Spare.Cert):
		return fileSpare
	}
	return ""
}

// assemble finds the place of each certificate.
func (s Store) assemble(at time.Time, n int64, kind pki.RotationKind, old *Hierarchy, certs []*x509.Certificate) (*Hierarchy, error) {
	h := &Hierarchy{Device: Pair{Cert: old.Device.Cert}, Server: Pair{Cert: old.Server.Cert}}
	reqs, err := s.Requests(n, kind)
	if err != nil {
		return nil, err
	}
	place := func(c *x509.Certificate) bool {
		for _, r := range reqs {
			if !bytes.Equal(c.RawSubjectPublicKeyInfo, r.PublicKey) {
				continue
			}
			if r.Profile == ceremony.DeviceCA {
				h.Device.Cert = c
			} else {
				h.Server.Cert = c
			}
			return true
		}
		return false
	}
	roots := []*x509.Certificate{old.Root.Cert, old.Spare.Cert}
	var brought, crosses []*x509.Certificate
	for _, c := range certs {
		switch {
		case place(c):
		case bytes.Equal(c.RawIssuer, c.RawSubject):
			if err := ceremony.CheckRoot(c); err != nil {
				return nil, fmt.Errorf("ca: %w", err)
			}
			if rootName(old, c) == "" {
				brought, roots = append(brought, c), append(roots, c)
			}
		case c.IsCA:
			crosses = append(crosses, c)
		default:
			return nil, fleet.Errorf(fleet.Invalid, "ca: %q is for none of the keys here: was it made from these requests?", c.Subject.CommonName)
		}
	}
	if err := h.findRoot(at, kind, old, roots); err != nil {
		return nil, err
	}
	if err := h.findSpare(kind, old, brought); err != nil {
		return nil, err
	}
	for _, c := range crosses {
		if !bytes.Equal(c.RawSubject, h.Root.Cert.RawSubject) || !bytes.Equal(c.RawSubjectPublicKeyInfo, h.Root.Cert.RawSubjectPublicKeyInfo) || c.CheckSignatureFrom(old.Root.Cert) != nil {
			return nil, fleet.Errorf(fleet.Invalid, "ca: %q by %q is neither a certificate for a key here nor the cross-certificate of %q by %q",
				c.Subject.CommonName, c.Issuer.CommonName, h.Root.Cert.Subject.CommonName, old.Root.Cert.Subject.CommonName)
		}
		h.Cross = c
	}
	return h, h.check()
}

// findRoot sets the root: who signed the new intermediates.
func (h *Hierarchy) findRoot(at time.Time, kind pki.RotationKind, old *Hierarchy, roots []*x509.Certificate) error {
	for i, cert := range []*x509.Certificate{h.Device.Cert, h.Server.Cert} {
		p := (Store{}).parts(kind, old)[i]
		if !p.fresh {
			continue
		}
		if cert.Equal(p.was) {
			return fleet.Errorf(fleet.Invalid, "ca: the certificate of the new %s is missing: it is made from its request (muster rotation requests)", p.profile)
		}
		var by *x509.Certificate
		for _, r := range roots {
			if bytes.Equal(cert.RawIssuer, r.RawSubject) && cert.CheckSignatureFrom(r) == nil {
				by = r
			}
		}
		switch {
		case by == nil:
			return fleet.Errorf(fleet.Invalid, "ca: %q was signed by none of the roots that are known: bring the certificate of %q with it", cert.Subject.CommonName, cert.Issuer.CommonName)
		case h.Root.Cert != nil && !h.Root.Cert.Equal(by):
			return fleet.Errorf(fleet.Invalid, "ca: the two intermediates are signed by different roots")
		case kind != pki.RotateRoot && !by.Equal(old.Root.Cert):
			return fleet.Errorf(fleet.Invalid, "ca: %q was signed by %q, which is not the root in use: for that, start a rotation of kind %s", cert.Subject.CommonName, by.Subject.CommonName, pki.RotateRoot)
		case kind == pki.RotateRoot && by.Equal(old.Root.Cert):
			return fleet.Errorf(fleet.Invalid, "ca: %q was signed by the root that is to be replaced", cert.Subject.CommonName)
		}
		if err := ceremony.CheckIntermediate(cert, p.profile, by, at); err != nil {
			return fmt.Errorf("ca: %w", err)
		}
		h.Root.Cert = by
	}
	return nil
}

// findSpare sets the spare root.
func (h *Hierarchy) findSpare(kind pki.RotationKind, old *Hierarchy, brought []*x509.Certificate) error {
	h.Spare.Cert = old.Spare.Cert
	for _, c := range brought {
		if c.Equal(h.Root.Cert) {
			continue
		}
		if kind != pki.RotateRoot {
			return fleet.Errorf(fleet.Invalid, "ca: %q is a root, and only a rotation of kind %s brings one", c.Subject.CommonName, pki.RotateRoot)
		}
		if !h.Spare.Cert.Equal(old.Spare.Cert) {
			return fleet.Errorf(fleet.Invalid, "ca: more than one new spare root: bring one")
		}
		h.Spare.Cert = c
	}
	if h.Spare.Cert.Equal(h.Root.Cert) {
		return fleet.Errorf(fleet.Invalid, "ca: the spare root becomes the root, so a new spare is needed: bring its certificate, too (muster ca root create)")
	}
	return nil
}

// SignHere makes the certificates of generation n with the keys of the roots, where these lie in the folder of generation
// from: for kind root the spare root becomes the root, and a new spare and a cross-certificate are made. ok is false if a
// key that it needs is not here.
func (s Store) SignHere(at time.Time, n, from int64, kind pki.RotationKind) (certs []*x509.Certificate, ok bool, err error) {
	old, err := s.Certificates(from)
	if err != nil {
		return nil, false, err
	}
	name, cert := fileRoot, old.Root.Cert
	if kind == pki.RotateRoot {
		name, cert = fileSpare, old.Spare.Cert
	}
	root, ok, err := s.rootHere(from, name, cert)
	if err != nil || !ok {
		return nil, false, err
	}
	fleetName, _, _ := strings.Cut(old.Device.Cert.Subject.CommonName, " devices")
	requests, err := s.Requests(n, kind)
	if err != nil {
		return nil, false, err
	}
	for _, r := range requests {
		what := "devices"
		if r.Profile == ceremony.ServerCA {
			what = "servers"
		}
		c, err := ceremony.SignIntermediate(ceremony.Terms{At: at, Name: fmt.Sprintf("%s %s %d", fleetName, what, n+1), Life: ceremony.IntermediateLife}, r.Profile, root, r.PublicKey)
		if err != nil {
			return nil, false, err
		}
		certs = append(certs, c)
	}
	if kind != pki.RotateRoot {
		return certs, true, nil
	}
	spare, err := s.newSpare(at, n, fleetName)
	if err != nil {
		return nil, false, err
	}
	certs = append(certs, spare)
	before, ok, err := s.rootHere(from, fileRoot, old.Root.Cert)
	if err != nil || !ok {
		return certs, err == nil, err
	}
	cross, err := ceremony.CrossSign(at, before, root.Cert)
	if err != nil {
		return nil, false, err
	}
	return append(certs, cross), true, nil
}

// rootHere opens the key of a root; ok is false if it is kept elsewhere.
func (s Store) rootHere(n int64, name string, cert *x509.Certificate) (_ ceremony.Signer, ok bool, err error) {
	path := filepath.Join(s.dir(n), name+extKey)
	if !exists(path) {
		return ceremony.Signer{}, false, nil
	}
	key, err := loadKey(path, s.Passphrase)
	if err == nil && !belongs(cert, key) {
		err = fleet.Errorf(fleet.Invalid, "ca: %s is not the key of %q: restore it from a backup", path, cert.Subject.CommonName)
	}
	return ceremony.Signer{Cert: cert, Key: key}, err == nil, err
}

// newSpare makes the spare root of generation n, its key as a file.
func (s Store) newSpare(at time.Time, n int64, fleetName string) (*x509.Certificate, error) {
	path := filepath.Join(s.dir(n), fileSpare+extKey)
	var key crypto.Signer
	var err error
	if exists(path) { // a crash came in between
		key, err = loadKey(path, s.Passphrase)
	} else {
		key, err = newKeyFile(path, s.Passphrase)
	}
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	return ceremony.SignRoot(ceremony.Terms{At: at, Name: fmt.Sprintf("%s root %d (spare)", fleetName, n+2), Life: ceremony.RootLife}, key)
}

// ProbeName is the device of probe certificates.
const ProbeName = "muster-probe"

// probeLife is how long a probe certificate holds.
const probeLife = 10 * time.Minute

// Probe returns a client certificate of this generation for a handshake, and nothing else. It has the form of a device's, so
// that every door looks at it in full; but its serial is in no store, so that no login succeeds with it, whatever devices
// there are.
func (h *Hierarchy) Probe(at time.Time) (tls.Certificate, error) {
	if h.Device.Key == nil {
		return tls.Certificate{}, fleet.Errorf(fleet.Unavailable, "ca: the key of the device CA is not here")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("ca: %w", err)
	}
	serial, err := NewSerial()
	if err != nil {
		return tls.Certificate{}, err
	}
	uri, err := url.Parse(wire.CertUser(ProbeName, serial))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("ca: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial.Big(), Subject: pkix.Name{CommonName: ProbeName}, NotBefore: at.Add(-probeLife), NotAfter: at.Add(probeLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		DNSNames: []string{ProbeName}, URIs: []*url.URL{uri},
	}, h.Device.Cert, key.Public(), h.Device.Key)
	if err != nil {
		return tls.Certificate{}, fleet.Wrap(fleet.Unavailable, err, "ca: the key of the device CA cannot sign")
	}
	return tls.Certificate{Certificate: [][]byte{der, h.Device.Cert.Raw}, PrivateKey: crypto.PrivateKey(key)}, nil
}
