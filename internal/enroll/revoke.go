package enroll

import (
	"context"
	"fmt"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Revocation reports what Revoke did.
type Revocation struct {
	Certificate pki.Certificate // with the original time, if it was revoked before
	Evidence
}

// Revoke takes a certificate out of use for good, for a reason of RFC 5280 §5.3.1 (see pki.ReasonAllowed). If it stands in
// a slot, the device is thrown out wholly: both slots, what is being signed for it, and the fallback, until an operator
// enrols it again; with reason 1 (keyCompromise) its passwords die too, for they lie in the same flash. One that was
// superseded goes alone.
//
// The order is: stored, so that a reconnect is refused; live connections closed; looked again after a moment and after
// five seconds, and closed again if need be, until none is found or ctx ends. What is left to do then, and the last look
// after a minute, is stored and done by Run. Revoking again returns the first time. Errors: Invalid for a reason, NotFound
// for a serial.
func (e *Enroller) Revoke(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) (Revocation, error) {
	if !pki.ReasonAllowed(reason) {
		return Revocation{}, fleet.Errorf(fleet.Invalid, "reason: use 0 (unspecified), 1 (keyCompromise), 3 (affiliationChanged), 4 (superseded), 5 (cessationOfOperation) or 9 (privilegeWithdrawn)")
	}
	c, err := e.Certificate(ctx, s)
	if err != nil {
		return Revocation{}, err
	}
	x := exclusion{device: c.Device, serial: s, at: at, start: time.Now()}
	seen, stop := e.c.Refusals(c.Device)
	defer stop()
	x.refused = seen
	err = e.c.Update(ctx, func(tx Tx) (err error) {
		x.live, x.serial = 0, s
		if c, err = tx.Certificate(s); err != nil || c.State == pki.Revoked {
			return err
		}
		whole, err := inSlot(tx, c)
		if err != nil {
			return err
		}
		if whole {
			x.serial = ""
		}
		c, x.live, err = e.revoke(tx, at, c, reason, by)
		return err
	})
	if err != nil {
		return Revocation{}, err
	}
	x.stored = time.Since(x.start)
	e.c.Committed()
	e.c.Revoked()
	r := Revocation{Certificate: c}
	if r.Evidence, err = e.shutOut(ctx, x); err != nil {
		return r, err
	}
	if again, err := e.Certificate(context.WithoutCancel(ctx), s); err == nil {
		r.Certificate = again
	}
	if r.Certificate.RevokedAt.Before(at) { // done before: when it was
		r.StoredAt = r.Certificate.RevokedAt
		if !r.Certificate.ClosedAt.IsZero() {
			r.ClosedAt = r.Certificate.ClosedAt
		}
	}
	return r, nil
}

// inSlot reports whether c stands in a slot of its device.
func inSlot(tx Tx, c pki.Certificate) (bool, error) {
	dev, err := tx.Device(c.Device)
	if fleet.Is(err, fleet.NotFound) {
		return false, nil
	}
	return err == nil && (dev.Current == c.Serial || dev.Next == c.Serial), err
}

// revoke stores a revocation and what follows from it.
func (e *Enroller) revoke(tx Tx, at time.Time, c pki.Certificate, reason int, by string) (pki.Certificate, int, error) {
	dev, err := tx.Device(c.Device)
	if err != nil && !fleet.Is(err, fleet.NotFound) {
		return c, 0, err
	}
	st, err2 := tx.Status(c.Device)
	if err2 != nil {
		return c, 0, err2
	}
	live := 0
	inSlot := err == nil && (dev.Current == c.Serial || dev.Next == c.Serial)
	if st.Online && (inSlot || st.Serial == c.Serial) {
		live = 1
	}
	if err := revokeOne(tx, at, c, reason, by); err != nil {
		return c, 0, err
	}
	if inSlot {
		if err := throwOut(tx, at, dev, c.Serial, reason, by); err != nil {
			return c, 0, err
		}
	}
	c, err = tx.Certificate(c.Serial)
	return c, live, err
}

// revokeOne stores the revocation of c, its line in the audit trail and the promise to close its connections.
func revokeOne(tx Tx, at time.Time, c pki.Certificate, reason int, by string) error {
	if err := c.Become(pki.Revoked, at); err != nil {
		return err
	}
	c.Reason, c.By, c.ClosedAt, c.VerifiedAt = reason, by, time.Time{}, time.Time{}
	if err := tx.PutCertificate(c); err != nil {
		return err
	}
	if err := audit(tx, at, by, "certificate.revoke", c.Device, fmt.Sprintf("serial %s reason %d", c.Serial, reason)); err != nil {
		return err
	}
	if len(c.Chain) == 0 {
		return nil // never signed
	}
	return tx.PutClosing(pki.Closing{User: wire.CertUser(c.Device, c.Serial), Device: c.Device, Serial: c.Serial, Why: "certificate revoked", Since: at})
}

// throwOut takes a device's other certificates and its fallback away, because the one in a slot was revoked.
func throwOut(tx Tx, at time.Time, dev fleet.Device, s fleet.Serial, reason int, by string) error {
	own, err := tx.CertificatesOf(dev.ID)
	if err != nil {
		return err
	}
	for _, c := range own {
		if c.State != pki.Intended && c.Serial != dev.Current && c.Serial != dev.Next || c.State == pki.Revoked {
			continue
		}
		if err := revokeOne(tx, at, c, reason, by); err != nil {
			return err
		}
	}
	dev.Current, dev.Next = "", ""
	dev.RenewSince, dev.RenewAsked = time.Time{}, time.Time{}
	dev.RecoveryOff = fmt.Sprintf("certificate %s was revoked %s (reason %d) by %s", s, at.UTC().Format(time.RFC3339), reason, by)
	const keyCompromise = 1
	if reason == keyCompromise {
		dev.Passwords = nil
	}
	if err := tx.PutDevice(dev); err != nil {
		return err
	}
	if err := tx.DropEnrolment(dev.ID); err != nil {
		return err
	}
	return tx.PutClosing(pki.Closing{User: string(dev.ID), Device: dev.ID, Serial: s, Why: "certificate revoked", Since: at})
}

// Disable refuses a device at every door until Enable, and closes its connections as Revoke does: until two looks find
// none, or ctx ends. It is idempotent and returns a NotFound error if there is no such device.
func (e *Enroller) Disable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (Evidence, error) {
	x := exclusion{device: id, at: at, start: time.Now()}
	seen, stop := e.c.Refusals(id)
	defer stop()
	x.refused = seen
	var since time.Time
	err := e.c.Update(ctx, func(tx Tx) error {
		dev, err := tx.Device(id)
		if err != nil || dev.Disabled {
			since = dev.DisabledAt
			return err
		}
		since = at
		if x.live, err = live(tx, id); err != nil {
			return err
		}
		dev.Disabled, dev.DisabledAt = true, at
		if err := tx.PutDevice(dev); err != nil {
			return err
		}
		for _, u := range usersOf(dev) {
			if err := tx.PutClosing(pki.Closing{User: u, Device: id, Why: "device disabled", Since: at}); err != nil {
				return err
			}
		}
		return audit(tx, at, by, "device.disable", id, "")
	})
	if err != nil {
		return Evidence{}, err
	}
	x.stored = time.Since(x.start)
	out, err := e.shutOut(ctx, x)
	if since.Before(at) {
		out.StoredAt = since
	}
	return out, err
}

// live returns how many sessions of a device are known to be open.
func live(tx Tx, id fleet.DeviceID) (int, error) {
	st, err := tx.Status(id)
	if err != nil || !st.Online {
		return 0, err
	}
	return 1, nil
}

// Enable lets a device in again. It is idempotent and returns a NotFound error if there is no such device.
func (e *Enroller) Enable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error {
	return e.c.Update(ctx, func(tx Tx) error {
		dev, err := tx.Device(id)
		if err != nil || !dev.Disabled {
			return err
		}
		dev.Disabled, dev.DisabledAt = false, time.Time{}
		if err := tx.PutDevice(dev); err != nil {
			return err
		}
		for _, u := range usersOf(dev) {
			if u == string(id) && dev.RecoveryOff != "" {
				continue // a revocation asks for it, too
			}
			if err := tx.DropClosing(u); err != nil {
				return err
			}
		}
		return audit(tx, at, by, "device.enable", id, "")
	})
}

// usersOf returns the broker users under which dev may be connected.
func usersOf(dev fleet.Device) []string {
	out := []string{string(dev.ID)}
	for _, s := range []fleet.Serial{dev.Current, dev.Next} {
		if s != "" {
			out = append(out, wire.CertUser(dev.ID, s))
		}
	}
	return out
}
