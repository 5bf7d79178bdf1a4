package enroll_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

// own is the issuer of all certificates of a rig.
func own(t testing.TB) pki.IssuerID {
	t.Helper()
	h, err := hierarchy()
	if err != nil {
		t.Fatal(err)
	}
	return pki.IssuerID(hex.EncodeToString(h.Device.Cert.SubjectKeyId))
}

// many gives the rig n more devices with the certificate of another one, copied: signing takes too long for a crowd.
func (r *rig) many(n int, like pki.Certificate) (users []string) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		for i := range n {
			c := like
			c.Serial = fleet.SerialOf(like.Serial.Big().SetInt64(int64(1000 + i)))
			c.Device, c.State = fleet.DeviceID(fmt.Sprint("crowd-", i)), pki.Active
			c.KeyHash = fleet.Hash(strings.Repeat(fmt.Sprintf("%08x", i), 8))
			if err := tx.PutCertificate(c); err != nil {
				return err
			}
			if err := tx.PutDevice(fleet.Device{ID: c.Device, Product: "pump", Current: c.Serial}); err != nil {
				return err
			}
			if i%10 == 0 {
				if err := tx.PutStatus(fleet.Status{Device: c.Device, Online: true, Serial: c.Serial, Vhost: wire.VhostDevices}); err != nil {
					return err
				}
				r.broker.connect(wire.CertUser(c.Device, c.Serial))
				users = append(users, wire.CertUser(c.Device, c.Serial))
			}
		}
		return nil
	})
	return users
}

func (r *rig) count(state pki.State) (n int) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error {
		list, err := tx.CertificatesAfter("", 1<<20)
		for _, c := range list {
			if c.State == state {
				n++
			}
		}
		return err
	})
	return n
}

func TestMassRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		first := r.enrolled(time.Now(), dev)
		const n = 450
		users := r.many(n, first)
		id := own(t)

		drill, err := r.e.DrillIssuer(t.Context(), time.Now(), id, "ops")
		if err != nil || drill.Certificates != n+1 || drill.Live != len(users) || drill.Estimate < drill.Took {
			t.Errorf("%+v, %v", drill, err)
		}
		if got := r.count(pki.Revoked); got != 0 || len(r.closings()) != 0 || !r.broker.isOpen(users[0]) {
			t.Fatalf("the drill revoked %d", got)
		}
		if _, _, err := r.e.MassRevocation(t.Context(), id); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("before there is one: %v", err)
		}
		for _, reason := range []int{2, 6, -1} {
			if _, err := r.e.RevokeIssuer(t.Context(), time.Now(), id, reason, "ops"); !fleet.Is(err, fleet.Invalid) {
				t.Errorf("reason %d: %v", reason, err)
			}
		}
		if _, err := r.e.RevokeIssuer(t.Context(), time.Now(), "00ff", 0, "ops"); !fleet.Is(err, fleet.NotFound) {
			t.Errorf("another issuer: %v", err)
		}
		at := time.Now()
		m, err := r.e.RevokeIssuer(t.Context(), at, id, 1, "ops")
		if err != nil || m.Total != n+1 || m.Done() {
			t.Fatalf("%+v, %v", m, err)
		}
		if again, err := r.e.RevokeIssuer(t.Context(), at.Add(time.Second), id, 0, "else"); err != nil || again.By != "ops" || again.Reason != 1 || !again.Since.Equal(m.Since) {
			t.Errorf("twice: %+v, %v", again, err)
		}
		stop := r.running()
		defer stop()
		time.Sleep(time.Second)
		m, _, err = r.e.MassRevocation(t.Context(), id)
		if err != nil || !m.Done() || m.Revoked != n+1 || m.Live != len(users) || m.Passes != 2 {
			t.Errorf("%+v, %v", m, err)
		}
		if got := r.count(pki.Revoked); got != n+1 {
			t.Errorf("%d are revoked", got)
		}
		for _, u := range users {
			if r.broker.isOpen(u) {
				t.Fatalf("%s is still connected", u)
			}
		}
		if c := r.cert(first.Serial); c.Reason != 1 || c.By != "ops" {
			t.Errorf("%+v", c)
		}
		time.Sleep(3 * time.Minute)
		if left := len(r.closings()); left != 0 {
			t.Errorf("%d promises left", left)
		}
	})
}

// kill -9 after each transaction: every restart goes on, and nothing is revoked twice or left out.
func TestMassRevocationResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, enroll.Policy{})
		const n = 450
		r.many(n, r.enrolled(time.Now(), dev))
		id, at := own(t), time.Now()
		if _, err := r.e.RevokeIssuer(t.Context(), at, id, 0, "ops"); err != nil {
			t.Fatal(err)
		}
		kills := 0
		for ; ; kills++ {
			writes := 0
			r.updating = func() error {
				if writes++; writes > 1 {
					return errors.New("killed")
				}
				return nil
			}
			stop := r.running()
			time.Sleep(500 * time.Millisecond)
			stop()
			m, _, err := r.e.MassRevocation(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			if got := r.count(pki.Revoked); got != m.Revoked {
				t.Fatalf("%d are revoked, the order says %d", got, m.Revoked)
			}
			if m.Done() {
				break
			}
			if kills > 20 {
				t.Fatalf("it does not get on: %+v", m)
			}
			r.kill(enroll.Policy{})
		}
		if kills < 3 {
			t.Errorf("only %d restarts", kills)
		}
		if got := r.count(pki.Revoked); got != n+1 {
			t.Errorf("%d are revoked", got)
		}
	})
}

// A device renews while the others are revoked: its new certificate goes, too.
func TestMassRevocationMissesNothingNew(t *testing.T) {
	m := pki.MassRevocation{Since: time.Now()}
	m.Looked("50", 3, false, m.Since)
	m.Looked("ff", 2, true, m.Since)
	if m.Done() || m.Revoked != 5 || m.After != "" || m.Found != 0 || m.Passes != 1 {
		t.Errorf("%+v", m)
	}
	m.Looked("ff", 1, true, m.Since) // came in meanwhile
	if m.Done() {
		t.Errorf("%+v", m)
	}
	m.Looked("ff", 0, true, m.Since)
	if !m.Done() || m.Revoked != 6 || m.Passes != 3 {
		t.Errorf("%+v", m)
	}
}
