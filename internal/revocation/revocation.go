// Package revocation tells the world which certificates are revoked: a list per issuer (RFC 5280), signed daily and after
// each revocation, and answers about single ones (OCSP, RFC 6960). Whether a device gets in is decided elsewhere, from the
// store itself; these are for those who ask a CA: auditors, and services of the operator's own.
package revocation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// Tx is what revocation needs of the store.
type Tx interface {
	Certificate(fleet.Serial) (pki.Certificate, error)
	RevokedCertificates(from time.Time, after []byte, limit int) (list []pki.Certificate, last []byte, err error)
	RevocationList(pki.IssuerID) (l pki.List, ok bool, err error)
	PutRevocationList(pki.List) error
	Audit(access.Entry) error
}

// Config of a Lists. All fields but Holds and Every are needed.
type Config struct {
	Update  func(context.Context, func(Tx) error) error
	View    func(context.Context, func(Tx) error) error
	Issuers func() []pki.Issuer // that sign now or signed what still holds; without those whose key is not here
	Log     *slog.Logger
	Holds   time.Duration // from thisUpdate to nextUpdate; 7 days
	Every   time.Duration // between two lists without a revocation; one day
}

// Lists is the use case. Its methods are safe for concurrent use.
type Lists struct {
	c    Config
	kick chan struct{} // capacity 1: something was revoked

	signing chan struct{} // capacity 1: held by who signs, so that numbers are given once

	mu     sync.Mutex
	signed map[pki.IssuerID]pki.List // guarded by mu: the newest, so that readers do not wait for the store
}

// New returns a Lists. It starts nothing.
func New(c Config) *Lists {
	if c.Holds == 0 {
		c.Holds = 7 * 24 * time.Hour
	}
	if c.Every == 0 {
		c.Every = 24 * time.Hour
	}
	return &Lists{c: c, kick: make(chan struct{}, 1), signing: make(chan struct{}, 1), signed: map[pki.IssuerID]pki.List{}}
}

// Revoked tells Run that something was revoked. It never blocks.
func (l *Lists) Revoked() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Bounds of Run.
const (
	settle = time.Second      // revocations that come together go on one list
	retry  = 30 * time.Second // after a failure
	page   = 1000             // certificates read in one transaction
)

// Run keeps the lists fresh until ctx ends. Run it once.
func (l *Lists) Run(ctx context.Context) error {
	all := false // something was revoked that is on no list yet
	for {
		wait, err := l.Refresh(ctx, time.Now(), all)
		switch {
		case err == nil:
			all = false
		case ctx.Err() == nil:
			l.c.Log.Error("revocation lists could not be signed; trying again", "error", err)
			wait = retry
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
			continue
		case <-l.kick:
			all = true
		}
		t.Stop()
		pause := time.NewTimer(settle)
		select {
		case <-ctx.Done():
			pause.Stop()
			return nil
		case <-pause.C:
		}
	}
}

// Refresh signs the lists that are due, or all of them, and returns when the next one is.
func (l *Lists) Refresh(ctx context.Context, at time.Time, all bool) (time.Duration, error) {
	next := l.c.Every
	var errs []error
	for _, i := range l.c.Issuers() {
		have, ok, err := l.newest(ctx, i.ID())
		if err == nil && ok && !all && at.Sub(have.At) < l.c.Every {
			next = min(next, l.c.Every-at.Sub(have.At))
			continue
		}
		if err == nil {
			_, err = l.sign(ctx, at, i, "")
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return max(next, time.Second), errors.Join(errs...)
}

// SignNow signs the list of an issuer at once, at the order of by. NotFound if there is no such issuer whose key is here.
func (l *Lists) SignNow(ctx context.Context, at time.Time, id pki.IssuerID, by string) (pki.List, error) {
	for _, i := range l.c.Issuers() {
		if i.ID() != id {
			continue
		}
		return l.sign(ctx, at, i, by)
	}
	return pki.List{}, noIssuer()
}

func noIssuer() error { return fleet.Errorf(fleet.NotFound, "there is no such issuer") }

// sign makes the next list of an issuer. What is revoked while it is made goes on the one after: the revocation kicks.
func (l *Lists) sign(ctx context.Context, at time.Time, i pki.Issuer, by string) (pki.List, error) {
	select {
	case l.signing <- struct{}{}:
		defer func() { <-l.signing }()
	case <-ctx.Done():
		return pki.List{}, fleet.Wrap(fleet.Unavailable, ctx.Err(), "another list is being signed")
	}
	have, _, err := l.newest(ctx, i.ID())
	if err != nil {
		return pki.List{}, err
	}
	var revoked []pki.Certificate
	var after []byte
	for {
		n := 0
		err := l.c.View(ctx, func(tx Tx) error {
			list, last, err := tx.RevokedCertificates(have.At, after, page)
			if n = len(list); n > 0 {
				after = last
			}
			for _, c := range list {
				if i.Issued(c) && c.OnList(have.At) {
					c.Chain, c.PublicKey = nil, nil // a list of a large fleet fits the memory without them
					revoked = append(revoked, c)
				}
			}
			return err
		})
		if err != nil {
			return pki.List{}, err
		}
		if n < page {
			break
		}
	}
	// Above every number that was ever given, also by a musterd whose store was replaced by a backup: as RFC 5280 §5.2.3 asks.
	out, err := i.SignList(at, l.c.Holds, max(have.Number+1, at.Unix()), revoked)
	if err != nil {
		return pki.List{}, err
	}
	err = l.c.Update(ctx, func(tx Tx) error {
		if err := tx.PutRevocationList(out); err != nil || by == "" {
			return err // the daily ones would fill the trail
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "crl.sign", On: string(out.Issuer), Details: fmt.Sprintf("number %d, %d entries", out.Number, out.Entries)})
	})
	if err != nil {
		return pki.List{}, err
	}
	l.mu.Lock()
	if l.signed[out.Issuer].Number < out.Number {
		l.signed[out.Issuer] = out
	}
	l.mu.Unlock()
	l.c.Log.Info("revocation list signed", "issuer", out.Issuer, "number", out.Number, "entries", out.Entries)
	return out, nil
}

func (l *Lists) newest(ctx context.Context, id pki.IssuerID) (out pki.List, ok bool, err error) {
	l.mu.Lock()
	out, ok = l.signed[id]
	l.mu.Unlock()
	if ok {
		return out, true, nil
	}
	err = l.c.View(ctx, func(tx Tx) error { out, ok, err = tx.RevocationList(id); return err })
	if err == nil && ok {
		l.mu.Lock()
		l.signed[id] = out
		l.mu.Unlock()
	}
	return out, ok, err
}

// List returns the newest list of an issuer, or a NotFound error.
func (l *Lists) List(ctx context.Context, id pki.IssuerID) (pki.List, error) {
	out, ok, err := l.newest(ctx, id)
	if err == nil && !ok {
		err = noIssuer()
	}
	return out, err
}

// All returns the newest list of every issuer whose key is here; one without a list is left out.
func (l *Lists) All(ctx context.Context) (out []pki.List, err error) {
	for _, i := range l.c.Issuers() {
		list, ok, err := l.newest(ctx, i.ID())
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, list)
		}
	}
	return out, nil
}
