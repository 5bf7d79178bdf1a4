package enroll

import (
	"context"
	"crypto/subtle"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Codes of refusals by EST.
const (
	CodePassword = "enrolment_password" // Unauthorized: wrong, expired, or there is none
	CodeUsed     = "password_used"      // Forbidden: another key used it before
	CodeSigning  = "signing"            // Unavailable: stored and not signed yet; the same request again gets the certificate
)

// NewEnrolment makes a password with which a device asks for its first certificate by EST, once, within life. It replaces the
// one that the device had, is shown this once, and kept as a hash only. Errors: Invalid if life is out of bounds; NotFound;
// Forbidden with CodeDisabled.
func (e *Enroller) NewEnrolment(ctx context.Context, at time.Time, id fleet.DeviceID, life time.Duration, by string) (plain string, until time.Time, err error) {
	if life < pki.MinEnrolment || life > pki.MaxEnrolment {
		return "", until, fleet.Errorf(fleet.Invalid, "for: use %s to %s", pki.MinEnrolment, pki.MaxEnrolment)
	}
	plain, hash, err := newSecret()
	if err != nil {
		return "", until, err
	}
	until = at.Add(life)
	err = e.c.Update(ctx, func(tx Tx) error {
		dev, err := tx.Device(id)
		if err != nil {
			return err
		}
		if dev.Disabled {
			return fleet.Coded(fleet.Forbidden, CodeDisabled, "device %s is disabled: enable it first", id)
		}
		if err := tx.PutEnrolment(pki.Enrolment{Device: id, SHA256: hash, Since: at, Until: until, By: by}); err != nil {
			return err
		}
		return audit(tx, at, by, "device.enrol-password", id, "until "+until.UTC().Format(time.RFC3339))
	})
	if err != nil {
		return "", time.Time{}, err
	}
	return plain, until, nil
}

// CheckEnrolment returns nil if sum is the SHA-256 of the device's enrolment password, used or not, and its time is not
// over; else an Unauthorized error that is the same for every reason.
func (e *Enroller) CheckEnrolment(ctx context.Context, at time.Time, id fleet.DeviceID, sum fleet.Hash) error {
	return e.c.View(ctx, func(tx Tx) error {
		_, err := enrolment(tx, at, id, sum)
		return err
	})
}

// enrolment returns the password of a device if it is the one with this hash. The comparison takes the same time for every password.
func enrolment(tx Tx, at time.Time, id fleet.DeviceID, sum fleet.Hash) (pki.Enrolment, error) {
	p, ok, err := tx.Enrolment(id)
	if err != nil {
		return p, err
	}
	equal := subtle.ConstantTimeCompare([]byte(p.SHA256), []byte(sum)) == 1
	if !ok || !equal || sum == "" || !at.Before(p.Until) {
		return pki.Enrolment{}, fleet.Coded(fleet.Unauthorized, CodePassword, "the user name is the device id, the password one that an operator made for its enrolment and that is still good")
	}
	return p, nil
}
