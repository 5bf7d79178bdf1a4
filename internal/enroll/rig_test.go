package enroll_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"muster/internal/ca"
	"muster/internal/downlink"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

const (
	day = 24 * time.Hour
	dev = fleet.DeviceID("pump-7")
)

// hierarchy is one CA for all tests. It holds from before the fake clock of synctest (2000) to long after now.
var hierarchy = sync.OnceValues(func() (*ca.Hierarchy, error) {
	return ca.Create(ca.CreateOptions{At: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), RootLife: 100 * 365 * day, IntermediateLife: 90 * 365 * day})
})

var sharedAuthority = sync.OnceValues(func() (*ca.Authority, error) {
	h, err := hierarchy()
	if err != nil {
		return nil, err
	}
	return ca.NewAuthority(h, pki.KeyPolicy{}, nil)
})

// authority is the real one with faults on request.
type authority struct {
	*ca.Authority
	mu     sync.Mutex
	err    error                       // guarded by mu: what Sign returns instead of signing
	signed func(pki.Order, pki.Signed) // guarded by mu: called after each signature
	orders []pki.Order                 // guarded by mu
}

func (a *authority) Sign(ctx context.Context, o pki.Order) (pki.Signed, error) {
	a.mu.Lock()
	err, hook := a.err, a.signed
	a.orders = append(a.orders, o)
	a.mu.Unlock()
	if err != nil {
		return pki.Signed{}, err
	}
	s, err := a.Authority.Sign(ctx, o)
	if err == nil && hook != nil {
		hook(o, s)
	}
	return s, err
}

func (a *authority) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
}

func (a *authority) onSigned(f func(pki.Order, pki.Signed)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.signed = f
}

func (a *authority) all() []pki.Order {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.orders)
}

// broker is a port of the broker that behaves like it: sessions by user, closed on request.
type broker struct {
	mu      sync.Mutex
	open    map[string]bool   // guarded by mu
	closed  []string          // guarded by mu: users, in order
	err     error             // guarded by mu: what every call returns
	onClose func(user string) // guarded by mu
}

func (b *broker) CloseUser(_ context.Context, user, reason string) error {
	b.mu.Lock()
	if b.err != nil {
		defer b.mu.Unlock()
		return b.err
	}
	if reason == "" {
		panic("no reason")
	}
	delete(b.open, user)
	b.closed = append(b.closed, user)
	hook := b.onClose
	b.mu.Unlock()
	if hook != nil {
		hook(user)
	}
	return nil
}

func (b *broker) UserConnected(_ context.Context, user string) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open[user], b.err
}

func (b *broker) isOpen(user string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open[user]
}

func (b *broker) onClosing(f func(user string)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.onClose = f
}

func (b *broker) connect(user string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open[user] = true
}

func (b *broker) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
}

func (b *broker) closes(user string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, u := range b.closed {
		if u == user {
			n++
		}
	}
	return n
}

// rig is an Enroller on a real store.
type rig struct {
	t      testing.TB
	path   string
	db     *bolt.DB
	auth   *authority
	broker *broker
	log    *bytes.Buffer
	e      *enroll.Enroller
	conf   enroll.Config // of e
	// updating, if set, is called before each transaction of the Enroller; its error takes the transaction's place.
	updating func() error
}

func newRig(t testing.TB, p enroll.Policy) *rig {
	t.Helper()
	a, err := sharedAuthority()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, path: filepath.Join(t.TempDir(), "muster.db"), auth: &authority{Authority: a}, broker: &broker{open: map[string]bool{}}, log: &bytes.Buffer{}}
	r.start(p)
	r.addDevice(dev)
	return r
}

