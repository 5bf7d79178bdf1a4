package recovery

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"muster/internal/access"
	"muster/internal/ca"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

const dev = fleet.DeviceID("pump-7")

var authority = sync.OnceValues(func() (*ca.Authority, error) {
	h, err := ca.Create(ca.CreateOptions{At: time.Now()})
	if err != nil {
		return nil, err
	}
	return ca.NewAuthority(h, pki.KeyPolicy{}, nil)
})

// nobody is a broker without sessions.
type nobody struct{}

func (nobody) CloseUser(context.Context, string, string) error     { return nil }
func (nobody) UserConnected(context.Context, string) (bool, error) { return false, nil }

type rig struct {
	t  *testing.T
	db *bolt.DB
	e  *enroll.Enroller
	r  *Recovery
	at time.Time
}

func newRig(t *testing.T, p Policy) *rig {
	t.Helper()
	a, err := authority()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, db: storetest.Open(t), at: time.Now()}
	log := slog.New(slog.DiscardHandler)
	r.e, err = enroll.New(enroll.Config{
		Update: func(ctx context.Context, f func(enroll.Tx) error) error {
			return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: a, Sessions: nobody{}, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.r, err = New(Config{
		Update: func(ctx context.Context, f func(Tx) error) error {
			return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Enroll: r.e, Policy: p, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.add(dev)
	return r
}

func (r *rig) do(f func(*bolt.Tx) error) {
	r.t.Helper()
	if err := r.db.Update(context.Background(), f); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) add(id fleet.DeviceID) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: id, Product: "pump"}) })
}

// csr sends a request a minute after the last message.
func (r *rig) csr(id fleet.DeviceID, csr []byte) error {
	r.at = r.at.Add(time.Minute)
	return r.db.Update(context.Background(), func(tx *bolt.Tx) error { return r.r.CSR(tx, r.at, id, csr) })
}

func (r *rig) sign() {
	r.t.Helper()
	if err := r.e.SignPending(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) device(id fleet.DeviceID) (d fleet.Device) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) (err error) { d, err = tx.Device(id); return err })
	return d
}

// wantOutbox takes the outbox, which must hold exactly these kinds and references, all for the fallback.
func (r *rig) wantOutbox(want ...[2]string) {
	r.t.Helper()
	var got [][2]string
	r.do(func(tx *bolt.Tx) error {
		list, err := tx.Outbox(0)
		if err != nil {
			return err
		}
		var seqs []uint64
		for _, e := range list {
			if e.Vhost != wire.VhostFallback {
				r.t.Errorf("%s goes to vhost %s", e.Kind, e.Vhost)
			}
			got = append(got, [2]string{string(e.Kind), e.Ref})
			seqs = append(seqs, e.Seq)
		}
		return tx.DropOutbox(seqs)
	})
	if !slices.Equal(got, want) {
		r.t.Errorf("outbox holds %v, want %v", got, want)
	}
}

