package app

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"muster/internal/ca"
	"muster/internal/expiry"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// generations are the CAs of this musterd, and which of them sign and are trusted: the one place that everything that signs
// or trusts asks at each use, so that a rotation needs no restart. It is the authority of package enroll.
type generations struct {
	files  ca.Store
	policy pki.KeyPolicy
	// records is the store, as smallstep asks it.
	records ca.Records
	log     *slog.Logger

	change sync.Mutex // one load at a time
	now    atomic.Pointer[standing]

	probing sync.Mutex
	probes  map[int64]probe // by generation
}

// probe is a client certificate for handshakes.
type probe struct {
	cert tls.Certificate
	made time.Time
}

// probeFresh is how long a probe is used: a key manager should not have to sign for every look.
const probeFresh = 3 * time.Minute

// probe returns a client certificate of a generation, to prove what doors do with it.
func (g *generations) probe(at time.Time, n int64) (*tls.Certificate, error) {
	g.probing.Lock()
	defer g.probing.Unlock()
	if p, ok := g.probes[n]; ok && at.Sub(p.made) < probeFresh {
		return &p.cert, nil
	}
	h := g.now.Load().all[n]
	if h == nil {
		return nil, fleet.Errorf(fleet.Unavailable, "the keys of generation %d are not here", n)
	}
	cert, err := h.Probe(at)
	if err != nil {
		return nil, err
	}
	if g.probes == nil {
		g.probes = map[int64]probe{}
	}
	g.probes[n] = probe{cert, at}
	return &cert, nil
}

// standing is what the records of rotations come to. It never changes.
type standing struct {
	signs     int64
	trusted   []int64 // the signing one first
	all       map[int64]*ca.Hierarchy
	authority *ca.Authority
}

func (s *standing) signing() *ca.Hierarchy { return s.all[s.signs] }

// believed returns the hierarchies that are trusted, the signing one first.
func (s *standing) believed() []*ca.Hierarchy {
	out := make([]*ca.Hierarchy, len(s.trusted))
	for i, n := range s.trusted {
		out[i] = s.all[n]
	}
	return out
}

