package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"testing"
	"time"

	"github.com/smallstep/certificates/db"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

// late is the use case that comes to be after its authority.
type late struct{ *enroll.Enroller }

// closed is a broker without connections.
type closed struct{}

func (closed) CloseUser(context.Context, string, string) error     { return nil }
func (closed) UserConnected(context.Context, string) (bool, error) { return false, nil }

// Smallstep's database is muster's store: what it asks is answered from there, what it revokes is revoked there with all that
// follows, and nothing is signed that is not intended there.
func TestSmallstepAsksTheStore(t *testing.T) {
	store := storetest.Open(t)
	records := &late{}
	a, err := NewAuthority(hierarchy(t), pki.KeyPolicy{}, records)
	if err != nil {
		t.Fatal(err)
	}
	records.Enroller, err = enroll.New(enroll.Config{
		Update: func(ctx context.Context, f func(enroll.Tx) error) error {
			return store.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return store.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: a, Sessions: closed{}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now()
	if err := store.Update(t.Context(), func(tx *bolt.Tx) error {
		return tx.PutDevice(fleet.Device{ID: "pump-7", Product: "pump", CreatedAt: at})
	}); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "pump-7"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := records.Issue(t.Context(), at, "pump-7", csr, enroll.IssueOptions{By: "anna"})
	if err != nil || len(c.Chain) == 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	sn := c.Serial.Big().String()

	database := a.auth.GetDatabase()
	if got, err := database.GetCertificate(sn); err != nil || !bytes.Equal(got.Raw, c.Chain[0]) {
		t.Errorf("the certificate by its serial: %v, %v", got, err)
	}
	if revoked, err := database.IsRevoked(sn); err != nil || revoked {
		t.Errorf("revoked before it was: %v", err)
	}
	for _, unknown := range []string{"7", "-1", "0", "x", "", "0x10", " 1", string(bytes.Repeat([]byte("9"), 60))} {
		if revoked, err := database.IsRevoked(unknown); err != nil || !revoked {
			t.Errorf("serial %q, which nobody has, holds: %v", unknown, err)
		}
		if _, err := database.GetCertificate(unknown); err == nil {
			t.Errorf("a certificate with serial %q", unknown)
		}
		if err := database.Revoke(&db.RevokedCertificateInfo{Serial: unknown, RevokedAt: at}); err == nil {
			t.Errorf("serial %q was revoked", unknown)
		}
	}

	// Nothing is signed that is not intended, by whatever fault.
	o := pki.Order{Serial: c.Serial, Device: c.Device, PublicKey: c.PublicKey, Validity: pki.Validity{NotBefore: c.NotBefore, NotAfter: c.NotAfter}}
	if _, err := a.Sign(t.Context(), o); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("signed twice: %v", err)
	}
	intent := c
	intent.Serial, intent.State, intent.Chain, intent.KeyHash = "77", pki.Intended, nil, fleet.Hash(bytes.Repeat([]byte("7"), 64))
	if err := store.Update(t.Context(), func(tx *bolt.Tx) error { return tx.PutCertificate(intent) }); err != nil {
		t.Fatal(err)
	}
	o.Serial = intent.Serial
	for what, change := range map[string]func(*pki.Order){
		"an unknown serial": func(o *pki.Order) { o.Serial = "78" },
		"another device":    func(o *pki.Order) { o.Device = "pump-8" },
		"another key":       func(o *pki.Order) { o.PublicKey = order(t, "pump-7").PublicKey },
	} {
		other := o
		change(&other)
		if _, err := a.Sign(t.Context(), other); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := database.GetCertificate("119"); err == nil { // 0x77
		t.Error("an intent is no certificate")
	}
	if _, err := a.Sign(t.Context(), o); err != nil {
		t.Errorf("what is intended: %v", err)
	}

	// A revocation by smallstep's interface is one of muster's: certificate, slot and promise to close share a transaction.
	if err := database.Revoke(&db.RevokedCertificateInfo{Serial: sn, ReasonCode: 2, RevokedAt: at}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a reason that muster does not give: %v", err)
	}
	for range 2 {
		if err := database.Revoke(&db.RevokedCertificateInfo{Serial: sn, ReasonCode: 1, RevokedAt: at}); err != nil {
			t.Fatal(err)
		}
	}
	if revoked, err := database.IsRevoked(sn); err != nil || !revoked {
		t.Errorf("not revoked: %v", err)
	}
	err = store.View(t.Context(), func(tx *bolt.Tx) error {
		dev, err := tx.Device("pump-7")
		if err != nil {
			return err
		}
		closings, err := tx.Closings()
		if dev.Next != "" || dev.Current != "" || dev.RecoveryOff == "" || len(closings) == 0 {
			t.Errorf("device %+v, %d promises to close", dev, len(closings))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := database.UseToken("a", "b"); err == nil {
		t.Error("a token is good")
	}
}
