package enroll

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// Bounds of the signer.
const (
	signBatch = 512                    // under a backlog; a request alone is signed at once
	idle      = 2 * time.Second        // an intent that nobody announced is found after
	minPause  = 250 * time.Millisecond // after a failure; doubled up to maxPause, with jitter
	maxPause  = 30 * time.Second
)

// relook is when to look again after a kick that found nothing: the kick may have come before its transaction's commit.
var relook = []time.Duration{5 * time.Millisecond, 50 * time.Millisecond, 500 * time.Millisecond, idle}

func (e *Enroller) signLoop(ctx context.Context) {
	pause, look := time.Duration(0), len(relook)-1
	for ctx.Err() == nil {
		err := e.SignPending(ctx)
		if ctx.Err() != nil {
			return
		}
		e.note(err)
		if err != nil {
			pause = min(max(2*pause, minPause), maxPause)
			if !wait(ctx, pause/2+rand.N(pause/2)) {
				return
			}
			continue
		}
		pause = 0
		t := time.NewTimer(relook[look])
		select {
		case <-ctx.Done():
		case <-e.toSign:
			look = 0
		case <-t.C:
			look = min(look+1, len(relook)-1)
		}
		t.Stop()
	}
}

// note keeps the outcome of signing for Health, and logs changes of it.
func (e *Enroller) note(err error) {
	e.mu.Lock()
	was := e.failing
	e.failing = err
	e.mu.Unlock()
	switch {
	case err != nil && was == nil:
		e.c.Log.Error("certificates cannot be signed; requests wait", "error", err)
	case err == nil && was != nil:
		e.c.Log.Info("certificates are signed again")
	}
}

// SignPending signs every intent of the store, in batches: one is signed while the one before it is stored. It returns
// the first failure that may pass.
func (e *Enroller) SignPending(ctx context.Context) error {
	stored := make(chan error, 1) // what became of the batch before; always has a value when the loop reads it
	stored <- nil
	for {
		var list []pki.Certificate
		err := e.c.View(ctx, func(tx Tx) (err error) {
			list, err = tx.IntendedCertificates(signBatch + e.claimed()) // those being stored still stand there
			return err
		})
		list = e.claim(list)
		var out []outcome
		if err == nil {
			out, err = e.sign(ctx, list)
		}
		if before := <-stored; before != nil || len(list) == 0 || len(out) == 0 {
			e.release(list)
			return errors.Join(before, err)
		}
		go func() {
			err := e.store(ctx, list, out)
			e.release(list)
			stored <- err
		}()
		if err != nil { // the authority failed on some; the others are stored
			return errors.Join(<-stored, err)
		}
	}
}

// claim returns those of list that nobody is signing, and marks them as being signed.
func (e *Enroller) claim(list []pki.Certificate) []pki.Certificate {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []pki.Certificate
	for _, c := range list {
		if !e.signing[c.Serial] && len(out) < signBatch {
			e.signing[c.Serial] = true
			out = append(out, c)
		}
	}
	return out
}

// claimed returns how many intents are being signed or stored.
func (e *Enroller) claimed() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.signing)
}

func (e *Enroller) release(list []pki.Certificate) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range list {
		delete(e.signing, c.Serial)
	}
}

// outcome is what became of an intent: err says why it was not signed.
type outcome struct {
	signed pki.Signed
	err    error
}

// sign signs a batch on all cores. The error is one that may pass; it does not hold up the others.
func (e *Enroller) sign(ctx context.Context, list []pki.Certificate) ([]outcome, error) {
	out := make([]outcome, len(list))
	var g errgroup.Group
	g.SetLimit(e.signers)
	for i, c := range list {
		g.Go(func() error {
			out[i].signed, out[i].err = e.c.Authority.Sign(ctx, orderOf(c))
			return nil
		})
	}
	_ = g.Wait() // failures are in out
	for _, o := range out {
		if o.err != nil && !fleet.Is(o.err, fleet.Unprocessable) {
			return out, o.err
		}
	}
	return out, nil
}