func (r *rig) audited(what string) (list []access.Entry) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		all, err := tx.AuditEntries(0, 0)
		for _, e := range all {
			if e.What == what {
				list = append(list, e)
			}
		}
		return err
	})
	return list
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csrOf(t *testing.T, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// enrolled gives a device a certificate for key that it uses.
func (r *rig) enrolled(id fleet.DeviceID, key *ecdsa.PrivateKey) pki.Certificate {
	r.t.Helper()
	c, err := r.e.Issue(r.t.Context(), r.at, id, csrOf(r.t, key), enroll.IssueOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	r.do(func(tx *bolt.Tx) error { return r.e.Connected(tx, r.at, id, c.Serial) })
	return c
}

func (r *rig) requests() []pki.Request {
	r.t.Helper()
	list, err := r.r.Requests(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// A key of the device's own brings a certificate at once, whatever became of the certificate, unless it was revoked.
func TestKnownKey(t *testing.T) {
	for name, c := range map[string]struct {
		then func(*rig, pki.Certificate)
		code string // of the refusal; empty: a certificate
	}{
		"active":     {func(*rig, pki.Certificate) {}, ""},
		"expired":    {func(r *rig, _ pki.Certificate) { r.sweep(100 * 24 * time.Hour) }, ""},
		"superseded": {func(r *rig, _ pki.Certificate) { r.enrolled(dev, newKey(r.t)) }, ""},
		"retired": {func(r *rig, _ pki.Certificate) {
			r.enrolled(dev, newKey(r.t))
			r.sweep(48 * time.Hour)
		}, ""},
		"revoked alone": {func(r *rig, c pki.Certificate) {
			r.enrolled(dev, newKey(r.t))
			r.do(func(tx *bolt.Tx) error {
				got, err := tx.Certificate(c.Serial)
				if err != nil {
					return err
				}
				if err := got.Become(pki.Revoked, r.at); err != nil {
					return err
				}
				return tx.PutCertificate(got)
			})
		}, pki.CodeKeyRevoked},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Policy{})
			key := newKey(t)
			first := r.enrolled(dev, key)
			c.then(r, first)
			if err := r.csr(dev, csrOf(t, key)); err != nil {
				t.Fatal(err)
			}
			r.sign()
			next := r.device(dev).Next
			if c.code != "" {
				r.wantOutbox([2]string{"no", c.code})
				if next != "" {
					t.Error("it got a certificate")
				}
				return
			}
			if next == "" || next == first.Serial {
				t.Fatal("no new certificate")
			}
			r.wantOutbox([2]string{"cert", string(next)})
			if n := len(r.audited("recovery.request")); n != 1 {
				t.Errorf("%d audit lines", n)
			}
			if len(r.requests()) != 0 {
				t.Error("an operator is asked for nothing")
			}
		})
	}
}

func (r *rig) sweep(after time.Duration) {
	r.t.Helper()
	r.at = r.at.Add(after)
	if _, err := r.e.Sweep(r.t.Context(), r.at); err != nil {
		r.t.Fatal(err)
	}
}

// A new key waits for an operator: one request however often it is asked for.
func TestNewKeyIsApproved(t *testing.T) {
	r := newRig(t, Policy{})
	r.enrolled(dev, newKey(t))
	key := newKey(t)
	for range 3 {
		if err := r.csr(dev, csrOf(t, key)); err != nil {
			t.Fatal(err)
		}
		r.wantOutbox([2]string{"no", enroll.CodeWait})
	}
	r.sign()
	list := r.requests()
	if len(list) != 1 || list[0].State != pki.Waiting || list[0].Device != dev || r.device(dev).Next != "" {
		t.Fatalf("%+v", list)
	}
	q := list[0]
	for range 2 {
		got, err := r.r.Approve(t.Context(), r.at, q.ID, "ops")
		if err != nil || got.State != pki.Approved || got.By != "ops" {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	// It asks again before its certificate is there.
	if err := r.csr(dev, csrOf(t, key)); err != nil {
		t.Fatal(err)
	}
	r.sign()
	next := r.device(dev).Next
	r.wantOutbox([2]string{"cert", string(next)})
	var c pki.Certificate
	r.do(func(tx *bolt.Tx) (err error) { c, err = tx.Certificate(next); return err })
	if c.KeyHash != q.KeyHash || c.By != "ops" || c.Via != pki.ViaRecovery {
		t.Errorf("%+v", c)
	}
	if _, err := r.r.Deny(t.Context(), r.at, q.ID, "ops"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("denied after it was approved: %v", err)
	}
	if n := len(r.audited("recovery.approve")); n != 1 {
		t.Errorf("%d audit lines for one approval", n)
	}
}

func TestNewKeyIsDenied(t *testing.T) {
	r := newRig(t, Policy{})
	key := newKey(t)
	if err := r.csr(dev, csrOf(t, key)); err != nil {
		t.Fatal(err)
	}
	id := r.requests()[0].ID
	for range 2 {
		if _, err := r.r.Deny(t.Context(), r.at, id, "ops"); err != nil {
			t.Fatal(err)
		}
	}
	r.wantOutbox([2]string{"no", enroll.CodeWait}, [2]string{"no", enroll.CodeDenied})
	if err := r.csr(dev, csrOf(t, key)); err != nil {
		t.Fatal(err)
	}
	r.wantOutbox([2]string{"no", enroll.CodeDenied})
	if _, err := r.r.Approve(t.Context(), r.at, id, "ops"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("approved after it was denied: %v", err)
	}
	for _, f := range []func(context.Context, time.Time, string, string) (pki.Request, error){r.r.Approve, r.r.Deny} {
		if _, err := f(t.Context(), r.at, "0123456789abcdef", "ops"); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("unknown request: %v", err)
		}
	}
}

func TestNewKeyByPolicy(t *testing.T) {
	r := newRig(t, Policy{ApproveNewKeys: true})
	if err := r.csr(dev, csrOf(t, newKey(t))); err != nil {
		t.Fatal(err)
	}
	r.sign()
	if r.device(dev).Next == "" || len(r.requests()) != 0 {
		t.Error("the policy approves, and yet it waits")
	}
}

// Somebody else's key is refused by either door, also when it got into use after the request.
func TestForeignKeys(t *testing.T) {
	r := newRig(t, Policy{})
	r.add("pump-8")
	theirs, late := newKey(t), newKey(t)
	r.enrolled("pump-8", theirs)
	if err := r.csr(dev, csrOf(t, theirs)); err != nil {
		t.Fatal(err)
	}
	r.wantOutbox([2]string{"no", pki.CodeKeyInUse})
	if err := r.csr(dev, csrOf(t, late)); err != nil {
		t.Fatal(err)
	}
	if err := r.csr("pump-8", csrOf(t, late)); err != nil {
		t.Fatal(err)
	}
	r.wantOutbox([2]string{"no", enroll.CodeWait}, [2]string{"no", pki.CodeKeyInUse})
	r.enrolled("pump-8", late)
	if _, err := r.r.Approve(t.Context(), r.at, r.requests()[0].ID, "ops"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("approved a key that is in use: %v", err)
	}
	if q := r.requests()[0]; q.State != pki.Waiting {
		t.Errorf("the request is %s", q.State)
	}
}

func TestBarredDevices(t *testing.T) {
	for name, c := range map[string]struct {
		bar  func(*fleet.Device)
		code string
	}{
		"disabled": {func(d *fleet.Device) { d.Disabled = true }, enroll.CodeDisabled},
		"revoked":  {func(d *fleet.Device) { d.RecoveryOff = "revoked" }, enroll.CodeRevoked},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Policy{})
			key := newKey(t)
			r.enrolled(dev, key)
			if err := r.csr(dev, csrOf(t, newKey(t))); err != nil {
				t.Fatal(err)
			}
			r.wantOutbox([2]string{"no", enroll.CodeWait})
			r.do(func(tx *bolt.Tx) error {
				d, err := tx.Device(dev)
				c.bar(&d)
				if err != nil {
					return err
				}
				return tx.PutDevice(d)
			})
			if err := r.csr(dev, csrOf(t, key)); err != nil {
				t.Fatal(err)
			}
			r.do(func(tx *bolt.Tx) error { return r.r.Hello(tx, r.at, dev, wire.Hello{}) })
			r.sign()
			r.wantOutbox()
			if r.device(dev).Next != "" {
				t.Error("it got a certificate")
			}
			for what, want := range map[string]int{"recovery.request": 2, "recovery.hello": 1} { // the first was let in
				if n := len(r.audited(what)); n != want {
					t.Errorf("%s: %d audit lines", what, n)
				}
			}
			_, err := r.r.Approve(t.Context(), r.at, r.requests()[0].ID, "ops")
			if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.Forbidden || e.Code != c.code {
				t.Errorf("approved for a barred device: %v", err)
			}
		})
	}
}

