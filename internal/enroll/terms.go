package enroll

import (
	"context"
	"fmt"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// CodeLockOut refuses new terms that would lock out too many devices. Kind Conflict.
const CodeLockOut = "would_lock_out"

// terms returns the terms in force: the stored ones, or else those of the settings.
func (e *Enroller) terms(tx Tx) (pki.Terms, error) {
	p, ok, err := tx.CertificatePolicy()
	if err != nil || !ok {
		return pki.Terms{Lifetime: e.policy.Lifetime, Grace: e.policy.Grace}, err
	}
	return p.Terms, nil
}

// CertificatePolicy returns the policy in force.
func (e *Enroller) CertificatePolicy(ctx context.Context) (p pki.Policy, err error) {
	err = e.c.View(ctx, func(tx Tx) error {
		var ok bool
		if p, ok, err = tx.CertificatePolicy(); err == nil && !ok {
			p = e.bySettings(time.Time{})
		}
		return err
	})
	return p, err
}

func (e *Enroller) bySettings(at time.Time) pki.Policy {
	t := pki.Terms{Lifetime: e.policy.Lifetime, Grace: e.policy.Grace}
	return pki.Policy{Terms: t, Settings: t, Since: at}
}

// Assess says what other terms would do to the fleet: how many devices would be locked out that are not under those in
// force. Only a shorter lifetime can.
func (e *Enroller) Assess(ctx context.Context, at time.Time, t pki.Terms) (i pki.Impact, err error) {
	if err := t.Check(); err != nil {
		return i, err
	}
	now, err := e.CertificatePolicy(ctx)
	if err != nil {
		return i, err
	}
	err = e.walk(ctx, func(tx Tx, dev fleet.Device, _ pki.Certificate) error {
		i.Devices++
		if t.Lifetime >= now.Lifetime {
			return nil
		}
		st, err := tx.Status(dev.ID)
		if err != nil {
			return err
		}
		if h := habitOf(dev, st); h.Survives(at, now.Lifetime) && !h.Survives(at, t.Lifetime) {
			i.Lost++
			if len(i.Sample) < pki.MaxSample {
				i.Sample = append(i.Sample, dev.ID)
			}
		}
		return nil
	})
	return i, err
}

// TryPolicy says what SetPolicy would do to the fleet, and whether it would refuse.
func (e *Enroller) TryPolicy(ctx context.Context, at time.Time, t pki.Terms) (i pki.Impact, refused bool, err error) {
	i, err = e.Assess(ctx, at, t)
	return i, i.Over(e.policy.MaxLockOut), err
}

// SetPolicy puts new terms in force: for certificates that are issued from now on. It refuses terms that would lock out
// more than Policy.MaxLockOut of the fleet with a Conflict error of CodeLockOut, unless force is set.
func (e *Enroller) SetPolicy(ctx context.Context, at time.Time, t pki.Terms, force bool, by string) (pki.Policy, pki.Impact, error) {
	i, err := e.Assess(ctx, at, t)
	if err != nil {
		return pki.Policy{}, i, err
	}
	if t.Lifetime < e.policy.MinLifetime {
		return pki.Policy{}, i, fleet.Errorf(fleet.Invalid, "lifetime: at least %s (certificates.min_lifetime)", e.policy.MinLifetime)
	}
	if i.Over(e.policy.MaxLockOut) && !force {
		return pki.Policy{}, i, fleet.Coded(fleet.Conflict, CodeLockOut, "refused: %s; at most %.3g %% may: choose a longer lifetime, or force it", i, 100*e.policy.MaxLockOut)
	}
	p := e.bySettings(at)
	p.Terms, p.By = t, by
	err = e.c.Update(ctx, func(tx Tx) error {
		if err := tx.PutCertificatePolicy(p); err != nil {
			return err
		}
		return audit(tx, at, by, "certificate.policy", "", fmt.Sprintf("lifetime %s, grace %s; %s", t.Lifetime, t.Grace, i))
	})
	return p, i, err
}

// AdoptSettings compares the settings with what they were at the last start. What changed in them is a proposal, judged as
// an operator's is: it comes into force, or is refused and shown until somebody decides. Call it at the start, before
// anything is issued.
func (e *Enroller) AdoptSettings(ctx context.Context, at time.Time) (pki.Policy, error) {
	var have pki.Policy
	var ok bool
	err := e.c.View(ctx, func(tx Tx) (err error) { have, ok, err = tx.CertificatePolicy(); return err })
	if err != nil {
		return have, err
	}
	want := e.bySettings(at)
	put := func(p pki.Policy, details string) (pki.Policy, error) {
		return p, e.c.Update(ctx, func(tx Tx) error {
			if err := tx.PutCertificatePolicy(p); err != nil {
				return err
			}
			return audit(tx, at, self, "certificate.policy", "", details)
		})
	}
	switch {
	case !ok:
		return put(want, fmt.Sprintf("by the settings: lifetime %s, grace %s", want.Lifetime, want.Grace))
	case have.Settings == want.Terms:
		return have, nil
	}
	i, err := e.Assess(ctx, at, want.Terms)
	if err != nil {
		return have, err
	}
	if !i.Over(e.policy.MaxLockOut) {
		return put(want, fmt.Sprintf("by the settings: lifetime %s, grace %s; %s", want.Lifetime, want.Grace, i))
	}
	if have.Refused == want.Terms {
		return have, nil // said before
	}
	have.Refused, have.Why = want.Terms, i.String()
	return put(have, fmt.Sprintf("refused, by the settings: lifetime %s, grace %s; %s", want.Lifetime, want.Grace, i))
}
