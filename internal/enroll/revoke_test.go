package enroll_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

// running starts Run and returns what stops it.
func (r *rig) running() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.e.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Error(err)
		}
	}
}

func TestRevokeCurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		if _, err := r.e.NewPassword(t.Context(), at, dev, "ops"); err != nil {
			t.Fatal(err)
		}
		cur := r.enrolled(at, dev)
		next := r.next(at, dev, pki.ViaMQTT)
		if err := r.request(at, dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil { // an intent, too
			t.Fatal(err)
		}
		r.online(dev, cur.Serial)
		r.broker.connect(string(dev))
		rev, err := r.e.Revoke(t.Context(), at, cur.Serial, 3, "ops")
		if err != nil {
			t.Fatal(err)
		}
		if !rev.Clean || rev.Attempts != 1 || rev.Live != 1 || rev.Verified != 5*time.Second || rev.Closed > time.Millisecond || rev.Detail != "" {
			t.Errorf("%+v", rev)
		}
		c := rev.Certificate
		if c.State != pki.Revoked || c.Reason != 3 || c.By != "ops" || !c.RevokedAt.Equal(at) || c.ClosedAt.IsZero() || c.VerifiedAt.Sub(at) != 5*time.Second {
			t.Errorf("%+v", c)
		}
		for _, u := range []string{wire.CertUser(dev, cur.Serial), wire.CertUser(dev, next), string(dev)} {
			if r.broker.closes(u) != 1 {
				t.Errorf("%s was closed %d times", u, r.broker.closes(u))
			}
		}
		d := r.device(dev)
		if d.Current != "" || d.Next != "" || d.RecoveryOff == "" || len(d.Passwords) != 1 {
			t.Errorf("%+v", d)
		}
		for _, c := range r.certs(dev) {
			if c.State != pki.Revoked {
				t.Errorf("%s is %s", c.Serial, c.State)
			}
		}
		if err := r.e.SignPending(t.Context()); err != nil || len(r.auth.all()) != 2 {
			t.Errorf("something was signed for it: %v", err)
		}
		if n := len(r.closings()); n != 0 {
			t.Errorf("%d promises left", n)
		}
		// It stays out: a new request, the key, late events.
		if err := r.request(at, dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil {
			t.Fatal(err)
		}
		r.connected(at, dev, cur.Serial)
		if d := r.device(dev); d.Current != "" {
			t.Error("a late event brought it back")
		}
		// Twice: the same answer, with the original time.
		again, err := r.e.Revoke(t.Context(), at.Add(time.Hour), cur.Serial, 1, "else")
		if err != nil || !again.Clean || !again.Certificate.RevokedAt.Equal(at) || again.Certificate.Reason != 3 || again.Certificate.By != "ops" {
			t.Errorf("again: %+v, %v", again, err)
		}
		// An operator may enrol it again, with another key.
		key := newKey(t)
		back, err := r.e.Issue(t.Context(), at.Add(time.Hour), dev, csrOf(t, key, dev), enroll.IssueOptions{By: "ops"})
		if err != nil {
			t.Fatal(err)
		}
		if d := r.device(dev); d.RecoveryOff != "" || d.Next != back.Serial {
			t.Errorf("%+v", d)
		}
	})
}

func TestRevokedKeyIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{Grace: time.Hour})
		at := time.Now()
		key := newKey(t)
		csr := csrOf(t, key, dev)
		c, err := r.e.Issue(t.Context(), at, dev, csr, enroll.IssueOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.e.Revoke(t.Context(), at, c.Serial, 1, "ops"); err != nil {
			t.Fatal(err)
		}
		if len(r.device(dev).Passwords) != 0 {
			t.Error("the key is compromised, and the password that lay beside it works")
		}
		_, err = r.e.Issue(t.Context(), at, dev, csr, enroll.IssueOptions{})
		wantCode(t, err, fleet.Forbidden, pki.CodeKeyRevoked)
		r.addDevice("pump-8")
		_, err = r.e.Issue(t.Context(), at, "pump-8", csrOf(t, key, "pump-8"), enroll.IssueOptions{})
		wantCode(t, err, fleet.Conflict, pki.CodeKeyInUse)

		// But a certificate that muster itself retired does not burn the key of a device that renews without a new one.
		same := csrOf(t, newKey(t), dev)
		if _, err := r.e.Issue(t.Context(), at, dev, same, enroll.IssueOptions{}); err != nil {
			t.Fatal(err)
		}
		first := r.device(dev).Next
		r.connected(at, dev, first)
		second, err := r.e.Issue(t.Context(), at.Add(80*day), dev, same, enroll.IssueOptions{})
		if err != nil || second.Serial == first {
			t.Fatalf("renewal with the same key: %v", err)
		}
		r.connected(at.Add(80*day), dev, second.Serial)
		if s, err := r.e.Sweep(t.Context(), at.Add(80*day+2*time.Hour)); err != nil || s.Retired != 1 {
			t.Fatalf("%+v, %v", s, err)
		}
		if c := r.cert(first); c.State != pki.Revoked || c.Reason != pki.ReasonSuperseded || c.By != "muster" {
			t.Errorf("%+v", c)
		}
		if _, err := r.e.Issue(t.Context(), at.Add(160*day), dev, same, enroll.IssueOptions{}); err != nil {
			t.Errorf("the device is locked out by its own renewal: %v", err)
		}
	})
}