// known returns every hierarchy, trusted or not, the signing one first and then the newest.
func (s *standing) known() []*ca.Hierarchy {
	numbers := slices.SortedFunc(maps.Keys(s.all), func(a, b int64) int {
		if (a == s.signs) != (b == s.signs) {
			return cmp.Compare(b2i(b == s.signs), b2i(a == s.signs))
		}
		return cmp.Compare(b, a)
	})
	out := make([]*ca.Hierarchy, len(numbers))
	for i, n := range numbers {
		out[i] = s.all[n]
	}
	return out
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// load takes over what the records say: it reads the generations that are new and has the right one sign. It is idempotent.
// Folders that no record names are not looked at.
func (g *generations) load(ctx context.Context, list []pki.Rotation) error {
	g.change.Lock()
	defer g.change.Unlock()
	signs, trusted := pki.Standing(list)
	was := g.now.Load()
	if was == nil {
		was = &standing{all: map[int64]*ca.Hierarchy{}}
	}
	next := &standing{signs: signs, trusted: trusted, all: maps.Clone(was.all), authority: was.authority}
	for _, n := range recorded(list) {
		if next.all[n] != nil {
			continue
		}
		h, err := g.files.Load(ctx, n)
		if err != nil && !slices.Contains(trusted, n) { // its lists are signed no more; devices do not notice
			g.log.Error("the keys of CAs that are not in use any more cannot be loaded: their revocation lists end", "generation", n, "error", err)
			h, err = g.files.Certificates(n)
		}
		if err != nil {
			return errors.Join(err, closeNew(was, next))
		}
		next.all[n] = h
	}
	if was.authority == nil || was.signs != signs {
		authority, err := ca.NewAuthority(next.signing(), g.policy, g.records)
		if err != nil {
			return errors.Join(err, closeNew(was, next))
		}
		next.authority = authority
	}
	g.now.Store(next)
	return nil
}

// recorded returns the generations that have their certificates, by the records.
func recorded(list []pki.Rotation) []int64 {
	out := []int64{0}
	for _, r := range list {
		if r.State != pki.RotationRequested && r.State != pki.RotationCancelled {
			out = append(out, r.ID)
		}
	}
	return out
}

// closeNew lets go of what next has and was has not.
func closeNew(was, next *standing) error {
	var errs []error
	for n, h := range next.all {
		if was.all[n] == nil {
			errs = append(errs, h.Close())
		}
	}
	return errors.Join(errs...)
}

func (g *generations) close() error {
	s := g.now.Swap(nil)
	if s == nil {
		return nil
	}
	return closeNew(&standing{}, s)
}

func (g *generations) hierarchy() *ca.Hierarchy { return g.now.Load().signing() }

// NewSerial implements enroll.Authority.
func (g *generations) NewSerial() (fleet.Serial, error) { return ca.NewSerial() }

// Sign implements enroll.Authority.
func (g *generations) Sign(ctx context.Context, o pki.Order) (pki.Signed, error) {
	return g.now.Load().authority.Sign(ctx, o)
}

// KeyHashes implements enroll.Authority: of all generations.
func (g *generations) KeyHashes() (out []fleet.Hash) {
	for _, h := range g.now.Load().known() {
		out = append(out, h.KeyHashes()...)
	}
	return out
}

// deviceCAs are the intermediates that signed devices' certificates that are trusted. Only these: by their root, one that was
// retired would be believed again.
func (g *generations) deviceCAs() []byte {
	var certs []*x509.Certificate
	for _, h := range g.now.Load().believed() {
		certs = append(certs, h.Device.Cert)
	}
	return pemOf(certs)
}

// clientCAs is what the broker trusts in client certificates: RabbitMQ wants the roots, too.
func (g *generations) clientCAs() []byte {
	var certs []*x509.Certificate
	for _, h := range g.now.Load().believed() {
		certs = append(certs, h.Device.Cert, h.Root.Cert)
	}
	return pemOf(certs)
}

// roots is what clients of the servers trust.
func (g *generations) roots() (out []*x509.Certificate) {
	for _, h := range g.now.Load().believed() {
		for _, c := range []*x509.Certificate{h.Root.Cert, h.Spare.Cert} {
			if !slices.ContainsFunc(out, c.Equal) {
				out = append(out, c)
			}
		}
	}
	return out
}

// inUse are the roots under which the servers' certificates stand.
func (g *generations) inUse() (out []*x509.Certificate) {
	for _, h := range g.now.Load().believed() {
		out = append(out, h.Root.Cert)
	}
	return out
}

// issuers are the CAs whose keys are here: that of devices that signs now comes first. Those of earlier generations sign the
// lists of what they issued as long as their keys are kept.
func (g *generations) issuers() (out []pki.Issuer) {
	add := func(p ca.Pair) {
		known := slices.ContainsFunc(out, func(i pki.Issuer) bool { return p.Cert != nil && i.Cert.Equal(p.Cert) })
		if p.Cert != nil && p.Key != nil && !known {
			out = append(out, pki.Issuer{Cert: p.Cert, Key: p.Key})
		}
	}
	all := g.now.Load().known()
	for _, h := range all {
		add(h.Device)
	}
	for _, h := range all {
		add(h.Server)
		add(h.Root)
	}
	return out
}

// Issued implements servercert.Issuer.
func (g *generations) Issued(chain []*x509.Certificate) bool {
	return slices.ContainsFunc(g.now.Load().known(), func(h *ca.Hierarchy) bool { return h.IssuedServer(chain) })
}

// Current implements servercert.Issuer.
func (g *generations) Current(chain []*x509.Certificate) bool {
	return g.hierarchy().SignedServer(chain)
}

// check has the keys that sign now sign something.
func (g *generations) check() error { return g.hierarchy().Check() }

// expiring are the CAs that are trusted, those of the generation that signs under their plain names.
func (g *generations) expiring() (out []expiry.Item) {
	s := g.now.Load()
	seen := []*x509.Certificate{}
	for i, n := range s.trusted {
		for _, item := range expiringCAs(s.all[n]) {
			if slices.ContainsFunc(seen, item.cert.Equal) {
				continue
			}
			seen = append(seen, item.cert)
			if i > 0 {
				item.Name = fmt.Sprintf("%s-of-generation-%d", item.Name, n)
			}
			out = append(out, item.Item)
		}
	}
	return out
}

// records is the store, as smallstep asks it; enroll comes to be after the authority that it uses.
type records struct{ a *App }

// Certificate implements ca.Records.
func (r records) Certificate(ctx context.Context, s fleet.Serial) (pki.Certificate, error) {
	return r.a.enroll.Certificate(ctx, s)
}

// RevokeRecord implements ca.Records.
func (r records) RevokeRecord(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) error {
	return r.a.enroll.RevokeRecord(ctx, at, s, reason, by)
}
