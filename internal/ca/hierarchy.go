// Package ca is muster's certificate authority: the hierarchy of roots and intermediates, its files, and a smallstep
// authority embedded so that nothing of it but signing by our own profile can be reached (DESIGN §7, facts in pki.md §1.6).
package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"muster/internal/ca/ceremony"
	"muster/internal/ca/keystore"
	"muster/internal/fleet"
	"muster/internal/pki"
)

const year = 365 * 24 * time.Hour // how long a server certificate holds, and the unit of the others

// Pair is a CA certificate with its key. A nil Key means that the key is kept elsewhere, as a root's should be.
type Pair struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// Hierarchy is every CA of a fleet. The intermediates are signed by Root; Spare is a second root that signs nothing until
// the first is lost, and which devices trust from the first day (pki.md §1.7).
type Hierarchy struct {
	Root, Spare Pair
	Device      Pair // signs device certificates, clientAuth only
	Server      Pair // signs certificates of the broker and of HTTPS listeners, serverAuth only
	// Cross is Root, signed by the root before it: servers show it, so that who has only that one believes them. May be nil.
	Cross *x509.Certificate
}

// CreateOptions describe a new hierarchy. Zero values mean what the comments say.
type CreateOptions struct {
	At   time.Time // now; required
	Name string    // of the fleet, in the CA names; muster

	RootLife         time.Duration // 25 years
	IntermediateLife time.Duration // 5 years
}

func (o CreateOptions) withDefaults() CreateOptions {
	if o.Name == "" {
		o.Name = "muster"
	}
	if o.RootLife == 0 {
		o.RootLife = ceremony.RootLife
	}
	if o.IntermediateLife == 0 {
		o.IntermediateLife = ceremony.IntermediateLife
	}
	return o
}

// Create makes a new hierarchy in memory, all keys EC P-256: an ESP32 checks such a signature in a tenth of the time that
// P-384 takes. It returns an Invalid error if the options make no sense.
func Create(o CreateOptions) (*Hierarchy, error) { return CreateWith(o, nil, nil) }

// CreateWith is Create with keys of the intermediates that were made elsewhere; nil makes one.
func CreateWith(o CreateOptions, device, server crypto.Signer) (*Hierarchy, error) {
	o = o.withDefaults()
	if o.At.IsZero() || o.IntermediateLife <= 0 || o.RootLife < o.IntermediateLife || len(o.Name) > 40 {
		return nil, fleet.Errorf(fleet.Invalid, "ca: a hierarchy needs a time, a name of at most 40 bytes, and a root that outlives its intermediates")
	}
	h := &Hierarchy{Device: Pair{Key: device}, Server: Pair{Key: server}}
	for p, name := range map[*Pair]string{&h.Root: o.Name + " root 1", &h.Spare: o.Name + " root 2 (spare)"} {
		if err := p.signSelf(ceremony.Terms{At: o.At, Name: name, Life: o.RootLife}); err != nil {
			return nil, err
		}
	}
	root := ceremony.Signer{Cert: h.Root.Cert, Key: h.Root.Key}
	if err := h.Device.signBy(root, ceremony.DeviceCA, ceremony.Terms{At: o.At, Name: o.Name + " devices 1", Life: o.IntermediateLife}); err != nil {
		return nil, err
	}
	return h, h.Server.signBy(root, ceremony.ServerCA, ceremony.Terms{At: o.At, Name: o.Name + " servers 1", Life: o.IntermediateLife})
}

// CreateIn is Create with the keys that keys names. The caller closes the hierarchy.
func CreateIn(ctx context.Context, o CreateOptions, keys Keys, passphrase []byte) (*Hierarchy, error) {
	var given Hierarchy
	for p, ref := range map[*Pair]string{&given.Device: keys.Device, &given.Server: keys.Server} {
		if ref == "" {
			continue
		}
		key, err := keystore.Open(ctx, ref, passphrase)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("ca: %w", err), given.Close())
		}
		p.Key = key
	}
	h, err := CreateWith(o, given.Device.Key, given.Server.Key)
	if err == nil {
		err = h.check()
	}
	if err != nil {
		return nil, errors.Join(err, given.Close())
	}
	return h, nil
}

// makeKey gives p a key if it has none.
func (p *Pair) makeKey() (err error) {
	if p.Key == nil {
		p.Key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return err
}

func (p *Pair) signSelf(t ceremony.Terms) (err error) {
	if err := p.makeKey(); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	p.Cert, err = ceremony.SignRoot(t, p.Key)
	return err
}

func (p *Pair) signBy(root ceremony.Signer, profile ceremony.Profile, t ceremony.Terms) error {
	if err := p.makeKey(); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(p.Key.Public())
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	p.Cert, err = ceremony.SignIntermediate(t, profile, root, spki)
	return err
}

// keyID is the key identifier of a certificate's key.
func keyID(pub crypto.PublicKey) ([]byte, error) { return ceremony.KeyID(pub) }

// NewSerial returns a random serial of 128 bits.
func NewSerial() (fleet.Serial, error) { return ceremony.NewSerial() }

// TrustBundle returns what devices trust, as PEM: both roots, the one in use first.
func (h *Hierarchy) TrustBundle() []byte { return toPEM(h.Root.Cert, h.Spare.Cert) }

// ClientCAs returns what the broker and the device listeners trust in client certificates, as PEM: the device
// intermediate and the root above it, and not the spare, which signed nothing.
func (h *Hierarchy) ClientCAs() []byte { return toPEM(h.Device.Cert, h.Root.Cert) }

// KeyHashes returns the hashes of all CA keys: no device may use one of them.
func (h *Hierarchy) KeyHashes() []fleet.Hash {
	var out []fleet.Hash
	for _, p := range h.pairs() {
		out = append(out, pki.KeyHash(p.Cert.RawSubjectPublicKeyInfo))
	}
	return out
}

func (h *Hierarchy) pairs() []Pair { return []Pair{h.Root, h.Spare, h.Device, h.Server} }

func toPEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// check returns an error that names the first thing wrong with h: who signed what, and which key belongs to which.
func (h *Hierarchy) check() error {
	for _, p := range []struct {
		name   string
		pair   Pair
		parent *x509.Certificate
		use    x509.ExtKeyUsage
	}{
		{"root", h.Root, h.Root.Cert, 0}, {"spare root", h.Spare, h.Spare.Cert, 0},
		{"device CA", h.Device, h.Root.Cert, x509.ExtKeyUsageClientAuth}, {"server CA", h.Server, h.Root.Cert, x509.ExtKeyUsageServerAuth},
	} {
		if err := p.pair.check(p.parent, p.use); err != nil {
			return fleet.Wrap(fleet.Invalid, err, "ca: the %s", p.name)
		}
	}
	seen := map[fleet.Hash]bool{}
	for _, hash := range h.KeyHashes() {
		if seen[hash] {
			return fleet.Errorf(fleet.Invalid, "ca: two of the CAs have the same key")
		}
		seen[hash] = true
	}
	return nil
}

func (p Pair) check(parent *x509.Certificate, use x509.ExtKeyUsage) error {
	switch c := p.Cert; {
	case c == nil:
		return fmt.Errorf("the certificate is missing")
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("the certificate is not one of a CA")
	case use != 0 && (len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != use):
		return fmt.Errorf("the certificate is for another use")
	case c.CheckSignatureFrom(parent) != nil:
		return fmt.Errorf("the certificate was not signed by its parent")
	}
	if p.Key == nil {
		return nil
	}
	if k, ok := p.Cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(p.Key.Public()) {
		return fmt.Errorf("certificate and key do not belong together")
	}
	return nil
}
