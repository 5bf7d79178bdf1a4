package enroll

import (
	"context"
	"crypto/x509"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// fetchWait is how long a request by EST waits for its signature; after that the device is told to come again.
const fetchWait = 4 * time.Second

// Bounds of what waits for operators, as in package recovery.
const (
	maxWaiting          = 1000
	maxWaitingPerDevice = 3
)

// EnrolByPassword gives a device its first certificate (RFC 7030 §4.2.1) for a request (PKCS #10, DER), by an enrolment
// password of which sum is the SHA-256. The transaction that stores the intent spends the password; the same key gets the
// same certificate again until the password's time is over. A device that was revoked gets in again, since the password was made
// after it. Errors: those of pki.ParseCSR; Unauthorized with CodePassword; Forbidden with CodeUsed, CodeDisabled or
// CodeDenied; Conflict with pki.CodeKeyInUse; Unavailable with CodeSigning or CodeWait: the same request later gets the answer.
func (e *Enroller) EnrolByPassword(ctx context.Context, at time.Time, id fleet.DeviceID, sum fleet.Hash, csr []byte) (pki.Certificate, error) {
	key, names, err := e.readNamed(id, csr)
	if err != nil {
		return pki.Certificate{}, err
	}
	if !names.OwnDNS(id) {
		return pki.Certificate{}, strangeNames(id)
	}
	return e.fetch(ctx, func(tx Tx) (pki.Certificate, error) {
		p, err := enrolment(tx, at, id, sum)
		if err != nil {
			return pki.Certificate{}, err
		}
		dev, err := tx.Device(id)
		if err != nil {
			return pki.Certificate{}, err
		}
		if p.KeyHash != "" && p.KeyHash != key.KeyHash {
			return pki.Certificate{}, usedUp()
		}
		if p.Serial != "" {
			return e.broughtBefore(tx, dev, p.Serial)
		}
		c, err := e.intendEST(tx, at, dev, key, wish{via: pki.ViaEST, by: p.By, anew: true})
		if err != nil {
			return c, err
		}
		if c.Serial != "" {
			if err := e.reopen(tx, id); err != nil {
				return c, err
			}
		}
		first := p.KeyHash == ""
		p.UsedAt, p.KeyHash, p.Serial = at, key.KeyHash, c.Serial
		if err := tx.PutEnrolment(p); err != nil || !first {
			return c, err
		}
		return c, audit(tx, at, deviceActor(id), "device.enrol", id, "key "+requestID(key.KeyHash)+", with the password of "+p.By)
	})
}

// broughtBefore returns the certificate that a password brought already, as long as it is of use.
func (e *Enroller) broughtBefore(tx Tx, dev fleet.Device, s fleet.Serial) (pki.Certificate, error) {
	c, err := tx.Certificate(s)
	switch {
	case err != nil:
		return pki.Certificate{}, err
	case dev.Disabled:
		return pki.Certificate{}, fleet.Coded(fleet.Forbidden, CodeDisabled, "device %s is disabled: enable it first", dev.ID)
	case c.State != pki.Intended && !c.State.Live():
		return pki.Certificate{}, usedUp()
	}
	return c, nil
}

func usedUp() error {
	return fleet.Coded(fleet.Forbidden, CodeUsed, "this enrolment password was used already: an operator can make another one")
}

// EnrolByCertificate gives a device the certificate after the one with the serial s, with which it came in and whose chain
// the caller has verified (RFC 7030 §4.2.1, §4.2.2). With renew the request must have exactly the names of that
// certificate; without it, the device id as common name and DNS name, or none. Errors: as for EnrolByPassword without the password's; Forbidden with
// pki.CodeIdentity for other names, with CodeNotCurrent if s is not one of the device's present certificates, with
// pki.CodeKeyRevoked; TooMany with CodeTooMany.
func (e *Enroller) EnrolByCertificate(ctx context.Context, at time.Time, id fleet.DeviceID, s fleet.Serial, csr []byte, renew bool) (pki.Certificate, error) {
	key, names, err := e.readNamed(id, csr)
	if err != nil {
		return pki.Certificate{}, err
	}
	return e.fetch(ctx, func(tx Tx) (pki.Certificate, error) {
		dev, err := tx.Device(id)
		if err != nil {
			return pki.Certificate{}, err
		}
		own, err := present(tx, at, dev, s)
		if err != nil {
			return pki.Certificate{}, err
		}
		same, err := sameNames(names, own)
		switch {
		case err != nil:
			return pki.Certificate{}, err
		case renew && !same:
			return pki.Certificate{}, fleet.Coded(fleet.Forbidden, pki.CodeIdentity, "the request must have the subject and the subjectAltName of the certificate that it renews, unchanged; or use simpleenroll")
		case !same && !names.OwnDNS(id):
			return pki.Certificate{}, strangeNames(id)
		}
		return e.intendEST(tx, at, dev, key, wish{via: pki.ViaEST})
	})
}

// CodeNotCurrent is the code of a certificate that is none of the device's present ones.
const CodeNotCurrent = "not_current"

// present returns certificate s of dev if it is in one of its slots, live and not past its end.
func present(tx Tx, at time.Time, dev fleet.Device, s fleet.Serial) (pki.Certificate, error) {
	if s != "" && (s == dev.Current || s == dev.Next) {
		c, err := tx.Certificate(s)
		if err != nil || c.State.Live() && at.Before(c.NotAfter) {
			return c, err
		}
	}
	return pki.Certificate{}, fleet.Coded(fleet.Forbidden, CodeNotCurrent, "this certificate is none of the device's present ones")
}

// sameNames reports whether names are those of certificate c.
func sameNames(names pki.Names, c pki.Certificate) (bool, error) {
	leaf, err := x509.ParseCertificate(c.Chain[0])
	if err != nil {
		return false, fleet.Wrap(fleet.Internal, err, "the stored certificate cannot be read")
	}
	own, err := pki.CertificateNames(leaf)
	return err == nil && names.Equal(own), err
}

func strangeNames(id fleet.DeviceID) error {
	return fleet.Coded(fleet.Unprocessable, pki.CodeSubject, "the request asks for other names than the device's: use subjectAltName DNS:%s, or none", id)
}

// readNamed is ReadCSR with the request's names.
func (e *Enroller) readNamed(id fleet.DeviceID, csr []byte) (pki.CSR, pki.Names, error) {
	key, err := e.ReadCSR(id, csr)
	if err != nil {
		return key, pki.Names{}, err
	}
	names, err := pki.RequestNames(csr)
	return key, names, err
}

// intendEST is intend for a request by EST. Where the policy wants an operator to approve new keys, it returns a zero
// certificate and no error while one waits: that must be committed.
func (e *Enroller) intendEST(tx Tx, at time.Time, dev fleet.Device, key pki.CSR, w wish) (pki.Certificate, error) {
	if e.policy.ApproveEST && !dev.Disabled {
		by, err := e.approval(tx, at, dev, key)
		if err != nil || by == "" {
			return pki.Certificate{}, err
		}
	}
	return e.intend(tx, at, dev, key, w)
}

// approval returns who approved the key, the device itself for one that it has had before, or nobody while it waits.
func (e *Enroller) approval(tx Tx, at time.Time, dev fleet.Device, key pki.CSR) (by string, err error) {
	_, blocked, err := tx.BlockedKey(key.KeyHash)
	if err != nil || blocked { // refused by intend
		return deviceActor(dev.ID), err
	}
	list, err := tx.CertificatesByKey(key.KeyHash)
	if err != nil || len(list) > 0 { // a key that is another's, or revoked, is refused by intend
		return deviceActor(dev.ID), err
	}
	q, err := tx.Request(requestID(key.KeyHash))
	switch {
	case fleet.Is(err, fleet.NotFound):
		return "", e.hold(tx, at, dev, key)
	case err != nil:
		return "", err
	case q.Device != dev.ID || q.KeyHash != key.KeyHash:
		return "", fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this key is in use elsewhere: make a new one on the device")
	case q.State == pki.Denied:
		return "", fleet.Coded(fleet.Forbidden, CodeDenied, "an operator refused this key")
	case q.State == pki.Waiting:
		return "", nil
	}
	return q.By, nil
}

// hold keeps a new key for an operator.
func (e *Enroller) hold(tx Tx, at time.Time, dev fleet.Device, key pki.CSR) error {
	list, err := tx.Requests()
	if err != nil {
		return err
	}
	all, own := 0, 0
	for _, q := range list {
		if q.State == pki.Waiting {
			all++
			if q.Device == dev.ID {
				own++
			}
		}
	}
	if all >= maxWaiting || own >= maxWaitingPerDevice {
		return fleet.Coded(fleet.TooMany, CodeLater, "too many keys wait for an operator")
	}
	id := requestID(key.KeyHash)
	err = tx.PutRequest(pki.Request{ID: id, Device: dev.ID, PublicKey: key.PublicKey, KeyHash: key.KeyHash, State: pki.Waiting, AskedAt: at, Via: pki.ViaEST})
	if err != nil {
		return err
	}
	return audit(tx, at, deviceActor(dev.ID), "est.request", dev.ID, "key "+id+" is new, waits for an operator")
}

// requestID is the name of a request that waits: 64 bits of the key's hash.
func requestID(h fleet.Hash) string { return string(h[:16]) }

// fetch commits an intent and waits for its certificate. What is stored stays so when the wait is over: the same request
// gets the certificate later.
func (e *Enroller) fetch(ctx context.Context, intend func(Tx) (pki.Certificate, error)) (pki.Certificate, error) {
	var c pki.Certificate
	err := e.c.Update(ctx, func(tx Tx) (err error) { c, err = intend(tx); return err })
	switch {
	case err != nil:
		return pki.Certificate{}, err
	case c.Serial == "":
		return c, fleet.Coded(fleet.Unavailable, CodeWait, "an operator must approve this key: send the same request again later")
	case c.State != pki.Intended:
		return c, nil
	}
	e.Kick()
	ctx, cancel := context.WithTimeout(ctx, fetchWait)
	defer cancel()
	signed, err := e.awaitSigned(ctx, c.Serial)
	if err == nil || fleet.Is(err, fleet.Conflict) {
		return signed, err
	}
	return pki.Certificate{}, &fleet.Error{Kind: fleet.Unavailable, Code: CodeSigning, Msg: "the certificate is not signed yet: send the same request again later", Err: err}
}

// DenyEST puts into the audit trail that a device was refused a certificate by EST, and why: a stable word. It is no error if
// there is no such device.
func (e *Enroller) DenyEST(ctx context.Context, at time.Time, id fleet.DeviceID, what, why string) error {
	return e.c.Update(ctx, func(tx Tx) error {
		if _, err := tx.Device(id); err != nil {
			if fleet.Is(err, fleet.NotFound) {
				return nil
			}
			return err
		}
		return audit(tx, at, deviceActor(id), what, id, "refused: "+why)
	})
}
