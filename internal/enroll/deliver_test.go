package enroll_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"testing"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

// push composes a certificate for the fallback and has a device with that receive buffer put it together.
func (r *rig) push(at time.Time, id fleet.DeviceID, s fleet.Serial, buffer int) wire.CertOrder {
	r.t.Helper()
	return r.compose(at, id, s, buffer, true)
}

func (r *rig) compose(at time.Time, id fleet.DeviceID, s fleet.Serial, buffer int, newPassword bool) wire.CertOrder {
	r.t.Helper()
	var payloads [][]byte
	r.do(func(tx *bolt.Tx) (err error) {
		payloads, err = r.e.ComposeCert(tx, at, id, s, fleet.Status{Buffer: buffer}, newPassword)
		return err
	})
	if len(payloads) == 0 {
		r.t.Fatal("nothing to send")
	}
	var a wire.Assembler
	for _, p := range payloads {
		if len(p) > wire.Budget(wire.DownTopic(id, wire.DownCert), buffer) {
			r.t.Fatalf("a payload of %d bytes for a buffer of %d", len(p), buffer)
		}
		m, err := wire.DecodeCertOrder(p)
		if err != nil {
			r.t.Fatal(err)
		}
		if m.Op == wire.CertPush {
			return m
		}
		whole, done, err := a.Add(m)
		if err != nil {
			r.t.Fatal(err)
		}
		if done {
			return whole
		}
	}
	r.t.Fatal("the slices are not complete")
	return wire.CertOrder{}
}

func hashOf(password string) fleet.Hash { return fleet.HashOf(sha256.Sum256([]byte(password))) }

func (r *rig) passwordWorks(id fleet.DeviceID, password string) bool {
	r.t.Helper()
	return slices.ContainsFunc(r.device(id).Passwords, func(p fleet.Password) bool { return p.SHA256 == hashOf(password) })
}

