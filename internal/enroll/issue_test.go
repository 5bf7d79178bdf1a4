package enroll_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/ca"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

func TestIssueAndPromote(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	key := newKey(t)
	csr := csrOf(t, key, dev)
	c, err := r.e.Issue(t.Context(), at, dev, csr, enroll.IssueOptions{By: "ops"})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(c.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if fleet.SerialOf(leaf.SerialNumber) != c.Serial || !leaf.NotAfter.Equal(c.NotAfter) || !leaf.NotBefore.Equal(c.NotBefore) || c.State != pki.Issued || c.By != "ops" {
		t.Errorf("record and certificate disagree: %+v", c)
	}
	if life := c.NotAfter.Sub(at); life > 90*day || life < 85*day {
		t.Errorf("lives for %s", life)
	}
	if d := r.device(dev); d.Next != c.Serial || d.Current != "" {
		t.Errorf("slots: %q %q", d.Current, d.Next)
	}
	r.wantOutbox() // the operator has it
	// The same key, and even the same request: the same certificate.
	for _, csr := range [][]byte{csr, csrOf(t, key, dev)} {
		again, err := r.e.Issue(t.Context(), at.Add(time.Hour), dev, csr, enroll.IssueOptions{By: "ops"})
		if err != nil || again.Serial != c.Serial || !bytes.Equal(again.Chain[0], c.Chain[0]) {
			t.Errorf("again: %s, %v", again.Serial, err)
		}
	}
	r.connected(at, dev, "abc") // of another device, or of none
	if d := r.device(dev); d.Next != c.Serial {
		t.Error("an unknown serial changed the slots")
	}
	r.connected(at, dev, c.Serial)
	r.connected(at.Add(time.Hour), dev, c.Serial)
	if d := r.device(dev); d.Current != c.Serial || d.Next != "" {
		t.Errorf("slots: %q %q", d.Current, d.Next)
	}
	if got := r.cert(c.Serial); got.State != pki.Active || !got.ActiveAt.Equal(at) {
		t.Errorf("%s since %s", got.State, got.ActiveAt)
	}
	second, err := r.e.Issue(t.Context(), at, dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{})
	if err != nil {
		t.Fatal(err)
	}
	third, err := r.e.Issue(t.Context(), at, dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if r.cert(second.Serial).State != pki.Superseded || r.cert(c.Serial).State != pki.Active || r.device(dev).Next != third.Serial {
		t.Error("a newer certificate did not take the place of the one that was not used")
	}
	r.connected(at, dev, third.Serial)
	if r.cert(c.Serial).State != pki.Superseded || r.cert(third.Serial).State != pki.Active {
		t.Error("the old one was not retired by the use of the new one")
	}
	r.connected(at, dev, c.Serial) // a late event of the old session
	if r.device(dev).Current != third.Serial {
		t.Error("went back")
	}
}

func TestIssueRefusals(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	r.addDevice("pump-8")
	other := newKey(t)
	if _, err := r.e.Issue(t.Context(), at, "pump-8", csrOf(t, other, "pump-8"), enroll.IssueOptions{}); err != nil {
		t.Fatal(err)
	}
	h, err := hierarchy()
	if err != nil {
		t.Fatal(err)
	}
	caCSR, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, h.Spare.Key)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	for name, c := range map[string]struct {
		id   fleet.DeviceID
		csr  []byte
		life time.Duration
		kind fleet.Kind
		code string
	}{
		"unknown device":        {"pump-9", csrOf(t, key, "pump-9"), 0, fleet.NotFound, ""},
		"another's name":        {dev, csrOf(t, key, "pump-8"), 0, fleet.Forbidden, pki.CodeIdentity},
		"another's key":         {dev, csrOf(t, other, dev), 0, fleet.Conflict, pki.CodeKeyInUse},
		"the CA's key":          {dev, caCSR, 0, fleet.Conflict, pki.CodeKeyInUse},
		"not a request":         {dev, []byte("x"), 0, fleet.Invalid, pki.CodeMalformed},
		"longer than the fleet": {dev, csrOf(t, key, dev), 91 * day, fleet.Invalid, ""},
		"too short":             {dev, csrOf(t, key, dev), time.Second, fleet.Invalid, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.e.Issue(t.Context(), at, c.id, c.csr, enroll.IssueOptions{Lifetime: c.life})
			wantCode(t, err, c.kind, c.code)
		})
	}
	if err := r.disable(at, dev); err != nil {
		t.Fatal(err)
	}
	_, err = r.e.Issue(t.Context(), at, dev, csrOf(t, key, dev), enroll.IssueOptions{})
	wantCode(t, err, fleet.Forbidden, enroll.CodeDisabled)
	if n := len(r.certs(dev)); n != 0 {
		t.Errorf("refused requests left %d records", n)
	}
}

