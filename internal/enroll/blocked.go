package enroll

import (
	"context"
	"slices"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// maxWhy is how long a reason may be, in bytes; maxBlocked how many keys operators may block: a list of more belongs into
// the file of certificates.blocked_keys.
const (
	maxWhy     = 200
	maxBlocked = 100_000
)

// BlockKey sees to it that no device ever gets a certificate for a key again, and returns the certificates that it has:
// they stay in force until they are revoked. One that waits to be signed is given up. Blocking again changes nothing. Errors: Invalid, Conflict for a key of the CA,
// TooMany.
func (e *Enroller) BlockKey(ctx context.Context, at time.Time, h fleet.Hash, why, by string) (k pki.BlockedKey, of []pki.Certificate, err error) {
	if len(why) > maxWhy {
		return k, nil, fleet.Errorf(fleet.Invalid, "why: at most %d bytes", maxWhy)
	}
	if slices.Contains(e.c.Authority.KeyHashes(), h) {
		return k, nil, fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this is a key of the CA itself: replace the CA")
	}
	err = e.c.Update(ctx, func(tx Tx) (err error) {
		var blocked bool
		if of, err = tx.CertificatesByKey(h); err != nil {
			return err
		}
		if k, blocked, err = tx.BlockedKey(h); err != nil || blocked {
			return err
		}
		all, err := tx.BlockedKeys()
		if err != nil {
			return err
		}
		if len(all) >= maxBlocked {
			return fleet.Errorf(fleet.TooMany, "%d keys are blocked: put them into the file of certificates.blocked_keys", len(all))
		}
		k = pki.BlockedKey{SHA256: h, Since: at, By: by, Why: why}
		if err := tx.PutBlockedKey(k); err != nil {
			return err
		}
		for _, c := range of { // what waits to be signed never is: the authority signs nothing but intents (package ca)
			if err := e.giveUp(tx, at, c.Serial, pki.KeyKnown()); err != nil {
				return err
			}
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "key.block", On: string(h), Details: why})
	})
	if err == nil && len(of) > 0 {
		e.c.Committed()
	}
	return k, of, err
}

// UnblockKey takes a key from the list, which was put there by mistake. It returns a NotFound error if it is not on it.
func (e *Enroller) UnblockKey(ctx context.Context, at time.Time, h fleet.Hash, by string) error {
	return e.c.Update(ctx, func(tx Tx) error {
		_, blocked, err := tx.BlockedKey(h)
		if err == nil && !blocked {
			err = fleet.Errorf(fleet.NotFound, "no operator blocked the key %s", h)
		}
		if err != nil {
			return err
		}
		if err := tx.DropBlockedKey(h); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "key.unblock", On: string(h)})
	})
}

// BlockedKeys returns the keys that operators blocked, in order of their hashes.
func (e *Enroller) BlockedKeys(ctx context.Context) (list []pki.BlockedKey, err error) {
	err = e.c.View(ctx, func(tx Tx) error { list, err = tx.BlockedKeys(); return err })
	return list, err
}
