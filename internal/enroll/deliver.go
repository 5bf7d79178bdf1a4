package enroll

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// ComposeCert returns the payloads of dn/cert that bring certificate s to a device: one, or as many slices as its receive
// buffer (st.Buffer) asks for. No payloads and no error: the device does not need it any more. An Unprocessable error says
// that it cannot receive it.
//
// With newPassword, which is for the fallback, it also makes a fresh fallback password: its hash is stored in the caller's
// transaction, so commit before sending. After a handful of deliveries of the same certificate none is added: all that were
// sent stay good, so that whichever the device stored, works.
func (e *Enroller) ComposeCert(tx Tx, at time.Time, id fleet.DeviceID, s fleet.Serial, st fleet.Status, newPassword bool) ([][]byte, error) {
	dev, err := tx.Device(id)
	if err != nil || dev.Disabled || dev.RecoveryOff != "" || s == "" || dev.Next != s && dev.Current != s {
		return nil, err
	}
	c, err := tx.Certificate(s)
	if err != nil || !c.State.Live() || !at.Before(c.NotAfter) {
		return nil, err
	}
	order := wire.CertOrder{Op: wire.CertPush, Serial: s, Chain: c.Chain}
	var hash fleet.Hash
	room := roomForPassword(dev.Passwords, s)
	if newPassword && dev.Next == s && room {
		if order.Password, hash, err = newSecret(); err != nil {
			return nil, err
		}
	}
	payloads, err := wire.SplitCert(order, wire.Budget(wire.DownTopic(id, wire.DownCert), st.Buffer))
	switch {
	case err != nil:
		return nil, err
	case order.Password != "":
		dev.Passwords = append(dev.Passwords, fleet.Password{SHA256: hash, Since: at, With: s})
		return payloads, tx.PutDevice(dev)
	case newPassword && !c.Bare:
		c.Bare = true
		return payloads, tx.PutCertificate(c)
	}
	return payloads, nil
}

// roomForPassword reports whether one more password may go with certificate s.
func roomForPassword(list []fleet.Password, s fleet.Serial) bool {
	n := 0
	for _, p := range list {
		if p.With == s {
			n++
		}
	}
	return n < maxGenerations && len(list) < maxPasswords
}

// newSecret returns a fallback password of 256 random bits, base64url, and its SHA-256 (DESIGN §4).
func newSecret() (plain string, hash fleet.Hash, err error) {
	var b [32]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", "", fleet.Wrap(fleet.Internal, err, "no random numbers")
	}
	plain = base64.RawURLEncoding.EncodeToString(b[:])
	return plain, fleet.HashOf(sha256.Sum256([]byte(plain))), nil
}

// NewPassword makes a fallback password that replaces all others of a device, and returns it: it is shown once and kept as
// a hash only. A fallback session of the device is closed. It returns a NotFound error if there is no such device.
func (e *Enroller) NewPassword(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (string, error) {
	plain, hash, err := newSecret()
	if err != nil {
		return "", err
	}
	err = e.c.Update(ctx, func(tx Tx) error {
		dev, err := tx.Device(id)
		if err != nil {
			return err
		}
		if len(dev.Passwords) > 0 {
			if err := tx.PutClosing(pki.Closing{User: string(id), Device: id, Why: "the password was replaced", Since: at, MayReturn: true}); err != nil {
				return err
			}
		}
		dev.Passwords = []fleet.Password{{SHA256: hash, Since: at}}
		if err := tx.PutDevice(dev); err != nil {
			return err
		}
		return audit(tx, at, by, "device.password", id, "")
	})
	if err != nil {
		return "", err
	}
	kick(e.toClose)
	return plain, nil
}

// ComposeRenew returns the payload of dn/cert that asks a device for a certificate request, nil if it need not renew any
// more.
func (e *Enroller) ComposeRenew(tx Tx, id fleet.DeviceID) ([]byte, error) {
	dev, err := tx.Device(id)
	if err != nil || dev.RenewSince.IsZero() || dev.Disabled || dev.RecoveryOff != "" {
		return nil, err
	}
	c, err := newestLive(tx, dev)
	if err != nil {
		return nil, err
	}
	o := wire.CertOrder{Op: wire.CertRenew, Retry: int(e.policy.AskAgain / time.Second)}
	if c.Serial != "" {
		o.By = c.Window().End.Unix()
	}
	return wire.Encode(o), nil
}

// ComposeNo returns the payload of dn/cert that tells a device why it gets no certificate: ref is the Ref of the outbox
// entry, one of the codes.
func ComposeNo(ref string) []byte {
	return wire.Encode(wire.CertOrder{Op: wire.CertNo, Why: ref, Retry: int(retryAfter(ref) / time.Second)})
}

// retryAfter says when it makes sense to ask again; zero: never with this request.
func retryAfter(ref string) time.Duration {
	switch ref {
	case CodeWait:
		return 10 * time.Minute
	case CodeLater:
		return 5 * time.Minute
	case CodeTooMany, CodeDisabled:
		return time.Hour
	}
	return 0
}
