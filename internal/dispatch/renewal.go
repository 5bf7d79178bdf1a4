package dispatch

import (
	"time"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// A rollout of certificates (Mode Renewal) uses the same stages, gates and stop rules as one of firmware. A grant asks the
// device to renew; its request, its word that it stored the certificate and its connection with it are the steps; only the
// last one is success. The certificate before is retired by that very connection, as with any renewal (DESIGN §7).

// CodeNoCertificate is the code of a device that has nothing to renew.
const CodeNoCertificate = "no-certificate"

// askToRenew is what a grant does in a rollout of certificates.
func (d *Dispatcher) askToRenew(tx Tx, at time.Time, id fleet.DeviceID) error {
	dev, err := tx.Device(id)
	if err != nil {
		return err
	}
	if dev.RenewSince.IsZero() || dev.RenewSince.Before(at) {
		dev.RenewSince = at // what it has, and what is on its way to it, is of the old terms
	}
	dev.RenewAsked = at
	if err := tx.PutDevice(dev); err != nil {
		return err
	}
	return tx.Enqueue(downlink.Entry{Device: id, Vhost: wire.VhostDevices, Kind: downlink.Renew, At: at})
}

// askNoMore is what the end of a grant does: a device that has not renewed is not asked again for this rollout's sake.
func (d *Dispatcher) askNoMore(tx Tx, id fleet.DeviceID) error {
	dev, err := tx.Device(id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if dev.RenewSince.IsZero() {
		return nil
	}
	dev.RenewSince, dev.RenewAsked = time.Time{}, time.Time{}
	return tx.PutDevice(dev)
}

// renewalFits finds out whether a device has a certificate to renew.
func renewalFits(tx Tx, dev fleet.Device) (fitness, error) {
	for _, s := range []fleet.Serial{dev.Next, dev.Current} {
		if s == "" {
			continue
		}
		c, err := tx.Certificate(s)
		if err != nil {
			return fitness{}, err
		}
		if c.State.Live() {
			return fitness{}, nil
		}
	}
	return fitness{code: CodeNoCertificate, why: "it has no certificate that it could renew"}, nil
}

// Renewing takes a step of a device that renews its certificate: it asked (ReportAccepted), the certificate is on its way
// (ReportDownloading), it has stored it (ReportInstalled). A device that no rollout asked is none of its business.
func (d *Dispatcher) Renewing(tx Tx, at time.Time, dev fleet.DeviceID, step rollout.Report) error {
	j, ok, err := tx.ActiveJob(dev)
	if err != nil || !ok {
		return err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil || r.Mode != rollout.Renewal {
		return err
	}
	_, _, err = d.apply(tx, r, []rollout.Job{j}, rollout.Reported{At: at, Device: dev, Report: step})
	return err
}

// Session takes the evidence of a session with a certificate: one that was asked for since the grant proves success, the
// one before, after the device said that it stored the new one, that it cannot use it.
func (d *Dispatcher) Session(tx Tx, at time.Time, dev fleet.DeviceID, serial fleet.Serial) error {
	j, ok, err := tx.LatestJob(dev)
	if err != nil || !ok || j.GrantedAt.IsZero() {
		return err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil || r.Mode != rollout.Renewal {
		return err
	}
	c, err := tx.Certificate(serial)
	if err != nil {
		return ignoreNotFound(err)
	}
	var ev rollout.Event = rollout.Reverted{At: at, Device: dev, Session: at}
	if c.Device == dev && !c.IntendedAt.Before(j.GrantedAt) {
		ev = rollout.Confirmed{At: at, Device: dev, Session: at}
	}
	_, _, err = d.apply(tx, r, []rollout.Job{j}, ev)
	return err
}

// RenewalTerms returns the lifetime of a certificate that a device asks for now, if a rollout of certificates that it takes
// part in has one of its own.
func (d *Dispatcher) RenewalTerms(tx Tx, dev fleet.DeviceID) (lifetime time.Duration, ok bool, err error) {
	j, ok, err := tx.ActiveJob(dev)
	if err != nil || !ok {
		return 0, false, err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil || r.Mode != rollout.Renewal || r.Lifetime == 0 {
		return 0, false, err
	}
	return r.Lifetime, true, nil
}

// adoptTerms makes the terms of a completed rollout of certificates those of every certificate to come.
func (d *Dispatcher) adoptTerms(tx Tx, r rollout.Rollout) error {
	if r.Lifetime == 0 {
		return nil
	}
	p, ok, err := tx.CertificatePolicy()
	if err != nil || !ok {
		return err
	}
	if p.Lifetime == r.Lifetime {
		return nil
	}
	p.Lifetime, p.Since, p.By = r.Lifetime, r.StateAt, r.CreatedBy
	p.Grace = min(p.Grace, p.Lifetime)
	p.Refused, p.Why = pki.Terms{}, ""
	if err := tx.PutCertificatePolicy(p); err != nil {
		return err
	}
	return tx.Audit(access.Entry{At: r.StateAt, Who: "muster", What: "certificate.policy", Details: "lifetime " + p.Lifetime.String() + ", by rollout " + string(r.ID)})
}
