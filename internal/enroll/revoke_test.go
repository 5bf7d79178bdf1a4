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
		for _, c := range r.closings() {
			if c.Open() || !c.LastLook.Equal(rev.LastLook) || rev.LastLook.Sub(at) < time.Minute {
				t.Errorf("%+v: more is left than the last look at %s", c, rev.LastLook)
			}
		}
		if !rev.StoredAt.Equal(at) || !rev.ClosedAt.Equal(at) || rev.EndedAt.IsZero() != true || rev.Refused != (enroll.Refusal{}) {
			t.Errorf("%+v", rev.Evidence)
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
				time.Sleep(3 * time.Minute)
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
		r.broker.onClosing(func(u string) {
			if u == user && r.broker.closes(user) == 1 {
				go func() { time.Sleep(time.Second); r.broker.connect(user) }() // a connect that was under way
			}
		})
		ev, err := r.e.Disable(t.Context(), at, dev, "ops")
		if err != nil {
			t.Fatal(err)
		}
		if !ev.Clean || ev.Live != 1 || ev.Closed > time.Millisecond || ev.Attempts != 2 || ev.Verified != 10*time.Second || r.broker.isOpen(user) || !r.device(dev).Disabled {
			t.Errorf("%+v", ev)
		}
		if again, err := r.e.Disable(t.Context(), time.Now(), dev, "ops"); err != nil || !again.Clean || !again.StoredAt.Equal(at) || !again.LastLook.Equal(ev.LastLook) {
			t.Errorf("again: %+v, %v", again, err)
		}
		time.Sleep(2 * time.Minute)
		if r.broker.isOpen(user) || len(r.closings()) != 0 {
			t.Error("came in again")
		}
		disable := func() { // for an operator who does not wait
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := r.e.Disable(ctx, time.Now(), dev, "ops"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // Run has taken over and told the broker: a session that opens from here on is a new one
		}
		disable()
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
		disable()
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
			disable()
			if err := r.e.Enable(t.Context(), time.Now(), dev, "ops"); err != nil {
				t.Fatal(err)
			}
		}
		disable()
		time.Sleep(3 * time.Second) // six after the first
		r.broker.connect(user)
		time.Sleep(2 * time.Minute)
		if r.broker.isOpen(user) || len(r.closings()) != 0 {
			t.Error("the second promise died with the first")
		}
		_, err = r.e.Disable(t.Context(), at, "nobody", "x")
		for _, err := range []error{err, r.e.Enable(t.Context(), at, "nobody", "x")} {
			if !fleet.Is(err, fleet.NotFound) {
				t.Errorf("unknown device: %v", err)
			}
		}
	})
}

// Somebody is in again when all the first looks are over, and muster was killed in between: the last look finds it.
func TestTheLastLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		c := r.enrolled(at, dev)
		user := wire.CertUser(dev, c.Serial)
		r.online(dev, c.Serial)
		rev, err := r.e.Revoke(t.Context(), at, c.Serial, 0, "ops")
		if err != nil || !rev.Clean {
			t.Fatal(rev, err)
		}
		r.broker.connect(user)
		r.kill(enroll.Policy{})
		stop := r.running()
		defer stop()
		time.Sleep(50*time.Second - time.Since(at))
		if !r.broker.isOpen(user) {
			t.Error("closed before the last look")
		}
		time.Sleep(2 * time.Minute)
		if r.broker.isOpen(user) || r.broker.closes(user) != 2 || len(r.closings()) != 0 {
			t.Errorf("closed %d times, %v left", r.broker.closes(user), r.closings())
		}
	})
}