func TestRevokeRefuses(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	for _, reason := range []int{-1, 2, 6, 7, 8, 10, 11, 999} {
		if _, err := r.e.Revoke(t.Context(), time.Now(), "abc", reason, "ops"); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("reason %d: %v", reason, err)
		}
	}
	if _, err := r.e.Revoke(t.Context(), time.Now(), "abc", 0, "ops"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("unknown serial: %v", err)
	}
}

func TestRevokeSuperseded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		old := r.enrolled(at, dev)
		cur := r.enrolled(at, dev)
		if _, err := r.e.Revoke(t.Context(), at, old.Serial, 0, "ops"); err != nil {
			t.Fatal(err)
		}
		d := r.device(dev)
		if d.Current != cur.Serial || d.RecoveryOff != "" || r.cert(cur.Serial).State != pki.Active {
			t.Errorf("revoking an old certificate hit the device: %+v", d)
		}
		if r.broker.closes(wire.CertUser(dev, cur.Serial)) != 0 || r.broker.closes(string(dev)) != 0 {
			t.Error("closed the sessions of the good one")
		}
	})
}

// A connect that was under way shows up after the close: it is closed again.
func TestRevokeClosesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		c := r.enrolled(at, dev)
		user := wire.CertUser(dev, c.Serial)
		r.online(dev, c.Serial)
		r.broker.onClosing(func(u string) {
			if u == user && r.broker.closes(user) == 1 {
				go func() { time.Sleep(3 * time.Second); r.broker.connect(user) }()
			}
		})
		rev, err := r.e.Revoke(t.Context(), at, c.Serial, 0, "ops")
		if err != nil {
			t.Fatal(err)
		}
		if !rev.Clean || rev.Attempts != 2 || rev.Verified != 10*time.Second || r.broker.closes(user) != 2 {
			t.Errorf("%+v, closed %d times", rev, r.broker.closes(user))
		}
	})
}

// The broker is away: the revocation holds, the answer says what is open, and Run finishes it; also after kill -9.
func TestRevokeWithoutBroker(t *testing.T) {
	for name, restart := range map[string]bool{"same process": false, "after kill -9": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, enroll.Policy{})
				at := time.Now()
				c := r.enrolled(at, dev)
				user := wire.CertUser(dev, c.Serial)
				r.online(dev, c.Serial)
				r.broker.fail(errors.New("connection refused"))
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				rev, err := r.e.Revoke(ctx, at, c.Serial, 0, "ops")
				if err != nil {
					t.Fatal(err)
				}
				if rev.Clean || rev.Detail == "" || rev.Closed != 0 || rev.Verified != 0 || rev.Certificate.State != pki.Revoked || time.Since(at) != 20*time.Second {
					t.Errorf("%+v", rev)
				}
				if n := len(r.closings()); n != 2 {
					t.Fatalf("%d promises", n)
				}
				if restart {
					r.kill(enroll.Policy{})
				}
				stop := r.running()
				time.Sleep(time.Minute)
				r.broker.fail(nil)
				time.Sleep(2 * time.Minute)
				stop()
				if r.broker.closes(user) == 0 || r.broker.isOpen(user) || len(r.closings()) != 0 {
					t.Error("the session lives on")
				}
				if got := r.cert(c.Serial); got.ClosedAt.IsZero() || got.VerifiedAt.IsZero() {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

// Two operators at once, with Run in between: both get the same answer.
func TestRevokeTwiceAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		c := r.enrolled(at, dev)
		r.online(dev, c.Serial)
		stop := r.running()
		got := make(chan enroll.Revocation, 2)
		for range 2 {
			go func() {
				rev, err := r.e.Revoke(context.Background(), at, c.Serial, 0, "ops")
				if err != nil {
					t.Error(err)
				}
				got <- rev
			}()
		}
		for range 2 {
			if rev := <-got; !rev.Clean || rev.Verified < 5*time.Second || !rev.Certificate.RevokedAt.Equal(at) {
				t.Errorf("%+v", rev)
			}
		}
		stop()
	})
}

