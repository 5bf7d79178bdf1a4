package enroll_test

import (
	"strings"
	"testing"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func TestBlockedKeys(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	r.addDevice("pump-8") // pump-7 is there
	k := newKey(t)
	csr := csrOf(t, k, "pump-7")
	c, err := r.e.Issue(t.Context(), at, "pump-7", csr, enroll.IssueOptions{By: "ops"})
	if err != nil {
		t.Fatal(err)
	}
	blocked, of, err := r.e.BlockKey(t.Context(), at, c.KeyHash, "found in a repository", "ops")
	if err != nil || len(of) != 1 || of[0].Serial != c.Serial || blocked.By != "ops" {
		t.Fatal(blocked, of, err)
	}
	// The first entry stays as it is.
	if again, _, err := r.e.BlockKey(t.Context(), at.Add(time.Hour), c.KeyHash, "again", "somebody"); err != nil || again.By != "ops" || again.Why != blocked.Why {
		t.Error(again, err)
	}
	// Its own device gets not even the same certificate again, over no door.
	_, err = r.e.Issue(t.Context(), at, "pump-7", csr, enroll.IssueOptions{By: "ops"})
	wantCode(t, err, fleet.Unprocessable, pki.CodeKey)
	if err := r.request(at, "pump-7", csr, pki.ViaMQTT); err != nil || len(r.certs("pump-7")) != 1 { // a device is told over MQTT
		t.Error(err, r.certs("pump-7"))
	}
	if box := r.outbox(); len(box) == 0 || box[len(box)-1].Ref != pki.CodeKey {
		t.Errorf("%+v", box)
	}

	// One that nobody had yet.
	fresh := csrOf(t, newKey(t), "pump-8")
	parsed, err := pki.ParseCSR(fresh, pki.KeyPolicy{})
	if err != nil {
		t.Fatal(err)
	}
	if _, of, err := r.e.BlockKey(t.Context(), at, parsed.KeyHash, "", "ops"); err != nil || len(of) != 0 {
		t.Fatal(of, err)
	}
	_, err = r.e.Issue(t.Context(), at, "pump-8", fresh, enroll.IssueOptions{By: "ops"})
	wantCode(t, err, fleet.Unprocessable, pki.CodeKey)
	if list, err := r.e.BlockedKeys(t.Context()); err != nil || len(list) != 2 {
		t.Error(list, err)
	}
	if err := r.e.UnblockKey(t.Context(), at, parsed.KeyHash, "admin"); err != nil {
		t.Fatal(err)
	}
	if err := r.e.UnblockKey(t.Context(), at, parsed.KeyHash, "admin"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("unblocked twice: %v", err)
	}
	if _, err = r.e.Issue(t.Context(), at, "pump-8", fresh, enroll.IssueOptions{By: "ops"}); err != nil {
		t.Error(err)
	}
	if _, _, err := r.e.BlockKey(t.Context(), at, c.KeyHash, strings.Repeat("x", 201), "ops"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a long reason: %v", err)
	}
}

// A request that waits while the key is away is given up when its key is blocked: it is never signed, and the device is told.
func TestAKeyThatIsBlockedWhileItWaits(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	if err := r.request(at, "pump-7", csrOf(t, newKey(t), "pump-7"), pki.ViaMQTT); err != nil {
		t.Fatal(err)
	}
	waiting := r.certs("pump-7")
	if len(waiting) != 1 || waiting[0].State != pki.Intended {
		t.Fatal(waiting)
	}
	if _, of, err := r.e.BlockKey(t.Context(), at, waiting[0].KeyHash, "leaked", "ops"); err != nil || len(of) != 1 {
		t.Fatal(of, err)
	}
	if err := r.e.SignPending(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := r.certs("pump-7"); len(now) != 1 || now[0].State != pki.Superseded || len(now[0].Chain) != 0 || len(r.auth.all()) != 0 {
		t.Errorf("%+v, %d orders", now, len(r.auth.all()))
	}
	if box := r.outbox(); len(box) == 0 || box[len(box)-1].Ref != pki.CodeKey {
		t.Errorf("the device is not told: %+v", box)
	}
}

// The key of a certificate that was revoked for key-compromise is dead for every device, for good.
func TestCompromisedKeysAreDeadForEveryDevice(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	at := time.Now()
	k := newKey(t)
	r.addDevice("pump-8") // pump-7 is there
	c, err := r.e.Issue(t.Context(), at, "pump-7", csrOf(t, k, "pump-7"), enroll.IssueOptions{By: "ops"})
	if err != nil {
		t.Fatal(err)
	}
	const keyCompromise = 1
	if _, err := r.e.Revoke(t.Context(), at, c.Serial, keyCompromise, "ops"); err != nil {
		t.Fatal(err)
	}
	later := at.Add(20 * 365 * 24 * time.Hour)
	_, err = r.e.Issue(t.Context(), later, "pump-7", csrOf(t, k, "pump-7"), enroll.IssueOptions{By: "ops"})
	wantCode(t, err, fleet.Forbidden, pki.CodeKeyRevoked)
	_, err = r.e.Issue(t.Context(), later, "pump-8", csrOf(t, k, "pump-8"), enroll.IssueOptions{By: "ops"})
	wantCode(t, err, fleet.Conflict, pki.CodeKeyInUse)
	// The CA's own keys can neither be used nor be blocked.
	ca := r.auth.KeyHashes()[0]
	_, _, err = r.e.BlockKey(t.Context(), at, ca, "", "ops")
	wantCode(t, err, fleet.Conflict, pki.CodeKeyInUse)
}