// The answer names the first login that was refused, and when the broker said that the session ended.
func TestEvidenceOfARevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		old := r.enrolled(at, dev)
		cur := r.enrolled(at, dev)
		watching := 0
		var seen []enroll.Refusal
		r.conf.Refusals = func(id fleet.DeviceID) (func() []enroll.Refusal, func()) {
			if id != dev {
				t.Errorf("watches %s", id)
			}
			watching++
			return func() []enroll.Refusal { return seen }, func() { watching-- }
		}
		r.e = r.with(enroll.Policy{})
		seen = []enroll.Refusal{
			{At: at.Add(-time.Second), Serial: old.Serial, Why: "before"}, {At: at.Add(time.Second), Serial: cur.Serial, Why: "another certificate"},
			{At: at.Add(2 * time.Second), Serial: old.Serial, Why: "this"}, {At: at.Add(3 * time.Second), Serial: old.Serial, Why: "later"},
		}
		rev, err := r.e.Revoke(t.Context(), at, old.Serial, 0, "ops")
		if err != nil || rev.Refused.Why != "this" {
			t.Errorf("one certificate: %+v, %v", rev, err)
		}
		at = time.Now()
		seen = []enroll.Refusal{{At: at.Add(time.Second), Why: "the password, too"}}
		r.online(dev, cur.Serial)
		r.broker.onClosing(func(u string) {
			if u == wire.CertUser(dev, cur.Serial) {
				r.do(func(tx *bolt.Tx) error {
					return tx.PutStatus(fleet.Status{Device: dev, Serial: cur.Serial, LostAt: at.Add(40 * time.Millisecond)})
				})
			}
		})
		rev, err = r.e.Revoke(t.Context(), at, cur.Serial, 0, "ops")
		if err != nil || rev.Refused.Why != "the password, too" || !rev.EndedAt.Equal(at.Add(40*time.Millisecond)) {
			t.Errorf("the device: %+v, %v", rev, err)
		}
		if watching != 0 {
			t.Errorf("%d watches are left", watching)
		}
	})
}

func TestRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		key := newKey(t)
		old := r.enrolled(at, dev)
		c, err := r.e.Issue(t.Context(), at, dev, csrOf(t, key, dev), enroll.IssueOptions{})
		if err != nil {
			t.Fatal(err)
		}
		r.connected(at, dev, c.Serial)
		user := wire.CertUser(dev, c.Serial)
		r.online(dev, c.Serial)
		ev, err := r.e.Remove(t.Context(), at, dev, "ops")
		if err != nil {
			t.Fatal(err)
		}
		if !ev.Clean || ev.Live != 1 || ev.Closed > time.Millisecond || ev.Verified != 5*time.Second || r.broker.isOpen(user) {
			t.Errorf("%+v", ev)
		}
		r.do(func(tx *bolt.Tx) error {
			if _, err := tx.Device(dev); !fleet.Is(err, fleet.NotFound) {
				t.Errorf("it is there: %v", err)
			}
			if st, err := tx.Status(dev); err != nil || st.Online {
				t.Errorf("%+v, %v", st, err)
			}
			return nil
		})
		for _, s := range []fleet.Serial{old.Serial, c.Serial} {
			if c := r.cert(s); c.State != pki.Revoked || c.Reason != 5 || c.By != "ops" {
				t.Errorf("%+v", c)
			}
		}
		time.Sleep(time.Hour)
		again, err := r.e.Remove(t.Context(), time.Now(), dev, "ops")
		if err != nil || !again.Clean || again.Live != 0 || !again.StoredAt.Equal(at) {
			t.Errorf("again: %+v, %v", again, err)
		}
		if _, err := r.e.Remove(t.Context(), at, "nobody", "ops"); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("unknown device: %v", err)
		}
		// Another device of the same name is not kept out, and the key is not taken again.
		r.addDevice(dev)
		_, err = r.e.Issue(t.Context(), time.Now(), dev, csrOf(t, key, dev), enroll.IssueOptions{})
		wantCode(t, err, fleet.Forbidden, pki.CodeKeyRevoked)
		r.addDevice("pump-8")
		_, err = r.e.Issue(t.Context(), time.Now(), "pump-8", csrOf(t, key, "pump-8"), enroll.IssueOptions{})
		wantCode(t, err, fleet.Conflict, pki.CodeKeyInUse)
		r.enrolled(time.Now(), dev)
	})
}

// kill -9 right after a removal was stored: Run closes what is open. A device that is added under its name meanwhile may
// use the fallback.
func TestRemoveResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		at := time.Now()
		c := r.enrolled(at, dev)
		user := wire.CertUser(dev, c.Serial)
		r.online(dev, c.Serial)
		r.broker.fail(errors.New("connection refused"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		ev, err := r.e.Remove(ctx, at, dev, "ops")
		if err != nil || ev.Clean || ev.Detail == "" || !ev.LastLook.IsZero() {
			t.Errorf("%+v, %v", ev, err)
		}
		r.kill(enroll.Policy{})
		r.broker.fail(nil)
		stop := r.running()
		defer stop()
		time.Sleep(10 * time.Second)
		if r.broker.isOpen(user) {
			t.Error("the session lives on")
		}
		r.addDevice(dev)
		r.broker.connect(string(dev))
		time.Sleep(2 * time.Minute)
		if !r.broker.isOpen(string(dev)) || len(r.closings()) != 0 {
			t.Errorf("the new device was closed, or %v is left", r.closings())
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
		time.Sleep(2 * time.Minute)
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
