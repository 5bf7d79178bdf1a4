package tlsfiles

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"muster/internal/fleet"
)

// Source serves a pair of files to TLS listeners. What it serves changes with Reload alone. Its methods are safe for
// concurrent use.
type Source struct {
	pair    Pair
	current atomic.Pointer[tls.Certificate]

	mu      sync.Mutex
	id      Identity // of the files that were last looked into
	refused error    // why they are not served; nil if they are
}

// Open reads a pair. It returns an error if there is nothing to serve yet.
func Open(p Pair) (*Source, error) {
	cert, id, err := p.Load()
	if err != nil {
		return nil, err
	}
	s := &Source{pair: p, id: id}
	s.current.Store(cert)
	return s, nil
}

// Get returns the certificate: for tls.Config.GetCertificate.
func (s *Source) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.current.Load(), nil }

// Chain returns what is served, leaf first.
func (s *Source) Chain() []*x509.Certificate {
	served := s.current.Load()
	out := []*x509.Certificate{served.Leaf}
	for _, der := range served.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			out = append(out, c)
		}
	}
	return out
}

// File returns the path of the certificate.
func (s *Source) File() string { return s.pair.Cert }

// Reload looks whether the files are others than before, or at any rate if force is set, and serves them if they are good
// at that time. What is not is refused: the certificate before stays in use, and Refused tells why. An error is returned
// once for each state of the files, unless force is set.
func (s *Source) Reload(at time.Time, force bool) (changed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, err := s.pair.Identity()
	if err == nil && id == s.id && !force {
		return false, nil
	}
	var cert *tls.Certificate
	if err == nil {
		cert, id, err = s.pair.Load()
	}
	if err == nil {
		err = s.fit(at, cert.Leaf)
	}
	if err != nil {
		said := s.refused != nil && (s.refused.Error() == err.Error() || id == s.id)
		s.id, s.refused = id, err
		if said && !force {
			return false, nil
		}
		return false, err
	}
	old := s.current.Swap(cert)
	s.id, s.refused = id, nil
	return !old.Leaf.Equal(cert.Leaf), nil
}

// fit refuses a certificate that does not hold now while the one before does.
func (s *Source) fit(at time.Time, leaf *x509.Certificate) error {
	holds := func(c *x509.Certificate) bool { return !at.Before(c.NotBefore) && at.Before(c.NotAfter) }
	if holds(leaf) || !holds(s.current.Load().Leaf) {
		return nil
	}
	return fleet.Errorf(fleet.Invalid, "tlsfiles: %s holds from %s to %s, not now", s.pair.Cert, leaf.NotBefore.UTC().Format(time.DateTime), leaf.NotAfter.UTC().Format(time.DateTime))
}

// Refused returns why the files are not served as they are; nil if they are.
func (s *Source) Refused() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused
}

// Replace puts a new pair into the files, and serves it.
func (s *Source) Replace(at time.Time, name string, chain, key []byte) error {
	if err := s.pair.Replace(name, chain, key); err != nil {
		return err
	}
	_, err := s.Reload(at, true)
	return err
}

// Touch is Pair.Touch.
func (s *Source) Touch() error { return s.pair.Touch() }

// Roots are the certificates of a PEM file, as a pool that follows the file. Safe for concurrent use.
type Roots struct {
	path    string
	current atomic.Pointer[trusted]

	mu sync.Mutex
	id fileID
}

type trusted struct {
	pool  *x509.CertPool
	certs []*x509.Certificate
}

// OpenRoots reads a file of certificates, PEM.
func OpenRoots(path string) (*Roots, error) {
	r := &Roots{path: path}
	_, err := r.Reload(true)
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Pool returns what is trusted now. It must not be changed.
func (r *Roots) Pool() *x509.CertPool { return r.current.Load().pool }

// Certificates returns the same as a list.
func (r *Roots) Certificates() []*x509.Certificate { return r.current.Load().certs }

// Reload reads the file if it is another than before, or at any rate if force is set. A file without certificates is
// refused, and what was trusted stays so; it is said once for each state of the file.
func (r *Roots) Reload(force bool) (changed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, err := identify(r.path)
	if err == nil && id == r.id && !force {
		return false, nil
	}
	said := id == r.id // only if the file is gone for longer
	r.id = id
	if err != nil {
		if said && !force {
			return false, nil
		}
		return false, fleet.Wrap(fleet.Invalid, err, "tlsfiles: %s cannot be read", r.path)
	}
	text, err := readFile(r.path)
	if err != nil {
		return false, err
	}
	certs, err := parse(text)
	if err == nil && len(certs) == 0 {
		err = errors.New("it holds no certificate")
	}
	if err != nil {
		return false, fleet.Wrap(fleet.Invalid, err, "tlsfiles: %s is not what can be trusted: %s", r.path, err)
	}
	next := &trusted{x509.NewCertPool(), certs}
	for _, c := range certs {
		next.pool.AddCert(c)
	}
	old := r.current.Swap(next)
	return old == nil || !old.pool.Equal(next.pool), nil
}