func TestDisableAndEnable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		c := r.enrolled(at, dev)
		user := wire.CertUser(dev, c.Serial)
		r.online(dev, c.Serial)
		stop := r.running()
		defer stop()
		for range 2 {
			if err := r.e.Disable(t.Context(), at, dev, "ops"); err != nil {
				t.Fatal(err)
			}
		}
		if r.broker.isOpen(user) || !r.device(dev).Disabled || time.Since(at) > time.Millisecond {
			t.Error("not thrown out at once")
		}
		time.Sleep(time.Second)
		r.broker.connect(user) // a connect that was under way
		time.Sleep(time.Minute)
		if r.broker.isOpen(user) || len(r.closings()) != 0 {
			t.Error("came in again")
		}
		if err := r.e.Disable(t.Context(), at, dev, "ops"); err != nil {
			t.Fatal(err)
		}
		closed := r.broker.closes(user)
		if err := r.e.Enable(t.Context(), at, dev, "ops"); err != nil {
			t.Fatal(err)
		}
		r.broker.connect(user)
		time.Sleep(time.Minute)
		if !r.broker.isOpen(user) || r.broker.closes(user) != closed || r.cert(c.Serial).State != pki.Active {
			t.Error("an enabled device was thrown out")
		}
		// Enabled in the middle of the closing.
		if err := r.e.Disable(t.Context(), time.Now(), dev, "ops"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := r.e.Enable(t.Context(), time.Now(), dev, "ops"); err != nil {
			t.Fatal(err)
		}
		r.broker.connect(user)
		time.Sleep(time.Minute)
		if !r.broker.isOpen(user) || len(r.closings()) != 0 {
			t.Error("a closing outlived its reason")
		}
		// Disabled, enabled and disabled again: the second promise is kept in full, whatever came of the first.
		for range 2 {
			if err := r.e.Disable(t.Context(), time.Now(), dev, "ops"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			if err := r.e.Enable(t.Context(), time.Now(), dev, "ops"); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.e.Disable(t.Context(), time.Now(), dev, "ops"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Second) // six after the first
		r.broker.connect(user)
		time.Sleep(time.Minute)
		if r.broker.isOpen(user) || len(r.closings()) != 0 {
			t.Error("the second promise died with the first")
		}
		for _, err := range []error{r.e.Disable(t.Context(), at, "nobody", "x"), r.e.Enable(t.Context(), at, "nobody", "x")} {
			if !fleet.Is(err, fleet.NotFound) {
				t.Errorf("unknown device: %v", err)
			}
		}
	})
}

// RabbitMQ keeps the connection of a certificate that ended: the sweep closes it.
func TestSweepExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		c, err := r.e.Issue(t.Context(), at, dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{Lifetime: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		r.connected(at, dev, c.Serial)
		user := wire.CertUser(dev, c.Serial)
		r.online(dev, c.Serial)
		stop := r.running()
		defer stop()
		if s, err := r.e.Sweep(t.Context(), at.Add(30*time.Second)); err != nil || s != (enroll.Swept{}) {
			t.Errorf("too early: %+v, %v", s, err)
		}
		s, err := r.e.Sweep(t.Context(), at.Add(61*time.Second))
		if err != nil || s.Expired != 1 || s.Open != 1 {
			t.Errorf("%+v, %v", s, err)
		}
		time.Sleep(time.Minute)
		if r.broker.isOpen(user) || len(r.closings()) != 0 || r.cert(c.Serial).State != pki.Expired {
			t.Error("the session outlived its certificate")
		}
		// It comes back with the key that muster knows, and the expired one does not stand in the way.
		later := at.Add(time.Hour)
		next := r.next(later, dev, pki.ViaRecovery)
		r.connected(later, dev, next)
		if d := r.device(dev); d.Current != next || r.cert(c.Serial).State != pki.Expired {
			t.Errorf("%+v", d)
		}
		if s, err := r.e.Sweep(t.Context(), later); err != nil || s != (enroll.Swept{}) {
			t.Errorf("again: %+v, %v", s, err)
		}
	})
}

func TestSweepInBatches(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	old := r.enrolled(at, dev)
	const n = 600
	r.do(func(tx *bolt.Tx) error {
		for i := range n {
			c := old
			c.Serial = fleet.SerialOf(old.Serial.Big().SetInt64(int64(i + 1)))
			c.State, c.SupersededAt = pki.Superseded, at
			if err := tx.PutCertificate(c); err != nil {
				return err
			}
		}
		return nil
	})
	s, err := r.e.Sweep(t.Context(), at.Add(25*time.Hour))
	if err != nil || s.Retired != n || s.Expired != 0 || s.Open != n {
		t.Errorf("%+v, %v", s, err)
	}
}