func (r *rig) next(at time.Time, id fleet.DeviceID, via pki.Via) fleet.Serial {
	r.t.Helper()
	if err := r.request(at, id, csrOf(r.t, newKey(r.t), id), via); err != nil {
		r.t.Fatal(err)
	}
	if err := r.e.SignPending(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	return r.device(id).Next
}

func TestComposeInOneOrInSlices(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	s := r.next(at, dev, pki.ViaMQTT)
	for _, buffer := range []int{0, 128, 256, 1024, 4096} {
		m := r.compose(at, dev, s, buffer, false)
		c := r.cert(s)
		if m.Serial != s || len(m.Chain) != 2 || !bytes.Equal(m.Chain[0], c.Chain[0]) || !bytes.Equal(m.Chain[1], c.Chain[1]) || m.Password != "" {
			t.Errorf("buffer %d: another certificate arrived", buffer)
		}
	}
	err := r.db.Update(t.Context(), func(tx *bolt.Tx) error {
		_, err := r.e.ComposeCert(tx, at, dev, s, fleet.Status{Buffer: 40}, true)
		return err
	})
	if !fleet.Is(err, fleet.Unprocessable) || len(r.device(dev).Passwords) != 0 {
		t.Errorf("a buffer of 40: %v", err)
	}
}

func TestComposeNothingForThoseWhoMayNot(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	old := r.next(at, dev, pki.ViaMQTT)
	s := r.next(at, dev, pki.ViaMQTT)
	nothing := func(name string, s fleet.Serial, at time.Time) {
		t.Helper()
		r.do(func(tx *bolt.Tx) error {
			p, err := r.e.ComposeCert(tx, at, dev, s, fleet.Status{}, true)
			if len(p) != 0 {
				t.Errorf("%s: %d payloads", name, len(p))
			}
			return err
		})
	}
	nothing("superseded", old, at)
	nothing("none", "", at)
	nothing("expired", s, at.Add(91*day))
	if err := r.disable(at, dev); err != nil {
		t.Fatal(err)
	}
	nothing("disabled", s, at)
	if err := r.e.Enable(t.Context(), at, dev, "ops"); err != nil {
		t.Fatal(err)
	}
	r.push(at, dev, s, 0)
	if n := len(r.device(dev).Passwords); n != 1 {
		t.Errorf("%d passwords", n)
	}
}

// The password goes with the certificate: old and new work until the device has used the certificate.
func TestPasswordRotation(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	first, err := r.e.NewPassword(t.Context(), at, dev, "ops")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := base64.RawURLEncoding.DecodeString(first); err != nil || len(b) != 32 {
		t.Errorf("not 256 bits of base64url: %d, %v", len(b), err)
	}
	s := r.next(at, dev, pki.ViaRecovery)
	r.wantOutbox([3]string{"cert", wire.VhostFallback, string(s)})
	a, b := r.push(at, dev, s, 0), r.push(at, dev, s, 0) // sent twice: which one did it store?
	if a.Password == b.Password {
		t.Error("the same password twice: it must be known in plain somewhere")
	}
	for _, p := range []string{first, a.Password, b.Password} {
		if !r.passwordWorks(dev, p) {
			t.Error("a password that the device may hold does not work")
		}
	}
	r.connected(at, dev, s)
	if r.passwordWorks(dev, first) || !r.passwordWorks(dev, a.Password) || !r.passwordWorks(dev, b.Password) {
		t.Error("after the use of the certificate the old password must die, and both new ones live")
	}
	// A renewal over the normal way brings no password and takes none.
	s = r.next(at, dev, pki.ViaMQTT)
	r.connected(at, dev, s)
	if !r.passwordWorks(dev, b.Password) {
		t.Error("a renewal without a password killed the one in use")
	}
	// An operator's takes the place of all.
	again, err := r.e.NewPassword(t.Context(), at, dev, "ops")
	if err != nil {
		t.Fatal(err)
	}
	if r.passwordWorks(dev, b.Password) || !r.passwordWorks(dev, again) || len(r.device(dev).Passwords) != 1 {
		t.Error("a new first password did not replace all")
	}
	if _, err := r.e.NewPassword(t.Context(), at, "nobody", "ops"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("unknown device: %v", err)
	}
}

// However often a certificate is sent: the list stays short, and whatever the device stored, works.
func TestPasswordsAreBounded(t *testing.T) {
	r := newRig(t, enroll.Policy{PerDay: 100})
	at := time.Now()
	first, err := r.e.NewPassword(t.Context(), at, dev, "ops")
	if err != nil {
		t.Fatal(err)
	}
	held := []string{first}
	s := r.next(at, dev, pki.ViaRecovery)
	for range 12 {
		if m := r.push(at, dev, s, 0); m.Password != "" {
			held = append(held, m.Password)
		}
	}
	if n := len(r.device(dev).Passwords); n > 6 {
		t.Errorf("%d passwords after twelve deliveries", n)
	}
	r.connected(at, dev, s)
	for i, p := range held {
		if !r.passwordWorks(dev, p) {
			t.Errorf("password %d may be the device's and does not work", i)
		}
	}
	for range 10 {
		s := r.next(at, dev, pki.ViaRecovery)
		for range 7 {
			r.push(at, dev, s, 0)
		}
		if n := len(r.device(dev).Passwords); n > 16 {
			t.Fatalf("%d passwords", n)
		}
	}
	// The next ordinary rotation leaves only its own.
	if _, err := r.e.NewPassword(t.Context(), at, dev, "ops"); err != nil {
		t.Fatal(err)
	}
	s = r.next(at, dev, pki.ViaRecovery)
	r.push(at, dev, s, 0)
	r.connected(at, dev, s)
	if n := len(r.device(dev).Passwords); n != 1 {
		t.Errorf("%d passwords", n)
	}
}

// Over the fallback, a device gets a certificate that it never used, and only that brings a password: connecting with one
// that it had before proves nothing.
func TestOnlyAnUnusedCertificateBringsAPassword(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	key := newKey(t)
	if err := r.request(at, dev, csrOf(t, key, dev), pki.ViaRecovery); err != nil {
		t.Fatal(err)
	}
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := r.device(dev).Next
	if r.push(at, dev, s, 0).Password == "" {
		t.Error("a new certificate came without a password")
	}
	r.connected(at, dev, s)
	if r.push(at, dev, s, 0).Password != "" {
		t.Error("a certificate in use brought a password")
	}
	if err := r.request(at, dev, csrOf(t, key, dev), pki.ViaRecovery); err != nil {
		t.Fatal(err)
	}
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := r.device(dev); d.Current != s || d.Next == "" || d.Next == s {
		t.Errorf("slots %s and %s", d.Current, d.Next)
	}
}

func TestOpenIntents(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	hello := func(vhost string) {
		t.Helper()
		r.do(func(tx *bolt.Tx) error { return r.e.OpenIntents(tx, at, dev, vhost) })
	}
	hello(wire.VhostDevices)
	r.wantOutbox()
	r.do(func(tx *bolt.Tx) error { return r.e.OpenIntents(tx, at, "nobody", wire.VhostDevices) })
	c := r.enrolled(at, dev)
	if _, err := r.e.RenewPass(t.Context(), at, enroll.RenewOptions{All: true}); err != nil {
		t.Fatal(err)
	}
	hello(wire.VhostDevices)
	r.wantOutbox([3]string{"renew", wire.VhostDevices, ""})
	hello(wire.VhostFallback)
	r.wantOutbox()
	s := r.next(at.Add(time.Second), dev, pki.ViaMQTT)
	r.outbox()
	hello(wire.VhostDevices)
	r.wantOutbox([3]string{"cert", wire.VhostDevices, string(s)})
	hello(wire.VhostFallback)
	r.wantOutbox([3]string{"cert", wire.VhostFallback, string(s)})
	r.connected(at.Add(time.Minute), dev, s)
	hello(wire.VhostDevices)
	r.wantOutbox()
	if !r.device(dev).RenewSince.IsZero() {
		t.Error("still asked to renew")
	}
	// An operator's certificate is not pushed: its key may not be the device's yet.
	if _, err := r.e.Issue(t.Context(), at, dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{}); err != nil {
		t.Fatal(err)
	}
	hello(wire.VhostDevices)
	r.wantOutbox()
	_ = c
}

func TestHave(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	r.addDevice("pump-8")
	s := r.next(at, dev, pki.ViaMQTT)
	have := func(id fleet.DeviceID, s fleet.Serial) error {
		return r.db.Update(t.Context(), func(tx *bolt.Tx) error { return r.e.Have(tx, at, id, s) })
	}
	if err := have(dev, s); err != nil {
		t.Error(err)
	}
	if r.device(dev).Next != s {
		t.Error("a word alone promoted it")
	}
	for _, err := range []error{have("pump-8", s), have(dev, "abc")} {
		if !fleet.Is(err, fleet.Invalid) {
			t.Errorf("a foreign serial: %v", err)
		}
	}
}

func TestComposeRenewAndNo(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	compose := func() (p []byte) {
		r.do(func(tx *bolt.Tx) (err error) { p, err = r.e.ComposeRenew(tx, dev); return err })
		return p
	}
	if compose() != nil {
		t.Error("asks a device that need not renew")
	}
	r.enrolled(at, dev)
	if _, err := r.e.RenewPass(t.Context(), at, enroll.RenewOptions{Devices: []fleet.DeviceID{dev}}); err != nil {
		t.Fatal(err)
	}
	if m, err := wire.DecodeCertOrder(compose()); err != nil || m.Op != wire.CertRenew {
		t.Errorf("%+v, %v", m, err)
	}
	for ref, again := range map[string]bool{enroll.CodeWait: true, enroll.CodeLater: true, enroll.CodeTooMany: true, enroll.CodeDenied: false, pki.CodeKeyInUse: false} {
		p := enroll.ComposeNo(ref)
		m, err := wire.DecodeCertOrder(p)
		if err != nil || m.Op != wire.CertNo || m.Why != ref || (m.Retry > 0) != again || len(p) > wire.QuietBudget {
			t.Errorf("%s: %+v, %v", ref, m, err)
		}
	}
}

// The broker stamps a device's request, muster its own wish: with a broker's clock that lags, the answer still counts.
func TestARequestWithALaggingStampAnswersTheWish(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	r.enrolled(at, dev)
	if _, err := r.e.RenewPass(t.Context(), at.Add(time.Minute), enroll.RenewOptions{All: true}); err != nil {
		t.Fatal(err)
	}
	s := r.next(at.Add(58*time.Second), dev, pki.ViaMQTT)
	r.connected(at.Add(2*time.Minute), dev, s)
	if !r.device(dev).RenewSince.IsZero() {
		t.Error("asked to renew again though it has just done so")
	}
}
