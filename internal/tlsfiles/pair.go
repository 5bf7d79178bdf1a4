// Package tlsfiles keeps server certificates and their keys in files: it reads pairs that belong together, replaces a pair
// so that no reader ever finds a key with another's certificate and no crash leaves half of one, and serves what the files
// hold to TLS listeners without a restart. Roots does the same for what is trusted.
package tlsfiles

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"muster/internal/fleet"
)

// Pair names the two files of a server certificate: PEM, leaf first, and PKCS #8.
//
// Once replaced, both are symbolic links into a folder of generations beside the certificate:
//
//	devices.crt -> devices.d/current/cert.pem
//	devices.key -> devices.d/current/key.pem
//	devices.d/current -> 4f2a…            one rename changes both (rabbitmq.md §4.7)
//	devices.d/4f2a…/{cert.pem,key.pem}    named by the serial; never written again
type Pair struct{ Cert, Key string }

// Names inside the folder of generations.
const (
	linkCurrent = "current"
	fileCert    = "cert.pem"
	fileKey     = "key.pem"
	partSuffix  = ".part"
)

// Identity tells whether files are still the ones that were read.
type Identity struct{ cert, key fileID }

type fileID struct {
	dev, ino uint64
	size     int64
	mtime    time.Time
}

func identify(path string) (fileID, error) {
	info, err := os.Stat(path)
	if err != nil {
		return fileID{}, err
	}
	id := fileID{size: info.Size(), mtime: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = uint64(st.Dev), st.Ino
	}
	return id, nil
}

// Identity returns what the files are now.
func (p Pair) Identity() (id Identity, err error) {
	if id.cert, err = identify(p.Cert); err != nil {
		return id, fmt.Errorf("tlsfiles: %w", err)
	}
	if id.key, err = identify(p.Key); err != nil {
		return id, fmt.Errorf("tlsfiles: %w", err)
	}
	return id, nil
}

// maxFile bounds what is read, in bytes.
const maxFile = 1 << 20

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fleet.Errorf(fleet.Invalid, "%s is not a file of at most %d bytes", path, maxFile)
	}
	return os.ReadFile(path)
}

// Load reads the pair, with its leaf parsed. It returns an Invalid error if the files do not hold a certificate and its
// key. Files that are replaced meanwhile are read again.
func (p Pair) Load() (*tls.Certificate, Identity, error) {
	var last error
	for range 5 {
		before, err := p.Identity()
		if err != nil {
			return nil, before, err
		}
		cert, err := p.load()
		after, idErr := p.Identity()
		if idErr != nil {
			return nil, after, idErr
		}
		if before == after {
			return cert, after, err
		}
		last = err
	}
	if last == nil {
		last = errors.New("they change all the time")
	}
	return nil, Identity{}, fleet.Wrap(fleet.Invalid, last, "tlsfiles: %s and %s cannot be read", p.Cert, p.Key)
}

func (p Pair) load() (*tls.Certificate, error) {
	chain, err := readFile(p.Cert)
	if err != nil {
		return nil, fmt.Errorf("tlsfiles: %w", err)
	}
	key, err := readFile(p.Key)
	if err != nil {
		return nil, fmt.Errorf("tlsfiles: %w", err)
	}
	cert, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "tlsfiles: %s and %s are not a certificate and its key", p.Cert, p.Key)
	}
	if cert.Leaf == nil {
		if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "tlsfiles: %s holds no certificate", p.Cert)
		}
	}
	return &cert, nil
}

// folder is where the generations lie.
func (p Pair) folder() string {
	return strings.TrimSuffix(p.Cert, filepath.Ext(p.Cert)) + ".d"
}

// Replace puts a new certificate chain and key, PEM, in place of the pair. name is the generation's, its serial. Readers find
// the old pair or the new one, whole; so they do after a crash at any moment, and Replace may then be called again. The
// generation before is kept.
func (p Pair) Replace(name string, chain, key []byte) error {
	return p.replace(name, chain, key, func(string) error { return nil })
}

// replace is Replace; after is called after each step, and its error ends it there as a crash would.
func (p Pair) replace(name string, chain, key []byte, after func(string) error) error {
	if _, err := fleet.ParseSerial(name); err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(chain, key); err != nil {
		return fleet.Wrap(fleet.Invalid, err, "tlsfiles: the new certificate and its key do not belong together")
	}
	r := replacer{p, after, nil}
	r.adopt()
	r.generation(name, chain, key)
	previous, _ := os.Readlink(filepath.Join(p.folder(), linkCurrent))
	r.point(name)
	r.step("touch", p.Touch)
	r.step("tidy", func() error { return p.tidy(name, previous) })
	if r.err != nil {
		return fmt.Errorf("tlsfiles: replace %s: %w", p.Cert, r.err)
	}
	return nil
}

