package trust_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"testing"
	"time"

	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/trust"
	"muster/internal/wire"
)

var day0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func root(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	k := key(t)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: day0, NotAfter: day0.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	c, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type rig struct {
	*testing.T
	db    *bolt.DB
	key   *ecdsa.PrivateKey
	inUse *x509.Certificate
	conf  trust.Config
	p     *trust.Publisher
}

func newRig(t *testing.T) *rig {
	r := &rig{T: t, db: storetest.Open(t), key: key(t), inUse: root(t, "in use")}
	r.conf = trust.Config{
		Update: func(ctx context.Context, f func(trust.Tx) error) error {
			return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(trust.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Key: &r.key.PublicKey, Signer: r.key, InUse: func() []*x509.Certificate { return []*x509.Certificate{r.inUse} },
		Log: slog.New(slog.DiscardHandler),
	}
	r.p = trust.New(r.conf)
	return r
}

func (r *rig) do(f func(*bolt.Tx) error) {
	r.Helper()
	if err := r.db.Update(r.Context(), f); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) device(id fleet.DeviceID, online bool, has int64) {
	r.Helper()
	r.do(func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: id, Product: "lamp"}); err != nil {
			return err
		}
		return tx.PutStatus(fleet.Status{Device: id, Online: online, Vhost: wire.VhostDevices, Bundle: has, LastSeen: day0})
	})
}

// rung returns the devices in the outbox, and empties it.
func (r *rig) rung() map[fleet.DeviceID]bool {
	r.Helper()
	out := map[fleet.DeviceID]bool{}
	r.do(func(tx *bolt.Tx) error {
		list, err := tx.Outbox(0)
		if err != nil {
			return err
		}
		var seqs []uint64
		for _, e := range list {
			if e.Kind == downlink.Trust {
				out[e.Device] = true
			}
			seqs = append(seqs, e.Seq)
		}
		return tx.DropOutbox(seqs)
	})
	return out
}

func (r *rig) publish(roots ...*x509.Certificate) pki.Published {
	r.Helper()
	b, err := r.p.Make(r.Context(), day0, roots, nil, false, "ops")
	if err != nil {
		r.Fatal(err)
	}
	return b
}

func code(err error) string {
	e, _ := errors.AsType[*fleet.Error](err)
	if e == nil {
		return ""
	}
	return e.Code
}

func TestTheFirstBundleIsMadeOnce(t *testing.T) {
	r := newRig(t)
	if _, err := r.p.Current(t.Context()); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("before there is one: %v", err)
	}
	for range 2 {
		if err := r.p.First(t.Context(), day0, []*x509.Certificate{r.inUse}); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := r.p.Current(t.Context()); err != nil || b.Version != 1 {
		t.Errorf("%+v, %v", b, err)
	}
}

func TestANewBundleRingsWhoIsConnectedAndLacksIt(t *testing.T) {
	r := newRig(t)
	for i := range 600 { // more than one transaction looks at
		r.device(fleet.DeviceID(fmt.Sprintf("dev-%03d", i)), i%2 == 0, 0)
	}
	r.device("has-it", true, 1)
	r.publish(r.inUse)
	if got := r.rung(); len(got) != 300 || got["has-it"] || got["dev-001"] {
		t.Errorf("%d devices were rung", len(got))
	}
	b := r.publish(r.inUse, root(t, "new"))
	if got := r.rung(); len(got) != 301 || !got["has-it"] || b.Version != 2 {
		t.Errorf("%d devices were rung for version %d", len(got), b.Version)
	}
}

func TestHelloBringsTheWordUntilItIsTaken(t *testing.T) {
	r := newRig(t)
	r.device("d1", true, 0)
	hello := func(has int64) bool {
		r.do(func(tx *bolt.Tx) error { return r.p.Hello(tx, day0, wire.VhostDevices, "d1", wire.Hello{Bundle: has}) })
		return r.rung()["d1"]
	}
	if hello(0) {
		t.Error("rung before there is a bundle")
	}
	r.publish(r.inUse)
	r.rung()
	if !hello(0) || hello(1) || hello(7) {
		t.Error("rung at the wrong hello")
	}
	compose := func() (out []byte) {
		r.do(func(tx *bolt.Tx) (err error) { out, err = r.p.Compose(tx, "d1"); return err })
		return out
	}
	if c, err := wire.DecodeCmd(compose()); err != nil || c.Op != wire.CmdTrust || c.Bundle != 1 {
		t.Errorf("%+v, %v", c, err)
	}
	r.do(func(tx *bolt.Tx) error {
		return tx.PutStatus(fleet.Status{Device: "d1", Bundle: 1})
	})
	if compose() != nil {
		t.Error("told again although it has it")
	}
}

func TestBundlesThatAreNotPublished(t *testing.T) {
	r := newRig(t)
	first := r.publish(r.inUse)
	sign := func(v int64, k *ecdsa.PrivateKey, roots ...*x509.Certificate) string {
		b := pki.Bundle{Version: v, Time: day0.Unix()}
		for _, c := range roots {
			b.Roots = append(b.Roots, c.Raw)
		}
		text, err := pki.SignBundle(b, k)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for name, tc := range map[string]struct{ text, code string }{
		"the version in force":  {sign(1, r.key, r.inUse), pki.CodeBundleOld},
		"another key":           {sign(2, key(t), r.inUse), pki.CodeBundleSignature},
		"without a root in use": {sign(2, r.key, root(t, "strange")), trust.CodeWouldLock},
		"nonsense":              {"nonsense", pki.CodeBundleMalformed},
	} {
		if _, err := r.p.Publish(t.Context(), day0, tc.text, false, "ops"); code(err) != tc.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if again, err := r.p.Publish(t.Context(), day0.Add(time.Hour), first.JWS, false, "ops"); err != nil || !again.At.Equal(first.At) {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if b, err := r.p.Publish(t.Context(), day0, sign(5, r.key, root(t, "strange")), true, "ops"); err != nil || b.Version != 5 {
		t.Errorf("by force: %v", err)
	}
	c := r.conf
	c.Signer = nil
	if _, err := trust.New(c).Make(t.Context(), day0, []*x509.Certificate{r.inUse}, nil, false, "ops"); code(err) != trust.CodeNoSigner {
		t.Errorf("with the key offline: %v", err)
	}
}

func TestStragglersAreNamed(t *testing.T) {
	r := newRig(t)
	r.publish(r.inUse)
	r.device("new", true, 1)
	r.device("old", false, 0)
	r.do(func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: "never", Product: "lamp"}); err != nil {
			return err
		}
		return tx.PutDevice(fleet.Device{ID: "off", Product: "lamp", Disabled: true})
	})
	s, err := r.p.Spread(t.Context(), 10)
	if err != nil || s.Version != 1 || s.Devices != 3 || s.Acked != 1 || s.Versions[0] != 2 || s.More {
		t.Fatalf("%+v, %v", s, err)
	}
	if len(s.Stragglers) != 2 || s.Stragglers[0].Device != "never" || s.Stragglers[1].Device != "old" {
		t.Errorf("%+v", s.Stragglers)
	}
	if s, err = r.p.Spread(t.Context(), 1); err != nil || len(s.Stragglers) != 1 || !s.More {
		t.Errorf("with a limit: %+v, %v", s, err)
	}
}
