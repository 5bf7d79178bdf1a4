package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"

	"muster/internal/ca/keystore"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// MinLeft is the least that must be left of the issuer's own life when it signs a certificate whose end it cuts short.
const MinLeft = 24 * time.Hour

// Authority signs device certificates. It is a smallstep authority of which only signing by our own profile can be
// reached: no provisioner, no HTTP handler, no token, and a database that refuses whatever was not ordered here. Renew,
// Rekey and Revoke of smallstep are never called: a renewal is a new order. Safe for concurrent use.
type Authority struct {
	auth    *authority.Authority
	issuer  *x509.Certificate
	keys    []fleet.Hash
	ledger  *ledger
	carrier *x509.CertificateRequest
	policy  pki.KeyPolicy
}

// NewAuthority returns an Authority that signs with h's device intermediate keys that policy allows, and only what records
// hold as intended. Without records the order alone decides: for tests and measurements.
func NewAuthority(h *Hierarchy, policy pki.KeyPolicy, records Records) (*Authority, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	if h.Device.Key == nil {
		return nil, fleet.Errorf(fleet.Invalid, "ca: the key of the device CA is not here")
	}
	carrier, err := carrierRequest()
	if err != nil {
		return nil, err
	}
	a := &Authority{issuer: h.Device.Cert, keys: h.KeyHashes(), ledger: newLedger(records), carrier: carrier, policy: policy}
	chain := []*x509.Certificate{h.Device.Cert}
	a.auth, err = authority.NewEmbedded(
		authority.WithConfig(embeddedConfig(h)),
		authority.WithX509RootCerts(h.Root.Cert),
		authority.WithX509IntermediateCerts(h.Device.Cert),
		authority.WithX509SignerFunc(func() ([]*x509.Certificate, crypto.Signer, error) { return chain, h.Device.Key, nil }),
		authority.WithDatabase(a.ledger),
		authority.WithX509Enforcers(a.ledger),
		authority.WithAuthorizeRenewFunc(func(context.Context, *provisioner.Controller, *x509.Certificate) error { return errRefused }),
		authority.WithQuietInit(),
	)
	if err != nil {
		return nil, fmt.Errorf("ca: smallstep: %w", err)
	}
	return a, a.assertClosed()
}

// embeddedConfig has no provisioner: each would be a way to ask for a certificate. NewEmbedded does not validate claims
// (pki.md §1.6 row 2), so they are set to what cannot get in the way: dates come from the order.
func embeddedConfig(h *Hierarchy) *config.Config {
	yes, no := true, false
	long := &provisioner.Duration{Duration: h.Device.Cert.NotAfter.Sub(h.Device.Cert.NotBefore)}
	return &config.Config{AuthorityConfig: &config.AuthConfig{
		Provisioners: provisioner.List{},
		Backdate:     &provisioner.Duration{},
		Claims: &provisioner.Claims{
			MinTLSDur: &provisioner.Duration{Duration: time.Second}, MaxTLSDur: long, DefaultTLSDur: long,
			DisableRenewal: &yes, AllowRenewalAfterExpiry: &no, EnableSSHCA: &no, DisableSmallstepExtensions: &yes,
		},
	}}
}

// assertClosed makes sure that smallstep came up as it was told, for it only logs what it could not set up.
func (a *Authority) assertClosed() error {
	list, _, err := a.auth.GetProvisioners("", 0)
	if err != nil {
		return fmt.Errorf("ca: smallstep: %w", err)
	}
	if len(list) != 0 {
		return fmt.Errorf("ca: smallstep came up with %d provisioners, want none", len(list))
	}
	if l, ok := a.auth.GetDatabase().(*ledger); !ok || l != a.ledger {
		return fmt.Errorf("ca: smallstep does not use muster's store")
	}
	return nil
}

// carrierRequest returns the request that carries every order into smallstep. SignWithContext wants one whose signature
// holds, checks it twice, and takes the public key from it; but the device's own request was checked when it came in, only
// its key was kept, and the profile puts that key in. So the carrier has a key of its own, which is forgotten at once. Its
// strength guards nothing: who could forge it would still need an order. RSA-1024 is what takes least time to check, a
// tenth of an EC signature.
var carrierRequest = sync.OnceValues(func() (*x509.CertificateRequest, error) {
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	return x509.ParseCertificateRequest(der)
})

