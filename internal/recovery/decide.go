package recovery

import (
	"context"
	"time"

	"muster/internal/access"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// Approve lets a new key have its certificate; the signer goes on with it. It is idempotent. Errors: NotFound; Conflict if
// the request was denied, or the key got into use elsewhere meanwhile; Forbidden if the device was barred.
func (r *Recovery) Approve(ctx context.Context, at time.Time, id, by string) (pki.Request, error) {
	return r.decide(ctx, at, id, by, pki.Approved, "recovery.approve", func(tx Tx, q pki.Request) error {
		dev, err := tx.Device(q.Device)
		if err != nil {
			return err
		}
		// A revoked device that asks by EST has an operator's new password.
		if why := barred(dev); why != "" && !(q.Via == pki.ViaEST && why == enroll.CodeRevoked) {
			return fleet.Coded(fleet.Forbidden, why, "device %s is barred from the fallback (%s): enrol or enable it instead", q.Device, why)
		}
		if _, err := knownKey(tx, dev, q.KeyHash); err != nil {
			return err
		}
		if q.Via == pki.ViaEST {
			return nil // the device asks again, and gets it in the answer
		}
		return r.c.Enroll.RequestKey(tx, at, q.Device, pki.CSR{PublicKey: q.PublicKey, KeyHash: q.KeyHash}, pki.ViaRecovery, by)
	})
}

// Deny refuses a new key. It is idempotent. Errors: NotFound; Conflict if the request was approved.
func (r *Recovery) Deny(ctx context.Context, at time.Time, id, by string) (pki.Request, error) {
	return r.decide(ctx, at, id, by, pki.Denied, "recovery.deny", func(tx Tx, q pki.Request) error {
		if q.Via == pki.ViaEST {
			return nil // it hears of it when it asks again
		}
		return say(tx, at, q.Device, enroll.CodeDenied)
	})
}

// decide moves a waiting request to a state, with what follows from it in the same transaction.
func (r *Recovery) decide(ctx context.Context, at time.Time, id, by string, to pki.RequestState, what string, then func(Tx, pki.Request) error) (pki.Request, error) {
	var q pki.Request
	err := r.c.Update(ctx, func(tx Tx) (err error) {
		if q, err = tx.Request(id); err != nil || q.State == to {
			return err
		}
		if q.State != pki.Waiting {
			return fleet.Coded(fleet.Conflict, "decided", "request %s was %s by %s already", id, q.State, q.By)
		}
		q.State, q.DecidedAt, q.By = to, at, by
		if err := tx.PutRequest(q); err != nil {
			return err
		}
		if err := then(tx, q); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: what, On: string(q.Device), Details: "key " + q.ID})
	})
	if err != nil {
		return pki.Request{}, err
	}
	r.c.Enroll.Kick()
	r.c.Committed()
	return q, nil
}

// Sweep drops requests that nobody decided within Policy.RequestLife, decided ones after 90 days, and those of devices that
// are gone. It returns how many.
func (r *Recovery) Sweep(ctx context.Context, at time.Time) (int, error) {
	var stale []string
	find := func(tx Tx) error {
		stale = nil
		list, err := tx.Requests()
		if err != nil {
			return err
		}
		for _, q := range list {
			_, err := tx.Device(q.Device)
			gone := fleet.Is(err, fleet.NotFound)
			if err != nil && !gone {
				return err
			}
			if gone || q.State == pki.Waiting && at.After(q.AskedAt.Add(r.policy.RequestLife)) || q.State != pki.Waiting && at.After(q.DecidedAt.Add(keepDecided)) {
				stale = append(stale, q.ID)
			}
		}
		return nil
	}
	if err := r.c.View(ctx, find); err != nil || len(stale) == 0 {
		return 0, err
	}
	err := r.c.Update(ctx, func(tx Tx) error {
		if err := find(tx); err != nil {
			return err
		}
		for _, id := range stale {
			if err := tx.DropRequest(id); err != nil {
				return err
			}
		}
		return nil
	})
	return len(stale), err
}