func TestLifetimeByOrder(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	c, err := r.e.Issue(t.Context(), at, dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{Lifetime: 2 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if d := at.Add(2 * time.Minute).Sub(c.NotAfter); d < 0 || d >= time.Second {
		t.Errorf("ends %s off", d)
	}
}

// A request over the device's own session: stored with the message, signed by Run, delivered by the outbox.
func TestRequestByCSR(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	first := r.enrolled(at, dev)
	key := newKey(t)
	csr := csrOf(t, key, dev)
	for range 3 { // at least once
		if err := r.request(at, dev, csr, pki.ViaMQTT); err != nil {
			t.Fatal(err)
		}
	}
	r.wantOutbox()
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := r.device(dev).Next
	if next == "" || len(r.certs(dev)) != 2 {
		t.Fatalf("next is %q, %d certificates", next, len(r.certs(dev)))
	}
	r.wantOutbox([3]string{"cert", wire.VhostDevices, string(next)})
	if err := r.request(at, dev, csr, pki.ViaMQTT); err != nil { // once more, after it was signed
		t.Fatal(err)
	}
	r.wantOutbox([3]string{"cert", wire.VhostDevices, string(next)})
	if c := r.cert(first.Serial); c.State != pki.Active {
		t.Errorf("the one in use is %s before the new one was used", c.State)
	}
	r.connected(at, dev, next)
	if err := r.request(at, dev, csr, pki.ViaMQTT); err != nil { // a very late copy
		t.Fatal(err)
	}
	if len(r.certs(dev)) != 2 {
		t.Error("a late copy of a request got another certificate")
	}
	// Renewal with the same key is one, once it was asked for.
	r.do(func(tx *bolt.Tx) error {
		d, err := tx.Device(dev)
		if err != nil {
			return err
		}
		d.RenewSince = at.Add(time.Hour)
		return tx.PutDevice(d)
	})
	if err := r.request(at.Add(2*time.Hour), dev, csr, pki.ViaMQTT); err != nil {
		t.Fatal(err)
	}
	if len(r.certs(dev)) != 3 {
		t.Error("a renewal with the same key got no new certificate")
	}
}

func TestRequestRefusals(t *testing.T) {
	r := newRig(t, enroll.Policy{PerDay: 3})
	at := time.Now()
	for name, csr := range map[string][]byte{"garbage": []byte("x"), "huge": make([]byte, pki.MaxCSR+1)} {
		if err := r.request(at, dev, csr, pki.ViaMQTT); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.request(at, "nobody", csrOf(t, newKey(t), "nobody"), pki.ViaMQTT); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("unknown device: %v", err)
	}
	r.wantOutbox()
	if err := r.request(at, dev, csrOf(t, newKey(t), "pump-8"), pki.ViaMQTT); err != nil {
		t.Fatal(err)
	}
	r.wantOutbox([3]string{"no", wire.VhostDevices, pki.CodeIdentity})
	for range 3 {
		if err := r.request(at, dev, csrOf(t, newKey(t), dev), pki.ViaRecovery); err != nil {
			t.Fatal(err)
		}
	}
	r.wantOutbox()
	if err := r.request(at, dev, csrOf(t, newKey(t), dev), pki.ViaRecovery); err != nil {
		t.Fatal(err)
	}
	r.wantOutbox([3]string{"no", wire.VhostFallback, enroll.CodeTooMany})
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	signed := 0
	for _, c := range r.certs(dev) {
		if len(c.Chain) > 0 {
			signed++
		}
	}
	if signed != 1 {
		t.Errorf("%d of three requests were signed, want the newest only", signed)
	}
	if err := r.request(at.Add(25*time.Hour), dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil || len(r.certs(dev)) != 4 {
		t.Errorf("a day later: %v", err)
	}
}

// kill -9 at each step of issuing: afterwards there is exactly one certificate, with the serial and key of the intent.
func TestCrashAtEveryStep(t *testing.T) {
	crash := errors.New("killed")
	for step, arm := range map[string]func(*rig){
		"after the intent": func(r *rig) { r.auth.fail(crash) },
		"after signing": func(r *rig) {
			r.auth.onSigned(func(pki.Order, pki.Signed) { r.updating = func() error { return crash } })
		},
		"before the commit": func(r *rig) { n := 0; r.updating = func() error { n++; return at2(n, crash) } },
	} {
		for _, door := range []string{"operator", "device"} {
			t.Run(step+" by "+door, func(t *testing.T) {
				r := newRig(t, enroll.Policy{})
				at := time.Now()
				csr := csrOf(t, newKey(t), dev)
				if door == "device" {
					if err := r.request(at, dev, csr, pki.ViaMQTT); err != nil {
						t.Fatal(err)
					}
					if step == "before the commit" {
						r.updating = func() error { return crash }
					} else {
						arm(r)
					}
					if err := r.e.SignPending(t.Context()); !errors.Is(err, crash) {
						t.Fatalf("the crash did not happen: %v", err)
					}
				} else {
					arm(r)
					if _, err := r.e.Issue(t.Context(), at, dev, csr, enroll.IssueOptions{By: "ops"}); !errors.Is(err, crash) {
						t.Fatalf("the crash did not happen: %v", err)
					}
				}
				before := r.certs(dev)
				if len(before) != 1 || before[0].State != pki.Intended || r.device(dev).Next != "" {
					t.Fatalf("after the crash: %+v", before)
				}
				r.kill(enroll.Policy{})
				if err := r.e.SignPending(t.Context()); err != nil {
					t.Fatal(err)
				}
				after := r.certs(dev)
				if len(after) != 1 || after[0].Serial != before[0].Serial || after[0].KeyHash != before[0].KeyHash || after[0].State != pki.Issued || r.device(dev).Next != after[0].Serial {
					t.Fatalf("after the restart: %+v", after)
				}
				for _, o := range r.auth.all() {
					if o.Serial != before[0].Serial {
						t.Errorf("serial %s was signed without a record", o.Serial)
					}
				}
				again, err := r.e.Issue(t.Context(), at, dev, csr, enroll.IssueOptions{By: "ops"})
				if err != nil || again.Serial != before[0].Serial {
					t.Errorf("the same request again: %s, %v", again.Serial, err)
				}
			})
		}
	}
}

// at2 lets the first transaction pass, which stores the intent, and fails the second.
func at2(n int, err error) error {
	if n == 2 {
		return err
	}
	return nil
}

// What happened between the intent and the signature decides whether the certificate may exist.
func TestBarredWhileSigning(t *testing.T) {
	for name, bar := range map[string]func(*rig, fleet.Serial) error{
		"disabled": func(r *rig, _ fleet.Serial) error { return r.disable(time.Now(), dev) },
		"intent revoked": func(r *rig, s fleet.Serial) error {
			_, err := r.e.Revoke(context.Background(), time.Now(), s, 0, "ops")
			return err
		},
		"current revoked": func(r *rig, _ fleet.Serial) error {
			_, err := r.e.Revoke(context.Background(), time.Now(), r.device(dev).Current, 0, "ops")
			return err
		},
		"newer request": func(r *rig, _ fleet.Serial) error {
			return r.request(time.Now(), dev, csrOf(r.t, newKey(r.t), dev), pki.ViaMQTT)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, enroll.Policy{})
				r.enrolled(time.Now(), dev)
				if err := r.request(time.Now(), dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil {
					t.Fatal(err)
				}
				var once sync.Once
				var serial fleet.Serial
				r.auth.onSigned(func(o pki.Order, _ pki.Signed) {
					once.Do(func() {
						serial = o.Serial
						if err := bar(r, o.Serial); err != nil {
							t.Error(err)
						}
					})
				})
				if err := r.e.SignPending(t.Context()); err != nil {
					t.Fatal(err)
				}
				if c := r.cert(serial); c.State.Live() || len(c.Chain) != 0 {
					t.Errorf("the certificate is %s", c.State)
				}
				if r.device(dev).Next == serial {
					t.Error("it is in a slot")
				}
			})
		})
	}
}

