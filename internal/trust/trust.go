// Package trust publishes the trust bundle: the roots under which devices believe servers and certificates. It brings a new
// version to every device and knows who has it and who does not, which is what the rotation of a root waits for
// (DESIGN §7, pki.md §1.7).
package trust

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Tx is what trust needs of the store.
type Tx interface {
	Devices(after fleet.DeviceID, limit int) ([]fleet.Device, error)
	Status(fleet.DeviceID) (fleet.Status, error)
	// TrustBundle returns the bundle of a version, 0 for the newest; ok is false if there is none.
	TrustBundle(version int64) (p pki.Published, ok bool, err error)
	// PutTrustBundle stores the newest bundle. A stored one never changes.
	PutTrustBundle(pki.Published) error
	Enqueue(downlink.Entry) error
	Audit(access.Entry) error
}

// Config of a Publisher. All fields but Signer and Committed are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
	Key    *ecdsa.PublicKey // that devices got with their credentials
	Signer crypto.Signer    // of Key; nil: it is kept offline, and bundles come signed
	// InUse returns the roots under which the servers' certificates stand now: a bundle that holds none of them would lock
	// the fleet out.
	InUse func() []*x509.Certificate
	Log   *slog.Logger
	// Committed, if set, is called after a transaction that put something into the outbox. It must not block.
	Committed func()
}

// Publisher is the use case. Its methods are safe for concurrent use.
type Publisher struct{ c Config }

// New returns a Publisher. It starts nothing.
func New(c Config) *Publisher {
	if c.Committed == nil {
		c.Committed = func() {}
	}
	return &Publisher{c}
}

// Codes of refusals beyond those of package pki.
const (
	CodeNoSigner  = "trust_key_offline" // Conflict: sign it where the key is
	CodeWouldLock = "would_lock_out"    // Conflict: no root of it is in use
)

// batch is how many devices one transaction looks at.
const batch = 512

// First makes the first bundle, of the given roots, in a store that has none. It needs the Signer.
func (p *Publisher) First(ctx context.Context, at time.Time, roots []*x509.Certificate) error {
	_, ok, err := p.newest(ctx)
	if err != nil || ok {
		return err
	}
	_, err = p.Make(ctx, at, roots, nil, false, "")
	return err
}

func (p *Publisher) newest(ctx context.Context) (b pki.Published, ok bool, err error) {
	err = p.c.View(ctx, func(tx Tx) error { b, ok, err = tx.TrustBundle(0); return err })
	return b, ok, err
}

// Current returns the newest bundle, or a NotFound error.
func (p *Publisher) Current(ctx context.Context) (pki.Published, error) {
	b, ok, err := p.newest(ctx)
	if err == nil && !ok {
		err = fleet.Errorf(fleet.NotFound, "no trust bundle was published yet")
	}
	return b, err
}

// Make signs a bundle with the next version and publishes it. Errors: Conflict with CodeNoSigner if the key is not here, and
// those of Publish.
func (p *Publisher) Make(ctx context.Context, at time.Time, roots, cross []*x509.Certificate, force bool, by string) (pki.Published, error) {
	if p.c.Signer == nil {
		return pki.Published{}, fleet.Coded(fleet.Conflict, CodeNoSigner, "the trust key is kept offline: sign the bundle there with muster trust sign, and publish that")
	}
	have, _, err := p.newest(ctx)
	if err != nil {
		return pki.Published{}, err
	}
	b := pki.Bundle{Version: have.Version + 1, Time: max(at.Unix(), have.Time), Roots: raw(roots), Cross: raw(cross)}
	text, err := pki.SignBundle(b, p.c.Signer)
	if err != nil {
		return pki.Published{}, err
	}
	return p.Publish(ctx, at, text, force, by)
}

