package enroll

import (
	"time"

	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Connected notes that a device entered the broker with a certificate. If it is the one in the slot next, it becomes
// current: the device has proven that it holds it. Until then both work (DESIGN §7). The one before is superseded; fallback
// passwords that came with other certificates die if this one brought its own. It is idempotent, and nothing for any other
// serial: the broker's events may come late or twice.
func (e *Enroller) Connected(tx Tx, at time.Time, id fleet.DeviceID, s fleet.Serial) error {
	dev, err := tx.Device(id)
	if fleet.Is(err, fleet.NotFound) {
		return nil
	}
	if err != nil || s == "" || dev.Current == s {
		return err
	}
	if dev.Next != s {
		e.c.Log.Warn("a device connected with a certificate that is in none of its slots", "device", id, "serial", s)
		return nil
	}
	c, err := tx.Certificate(s)
	if err != nil || !c.State.Live() {
		return err
	}
	if err := supersede(tx, at, dev.Current); err != nil {
		return err
	}
	if err := become(tx, c, pki.Active, at); err != nil {
		return err
	}
	dev.Current, dev.Next = s, ""
	if !c.IntendedAt.Before(dev.RenewSince) {
		dev.RenewSince, dev.RenewAsked = time.Time{}, time.Time{}
	}
	if !c.Bare {
		dev.Passwords = keepPasswords(dev.Passwords, s)
	}
	if err := tx.PutDevice(dev); err != nil {
		return err
	}
	return audit(tx, at, deviceActor(id), "certificate.activate", id, "serial "+string(s))
}

// Have notes that a device says it has stored a certificate. Nothing depends on it: only connecting with it proves it.
func (e *Enroller) Have(tx Tx, at time.Time, id fleet.DeviceID, s fleet.Serial) error {
	c, err := tx.Certificate(s)
	if fleet.Is(err, fleet.NotFound) || err == nil && c.Device != id {
		return fleet.Errorf(fleet.Invalid, "cert: ok names a serial that is not this device's")
	}
	if err != nil {
		return err
	}
	e.c.Log.Debug("a device stored its certificate", "device", id, "serial", s, "state", c.State)
	return e.c.Renewing(tx, at, id, Stored)
}

// OpenIntents puts into the outbox what a device that just said hello in a vhost should still do: take a certificate that
// it does not use yet, or renew (DESIGN §6, level-triggered).
func (e *Enroller) OpenIntents(tx Tx, at time.Time, id fleet.DeviceID, vhost string) error {
	dev, err := tx.Device(id)
	if fleet.Is(err, fleet.NotFound) {
		return nil
	}
	if err != nil || dev.Disabled || dev.RecoveryOff != "" {
		return err
	}
	if dev.Next != "" {
		c, err := tx.Certificate(dev.Next)
		if err != nil {
			return err
		}
		if c.State.Live() && !c.Via.Fetched() && at.Before(c.NotAfter) {
			return offer(tx, at, c, vhost)
		}
	}
	if !dev.RenewSince.IsZero() && vhost == wire.VhostDevices {
		return tx.Enqueue(downlink.Entry{Device: id, Vhost: vhost, Kind: downlink.Renew, At: at})
	}
	return nil
}

// Bounds of a device's fallback passwords.
const (
	maxGenerations = 5  // that were sent with one certificate
	maxPasswords   = 16 // in all; only an operator's new one makes room then
)

// keepPasswords returns the passwords that live on once a device has used certificate s, which always came with one:
// those that did.
func keepPasswords(list []fleet.Password, s fleet.Serial) []fleet.Password {
	var with []fleet.Password
	for _, p := range list {
		if p.With == s {
			with = append(with, p)
		}
	}
	if len(with) == 0 {
		return list // it was never sent
	}
	return with
}