func TestHelloGetsWhatWaits(t *testing.T) {
	r := newRig(t, Policy{})
	key := newKey(t)
	r.enrolled(dev, key)
	hello := func() { r.do(func(tx *bolt.Tx) error { return r.r.Hello(tx, r.at, dev, wire.Hello{}) }) }
	hello()
	r.wantOutbox()
	if err := r.csr(dev, csrOf(t, key)); err != nil {
		t.Fatal(err)
	}
	r.sign()
	next := string(r.device(dev).Next)
	r.wantOutbox([2]string{"cert", next})
	hello() // it lost power before it had it
	r.wantOutbox([2]string{"cert", next})
	err := r.db.Update(t.Context(), func(tx *bolt.Tx) error { return r.r.Hello(tx, r.at, "nobody", wire.Hello{}) })
	if !fleet.Is(err, fleet.Invalid) {
		t.Errorf("unknown device: %v", err)
	}
}

func TestUnreadable(t *testing.T) {
	r := newRig(t, Policy{})
	for name, csr := range map[string][]byte{"garbage": []byte("x"), "nothing": nil, "huge": make([]byte, pki.MaxCSR+1)} {
		if err := r.csr(dev, csr); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.csr("nobody", csrOf(t, newKey(t))); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("unknown device: %v", err)
	}
	if len(r.requests()) != 0 {
		t.Error("something was stored")
	}
}