func raw(certs []*x509.Certificate) [][]byte {
	var out [][]byte
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

// Publish puts a signed bundle in force and rings every device that is connected; the others hear of it when they say
// hello. The same bundle again is no error. Errors are those of pki.VerifyBundle; Conflict with pki.CodeBundleOld if its
// version is not above the one in force, with CodeWouldLock if no root of it is in use and force is not set.
func (p *Publisher) Publish(ctx context.Context, at time.Time, text string, force bool, by string) (pki.Published, error) {
	b, err := pki.VerifyBundle(text, p.c.Key)
	if err != nil {
		return pki.Published{}, err
	}
	if !force && !p.holdsOneInUse(b) {
		return pki.Published{}, fleet.Coded(fleet.Conflict, CodeWouldLock, "no root of this bundle is one under which the servers' certificates stand: every device that takes it would be locked out")
	}
	out := pki.Published{Bundle: b, JWS: text, At: at, By: by}
	again := false
	err = p.c.Update(ctx, func(tx Tx) error {
		have, _, err := tx.TrustBundle(0)
		if err != nil {
			return err
		}
		if again = have.JWS == text; again {
			out = have
			return nil
		}
		if !b.Follows(have.Version) {
			return fleet.Coded(fleet.Conflict, pki.CodeBundleOld, "version %d is in force: a bundle must have a higher one, and this has %d", have.Version, b.Version)
		}
		if err := tx.PutTrustBundle(out); err != nil {
			return err
		}
		who := by
		if who == "" {
			who = "muster"
		}
		return tx.Audit(access.Entry{At: at, Who: who, What: "trust.publish", On: fmt.Sprint(b.Version), Details: fmt.Sprintf("%d roots, %d cross-certificates", len(b.Roots), len(b.Cross))})
	})
	if err != nil || again {
		return out, err
	}
	p.c.Log.Info("trust bundle published", "version", b.Version, "roots", len(b.Roots))
	return out, p.ring(ctx, at, b.Version)
}

func (p *Publisher) holdsOneInUse(b pki.Bundle) bool {
	for _, c := range p.c.InUse() {
		if slices.ContainsFunc(b.Roots, func(der []byte) bool { return string(der) == string(c.Raw) }) {
			return true
		}
	}
	return false
}

// ring puts a word into the outbox for each device that is connected and has an older version. What a crash leaves out is
// made up for by the next hello.
func (p *Publisher) ring(ctx context.Context, at time.Time, version int64) error {
	var after fleet.DeviceID
	for {
		n := 0
		err := p.c.Update(ctx, func(tx Tx) error {
			list, err := tx.Devices(after, batch)
			if err != nil {
				return err
			}
			n = len(list)
			for _, d := range list {
				after = d.ID
				st, err := tx.Status(d.ID)
				if err != nil {
					return err
				}
				if !st.Online || st.Bundle >= version {
					continue
				}
				if err := tx.Enqueue(downlink.Entry{Device: d.ID, Vhost: st.Vhost, Kind: downlink.Trust, At: at}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		p.c.Committed()
		if n < batch {
			return nil
		}
	}
}

// Hello rings a device that said hello with an older version, in the transaction of its caller.
func (p *Publisher) Hello(tx Tx, at time.Time, vhost string, id fleet.DeviceID, h wire.Hello) error {
	b, ok, err := tx.TrustBundle(0)
	if err != nil || !ok || !b.Follows(h.Bundle) {
		return err
	}
	return tx.Enqueue(downlink.Entry{Device: id, Vhost: vhost, Kind: downlink.Trust, At: at})
}

// Compose returns the word on dn/cmd that tells a device of the bundle; nil if it has it by now.
func (p *Publisher) Compose(tx Tx, id fleet.DeviceID) ([]byte, error) {
	b, ok, err := tx.TrustBundle(0)
	if err != nil || !ok {
		return nil, err
	}
	st, err := tx.Status(id)
	if err != nil || !b.Follows(st.Bundle) {
		return nil, err
	}
	return wire.Encode(wire.Cmd{Op: wire.CmdTrust, Bundle: b.Version}), nil
}

// Spread says who trusts what.
type Spread struct {
	Version    int64 // the newest
	Devices    int   // all but disabled and revoked ones
	Acked      int   // that said hello with the newest
	Versions   map[int64]int
	Stragglers []Straggler // those without the newest, not seen for longest first
	More       bool        // there are more of them
}

// Straggler is a device that does not trust the newest bundle yet.
type Straggler struct {
	Device   fleet.DeviceID
	Version  int64
	LastSeen time.Time // zero: never
	Online   bool
}

// maxStragglers is how many are named at most.
const maxStragglers = 1000

// Spread counts who has the newest bundle. It reads the whole fleet, in short transactions.
func (p *Publisher) Spread(ctx context.Context, limit int) (Spread, error) {
	limit = min(max(limit, 1), maxStragglers)
	b, _, err := p.newest(ctx)
	if err != nil {
		return Spread{}, err
	}
	out := Spread{Version: b.Version, Versions: map[int64]int{}}
	var after fleet.DeviceID
	for {
		n := 0
		err := p.c.View(ctx, func(tx Tx) error {
			list, err := tx.Devices(after, batch)
			if err != nil {
				return err
			}
			n = len(list)
			for _, d := range list {
				after = d.ID
				if d.Disabled || d.RecoveryOff != "" {
					continue
				}
				st, err := tx.Status(d.ID)
				if err != nil {
					return err
				}
				out.Devices++
				out.Versions[st.Bundle]++
				if !b.Follows(st.Bundle) {
					out.Acked++
					continue
				}
				out.Stragglers = append(out.Stragglers, Straggler{Device: d.ID, Version: st.Bundle, LastSeen: st.LastSeen, Online: st.Online})
				if len(out.Stragglers) >= 2*maxStragglers {
					out.trim(limit)
				}
			}
			return nil
		})
		if err != nil || n < batch {
			out.trim(limit)
			return out, err
		}
	}
}

func (s *Spread) trim(limit int) {
	slices.SortStableFunc(s.Stragglers, func(a, b Straggler) int { return a.LastSeen.Compare(b.LastSeen) })
	if len(s.Stragglers) > limit {
		s.Stragglers, s.More = slices.Clone(s.Stragglers[:limit]), true
	}
}
