package simdev

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"

	"muster/internal/pki"
	"muster/internal/wire"
)

// bundleRecord is the newest trust bundle that the device took; a zero one before there was any.
type bundleRecord struct {
	Version int64  `json:"version"`
	JWS     string `json:"jws"`
}

// trustKey returns the key by which bundles are checked; nil if the device was made without one, and so takes none.
func (m memory) trustKey() (*ecdsa.PublicKey, error) {
	var der []byte
	if _, err := load(m.r, recTrustKey, &der); err != nil || len(der) == 0 {
		return nil, err
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, err
	}
	pub, _ := key.(*ecdsa.PublicKey)
	return pub, nil
}

// loadTrust sets what the device trusts: the newest bundle, or the roots that it was made with.
func (d *Device) loadTrust() error {
	have, _, err := d.mem.bundle.read()
	if err != nil {
		return err
	}
	if d.trustKey, err = d.mem.trustKey(); err != nil {
		return err
	}
	if d.bundle = have.Version; d.bundle > 0 && d.trustKey != nil {
		b, err := pki.VerifyBundle(have.JWS, d.trustKey)
		if err == nil {
			d.trust = b.Pool()
			return nil
		}
		d.emit(TrustRefused, "what is stored: %v", err)
		d.bundle = 0
	}
	d.trust, err = d.mem.roots()
	return err
}

// fetchTrust takes the trust bundle that muster told of: only one that its key signed, with a version above what the device
// has. It says hello then, so that muster knows.
func (s *session) fetchTrust(ctx context.Context, version int64) error {
	if version <= s.d.bundle || s.d.trustKey == nil {
		return nil
	}
	text, err := s.getTrust(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.d.emit(TrustRefused, "%v", err)
		return nil // the next hello brings the word again
	}
	b, err := pki.VerifyBundle(text, s.d.trustKey)
	if err == nil && !b.Follows(s.d.bundle) {
		err = fmt.Errorf("version %d is not above %d", b.Version, s.d.bundle)
	}
	if err != nil {
		s.d.emit(TrustRefused, "%v", err)
		return nil
	}
	if err := s.d.mem.bundle.write(bundleRecord{b.Version, text}); err != nil {
		return err
	}
	s.d.bundle, s.d.trust = b.Version, b.Pool()
	s.d.emit(TrustStored, "version %d", b.Version)
	if err := s.d.tellTime(b.Time); err != nil { // signed, so it is a lower bound of the time
		return err
	}
	return s.hello(ctx)
}

func (s *session) getTrust(ctx context.Context) (string, error) {
	l := s.loader()
	limit, cancel := context.WithTimeout(ctx, 2*s.d.c.Timing.Connect)
	defer cancel()
	req, err := http.NewRequestWithContext(limit, http.MethodGet, l.base+wire.PathTrust, nil)
	if err != nil {
		return "", err
	}
	if l.user != "" {
		req.SetBasicAuth(l.user, l.password)
	}
	res, err := l.client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the server answers %s", res.Status)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, pki.MaxBundle+1))
	return string(b), err
}