func TestLimits(t *testing.T) {
	r := newRig(t, Policy{PerDeviceHour: 2, PerSecond: 1})
	burst := func(id fleet.DeviceID, n int) {
		for i := range n {
			at := r.at.Add(time.Duration(i) * time.Millisecond)
			r.do(func(tx *bolt.Tx) error { return r.r.CSR(tx, at, id, csrOf(t, newKey(t))) })
		}
	}
	burst(dev, 10)
	r.wantOutbox([2]string{"no", enroll.CodeWait}, [2]string{"no", enroll.CodeWait}) // and eight that are ignored
	// All together: five at once, the rest is put off, told so and not stored.
	for i := range 5 {
		id := fleet.DeviceID(fmt.Sprintf("many-%d", i))
		r.add(id)
		burst(id, 1)
	}
	r.wantOutbox([2]string{"no", enroll.CodeWait}, [2]string{"no", enroll.CodeWait}, [2]string{"no", enroll.CodeWait}, [2]string{"no", enroll.CodeLater}, [2]string{"no", enroll.CodeLater})
	if n := len(r.requests()); n != 5 {
		t.Errorf("%d requests wait", n)
	}
	if _, err := New(Config{Policy: Policy{PerDeviceHour: -1}}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("negative rate: %v", err)
	}
}

func TestWaitingIsBoundedPerDevice(t *testing.T) {
	r := newRig(t, Policy{})
	for range maxWaitingPerDevice {
		if err := r.csr(dev, csrOf(t, newKey(t))); err != nil {
			t.Fatal(err)
		}
		r.wantOutbox([2]string{"no", enroll.CodeWait})
	}
	if err := r.csr(dev, csrOf(t, newKey(t))); err != nil {
		t.Fatal(err)
	}
	r.wantOutbox([2]string{"no", enroll.CodeLater})
	if n := len(r.requests()); n != maxWaitingPerDevice {
		t.Errorf("%d requests wait", n)
	}
	// The operator's no makes room: strangers with the password cannot keep the device itself out.
	if _, err := r.r.Deny(t.Context(), r.at, r.requests()[0].ID, "ops"); err != nil {
		t.Fatal(err)
	}
	if err := r.csr(dev, csrOf(t, newKey(t))); err != nil || len(r.requests()) != maxWaitingPerDevice+1 {
		t.Errorf("no room after a denial: %v", err)
	}
}

func TestSweepDropsStale(t *testing.T) {
	r := newRig(t, Policy{})
	if err := r.csr(dev, csrOf(t, newKey(t))); err != nil {
		t.Fatal(err)
	}
	if err := r.csr(dev, csrOf(t, newKey(t))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.r.Deny(t.Context(), r.at, r.requests()[0].ID, "ops"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		after time.Duration
		left  int
	}{{29 * 24 * time.Hour, 2}, {31 * 24 * time.Hour, 1}, {91 * 24 * time.Hour, 0}} {
		n, err := r.r.Sweep(t.Context(), r.at.Add(c.after))
		if err != nil || len(r.requests()) != c.left {
			t.Errorf("after %s: %d dropped, %d left, %v", c.after, n, len(r.requests()), err)
		}
	}
}

func TestLimiterForgetsAndRepeats(t *testing.T) {
	l := newLimiter(rate.Inf, 1)
	at := time.Now()
	for range 2 {
		if l.allow("a", at) != nil {
			t.Error("the same message was judged twice")
		}
	}
	for range 2 {
		if l.allow("a", at.Add(1)) != errDevice {
			t.Error("over the limit, and let in")
		}
	}
	if l.allow("a", at.Add(2*time.Hour)) != nil {
		t.Error("not let in an hour later")
	}
	for i := range maxTracked + 10 {
		l.allow(fleet.DeviceID(fmt.Sprint("d", i)), at)
	}
	if len(l.devices) != maxTracked || l.order.Len() != maxTracked {
		t.Errorf("remembers %d and %d devices", len(l.devices), l.order.Len())
	}
}
