package enroll

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// A mass revocation goes through the store in the order of the serials: massPage records a read transaction, massBatch
// revocations a write transaction, so that the fleet's messages wait for moments only.
const (
	massPage  = 1000
	massBatch = 200
)

// Drill is what a mass revocation would do, found out by doing all of it but the commit.
type Drill struct {
	Certificates int // that hold
	Live         int // sessions that are known to be open
	Took         time.Duration
	// Estimate is what the same would take at least with commits and with the broker told to close the sessions. A commit of a
	// full batch weighs more than the small one that the drill measures: the real one took three times as long (docs/performance.md).
	Estimate time.Duration
}

// RevokeIssuer orders to revoke every certificate of an issuer that holds, for a reason of RFC 5280 §5.3.1. Run does it, in
// transactions of bounded size, and goes on after a restart. It returns the order as it is stored; one that is under way is
// not ordered again. Errors: Invalid for a reason, NotFound for an issuer that signed nothing.
func (e *Enroller) RevokeIssuer(ctx context.Context, at time.Time, id pki.IssuerID, reason int, by string) (m pki.MassRevocation, err error) {
	if !pki.ReasonAllowed(reason) {
		return m, fleet.Errorf(fleet.Invalid, "reason: use 0 (unspecified), 1 (keyCompromise), 3 (affiliationChanged), 4 (superseded), 5 (cessationOfOperation) or 9 (privilegeWithdrawn)")
	}
	total, _, err := e.countIssuer(ctx, id)
	if err != nil {
		return m, err
	}
	err = e.c.Update(ctx, func(tx Tx) error {
		have, ok, err := tx.MassRevocation(id)
		if err != nil || ok && !have.Done() {
			m = have
			return err
		}
		m = pki.MassRevocation{Issuer: id, Reason: reason, By: by, Since: at, Total: total}
		if err := tx.PutMassRevocation(m); err != nil {
			return err
		}
		return audit(tx, at, by, "issuer.revoke", "", fmt.Sprintf("issuer %s reason %d: %d certificates", id, reason, total))
	})
	kick(e.toMass)
	return m, err
}

// MassRevocation returns the newest order to revoke all certificates of an issuer, and how many promises to close
// connections are not kept yet. It returns a NotFound error if there was none.
func (e *Enroller) MassRevocation(ctx context.Context, id pki.IssuerID) (m pki.MassRevocation, open int, err error) {
	err = e.c.View(ctx, func(tx Tx) error {
		var ok bool
		if m, ok, err = tx.MassRevocation(id); err != nil {
			return err
		}
		if !ok {
			return fleet.Errorf(fleet.NotFound, "nobody ordered to revoke the certificates of issuer %s", id)
		}
		list, err := tx.Closings()
		for _, c := range list {
			if c.Open() {
				open++
			}
		}
		return err
	})
	return m, open, err
}

// countIssuer counts the certificates of an issuer that hold. It returns a NotFound error if it signed none at all.
func (e *Enroller) countIssuer(ctx context.Context, id pki.IssuerID) (holding, all int, err error) {
	ids := issuers{}
	for after, end := fleet.Serial(""), false; !end; {
		err := e.c.View(ctx, func(tx Tx) error {
			page, err := tx.CertificatesAfter(after, massPage)
			if end = len(page) < massPage; len(page) > 0 {
				after = page[len(page)-1].Serial
			}
			for _, c := range page {
				if ids.of(c) != id {
					continue
				}
				all++
				if holds(c) {
					holding++
				}
			}
			return err
		})
		if err != nil {
			return 0, 0, err
		}
	}
	if all == 0 {
		return 0, 0, fleet.Errorf(fleet.NotFound, "issuer %s has signed no certificate of a device: muster certs crl lists the issuers", id)
	}
	return holding, all, nil
}

// holds reports whether c exists outside of muster and is not at its end.
func holds(c pki.Certificate) bool {
	return len(c.Chain) > 0 && c.State != pki.Revoked && c.State != pki.Expired
}

