package ca

import (
	"crypto/x509"
	"fmt"
	"sync"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"golang.org/x/crypto/ssh"

	"muster/internal/fleet"
)

// ledger is what smallstep takes for its database, and the last gate before it signs. It knows the orders that are being
// signed at this moment; whatever else smallstep asks for is refused. What was issued is kept by muster's own store, in
// the transaction that follows (DESIGN §7).
type ledger struct {
	mu     sync.Mutex
	orders map[fleet.Serial]*profile // guarded by mu
}

var (
	_ db.AuthDB                       = (*ledger)(nil)
	_ db.CertificateStorer            = (*ledger)(nil)
	_ provisioner.CertificateEnforcer = (*ledger)(nil)
)

func newLedger() *ledger { return &ledger{orders: map[fleet.Serial]*profile{}} }

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

// StoreCertificate implements db.CertificateStorer.
func (l *ledger) StoreCertificate(c *x509.Certificate) error {
	_, err := l.find(c)
	return err
}

// IsRevoked says yes: smallstep asks only before renewing, which muster never lets it do.
func (l *ledger) IsRevoked(string) (bool, error) { return true, nil }

// IsSSHRevoked says yes, as there is no SSH CA.
func (l *ledger) IsSSHRevoked(string) (bool, error) { return true, nil }

// Revoke refuses: revocation is muster's own.
func (l *ledger) Revoke(*db.RevokedCertificateInfo) error { return errRefused }

// RevokeSSH refuses.
func (l *ledger) RevokeSSH(*db.RevokedCertificateInfo) error { return errRefused }

// GetCertificate refuses.
func (l *ledger) GetCertificate(string) (*x509.Certificate, error) { return nil, errRefused }

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
