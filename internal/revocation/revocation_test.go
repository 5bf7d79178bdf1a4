package revocation_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/revocation"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

// key is a signer that fails on request.
type key struct {
	crypto.Signer
	away atomic.Bool
}

func (k *key) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	if k.away.Load() {
		return nil, errors.New("the token is not there")
	}
	return k.Signer.Sign(r, digest, o)
}

func issuer(t *testing.T, name string) (pki.Issuer, *key) {
	t.Helper()
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte(name),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, own.Public(), own)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	k := &key{Signer: own}
	return pki.Issuer{Cert: c, Key: k}, k
}

type rig struct {
	*testing.T
	path    string
	db      *bolt.DB
	issuers []pki.Issuer
	lists   *revocation.Lists
	numbers map[pki.IssuerID][]int64 // that were seen
}

func newRig(t *testing.T, issuers ...pki.Issuer) *rig {
	r := &rig{T: t, path: filepath.Join(t.TempDir(), "muster.db"), issuers: issuers, numbers: map[pki.IssuerID][]int64{}}
	r.start()
	return r
}

func (r *rig) start() {
	r.db = storetest.Reopen(r.T, r.path)
	r.lists = revocation.New(revocation.Config{
		Update: func(ctx context.Context, f func(revocation.Tx) error) error {
			return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(revocation.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Issuers: func() []pki.Issuer { return r.issuers }, Log: slog.New(slog.DiscardHandler),
	})
}

func (r *rig) revoke(n int, by pki.Issuer) {
	r.Helper()
	err := r.db.Update(context.Background(), func(tx *bolt.Tx) error {
		s := fleet.SerialOf(big.NewInt(int64(n)))
		return tx.PutCertificate(pki.Certificate{
			Serial: s, Device: "gone", State: pki.Revoked, KeyHash: fleet.Hash(fmt.Sprint(n)), Chain: [][]byte{{1}, by.Cert.Raw},
			RevokedAt: time.Now(), NotAfter: time.Now().Add(1000 * time.Hour),
		})
	})
	if err != nil {
		r.Fatal(err)
	}
}

// want checks that an issuer's newest list is its nth that was looked at, and its entries. Numbers only grow.
func (r *rig) want(i pki.Issuer, nth int64, entries int) {
	r.Helper()
	l, err := r.lists.List(context.Background(), i.ID())
	seen := r.numbers[i.ID()]
	if len(seen) == 0 || l.Number > seen[len(seen)-1] {
		seen = append(seen, l.Number)
		r.numbers[i.ID()] = seen
	}
	if err != nil || int64(len(seen)) != nth || l.Number != seen[len(seen)-1] || l.Number < l.At.Unix() || l.Entries != entries {
		r.Errorf("number %d, %d entries, %v; want the list number %d of %v, %d entries", l.Number, l.Entries, err, nth, seen, entries)
	}
}

// running starts Run and returns what stops it.
func (r *rig) running() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.lists.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			r.Error(err)
		}
	}
}

func TestListsAreSignedDailyAndAfterRevocations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, k := issuer(t, "devices 1")
		two, _ := issuer(t, "devices 2")
		r := newRig(t, one, two)
		stop := r.running()
		time.Sleep(time.Second)
		r.want(one, 1, 0)
		time.Sleep(24 * time.Hour)
		r.want(one, 2, 0)
		for n := range 10 { // what comes together goes on one list
			r.revoke(n+1, one)
			r.lists.Revoked()
		}
		r.revoke(100, two)
		r.lists.Revoked()
		time.Sleep(2 * time.Second)
		r.want(one, 3, 10)
		r.want(two, 1, 1)
		// The key is away: the list before is served on, and another one is signed when it is back.
		k.away.Store(true)
		r.revoke(11, one)
		r.lists.Revoked()
		time.Sleep(10 * time.Minute)
		r.want(one, 3, 10)
		if _, err := r.lists.SignNow(t.Context(), time.Now(), one.ID(), "ops"); !fleet.Is(err, fleet.Unavailable) {
			t.Errorf("without the key: %v", err)
		}
		k.away.Store(false)
		time.Sleep(time.Minute)
		r.want(one, 4, 11)
		stop()
		// After a restart numbers go on, and the list is there before another one is signed.
		if err := r.db.Close(); err != nil {
			t.Fatal(err)
		}
		r.start()
		r.want(one, 4, 11)
		l, err := r.lists.SignNow(t.Context(), time.Now(), one.ID(), "ops")
		if err != nil || l.Entries != 11 {
			t.Errorf("%d, %d entries, %v", l.Number, l.Entries, err)
		}
		r.want(one, 5, 11)
	})
}

func TestNumbersAreGivenOnce(t *testing.T) {
	one, _ := issuer(t, "devices 1")
	r := newRig(t, one)
	const n = 20
	numbers := make([]int64, n)
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			l, err := r.lists.SignNow(context.Background(), time.Now(), one.ID(), "ops")
			numbers[i] = l.Number
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	seen := map[int64]bool{}
	for _, n := range numbers {
		seen[n] = true
	}
	if len(seen) != n {
		t.Errorf("numbers %v", numbers)
	}
	if _, err := r.lists.SignNow(t.Context(), time.Now(), "00ff", "ops"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("an unknown issuer: %v", err)
	}
	if _, err := r.lists.List(t.Context(), "00ff"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("an unknown issuer: %v", err)
	}
}