// KeyHashes returns the hashes of the CA's own keys.
func (a *Authority) KeyHashes() []fleet.Hash { return a.keys }

// Issuer returns the certificate that signs devices' ones.
func (a *Authority) Issuer() *x509.Certificate { return a.issuer }

// Sign returns the certificate that o asks for, after looking at it once more. The end is cut to the issuer's own. It
// returns an Unprocessable error if o can never be signed, and an Unavailable one if it may be later, or by an operator's
// act: the issuer is near its end, or its key does not answer.
func (a *Authority) Sign(ctx context.Context, o pki.Order) (pki.Signed, error) {
	p, err := a.prepare(o)
	if err != nil {
		return pki.Signed{}, err
	}
	if err := a.ledger.intended(ctx, o); err != nil {
		return pki.Signed{}, err
	}
	if err := a.ledger.open(p); err != nil {
		return pki.Signed{}, err
	}
	defer a.ledger.close(p)
	request := *a.carrier // smallstep keeps none, but might write to it
	chain, err := a.auth.SignWithContext(ctx, &request, provisioner.SignOptions{}, p, identity{p})
	if err != nil {
		return pki.Signed{}, fleet.Wrap(fleet.Unavailable, err, "the certificate authority could not sign")
	}
	leaf := chain[0]
	if err := p.verify(leaf, a.issuer); err != nil {
		return pki.Signed{}, fleet.Wrap(fleet.Internal, err, "the certificate authority made another certificate than ordered; it was thrown away")
	}
	return pki.Signed{Chain: [][]byte{leaf.Raw, a.issuer.Raw}, Validity: span(leaf)}, nil
}

// prepare checks an order.
func (a *Authority) prepare(o pki.Order) (*profile, error) {
	if _, err := fleet.ParseSerial(string(o.Serial)); err != nil || o.Serial.Big().BitLen() > 159 {
		return nil, fleet.Errorf(fleet.Unprocessable, "ca: the order's serial is not usable")
	}
	if !o.Device.Valid() {
		return nil, fleet.Errorf(fleet.Unprocessable, "ca: the order's device id is not valid")
	}
	if err := a.policy.CheckKey(o.PublicKey); err != nil {
		return nil, err
	}
	if !o.NotBefore.Before(o.NotAfter) {
		return nil, fleet.Errorf(fleet.Unprocessable, "ca: the order ends before it starts")
	}
	v := o.Validity.Within(span(a.issuer))
	if o.NotAfter.After(a.issuer.NotAfter) && left(v, o.NotBefore) < MinLeft {
		return nil, fleet.Errorf(fleet.Unavailable, "the device CA ends %s: replace it, nothing can be signed until then", a.issuer.NotAfter.Format(time.DateOnly))
	}
	if !v.NotBefore.Before(v.NotAfter) {
		return nil, fleet.Errorf(fleet.Unprocessable, "ca: the order would hold for less than a second")
	}
	p, err := newProfile(o, v)
	if err != nil {
		return nil, fleet.Wrap(fleet.Unprocessable, err, "ca: the order cannot be signed")
	}
	return p, nil
}

// Check has each key of an intermediate sign a throw-away digest: one in a key manager may have stopped to answer. It takes
// no longer than keystore.Timeout a key. The error is Unavailable and says which key it is.
func (h *Hierarchy) Check() error {
	for _, of := range []struct {
		name string
		pair Pair
	}{{"device CA", h.Device}, {"server CA", h.Server}} {
		if of.pair.Key == nil {
			return fleet.Errorf(fleet.Unavailable, "the key of the %s is not here", of.name)
		}
		if err := keystore.CheckSigner(of.pair.Key); err != nil {
			return fleet.Wrap(fleet.Unavailable, err, "the key of the %s cannot sign", of.name)
		}
	}
	return nil
}

var errRefused = errors.New("muster: not offered")

// NewSerial returns a serial for a new order.
func (a *Authority) NewSerial() (fleet.Serial, error) { return NewSerial() }