// replacer runs steps until one fails.
type replacer struct {
	p     Pair
	after func(string) error
	err   error
}

func (r *replacer) step(name string, do func() error) {
	if r.err != nil {
		return
	}
	if r.err = do(); r.err == nil {
		r.err = r.after(name)
	}
}

// adopt turns two plain files into links to a generation that holds the very same pair, so that one rename can change both
// from then on. It does nothing where that is done.
func (r *replacer) adopt() {
	if r.err != nil || r.p.linked() {
		return
	}
	cert, _, err := r.p.Load()
	if err != nil {
		r.err = err
		return
	}
	chain, err := readFile(r.p.Cert)
	if err != nil {
		r.err = err
		return
	}
	key, err := readFile(r.p.Key)
	if err != nil {
		r.err = err
		return
	}
	name := string(fleet.SerialOf(cert.Leaf.SerialNumber))
	r.generation(name, chain, key)
	r.point(name)
	r.step("link certificate", func() error { return r.p.link(r.p.Cert, fileCert) })
	r.step("link key", func() error { return r.p.link(r.p.Key, fileKey) })
}

// linked reports whether both files are links into the folder of generations.
func (p Pair) linked() bool {
	for path, file := range map[string]string{p.Cert: fileCert, p.Key: fileKey} {
		to, err := os.Readlink(path)
		if err != nil {
			return false
		}
		if want, err := p.target(path, file); err != nil || to != want {
			return false
		}
	}
	return true
}

// target is where the link at path points: relative, so that the tree can be mounted elsewhere.
func (p Pair) target(path, file string) (string, error) {
	return filepath.Rel(filepath.Dir(path), filepath.Join(p.folder(), linkCurrent, file))
}

func (p Pair) link(path, file string) error {
	to, err := p.target(path, file)
	if err != nil {
		return err
	}
	return putLink(path, to)
}

// putLink makes path a symbolic link, in place of whatever file it was.
func putLink(path, to string) error {
	part := path + partSuffix
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, part); err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// generation writes the folder of a generation: whole or not at all.
func (r *replacer) generation(name string, chain, key []byte) {
	dir := filepath.Join(r.p.folder(), name)
	part := dir + partSuffix
	r.step("folder of "+name, func() error {
		if err := r.p.makeFolder(r.p.folder()); err != nil {
			return err
		}
		if err := os.RemoveAll(part); err != nil {
			return err
		}
		return r.p.makeFolder(part)
	})
	r.step("key of "+name, func() error { return writeLike(filepath.Join(part, fileKey), key, r.p.Key) })
	r.step("certificate of "+name, func() error { return writeLike(filepath.Join(part, fileCert), chain, r.p.Cert) })
	r.step("generation "+name, func() error {
		if err := syncDir(part); err != nil {
			return err
		}
		if err := os.Rename(part, dir); err != nil {
			if !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
				return err
			}
			return os.RemoveAll(part) // it was made before a crash
		}
		return syncDir(r.p.folder())
	})
}

// point makes a generation the current one: the rename that changes the pair.
func (r *replacer) point(name string) {
	r.step("current is "+name, func() error { return putLink(filepath.Join(r.p.folder(), linkCurrent), name) })
}

// Touch sets the times of the files to now. Erlang's PEM cache looks at nothing else, and believes only times that are later
// than its last look (rabbitmq.md §4.7).
func (p Pair) Touch() error {
	now := time.Now()
	return errors.Join(os.Chtimes(p.Cert, now, now), os.Chtimes(p.Key, now, now))
}

// tidy removes generations other than the two that are named.
func (p Pair) tidy(keep ...string) error {
	entries, err := os.ReadDir(p.folder())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == linkCurrent || e.Name() == keep[0] || e.Name() == keep[1] {
			continue
		}
		if _, err := fleet.ParseSerial(strings.TrimSuffix(e.Name(), partSuffix)); err != nil || !e.IsDir() {
			continue // not ours
		}
		if err := os.RemoveAll(filepath.Join(p.folder(), e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// makeFolder makes a folder with the rights of the one that holds the certificate: the broker may run as another user.
func (p Pair) makeFolder(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	if err := likeFile(dir, filepath.Dir(p.Cert)); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// likeFile gives path the mode of model, and its owner where that is allowed.
func likeFile(path, model string) error {
	info, err := os.Stat(model)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		_ = os.Chown(path, int(st.Uid), int(st.Gid)) // allowed for root, and for groups of our own
	}
	return os.Chmod(path, info.Mode().Perm())
}

// writeLike writes a new file with the rights of model and waits for the disk.
func writeLike(path string, data []byte, model string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, likeFile(path, model), f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// parse returns the certificates of a PEM text.
func parse(text []byte) (out []*x509.Certificate, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}
