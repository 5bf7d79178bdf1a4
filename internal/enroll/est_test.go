package enroll_test

import (
	"crypto/sha256"
	"testing"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
)

func sumOf(s string) fleet.Hash { return fleet.HashOf(sha256.Sum256([]byte(s))) }

func TestEnrolmentPasswordEnds(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	plain, until, err := r.e.NewEnrolment(t.Context(), at, dev, time.Hour, "ops")
	if err != nil || len(plain) != 43 || !until.Equal(at.Add(time.Hour)) {
		t.Fatalf("%d characters until %v, %v", len(plain), until, err)
	}
	for _, c := range []struct {
		name string
		at   time.Time
		id   fleet.DeviceID
		sum  fleet.Hash
		ok   bool
	}{
		{"at once", at, dev, sumOf(plain), true},
		{"just before the end", until.Add(-1), dev, sumOf(plain), true},
		{"at its end", until, dev, sumOf(plain), false},
		{"wrong", at, dev, sumOf("x"), false},
		{"empty hash", at, dev, "", false},
		{"another device", at, "nobody", sumOf(plain), false},
		{"no password and no hash", at, "nobody", "", false},
	} {
		err := r.e.CheckEnrolment(t.Context(), c.at, c.id, c.sum)
		if c.ok != (err == nil) || err != nil && !fleet.Is(err, fleet.Unauthorized) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	_, err = r.e.EnrolByPassword(t.Context(), until, dev, sumOf(plain), csrOf(t, newKey(t), dev))
	wantCode(t, err, fleet.Unauthorized, enroll.CodePassword)

	for _, life := range []time.Duration{0, -time.Hour, pki.MinEnrolment - 1, pki.MaxEnrolment + 1} {
		if _, _, err := r.e.NewEnrolment(t.Context(), at, dev, life, "ops"); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", life, err)
		}
	}
	if _, _, err := r.e.NewEnrolment(t.Context(), at, "nobody", time.Hour, "ops"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("an unknown device: %v", err)
	}
}

// The intent and the spending of the password are one: whatever dies in between, the same request gets the one certificate.
func TestPasswordIsSpentWithTheIntent(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	plain, _, err := r.e.NewEnrolment(t.Context(), time.Now(), dev, time.Hour, "ops")
	if err != nil {
		t.Fatal(err)
	}
	csr := csrOf(t, newKey(t), dev)
	r.auth.fail(fleet.Errorf(fleet.Unavailable, "the key is away"))
	if err := r.e.SignPending(t.Context()); err != nil { // nothing is intended yet
		t.Fatal(err)
	}
	ask := func() (pki.Certificate, error) {
		return r.e.EnrolByPassword(t.Context(), time.Now(), dev, sumOf(plain), csr)
	}
	_, err = ask() // nobody signs: Run does not run
	wantCode(t, err, fleet.Unavailable, enroll.CodeSigning)
	list := r.certs(dev)
	if len(list) != 1 || list[0].State != pki.Intended {
		t.Fatalf("%+v", list)
	}
	r.do(func(tx *bolt.Tx) error {
		p, ok, err := tx.Enrolment(dev)
		if err == nil && (!ok || p.Serial != list[0].Serial || p.KeyHash != list[0].KeyHash || p.UsedAt.IsZero()) {
			t.Errorf("%+v", p)
		}
		return err
	})
	r.kill(enroll.Policy{})
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := ask()
	if err != nil || c.Serial != list[0].Serial || c.State != pki.Issued || len(r.certs(dev)) != 1 {
		t.Fatalf("%+v, %v", c, err)
	}
	_, err = r.e.EnrolByPassword(t.Context(), time.Now(), dev, sumOf(plain), csrOf(t, newKey(t), dev))
	wantCode(t, err, fleet.Forbidden, enroll.CodeUsed)
	if len(r.outbox()) != 0 {
		t.Error("what was fetched is sent to the device, too")
	}
}

// Only the present certificates renew, whatever the caller verified before.
func TestOnlyPresentCertificatesRenew(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	c, err := r.e.Issue(t.Context(), at, dev, csrOf(t, newKey(t), dev), enroll.IssueOptions{By: "ops"})
	if err != nil {
		t.Fatal(err)
	}
	for name, ask := range map[string]struct {
		at time.Time
		s  fleet.Serial
	}{"none": {at, ""}, "unknown": {at, "abc"}, "expired": {c.NotAfter, c.Serial}} {
		_, err := r.e.EnrolByCertificate(t.Context(), ask.at, dev, ask.s, csrOf(t, newKey(t), dev), false)
		if f := fleet.KindOf(err); f != fleet.Forbidden {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.addDevice("pump-8")
	_, err = r.e.EnrolByCertificate(t.Context(), at, "pump-8", c.Serial, csrOf(t, newKey(t), "pump-8"), false)
	wantCode(t, err, fleet.Forbidden, enroll.CodeNotCurrent)
}
