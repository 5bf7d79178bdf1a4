package enroll

import (
	"context"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Holders counts the devices whose certificate in use was signed by an issuer, and names up to limit of them. It reads all
// certificates, in short transactions.
func (e *Enroller) Holders(ctx context.Context, id pki.IssuerID, limit int) (n int, named []fleet.DeviceID, err error) {
	err = e.holders(ctx, id, func(dev fleet.DeviceID) {
		if n++; len(named) < limit {
			named = append(named, dev)
		}
	})
	return n, named, err
}

// holders calls yield for each device whose certificate in use is of an issuer.
func (e *Enroller) holders(ctx context.Context, id pki.IssuerID, yield func(fleet.DeviceID)) error {
	ids := issuers{}
	for after, end := fleet.Serial(""), false; !end; {
		var found []fleet.DeviceID
		err := e.c.View(ctx, func(tx Tx) error {
			found = nil
			page, err := tx.CertificatesAfter(after, massPage)
			if err != nil {
				return err
			}
			for _, c := range page {
				if c.State == pki.Active && ids.of(c) == id {
					found = append(found, c.Device)
				}
			}
			if end = len(page) < massPage; !end {
				after = page[len(page)-1].Serial
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, dev := range found {
			yield(dev)
		}
	}
	return nil
}

// RetireIssuer takes from every certificate of an issuer that still holds its validity, because nobody trusts that CA any
// more: superseded, in the words of RFC 5280 §5.3.1. Unlike RevokeIssuer it leaves the devices the fallback, where their old
// key still proves who they are. Doing it again does no harm. It returns how many there were.
func (e *Enroller) RetireIssuer(ctx context.Context, at time.Time, id pki.IssuerID, by string) (n int, err error) {
	ids := issuers{}
	for after, end := fleet.Serial(""), false; !end; {
		var batch []fleet.Serial
		if batch, after, end, err = e.nextOf(ctx, id, after, ids); err != nil {
			return n, err
		}
		did := 0
		err = e.c.Update(ctx, func(tx Tx) error {
			did = 0
			for _, s := range batch {
				c, err := tx.Certificate(s)
				if err != nil {
					return err
				}
				if !holds(c) {
					continue
				}
				if err := revokeOne(tx, at, c, pki.ReasonSuperseded, by); err != nil {
					return err
				}
				did++
			}
			return nil
		})
		if err != nil {
			return n, err
		}
		n += did
	}
	if n > 0 {
		e.c.Revoked()
		kick(e.toClose)
	}
	return n, nil
}