// issuers remembers the names of the issuers that it met, by their certificates.
type issuers map[string]pki.IssuerID

// of returns who signed c; empty if nobody did.
func (i issuers) of(c pki.Certificate) pki.IssuerID {
	if len(c.Chain) < 2 {
		return ""
	}
	if id, ok := i[string(c.Chain[1])]; ok {
		return id
	}
	var id pki.IssuerID
	if cert, err := x509.ParseCertificate(bytes.Clone(c.Chain[1])); err == nil {
		id = pki.IssuerID(hex.EncodeToString(cert.SubjectKeyId))
	}
	i[string(c.Chain[1])] = id
	return id
}

// massLoop carries out mass revocations.
func (e *Enroller) massLoop(ctx context.Context) {
	for ctx.Err() == nil {
		pause := maxRetry
		if err := e.carryOut(ctx); err != nil && ctx.Err() == nil {
			e.c.Log.Error("a mass revocation failed; it goes on where it was", "error", err)
			pause = retry
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-e.toMass:
		case <-t.C:
		}
		t.Stop()
	}
}

// carryOut does every mass revocation that is not done.
func (e *Enroller) carryOut(ctx context.Context) error {
	var open []pki.MassRevocation
	err := e.c.View(ctx, func(tx Tx) error {
		open = nil
		list, err := tx.MassRevocations()
		for _, m := range list {
			if !m.Done() {
				open = append(open, m)
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, m := range open {
		ids := issuers{}
		for !m.Done() {
			if m, err = e.massStep(ctx, time.Now(), m, ids); err != nil {
				return err
			}
		}
		e.c.Log.Warn("all certificates of an issuer are revoked", "issuer", m.Issuer, "certificates", m.Revoked, "sessions", m.Live, "took", m.DoneAt.Sub(m.Since))
	}
	return nil
}

// massStep revokes the next batch of m and returns m as it is stored then.
func (e *Enroller) massStep(ctx context.Context, at time.Time, m pki.MassRevocation, ids issuers) (pki.MassRevocation, error) {
	batch, after, end, err := e.nextOf(ctx, m.Issuer, m.After, ids)
	if err != nil {
		return m, err
	}
	var users []string
	next := m
	err = e.c.Update(ctx, func(tx Tx) error {
		next, users = m, nil
		revoked := 0
		for _, s := range batch {
			did, user, err := e.revokeHolding(tx, at, s, m.Reason, m.By)
			if err != nil {
				return err
			}
			if did {
				revoked++
			}
			if user != "" {
				users = append(users, user)
				next.Live++
			}
		}
		next.Looked(after, revoked, end, at)
		if next.Done() {
			if err := audit(tx, at, m.By, "issuer.revoked", "", fmt.Sprintf("issuer %s: %d certificates in %s", m.Issuer, next.Revoked, at.Sub(m.Since).Round(time.Millisecond))); err != nil {
				return err
			}
		}
		return tx.PutMassRevocation(next)
	})
	if err != nil {
		return m, err
	}
	e.c.Committed()
	e.c.Revoked()
	e.closeKnown(ctx, users)
	kick(e.toClose) // closes those that nobody knew of, and looks again
	return next, nil
}

// revokeHolding revokes a certificate unless it does not hold any more. user is the broker user of its open session, if one
// is known.
func (e *Enroller) revokeHolding(tx Tx, at time.Time, s fleet.Serial, reason int, by string) (did bool, user string, err error) {
	c, err := tx.Certificate(s)
	if err != nil || !holds(c) {
		return false, "", err // went with another one of the same device
	}
	_, live, err := e.revoke(tx, at, c, reason, by)
	if live > 0 {
		user = wire.CertUser(c.Device, c.Serial)
	}
	return err == nil, user, err
}

// RevokeRecord revokes a certificate as Revoke does, and leaves closing its sessions to Run. Errors: Invalid for a reason,
// NotFound.
func (e *Enroller) RevokeRecord(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) error {
	if !pki.ReasonAllowed(reason) {
		return fleet.Errorf(fleet.Invalid, "reason %d is none that muster gives (RFC 5280 §5.3.1)", reason)
	}
	did := false
	err := e.c.Update(ctx, func(tx Tx) (err error) { did, _, err = e.revokeHolding(tx, at, s, reason, by); return err })
	if err != nil || !did {
		return err
	}
	e.c.Committed()
	e.c.Revoked()
	kick(e.toClose)
	return nil
}

// nextOf returns the next certificates of an issuer that hold, at most massBatch of them, the serial up to which all were
// looked at, and whether nothing is behind it.
func (e *Enroller) nextOf(ctx context.Context, id pki.IssuerID, from fleet.Serial, ids issuers) (batch []fleet.Serial, after fleet.Serial, end bool, err error) {
	after = from
	for len(batch) < massBatch && !end {
		err = e.c.View(ctx, func(tx Tx) error {
			page, err := tx.CertificatesAfter(after, massPage)
			end = len(page) < massPage
			for _, c := range page {
				if len(batch) == massBatch {
					end = false
					break
				}
				after = c.Serial
				if holds(c) && ids.of(c) == id {
					batch = append(batch, c.Serial)
				}
			}
			return err
		})
		if err != nil {
			return nil, from, false, err
		}
	}
	return batch, after, end, nil
}

// closeKnown closes sessions at once, without proof: what fails here is a promise that the closing loop keeps.
func (e *Enroller) closeKnown(ctx context.Context, users []string) {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(closers)
	for _, u := range users {
		g.Go(func() error { return e.c.Sessions.CloseUser(ctx, u, "certificate revoked") })
	}
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		e.c.Log.Warn("connections of revoked certificates could not be closed yet", "error", err)
	}
}

// errDrill takes a transaction back.
var errDrill = errors.New("a drill commits nothing")

// DrillIssuer does what RevokeIssuer orders, but for the commits and for closing anything, and says how long the real one
// would take. That a drill was held is on record. Errors are as of RevokeIssuer.
func (e *Enroller) DrillIssuer(ctx context.Context, at time.Time, id pki.IssuerID, by string) (Drill, error) {
	total, _, err := e.countIssuer(ctx, id)
	if err != nil {
		return Drill{}, err
	}
	d := Drill{Certificates: total}
	start, ids, batches := time.Now(), issuers{}, 0
	for after, end := fleet.Serial(""), false; !end; batches++ {
		var batch []fleet.Serial
		if batch, after, end, err = e.nextOf(ctx, id, after, ids); err != nil {
			return Drill{}, err
		}
		live := 0
		err = e.c.Update(ctx, func(tx Tx) error {
			live = 0
			for _, s := range batch {
				_, user, err := e.revokeHolding(tx, at, s, 0, by)
				if err != nil {
					return err
				}
				if user != "" {
					live++
				}
			}
			return errDrill
		})
		if !errors.Is(err, errDrill) {
			return Drill{}, err
		}
		d.Live += live
	}
	d.Took = time.Since(start)
	commit, err := timed(func() error {
		return e.c.Update(ctx, func(tx Tx) error {
			return audit(tx, at, by, "issuer.drill", "", fmt.Sprintf("issuer %s: %d certificates", id, total))
		})
	})
	if err != nil {
		return Drill{}, err
	}
	ask, err := timed(func() error { _, err := e.c.Sessions.UserConnected(ctx, "urn:muster:drill"); return err })
	if err != nil {
		return Drill{}, fleet.Wrap(fleet.Unavailable, err, "the broker does not answer: it would not close the sessions either")
	}
	d.Estimate = d.Took + time.Duration(batches)*commit + time.Duration((d.Live+closers-1)/closers)*ask
	return d, nil
}

func timed(f func() error) (time.Duration, error) {
	start := time.Now()
	err := f()
	return time.Since(start), err
}
