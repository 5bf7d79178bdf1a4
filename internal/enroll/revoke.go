package enroll

import (
	"context"
	"fmt"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Revocation reports what Revoke did. Durations count from the call.
type Revocation struct {
	Certificate pki.Certificate // with the original time, if it was revoked before
	Live        int             // sessions that were known to be open
	Stored      time.Duration   // until new connections were refused
	Closed      time.Duration   // until live ones were told to close; zero if the broker could not be reached
	Verified    time.Duration   // until a later look found none; zero if there was none before ctx ended
	Attempts    int             // rounds of closing
	Clean       bool            // none was found; if not, Run goes on trying
	Detail      string          // what stands in the way, if not Clean
}

// Revoke takes a certificate out of use for good, for a reason of RFC 5280 §5.3.1 (see pki.ReasonAllowed). If it stands in
// a slot, the device is thrown out wholly: both slots, what is being signed for it, and the fallback, until an operator
// enrols it again; with reason 1 (keyCompromise) its passwords die too, for they lie in the same flash. One that was
// superseded goes alone.
//
// The order is: stored, so that a reconnect is refused; live connections closed; looked again after a moment and after
// five seconds, and closed again if need be, until none is found or ctx ends. What is left to do then is stored and done
// by Run. Revoking again returns the first time. Errors: Invalid for a reason, NotFound for a serial.
func (e *Enroller) Revoke(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) (Revocation, error) {
	if !pki.ReasonAllowed(reason) {
		return Revocation{}, fleet.Errorf(fleet.Invalid, "reason: use 0 (unspecified), 1 (keyCompromise), 3 (affiliationChanged), 4 (superseded), 5 (cessationOfOperation) or 9 (privilegeWithdrawn)")
	}
	start := time.Now()
	var r Revocation
	err := e.c.Update(ctx, func(tx Tx) (err error) {
		r = Revocation{}
		if r.Certificate, err = tx.Certificate(s); err != nil || r.Certificate.State == pki.Revoked {
			return err
		}
		r.Certificate, r.Live, err = e.revoke(tx, at, r.Certificate, reason, by)
		return err
	})
	if err != nil {
		return Revocation{}, err
	}
	r.Stored = time.Since(start)
	e.c.Committed()
	e.c.Revoked()
	list, mine, err := e.claimClosings(ctx, func(c pki.Closing) bool { return c.Device == r.Certificate.Device })
	if err != nil {
		return r, err
	}
	defer func() {
		e.releaseClosings(mine)
		kick(e.toClose) // whatever is left
	}()
	done := e.settle(ctx, at, start, list) // those that Run is closing, too: whoever asked waits for the proof
	r.Attempts, r.Detail = done.attempts, done.detail
	if !done.closedAt.IsZero() {
		r.Closed = done.closedAt.Sub(at)
	}
	if done.clean {
		r.Clean, r.Detail = true, ""
		r.Verified = time.Since(start)
	}
	again, err := e.Certificate(context.WithoutCancel(ctx), s)
	if err == nil {
		r.Certificate = again
	}
	return r, nil
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
	if err := audit(tx, at, by, "certificate.revoke", c.Device, fmt.Sprintf("serial %s reason %d", c.Serial, reason)); err != nil {
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

// revokeOne stores the revocation of c and the promise to close its connections.
func revokeOne(tx Tx, at time.Time, c pki.Certificate, reason int, by string) error {
	if err := c.Become(pki.Revoked, at); err != nil {
		return err
	}
	c.Reason, c.By, c.ClosedAt, c.VerifiedAt = reason, by, time.Time{}, time.Time{}
	if err := tx.PutCertificate(c); err != nil || len(c.Chain) == 0 {
		return err // never signed
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

// Disable refuses a device at every door until Enable, and closes its connections: once at once, and again by Run until
// none is found. It is idempotent and returns a NotFound error if there is no such device.
func (e *Enroller) Disable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error {
	var users []pki.Closing
	err := e.c.Update(ctx, func(tx Tx) error {
		users = nil
		dev, err := tx.Device(id)
		if err != nil || dev.Disabled {
			return err
		}
		dev.Disabled, dev.DisabledAt = true, at
		if err := tx.PutDevice(dev); err != nil {
			return err
		}
		for _, u := range usersOf(dev) {
			c := pki.Closing{User: u, Device: id, Why: "device disabled", Since: at}
			if err := tx.PutClosing(c); err != nil {
				return err
			}
			users = append(users, c)
		}
		return audit(tx, at, by, "device.disable", id, "")
	})
	if err != nil {
		return err
	}
	for _, c := range users {
		if err := e.c.Sessions.CloseUser(ctx, c.User, c.Why); err != nil {
			e.c.Log.Warn("connections of a disabled device could not be closed yet", "device", id, "error", err)
			break
		}
	}
	kick(e.toClose)
	return nil
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