// The authority is away for a while: nothing is lost, health says so, and Run goes on by itself.
func TestRunRidesOutAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		r.auth.fail(fleet.Errorf(fleet.Unavailable, "KMS away"))
		go func() { done <- r.e.Run(ctx) }()
		if err := r.request(time.Now(), dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if r.e.Health() == nil {
			t.Error("health says nothing of the outage")
		}
		if n := len(r.auth.all()); n < 10 || n > 100 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		if _, err := r.e.Issue(ctx, time.Now(), dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{}); !fleet.Is(err, fleet.Unavailable) {
			t.Errorf("an operator was told %v", err)
		}
		r.auth.fail(nil)
		time.Sleep(time.Minute)
		if err := r.e.Health(); err != nil {
			t.Errorf("still unwell: %v", err)
		}
		if r.device(dev).Next == "" {
			t.Error("the request was lost")
		}
		// A request that comes while all is well is signed at once.
		before := r.device(dev).Next
		if err := r.request(time.Now(), dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		if r.device(dev).Next == before {
			t.Error("not signed within 100 ms")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// An order that can never be signed does not hold up the others, nor is it tried for ever.
func TestUnsignable(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	r.addDevice("pump-8")
	at := time.Now()
	if err := r.request(at, dev, csrOf(t, newKey(t), dev), pki.ViaMQTT); err != nil {
		t.Fatal(err)
	}
	bad := r.certs(dev)[0]
	r.do(func(tx *bolt.Tx) error { // as if the policy had changed since
		bad.PublicKey = []byte("no key")
		return tx.PutCertificate(bad)
	})
	if err := r.request(at.Add(time.Second), "pump-8", csrOf(t, newKey(t), "pump-8"), pki.ViaMQTT); err != nil {
		t.Fatal(err)
	}
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	good := r.device("pump-8").Next
	if r.cert(bad.Serial).State != pki.Superseded || good == "" {
		t.Error("the bad one was not given up, or the good one not signed")
	}
	r.wantOutbox([3]string{"no", wire.VhostDevices, pki.CodeKey}, [3]string{"cert", wire.VhostDevices, string(good)})
}

func TestManyAtOnce(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.e.Run(ctx) }()
	const n = 40
	ids := make([]fleet.DeviceID, n)
	for i := range ids {
		ids[i] = fleet.DeviceID(fmt.Sprintf("many-%d", i))
		r.addDevice(ids[i])
	}
	csrs := make([][]byte, n)
	for i := range csrs {
		csrs[i] = csrOf(t, newKey(t), ids[i])
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[fleet.DeviceID]map[fleet.Serial]bool{}
	for range 3 { // the same request from three operators, and from the device
		for i, id := range ids {
			wg.Go(func() {
				c, err := r.e.Issue(ctx, time.Now(), id, csrs[i], enroll.IssueOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if got[id] == nil {
					got[id] = map[fleet.Serial]bool{}
				}
				got[id][c.Serial] = true
			})
		}
	}
	for i, id := range ids {
		wg.Go(func() {
			if err := r.request(time.Now(), id, csrs[i], pki.ViaMQTT); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if len(got[id]) != 1 || len(r.certs(id)) != 1 {
			t.Errorf("%s got %v and has %d certificates", id, got[id], len(r.certs(id)))
		}
	}
}

func TestNewRefusesNonsense(t *testing.T) {
	a, err := sharedAuthority()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []enroll.Policy{{Lifetime: time.Millisecond}, {MinLifetime: 100 * day}, {Grace: -1}, {PerDay: -1}, {Backdate: -1}} {
		if _, err := enroll.New(enroll.Config{Authority: a, Policy: p}); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%+v: %v", p, err)
		}
	}
	if ca.MinPassphrase < 8 {
		t.Error("passphrases may be guessed")
	}
}

func TestNothingSecretInTheLog(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	plain, err := r.e.NewPassword(t.Context(), at, dev, "ops")
	if err != nil {
		t.Fatal(err)
	}
	c := r.enrolled(at, dev)
	if err := r.request(at, dev, csrOf(t, newKey(t), dev), pki.ViaRecovery); err != nil {
		t.Fatal(err)
	}
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	sent := r.push(at, dev, r.device(dev).Next, 0)
	if sent.Password == "" {
		t.Fatal("no password came with it")
	}
	if _, err := r.e.Revoke(t.Context(), at, c.Serial, 1, "ops"); err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{plain, sent.Password} {
		if strings.Contains(r.log.String(), secret) {
			t.Error("a password is in the log")
		}
	}
	var dump bytes.Buffer
	if _, err := r.db.Backup(&dump); err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{plain, sent.Password} {
		if bytes.Contains(dump.Bytes(), []byte(secret)) {
			t.Error("a password is in the store")
		}
	}
}
