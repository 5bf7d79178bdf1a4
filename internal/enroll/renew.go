package enroll

import (
	"context"
	"slices"
	"time"

	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// RenewOptions say whom a pass asks to renew: devices whose window is open, if nothing is set. At most one of Within, All,
// Issuer and Devices may be set.
type RenewOptions struct {
	Within  time.Duration    // those whose certificate ends within; 0: those that are due
	All     bool             // every device with a certificate
	Issuer  pki.IssuerID     // those whose certificate in use this CA signed: the one before, in a rotation
	Devices []fleet.DeviceID // these
	Limit   int              // devices asked at most; 0: no limit
	DryRun  bool             // nobody is asked
	By      string           // name of the token; empty: the scheduler
	// Over spreads the renewals: instead of being asked now, the devices get a window that begins now and is so long, each
	// is due at its own moment of it, and the passes that follow ask them (RFC 9773: the server sets the window).
	Over time.Duration
}

// Renewals reports what a pass did.
type Renewals struct {
	Due     int              // devices the options mean, those of Already included
	Asked   []fleet.DeviceID // now, nearest expiry first; in a dry run, that would be
	Already int              // asked before and not due to be asked again
	Waiting []fleet.DeviceID // of those meant, that were asked, now or before, and have no new certificate yet
	Spread  int              // got a window instead of being asked
	Offline int              // of those asked: they are told when they say hello
	Skipped []Skip
	More    bool // the limit left some out
}

// Skip is a device that was not asked.
type Skip struct {
	Device fleet.DeviceID
	Why    string
}

// renewBatch is how many devices are asked in one transaction.
const renewBatch = 256

// RenewPass asks devices to renew, nearest expiry first. It is idempotent: who was asked is asked again only after
// Policy.AskAgain. A device that is online gets a message at once, any other when it says hello. The error is Invalid if
// the options contradict one another, NotFound if a named device does not exist.
func (e *Enroller) RenewPass(ctx context.Context, at time.Time, o RenewOptions) (Renewals, error) {
	named := 0
	for _, set := range []bool{o.Within != 0, o.All, o.Issuer != "", len(o.Devices) > 0} {
		if set {
			named++
		}
	}
	if o.Over < 0 || o.Over > 0 && named == 0 {
		return Renewals{}, fleet.Errorf(fleet.Invalid, "renewal: a time to spread over goes with a time, all, an issuer, or devices")
	}
	if named > 1 || o.Within < 0 || o.Limit < 0 {
		return Renewals{}, fleet.Errorf(fleet.Invalid, "renewal: give one of a time, all, an issuer, or devices, and no negative numbers")
	}
	who, err := e.candidates(ctx, at, o)
	if err != nil {
		return Renewals{}, err
	}
	var r Renewals
	for batch := range slices.Chunk(who, renewBatch) {
		part := r
		err := e.c.Update(ctx, func(tx Tx) error {
			part = r
			part.Asked, part.Skipped, part.Waiting = slices.Clone(r.Asked), slices.Clone(r.Skipped), slices.Clone(r.Waiting)
			for _, id := range batch {
				if err := e.ask(tx, at, id, o, &part); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return r, err
		}
		r = part
		e.c.Committed()
	}
	return r, nil
}

// candidates returns the devices that o means, nearest expiry first. ask looks at each once more.
func (e *Enroller) candidates(ctx context.Context, at time.Time, o RenewOptions) (who []fleet.DeviceID, err error) {
	if o.Issuer != "" {
		err = e.holders(ctx, o.Issuer, func(dev fleet.DeviceID) { who = append(who, dev) })
		return who, err
	}
	err = e.c.View(ctx, func(tx Tx) error {
		who = nil
		if len(o.Devices) > 0 {
			for _, id := range o.Devices {
				if _, err := tx.Device(id); err != nil {
					return err
				}
				if !slices.Contains(who, id) {
					who = append(who, id)
				}
			}
			return nil
		}
		var list []pki.Certificate
		var err error
		switch {
		case o.All:
			list, err = tx.CertificatesEnding(at.Add(200*365*24*time.Hour), 0)
		case o.Within != 0:
			list, err = tx.CertificatesEnding(at.Add(o.Within), 0)
		default: // those due for longest come first, but who ends first is asked first: after an outage both matter
			list, err = tx.CertificatesDue(at, 0)
			slices.SortStableFunc(list, func(a, b pki.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
		}
		if err != nil {
			return err
		}
		seen := map[fleet.DeviceID]bool{}
		for _, c := range list {
			if c.State.Live() && !seen[c.Device] {
				seen[c.Device] = true
				who = append(who, c.Device)
			}
		}
		return nil
	})
	return who, err
}

// ask asks one device, or notes in r why not.
func (e *Enroller) ask(tx Tx, at time.Time, id fleet.DeviceID, o RenewOptions, r *Renewals) error {
	dev, err := tx.Device(id)
	if fleet.Is(err, fleet.NotFound) {
		return nil // removed meanwhile
	}
	if err != nil {
		return err
	}
	why, err := e.cannotRenew(tx, at, dev, o)
	if err != nil {
		return err
	}
	if why == notDue {
		return nil
	}
	r.Due++
	switch {
	case why != "":
		r.Skipped = append(r.Skipped, Skip{id, why})
		return nil
	case o.Over > 0:
		r.Spread++
		return e.spread(tx, at, dev, o)
	case !dev.RenewSince.IsZero() && at.Before(dev.RenewAsked.Add(e.policy.AskAgain)):
		r.Already++
		r.Waiting = append(r.Waiting, id)
		return nil
	case o.Limit > 0 && len(r.Asked) == o.Limit:
		r.More = true
		return nil
	}
	st, err := tx.Status(id)
	if err != nil {
		return err
	}
	r.Asked = append(r.Asked, id)
	if !o.DryRun || !dev.RenewSince.IsZero() {
		r.Waiting = append(r.Waiting, id)
	}
	if !st.Online {
		r.Offline++
	}
	if o.DryRun {
		return nil
	}
	if dev.RenewSince.IsZero() {
		dev.RenewSince = at
	}
	dev.RenewAsked = at
	if err := tx.PutDevice(dev); err != nil {
		return err
	}
	if st.Online {
		if err := tx.Enqueue(downlink.Entry{Device: id, Vhost: wire.VhostDevices, Kind: downlink.Renew, At: at}); err != nil {
			return err
		}
	}
	if o.By == "" {
		return nil // the scheduler's passes would fill the trail; the issue that follows is in it
	}
	return audit(tx, at, o.By, "certificate.renew", id, "")
}

// spread gives the newest certificate of dev a window of its own.
func (e *Enroller) spread(tx Tx, at time.Time, dev fleet.Device, o RenewOptions) error {
	c, err := newestLive(tx, dev)
	if err != nil || o.DryRun {
		return err
	}
	c.Suggested = c.Suggest(at, o.Over)
	if err := tx.PutCertificate(c); err != nil {
		return err
	}
	if o.By == "" {
		return nil
	}
	return audit(tx, at, o.By, "certificate.window", dev.ID, "serial "+string(c.Serial)+" until "+c.Suggested.End.UTC().Format(time.RFC3339))
}

// notDue is the reason that is none: a newer certificate is on its way, or the pass means others.
const notDue = "not due"

// cannotRenew says why dev is not to be asked; empty if it is.
func (e *Enroller) cannotRenew(tx Tx, at time.Time, dev fleet.Device, o RenewOptions) (string, error) {
	switch {
	case dev.Disabled:
		return "disabled", nil
	case dev.RecoveryOff != "":
		return "its certificate was revoked: enrol it again", nil
	}
	newest, err := newestLive(tx, dev)
	if err != nil {
		return "", err
	}
	switch {
	case newest.Serial == "":
		return "it has no certificate", nil
	case !at.Before(newest.NotAfter):
		return "its certificate has expired: it can come back over the fallback", nil
	case o.Issuer != "" && (issuers{}).of(newest) != o.Issuer:
		return notDue, nil // the new one is on its way
	case o.All, o.Issuer != "", len(o.Devices) > 0:
		return "", nil
	case o.Within != 0 && !newest.NotAfter.Before(at.Add(o.Within)), o.Within == 0 && !newest.Due(at):
		return notDue, nil
	}
	return "", nil
}

// newestLive returns the certificate in next, or else in current, that is alive; a zero one if there is none.
func newestLive(tx Tx, dev fleet.Device) (pki.Certificate, error) {
	for _, s := range []fleet.Serial{dev.Next, dev.Current} {
		if s == "" {
			continue
		}
		c, err := tx.Certificate(s)
		if err != nil || c.State.Live() {
			return c, err
		}
	}
	return pki.Certificate{}, nil
}