// store stores what became of a batch in one transaction. What may be signed later stays as it is.
func (e *Enroller) store(ctx context.Context, list []pki.Certificate, out []outcome) error {
	at := time.Now()
	err := e.c.Update(ctx, func(tx Tx) error {
		for i, c := range list {
			var err error
			switch {
			case out[i].err == nil:
				_, err = e.finish(tx, at, c.Serial, out[i].signed)
			case fleet.Is(out[i].err, fleet.Unprocessable):
				err = e.giveUp(tx, at, c.Serial, out[i].err)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	e.c.Committed()
	return nil
}

func orderOf(c pki.Certificate) pki.Order {
	return pki.Order{Serial: c.Serial, Device: c.Device, PublicKey: c.PublicKey, Validity: pki.Validity{NotBefore: c.NotBefore, NotAfter: c.NotAfter}}
}

// finish stores a signed certificate: record, slot next and delivery. The record of the moment decides: an intent that
// was withdrawn or revoked meanwhile stays so, and one that somebody else finished keeps what it has.
func (e *Enroller) finish(tx Tx, at time.Time, s fleet.Serial, signed pki.Signed) (pki.Certificate, error) {
	c, err := tx.Certificate(s)
	if err != nil || c.State != pki.Intended {
		return c, err
	}
	dev, err := tx.Device(c.Device)
	switch {
	case fleet.Is(err, fleet.NotFound), err == nil && (dev.Disabled || dev.RecoveryOff != ""):
		return c, become(tx, c, pki.Superseded, at) // barred since it asked
	case err != nil:
		return c, err
	}
	if err := c.Become(pki.Issued, at); err != nil {
		return c, err
	}
	c.Chain, c.NotBefore, c.NotAfter = signed.Chain, signed.NotBefore, signed.NotAfter
	c.Bare = c.Via != pki.ViaRecovery // as offer would note below, with a write of its own
	if err := tx.PutCertificate(c); err != nil {
		return c, err
	}
	if err := supersede(tx, at, dev.Next); err != nil {
		return c, err
	}
	dev.Next = s
	if err := tx.PutDevice(dev); err != nil {
		return c, err
	}
	if !c.Via.Fetched() {
		if err := offer(tx, at, c, vhostOf(c.Via)); err != nil {
			return c, err
		}
	}
	if err := e.c.Renewing(tx, at, c.Device, Signed); err != nil {
		return c, err
	}
	who := c.By
	if who == "" {
		who = deviceActor(c.Device)
	}
	return c, audit(tx, at, who, "certificate.issue", c.Device, "serial "+string(s)+" via "+string(c.Via))
}

// supersede retires the certificate of a slot, if there is one that still lives.
func supersede(tx Tx, at time.Time, s fleet.Serial) error {
	if s == "" {
		return nil
	}
	c, err := tx.Certificate(s)
	if err != nil || !c.State.Live() {
		return err
	}
	return become(tx, c, pki.Superseded, at)
}

// giveUp ends an intent that can never be signed.
func (e *Enroller) giveUp(tx Tx, at time.Time, s fleet.Serial, why error) error {
	c, err := tx.Certificate(s)
	if err != nil || c.State != pki.Intended {
		return err
	}
	e.c.Log.Error("a certificate can never be signed", "device", c.Device, "serial", s, "error", why)
	if err := become(tx, c, pki.Superseded, at); err != nil {
		return err
	}
	if c.Via.Fetched() {
		return nil
	}
	return tx.Enqueue(downlink.Entry{Device: c.Device, Vhost: vhostOf(c.Via), Kind: downlink.No, Ref: pki.CodeKey, At: at})
}

// signNow signs one intent for a caller who waits.
func (e *Enroller) signNow(ctx context.Context, at time.Time, c pki.Certificate) (pki.Certificate, error) {
	mine := e.claim([]pki.Certificate{c})
	if len(mine) == 0 {
		return e.awaitSigned(ctx, c.Serial)
	}
	defer e.release(mine)
	signed, err := e.c.Authority.Sign(ctx, orderOf(c))
	if err != nil {
		if fleet.Is(err, fleet.Unprocessable) {
			if err := e.c.Update(ctx, func(tx Tx) error { return e.giveUp(tx, at, c.Serial, err) }); err != nil {
				return pki.Certificate{}, err
			}
		}
		return pki.Certificate{}, err
	}
	err = e.c.Update(ctx, func(tx Tx) (err error) { c, err = e.finish(tx, at, c.Serial, signed); return err })
	if err != nil {
		return pki.Certificate{}, err
	}
	e.c.Committed()
	return c, finished(c)
}

// finished returns an error if c, which was to be signed, was not.
func finished(c pki.Certificate) error {
	if c.State.Live() {
		return nil
	}
	return fleet.Errorf(fleet.Conflict, "the certificate is %s by now: the device was barred, or another request came after this one", c.State)
}

// awaitSigned waits until whoever signs an intent is done.
func (e *Enroller) awaitSigned(ctx context.Context, s fleet.Serial) (pki.Certificate, error) {
	for {
		c, err := e.Certificate(ctx, s)
		if err != nil {
			return pki.Certificate{}, err
		}
		if c.State != pki.Intended {
			return c, finished(c)
		}
		if err := e.Health(); err != nil {
			return pki.Certificate{}, err
		}
		if !wait(ctx, 10*time.Millisecond) {
			return pki.Certificate{}, fleet.Wrap(fleet.Unavailable, ctx.Err(), "the certificate is still being signed: ask again")
		}
	}
}