func (r *rig) start(p enroll.Policy) {
	r.t.Helper()
	r.db = storetest.Reopen(r.t, r.path)
	r.conf = enroll.Config{
		Update: func(ctx context.Context, f func(enroll.Tx) error) error {
			if r.updating != nil {
				if err := r.updating(); err != nil {
					return err
				}
			}
			return r.update(ctx, f)
		},
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: r.auth, Sessions: r.broker, Policy: p,
		Log: slog.New(slog.NewTextHandler(&locked{w: r.log}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	r.e = r.with(p)
}

// with returns an Enroller of another policy over the same store.
func (r *rig) with(p enroll.Policy) *enroll.Enroller {
	r.t.Helper()
	c := r.conf
	c.Policy = p
	e, err := enroll.New(c)
	if err != nil {
		r.t.Fatal(err)
	}
	return e
}

// locked is a writer for several goroutines.
type locked struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func (r *rig) update(ctx context.Context, f func(enroll.Tx) error) error {
	return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
}

// kill leaves everything as kill -9 would, and starts again on the same file.
func (r *rig) kill(p enroll.Policy) {
	r.t.Helper()
	if err := r.db.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.updating = nil
	r.auth.fail(nil)
	r.auth.onSigned(nil)
	r.start(p)
}

// do runs f in a transaction that must succeed.
func (r *rig) do(f func(*bolt.Tx) error) {
	r.t.Helper()
	if err := r.db.Update(context.Background(), f); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) addDevice(id fleet.DeviceID) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		return tx.PutDevice(fleet.Device{ID: id, Product: "pump", CreatedAt: time.Now()})
	})
}

func (r *rig) device(id fleet.DeviceID) fleet.Device {
	r.t.Helper()
	var d fleet.Device
	r.do(func(tx *bolt.Tx) (err error) { d, err = tx.Device(id); return err })
	return d
}

func (r *rig) cert(s fleet.Serial) pki.Certificate {
	r.t.Helper()
	c, err := r.e.Certificate(context.Background(), s)
	if err != nil {
		r.t.Fatalf("certificate %s: %v", s, err)
	}
	return c
}

func (r *rig) certs(id fleet.DeviceID) []pki.Certificate {
	r.t.Helper()
	list, err := r.e.CertificatesOf(context.Background(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

func (r *rig) closings() []pki.Closing {
	r.t.Helper()
	var list []pki.Closing
	r.do(func(tx *bolt.Tx) (err error) { list, err = tx.Closings(); return err })
	return list
}

// outbox takes everything out of the outbox.
func (r *rig) outbox() []downlink.Entry {
	r.t.Helper()
	var list []downlink.Entry
	r.do(func(tx *bolt.Tx) (err error) {
		if list, err = tx.Outbox(0); err != nil {
			return err
		}
		var seqs []uint64
		for _, e := range list {
			seqs = append(seqs, e.Seq)
		}
		return tx.DropOutbox(seqs)
	})
	return list
}

// wantOutbox takes the outbox, which must hold exactly these entries: kind, vhost, ref.
func (r *rig) wantOutbox(want ...[3]string) {
	r.t.Helper()
	var got [][3]string
	for _, e := range r.outbox() {
		got = append(got, [3]string{string(e.Kind), e.Vhost, e.Ref})
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("outbox holds %v, want %v", got, want)
	}
}

// disable is for an operator who does not wait for the proof.
func (r *rig) disable(at time.Time, id fleet.DeviceID) error {
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, err := r.e.Disable(ctx, at, id, "ops")
	return err
}

func (r *rig) connected(at time.Time, id fleet.DeviceID, s fleet.Serial) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error { return r.e.Connected(tx, at, id, s) })
}

func (r *rig) request(at time.Time, id fleet.DeviceID, csr []byte, via pki.Via) error {
	return r.db.Update(context.Background(), func(tx *bolt.Tx) error { return r.e.RequestByCSR(tx, at, id, csr, via) })
}

// enrolled issues a certificate for the device and has it connect with it.
func (r *rig) enrolled(at time.Time, id fleet.DeviceID) pki.Certificate {
	r.t.Helper()
	c, err := r.e.Issue(context.Background(), at, id, csrOf(r.t, newKey(r.t), id), enroll.IssueOptions{By: "test"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.connected(at, id, c.Serial)
	return r.cert(c.Serial)
}

func (r *rig) online(id fleet.DeviceID, s fleet.Serial) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		return tx.PutStatus(fleet.Status{Device: id, Online: true, Serial: s, Vhost: wire.VhostDevices})
	})
	r.broker.connect(wire.CertUser(id, s))
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csrOf(t testing.TB, k *ecdsa.PrivateKey, id fleet.DeviceID) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: string(id)}}, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// wantCode fails unless err is a fleet.Error with that code.
func wantCode(t *testing.T, err error, kind fleet.Kind, code string) {
	t.Helper()
	e, ok := errors.AsType[*fleet.Error](err)
	if !ok || e.Kind != kind || e.Code != code {
		t.Errorf("got %v, want %s %s", err, kind, code)
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }
