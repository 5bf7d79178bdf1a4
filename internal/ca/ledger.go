package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"golang.org/x/crypto/ssh"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Records is muster's store, as smallstep's database asks it. It is enroll's use case, seen from here.
type Records interface {
	// Certificate returns the record of a serial, or a NotFound error.
	Certificate(ctx context.Context, s fleet.Serial) (pki.Certificate, error)
	// RevokeRecord stores a revocation and what follows from it in one transaction; sessions are closed soon after. A
	// revocation that stands already is no error.
	RevokeRecord(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) error
}

// ledger is smallstep's database over muster's store, and the last gate before it signs. The orders that are being signed at
// this moment are in memory; everything else is asked of the store. Storing a certificate is left to the transaction that
// also fills the device's slot and the outbox (enroll), which smallstep's interface knows nothing of: there, its intent is
// on record before it is signed, so that nothing can be signed that the store does not know (DESIGN §7).
type ledger struct {
	records Records // nil: nothing is known but the orders
	mu      sync.Mutex
	orders  map[fleet.Serial]*profile // guarded by mu
}

var (
	_ db.AuthDB                       = (*ledger)(nil)
	_ db.CertificateStorer            = (*ledger)(nil)
	_ provisioner.CertificateEnforcer = (*ledger)(nil)
)

func newLedger(r Records) *ledger { return &ledger{records: r, orders: map[fleet.Serial]*profile{}} }

// intended returns an Unprocessable error unless the store holds an intent for exactly what o asks for.
func (l *ledger) intended(ctx context.Context, o pki.Order) error {
	if l.records == nil {
		return nil
	}
	c, err := l.records.Certificate(ctx, o.Serial)
	switch {
	case fleet.Is(err, fleet.NotFound):
		return fleet.Errorf(fleet.Unprocessable, "ca: nothing is on record about certificate %s", o.Serial)
	case err != nil:
		return fleet.Wrap(fleet.Unavailable, err, "ca: the store cannot be asked about certificate %s", o.Serial)
	case c.State != pki.Intended:
		return fleet.Errorf(fleet.Unprocessable, "ca: certificate %s is %s, and no intent", o.Serial, c.State)
	case c.Device != o.Device || !bytes.Equal(c.PublicKey, o.PublicKey):
		return fleet.Errorf(fleet.Unprocessable, "ca: certificate %s is intended for another device or key", o.Serial)
	}
	return nil
}

// record returns what the store holds about a serial, which smallstep writes in decimal.
func (l *ledger) record(sn string) (pki.Certificate, error) {
	n, ok := new(big.Int).SetString(sn, 10)
	if !ok || n.Sign() <= 0 || n.BitLen() > 160 || l.records == nil {
		return pki.Certificate{}, errRefused
	}
	return l.records.Certificate(context.Background(), fleet.SerialOf(n))
}

// open notes that p is being signed.
func (l *ledger) open(p *profile) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.orders[p.order.Serial] != nil {
		return fleet.Errorf(fleet.Conflict, "certificate %s is being signed already", p.order.Serial)
	}
	l.orders[p.order.Serial] = p
	return nil
}

func (l *ledger) close(p *profile) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.orders, p.order.Serial)
}

func (l *ledger) find(c *x509.Certificate) (*profile, error) {
	if c.SerialNumber == nil {
		return nil, errRefused
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.orders[fleet.SerialOf(c.SerialNumber)]; p != nil {
		return p, nil
	}
	return nil, errRefused
}

// Enforce implements provisioner.CertificateEnforcer: the template is what an order asks for, or it is not signed.
func (l *ledger) Enforce(c *x509.Certificate) error {
	p, err := l.find(c)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(c.PublicKey)
	if err != nil {
		return fmt.Errorf("muster: %w", err)
	}
	switch {
	case string(spki) != string(p.order.PublicKey), c.Subject.CommonName != string(p.order.Device),
		c.IsCA, len(c.ExtraExtensions) != 0, len(c.ExtKeyUsage) != 1, c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth:
		return errRefused
	}
	return nil
}

// StoreCertificate implements db.CertificateStorer: it takes what was ordered, and leaves storing it to whoever ordered it.
func (l *ledger) StoreCertificate(c *x509.Certificate) error {
	_, err := l.find(c)
	return err
}

// IsRevoked implements db.AuthDB, from the store. What the store does not know is nobody's certificate, so it counts as revoked,
// and so does one that was replaced or has ended: smallstep asks before it renews, which muster never lets it do.
func (l *ledger) IsRevoked(sn string) (bool, error) {
	c, err := l.record(sn)
	if err != nil {
		return true, nil
	}
	return !c.State.Live(), nil
}

// IsSSHRevoked says yes, as there is no SSH CA.
func (l *ledger) IsSSHRevoked(string) (bool, error) { return true, nil }

// Revoke implements db.AuthDB: the revocation is stored with what follows from it.
func (l *ledger) Revoke(r *db.RevokedCertificateInfo) error {
	c, err := l.record(r.Serial)
	if err != nil {
		return err
	}
	if !pki.ReasonAllowed(r.ReasonCode) {
		return fleet.Errorf(fleet.Invalid, "ca: reason %d is none that muster gives", r.ReasonCode)
	}
	return l.records.RevokeRecord(context.Background(), r.RevokedAt, c.Serial, r.ReasonCode, "authority")
}

// RevokeSSH refuses.
func (l *ledger) RevokeSSH(*db.RevokedCertificateInfo) error { return errRefused }

// GetCertificate implements db.AuthDB, from the store.
func (l *ledger) GetCertificate(sn string) (*x509.Certificate, error) {
	c, err := l.record(sn)
	if err != nil {
		return nil, err
	}
	if len(c.Chain) == 0 { // intended, and not signed
		return nil, errRefused
	}
	return x509.ParseCertificate(c.Chain[0])
}

// UseToken refuses: no token is ever good.
func (l *ledger) UseToken(string, string) (bool, error) { return false, errRefused }

// IsSSHHost refuses.
func (l *ledger) IsSSHHost(string) (bool, error) { return false, errRefused }

// GetSSHHostPrincipals refuses.
func (l *ledger) GetSSHHostPrincipals() ([]string, error) { return nil, errRefused }

// StoreSSHCertificate refuses.
func (l *ledger) StoreSSHCertificate(*ssh.Certificate) error { return errRefused }

// Shutdown has nothing to close.
func (l *ledger) Shutdown() error { return nil }
