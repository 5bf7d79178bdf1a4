package apirig

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"sync"
	"time"

	"muster/internal/ca"
	"muster/internal/ca/ceremony"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rotation"
	"muster/internal/trust"
)

// Authorities are CAs in memory, and three doors that believe what they were told to: rotation.Authorities for tests that
// need no files and no broker. Its fields are knobs; set them while nobody calls.
type Authorities struct {
	Offline bool             // the roots' keys are elsewhere: certificates come by Import
	Refuse  map[int64]string // why the door mqtt refuses clients of a generation
	Stale   bool             // the door mqtt goes on to show a certificate of generation 0
	Broken  error            // what Apply returns once
	KeyGone error            // what Check returns

	mu       sync.Mutex
	all      map[int64]*ca.Hierarchy
	requests map[int64][]rotation.Request
	signs    int64
	trusted  []int64
	Applied  int // how often
}

// NewAuthorities returns Authorities whose generation 0 is h.
func NewAuthorities(h *ca.Hierarchy) *Authorities {
	return &Authorities{all: map[int64]*ca.Hierarchy{0: h}, requests: map[int64][]rotation.Request{}, trusted: []int64{0}, Refuse: map[int64]string{}}
}

// Prepare implements rotation.Authorities.
func (a *Authorities) Prepare(_ context.Context, at time.Time, r pki.Rotation, keys rotation.Keys) (ready bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if keys != (rotation.Keys{}) {
		return false, fleet.Errorf(fleet.Unavailable, "no key manager answers here")
	}
	next, err := succeed(at, a.all[r.From], r)
	if err != nil {
		return false, err
	}
	a.all[r.ID] = next
	if !a.Offline {
		return true, nil
	}
	for _, p := range []struct {
		profile ceremony.Profile
		pair    ca.Pair
	}{{ceremony.DeviceCA, next.Device}, {ceremony.ServerCA, next.Server}} {
		der, err := ceremony.Request(string(p.profile), p.pair.Key)
		if err != nil {
			return false, err
		}
		a.requests[r.ID] = append(a.requests[r.ID], rotation.Request{
			Profile: string(p.profile), PEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), KeyHash: pki.KeyHash(p.pair.Cert.RawSubjectPublicKeyInfo),
		})
	}
	return false, nil
}

// succeed makes the generation after h.
func succeed(at time.Time, h *ca.Hierarchy, r pki.Rotation) (*ca.Hierarchy, error) {
	name := fmt.Sprintf("generation %d", r.ID)
	if r.Kind == pki.RotateRoot {
		return ca.Create(ca.CreateOptions{At: at, Name: name})
	}
	next := *h
	profile, pair := ceremony.DeviceCA, &next.Device
	if r.Kind == pki.RotateServerCA {
		profile, pair = ceremony.ServerCA, &next.Server
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	pair.Key = key
	pair.Cert, err = ceremony.SignIntermediate(ceremony.Terms{At: at, Name: name, Life: ceremony.IntermediateLife}, profile, ceremony.Signer{Cert: h.Root.Cert, Key: h.Root.Key}, pub)
	return &next, err
}

// Requests implements rotation.Authorities.
func (a *Authorities) Requests(r pki.Rotation) ([]rotation.Request, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[r.ID], nil
}

// Certificates returns what the ceremony makes of the requests of a rotation.
func (a *Authorities) Certificates(id int64) []*x509.Certificate {
	a.mu.Lock()
	defer a.mu.Unlock()
	return []*x509.Certificate{a.all[id].Device.Cert, a.all[id].Server.Cert}
}

// Import implements rotation.Authorities.
func (a *Authorities) Import(_ time.Time, r pki.Rotation, certs []*x509.Certificate) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range certs {
		if h := a.all[r.ID]; !c.Equal(h.Device.Cert) && !c.Equal(h.Server.Cert) {
			return fleet.Errorf(fleet.Invalid, "%q is for none of the keys here", c.Subject.CommonName)
		}
	}
	return nil
}

// Generation implements rotation.Authorities.
func (a *Authorities) Generation(n int64) (rotation.Generation, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.all[n]
	if h == nil {
		return rotation.Generation{}, fleet.Errorf(fleet.Invalid, "there is no generation %d", n)
	}
	return rotation.Generation{Root: h.Root.Cert, Spare: h.Spare.Cert, Cross: h.Cross, Device: h.Device.Cert, Server: h.Server.Cert}, nil
}

// Apply implements rotation.Authorities.
func (a *Authorities) Apply(_ context.Context, list []pki.Rotation) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.Broken; err != nil {
		a.Broken = nil
		return err
	}
	a.signs, a.trusted = pki.Standing(list)
	a.Applied++
	return nil
}

// Standing returns who signs and who is trusted.
func (a *Authorities) Standing() (signs int64, trusted []int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.signs, slices.Clone(a.trusted)
}

// Check implements rotation.Authorities.
func (a *Authorities) Check(int64) error { return a.KeyGone }

// Prove implements rotation.Authorities: mqtt asks for a certificate, ops does not, and shop shows one of another CA.
func (a *Authorities) Prove(_ context.Context, clients []int64, roots int64) (out []pki.Proof) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := time.Now()
	shows := a.signs
	if a.Stale {
		shows = 0
	}
	for _, n := range clients {
		p := a.shown(pki.Proof{Door: "mqtt", Client: n, Roots: roots, At: at}, shows)
		if p.Refused = a.Refuse[n]; p.Refused == "" && !slices.Contains(a.trusted, n) {
			p.Refused = "remote error: tls: unknown certificate authority"
		}
		out = append(out, p)
	}
	return append(out, a.shown(pki.Proof{Door: "ops", Client: pki.NoClient, Roots: roots, At: at}, a.signs), pki.Proof{Door: "shop", Client: pki.NoClient, Roots: roots, At: at, Foreign: true})
}

// shown fills in what a door shows that has a certificate of generation n.
func (a *Authorities) shown(p pki.Proof, n int64) pki.Proof {
	by, believed := a.all[n], a.all[p.Roots]
	p.Issuer = string(pki.IssuerIDOf(by.Server.Cert))
	if !slices.ContainsFunc([]*x509.Certificate{believed.Root.Cert, believed.Spare.Cert}, by.Root.Cert.Equal) {
		p.Unverified = "x509: certificate signed by unknown authority"
	}
	return p
}

// TrustOfDevices is the trust bundle as a rotation sees it.
type TrustOfDevices struct{ *trust.Publisher }

// Roots implements rotation.Trust.
func (t TrustOfDevices) Roots(ctx context.Context) (int64, [][]byte, [][]byte, error) {
	b, err := t.Current(ctx)
	return b.Version, b.Roots, b.Cross, err
}

// Publish implements rotation.Trust.
func (t TrustOfDevices) Publish(ctx context.Context, at time.Time, roots, cross []*x509.Certificate, by string) (int64, error) {
	b, err := t.Make(ctx, at, roots, cross, false, by)
	return b.Version, err
}

// Lacking implements rotation.Trust.
func (t TrustOfDevices) Lacking(ctx context.Context, limit int) (int, []string, error) {
	s, err := t.Spread(ctx, limit)
	var named []string
	for _, d := range s.Stragglers {
		named = append(named, string(d.Device))
	}
	return s.Devices - s.Acked, named, err
}

// rootsInUse are those under which servers' certificates stand.
func (r *Rig) rootsInUse() (out []*x509.Certificate) {
	_, trusted := r.Authorities.Standing()
	for _, n := range trusted {
		g, err := r.Authorities.Generation(n)
		if err == nil {
			out = append(out, g.Root)
		}
	}
	return out
}
