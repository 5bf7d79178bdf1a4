package enroll_test

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
)

// onRecord holds the audit trail to the certificates: each that was issued, used and revoked has one line that says so,
// with its device and serial, and no line speaks of what did not happen.
func (r *rig) onRecord(ids ...fleet.DeviceID) {
	r.t.Helper()
	lines := map[string]int{}
	for _, e := range r.audited() {
		var s fleet.Serial
		if _, err := fmt.Sscanf(e.Details, "serial %s", &s); err == nil {
			lines[e.What+" "+e.On+" "+string(s)]++
		}
	}
	for _, id := range ids {
		var own []pki.Certificate
		r.do(func(tx *bolt.Tx) (err error) { own, err = tx.CertificatesOf(id); return err })
		for _, c := range own {
			for what, happened := range map[string]bool{
				"certificate.issue": len(c.Chain) > 0, "certificate.activate": !c.ActiveAt.IsZero(), "certificate.revoke": c.State == pki.Revoked,
			} {
				if n := lines[what+" "+string(id)+" "+string(c.Serial)]; (n == 1) != happened || n > 1 {
					r.t.Errorf("%d lines %s of %s, which is %s", n, what, c.Serial, c.State)
				}
			}
		}
	}
}

func TestEveryRevocationIsOnRecord(t *testing.T) {
	for name, act := range map[string]func(*rig, time.Time, pki.Certificate) error{
		"one certificate takes the others with it": func(r *rig, at time.Time, c pki.Certificate) error {
			_, err := r.e.Revoke(r.t.Context(), at, c.Serial, 1, "ops")
			return err
		},
		"a device is removed": func(r *rig, at time.Time, _ pki.Certificate) error {
			_, err := r.e.Remove(r.t.Context(), at, dev, "ops")
			return err
		},
		"a replaced one after its grace": func(r *rig, at time.Time, _ pki.Certificate) error {
			r.connected(at, dev, r.device(dev).Next)
			_, err := r.e.Sweep(r.t.Context(), at.Add(2*day))
			return err
		},
		"a CA that nobody trusts any more": func(r *rig, at time.Time, c pki.Certificate) error {
			issuer, err := x509.ParseCertificate(c.Chain[1])
			if err != nil {
				return err
			}
			n, err := r.e.RetireIssuer(r.t.Context(), at, pki.IssuerID(hex.EncodeToString(issuer.SubjectKeyId)), "ops")
			if n == 0 {
				r.t.Error("nothing was retired")
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, enroll.Policy{Grace: day})
				at := time.Now()
				c := r.enrolled(at, dev)
				r.next(at, dev, pki.ViaMQTT)
				if err := act(r, at, c); err != nil {
					t.Fatal(err)
				}
				r.do(func(tx *bolt.Tx) (err error) { c, err = tx.Certificate(c.Serial); return err })
				if c.State != pki.Revoked {
					t.Errorf("it is %s", c.State)
				}
				r.onRecord(dev)
			})
		})
	}
}
