package enroll

import (
	"context"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Swept counts what a sweep did.
type Swept struct {
	Expired int // certificates that came to their end; their live sessions are being closed
	Retired int // superseded ones, revoked after the grace period
	Open    int // promises to close connections that Run has still to keep
}

// sweepBatch is how many certificates one transaction of a sweep changes.
const sweepBatch = 256

// Sweep enforces what only time brings: it expires certificates, because RabbitMQ keeps the connection of one that ended
// (rabbitmq.md §4.6), and revokes superseded ones after Policy.Grace. Run then closes what must not live on. Call it
// every minute or so; it costs little when there is nothing to do.
func (e *Enroller) Sweep(ctx context.Context, at time.Time) (Swept, error) {
	var s Swept
	var err error
	s.Expired, err = e.sweep(ctx, func(tx Tx) ([]pki.Certificate, error) { return tx.CertificatesEnding(at, sweepBatch) }, func(tx Tx, c pki.Certificate) error {
		return expire(tx, at, c)
	})
	if err != nil {
		return s, err
	}
	s.Retired, err = e.sweep(ctx, func(tx Tx) ([]pki.Certificate, error) {
		t, err := e.terms(tx)
		if err != nil {
			return nil, err
		}
		return tx.SupersededCertificates(at.Add(-t.Grace), sweepBatch)
	}, func(tx Tx, c pki.Certificate) error {
		return revokeOne(tx, at, c, pki.ReasonSuperseded, self)
	})
	if err != nil {
		return s, err
	}
	err = e.c.View(ctx, func(tx Tx) error {
		s.Open = 0
		list, err := tx.Closings()
		for _, c := range list {
			if c.Open() {
				s.Open++
			}
		}
		return err
	})
	if s.Open > 0 {
		kick(e.toClose)
	}
	return s, err
}

// sweep does something to all certificates that find returns, a batch a transaction. do must take them out of what find
// returns.
func (e *Enroller) sweep(ctx context.Context, find func(Tx) ([]pki.Certificate, error), do func(Tx, pki.Certificate) error) (int, error) {
	total := 0
	for {
		// Most sweeps find nothing, so they do not take the writer's place.
		var found int
		err := e.c.View(ctx, func(tx Tx) error {
			list, err := find(tx)
			found = len(list)
			return err
		})
		if err != nil || found == 0 {
			return total, err
		}
		err = e.c.Update(ctx, func(tx Tx) error {
			list, err := find(tx)
			if err != nil {
				return err
			}
			found = len(list)
			for _, c := range list {
				if err := do(tx, c); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return total, err
		}
		total += found
	}
}

// expire ends a certificate. It stays in its slot, where it lets nobody in, to be seen.
func expire(tx Tx, at time.Time, c pki.Certificate) error {
	wasLive := c.State.Live()
	if err := become(tx, c, pki.Expired, at); err != nil || !wasLive {
		return err
	}
	if _, err := tx.Device(c.Device); fleet.Is(err, fleet.NotFound) {
		return nil
	}
	return tx.PutClosing(pki.Closing{User: wire.CertUser(c.Device, c.Serial), Device: c.Device, Serial: c.Serial, Why: "certificate expired", Since: at})
}
