package enroll

import (
	"context"
	"errors"
	"slices"
	"time"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Codes of refusals beyond those of package pki. They reach the device as the why of dn/cert.
const (
	CodeDisabled = "device_disabled"       // Forbidden
	CodeRevoked  = "device_revoked"        // Forbidden: an operator must enrol the device again
	CodeTooMany  = "too_many_certificates" // TooMany: more in a day than the policy allows
	CodeLater    = "later"                 // over a rate; try again
	CodeWait     = "wait"                  // an operator must decide
	CodeDenied   = "denied"                // an operator refused
)

// IssueOptions of an operator's order.
type IssueOptions struct {
	Lifetime time.Duration // zero: as the policy says; never longer than that
	By       string        // name of the token
}

// Issue signs a request (PKCS #10, DER) for a device by an operator's order and returns its certificate. The same key gets
// the same certificate as long as it is not due for renewal. The certificate goes to the slot next and becomes current when
// the device connects with it. It opens the fallback again if a revocation had closed it. Errors: NotFound, those of pki.ParseCSR, Forbidden with
// CodeDisabled or pki.CodeKeyRevoked, Conflict with pki.CodeKeyInUse, Unavailable if the authority does not answer: the
// order stands then, and Run goes on with it.
func (e *Enroller) Issue(ctx context.Context, at time.Time, id fleet.DeviceID, csr []byte, o IssueOptions) (pki.Certificate, error) {
	key, err := pki.ParseCSR(csr, e.policy.Keys)
	if err != nil {
		return pki.Certificate{}, err
	}
	if err := key.ForDevice(id); err != nil {
		return pki.Certificate{}, err
	}
	var c pki.Certificate
	err = e.c.Update(ctx, func(tx Tx) error {
		t, err := e.terms(tx)
		if err != nil {
			return err
		}
		if o.Lifetime != 0 && (o.Lifetime < e.policy.MinLifetime || o.Lifetime > t.Lifetime) {
			return fleet.Errorf(fleet.Invalid, "lifetime: use %s to %s", e.policy.MinLifetime, t.Lifetime)
		}
		dev, err := tx.Device(id)
		if err != nil {
			return err
		}
		if c, err = e.intend(tx, at, dev, key, wish{via: pki.ViaOperator, by: o.By, lifetime: o.Lifetime}); err != nil {
			return err
		}
		return e.reopen(tx, id)
	})
	if err != nil || c.State != pki.Intended {
		return c, err
	}
	return e.signNow(ctx, at, c)
}

// reopen lets a device into the fallback again.
func (e *Enroller) reopen(tx Tx, id fleet.DeviceID) error {
	dev, err := tx.Device(id)
	if err != nil || dev.RecoveryOff == "" {
		return err
	}
	dev.RecoveryOff = ""
	if err := tx.PutDevice(dev); err != nil {
		return err
	}
	return tx.DropClosing(string(id))
}

// RequestByCSR takes the request that a device sent over its own session. It stores the intent in the caller's
// transaction, so an acknowledged request is never lost; Run signs it. A refused request is answered to the device and
// returns nil. The error is of kind Invalid if the request cannot be read at all: it belongs in the quarantine.
func (e *Enroller) RequestByCSR(tx Tx, at time.Time, id fleet.DeviceID, csr []byte, via pki.Via) error {
	key, err := e.ReadCSR(id, csr)
	if err == nil {
		return e.RequestKey(tx, at, id, key, via, "")
	}
	return e.Refuse(tx, at, id, via, err)
}

// ReadCSR reads a device's request and checks that it names no other device.
func (e *Enroller) ReadCSR(id fleet.DeviceID, csr []byte) (pki.CSR, error) {
	key, err := pki.ParseCSR(csr, e.policy.Keys)
	if err != nil {
		return pki.CSR{}, err
	}
	return key, key.ForDevice(id)
}

// RequestKey is RequestByCSR for a request that was read already, at the order of by if that is not empty.
func (e *Enroller) RequestKey(tx Tx, at time.Time, id fleet.DeviceID, key pki.CSR, via pki.Via, by string) error {
	dev, err := tx.Device(id)
	if fleet.Is(err, fleet.NotFound) {
		return fleet.Errorf(fleet.Invalid, "certificate request of an unknown device")
	}
	if err != nil {
		return err
	}
	c, err := e.intend(tx, at, dev, key, wish{via: via, by: by})
	if err != nil {
		return e.Refuse(tx, at, id, via, err)
	}
	if c.State != pki.Intended {
		return offer(tx, at, c, vhostOf(via)) // signed already: it is delivered again
	}
	e.Kick()
	return nil
}

// Refuse tells a device why its request was refused, and returns nil. What cannot be read at all comes back as an Invalid
// error, and failures of the store as they are.
func (e *Enroller) Refuse(tx Tx, at time.Time, id fleet.DeviceID, via pki.Via, why error) error {
	f, ok := errors.AsType[*fleet.Error](why)
	switch {
	case !ok || f.Code == "":
		return why
	case f.Kind == fleet.Invalid:
		return why
	case f.Kind == fleet.TooLarge:
		return &fleet.Error{Kind: fleet.Invalid, Code: f.Code, Msg: f.Msg}
	}
	e.c.Log.Warn("certificate request refused", "device", id, "via", via, "code", f.Code, "error", f.Msg)
	return tx.Enqueue(downlink.Entry{Device: id, Vhost: vhostOf(via), Kind: downlink.No, Ref: f.Code, At: at})
}

// vhostOf returns where a device that came by a door listens.
func vhostOf(via pki.Via) string {
	if via == pki.ViaRecovery {
		return wire.VhostFallback
	}
	return wire.VhostDevices
}

// offer puts a certificate into the outbox for its device. Only over the fallback does a password go with it.
func offer(tx Tx, at time.Time, c pki.Certificate, vhost string) error {
	if vhost != wire.VhostFallback && !c.Bare {
		c.Bare = true
		if err := tx.PutCertificate(c); err != nil {
			return err
		}
	}
	return tx.Enqueue(downlink.Entry{Device: c.Device, Vhost: vhost, Kind: downlink.Cert, Ref: string(c.Serial), At: at})
}

// wish is what a request asks beyond its key.
type wish struct {
	via      pki.Via
	by       string
	lifetime time.Duration // zero: as the policy says
	anew     bool          // an operator's word stands behind it: it may open what a revocation closed
}

// intend returns the certificate for dev's key: the one that exists, or a new intent. A coded error says why there is none.
func (e *Enroller) intend(tx Tx, at time.Time, dev fleet.Device, key pki.CSR, w wish) (pki.Certificate, error) {
	switch {
	case dev.Disabled:
		return pki.Certificate{}, fleet.Coded(fleet.Forbidden, CodeDisabled, "device %s is disabled: enable it first", dev.ID)
	case dev.RecoveryOff != "" && w.via != pki.ViaOperator && !w.anew:
		return pki.Certificate{}, fleet.Coded(fleet.Forbidden, CodeRevoked, "device %s was revoked: enrol it again", dev.ID)
	}
	same, err := e.sameKey(tx, at, dev, key, w.via)
	if err != nil || same.Serial != "" {
		return same, err
	}
	own, err := tx.CertificatesOf(dev.ID)
	if err != nil {
		return pki.Certificate{}, err
	}
	if w.via != pki.ViaOperator && e.tooMany(own, at) {
		return pki.Certificate{}, fleet.Coded(fleet.TooMany, CodeTooMany, "device %s asked for %d certificates within a day", dev.ID, e.policy.PerDay)
	}
	if err := withdrawIntents(tx, at, own); err != nil {
		return pki.Certificate{}, err
	}
	serial, err := e.c.Authority.NewSerial()
	if err != nil {
		return pki.Certificate{}, err
	}
	life := w.lifetime
	if life == 0 {
		own, ok, err := e.c.Terms(tx, dev.ID)
		if err != nil {
			return pki.Certificate{}, err
		}
		if !ok {
			t, err := e.terms(tx)
			if err != nil {
				return pki.Certificate{}, err
			}
			own = t.Lifetime
		}
		life = max(pki.Dither(own, serial), e.policy.MinLifetime)
	}
	c := pki.Certificate{
		Serial: serial, Device: dev.ID, State: pki.Intended, Via: w.via, PublicKey: key.PublicKey, KeyHash: key.KeyHash,
		NotBefore: at.Add(-e.policy.Backdate), NotAfter: at.Add(life), IntendedAt: notBefore(at, dev.RenewSince), By: w.by,
	}
	if err := tx.PutCertificate(c); err != nil {
		return c, err
	}
	return c, e.c.Renewing(tx, at, dev.ID, Requested)
}

// sameKey returns the certificate that a key has and that answers this request, a zero one if a new one is needed, or an
// error if the key must not be used.
func (e *Enroller) sameKey(tx Tx, at time.Time, dev fleet.Device, key pki.CSR, via pki.Via) (same pki.Certificate, err error) {
	if slices.Contains(e.c.Authority.KeyHashes(), key.KeyHash) {
		return same, fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this key is in use elsewhere: make a new one on the device")
	}
	list, err := tx.CertificatesByKey(key.KeyHash)
	if err != nil {
		return same, err
	}
	for _, c := range list {
		switch {
		case c.Device != dev.ID:
			return pki.Certificate{}, fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this key is in use elsewhere: make a new one on the device")
		case c.Untrusted():
			return pki.Certificate{}, fleet.Coded(fleet.Forbidden, pki.CodeKeyRevoked, "this key belongs to a revoked certificate: make a new one on the device")
		case answers(dev, c, at, via):
			same = c
		}
	}
	_, blocked, err := tx.BlockedKey(key.KeyHash)
	if err == nil && blocked {
		err = pki.KeyKnown()
	}
	return same, err
}

// notBefore returns at, or since if that is later. The time of a request is the broker's, the time of asking for it muster's
// own: with a clock that lags, the answer to a request to renew must not look older than the request.
func notBefore(at, since time.Time) time.Time {
	if at.Before(since) {
		return since
	}
	return at
}

// answers reports whether c, a certificate of dev for the key of a request, is what the request should get.
func answers(dev fleet.Device, c pki.Certificate, at time.Time, via pki.Via) bool {
	switch {
	case c.State == pki.Intended:
		return true
	case !c.State.Live() || c.Due(at) || c.IntendedAt.Before(dev.RenewSince):
		return false // it is time for a new one
	case c.Serial == dev.Next:
		return true
	}
	// Over the fallback, a device must get one that it never used: connecting with it proves that it stored the password
	// that came with it.
	return c.Serial == dev.Current && via != pki.ViaRecovery
}

// tooMany reports whether a device asked for as many certificates as it may in a day.
func (e *Enroller) tooMany(own []pki.Certificate, at time.Time) bool {
	n := 0
	for _, c := range own {
		if c.Via != pki.ViaOperator && c.IntendedAt.After(at.Add(-24*time.Hour)) {
			n++
		}
	}
	return n >= e.policy.PerDay
}

// withdrawIntents gives up what was asked for before and is not signed yet: the newest request counts.
func withdrawIntents(tx Tx, at time.Time, own []pki.Certificate) error {
	for _, c := range own {
		if c.State != pki.Intended {
			continue
		}
		if err := become(tx, c, pki.Superseded, at); err != nil {
			return err
		}
	}
	return nil
}

// become moves a certificate to a state and stores it.
func become(tx Tx, c pki.Certificate, to pki.State, at time.Time) error {
	if err := c.Become(to, at); err != nil {
		return err
	}
	return tx.PutCertificate(c)
}

func audit(tx Tx, at time.Time, who, what string, on fleet.DeviceID, details string) error {
	return tx.Audit(access.Entry{At: at, Who: who, What: what, On: string(on), Details: details})
}
