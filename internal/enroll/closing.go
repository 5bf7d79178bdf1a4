package enroll

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// How connections are closed: told to close, looked at shortly after, again once a connect that was under way at that
// moment would show, and a last time when nothing of before can show any more (rabbitmq.md §4.6). The last look is in the
// background: nobody waits for it.
const (
	firstLook  = 250 * time.Millisecond
	secondLook = 5 * time.Second
	lastLook   = time.Minute
	closers    = 8                // calls to the broker at a time
	retry      = time.Second      // after a call failed; doubled up to maxRetry
	maxRetry   = 30 * time.Second // also how often Run looks for promises
)

// closeLoop keeps the promises to close connections that nobody waits for.
func (e *Enroller) closeLoop(ctx context.Context) {
	for ctx.Err() == nil {
		_, mine, err := e.claimClosings(ctx, pki.Closing.Open)
		if err != nil && ctx.Err() == nil {
			e.c.Log.Warn("connections to be closed cannot be looked up", "error", err)
		}
		if len(mine) > 0 {
			now := time.Now()
			e.settle(ctx, now, now, mine)
			e.releaseClosings(mine)
			continue // what came meanwhile
		}
		next, again, err := e.lookLast(ctx, time.Now())
		if err != nil && ctx.Err() == nil {
			e.c.Log.Warn("the last look for connections that were closed failed; it is repeated", "error", err)
		}
		if again {
			continue
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-e.toClose:
		case <-t.C:
		}
		t.Stop()
	}
}

// claimClosings returns the promises that match, and those of them that nobody was keeping and that are the caller's now.
func (e *Enroller) claimClosings(ctx context.Context, match func(pki.Closing) bool) (list, mine []pki.Closing, err error) {
	err = e.c.View(ctx, func(tx Tx) error {
		all, err := tx.Closings()
		list = slices.DeleteFunc(all, func(c pki.Closing) bool { return !match(c) })
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range list {
		if !e.settling[c.User] {
			e.settling[c.User] = true
			mine = append(mine, c)
		}
	}
	return list, mine, nil
}

func (e *Enroller) releaseClosings(list []pki.Closing) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range list {
		delete(e.settling, c.User)
	}
}

// settled reports what settle did.
type settled struct {
	closedAt time.Time // when every user had been told to close; zero if never
	attempts int
	clean    bool
	detail   string
}

// settle closes the connections of the users of list until two looks find none, or ctx ends. start is the moment of
// the clock that at stands for.
func (e *Enroller) settle(ctx context.Context, at, start time.Time, list []pki.Closing) settled {
	now := func() time.Time { return at.Add(time.Since(start)) }
	var s settled
	for pause := retry; ; {
		left, err := e.stillPromised(ctx, list)
		if err == nil && len(left) == 0 {
			s.clean = true
			if s.closedAt.IsZero() {
				s.closedAt = now()
			}
			return s
		}
		s.attempts++
		if err == nil {
			err = e.closeAll(ctx, left)
		}
		if err == nil {
			if s.closedAt.IsZero() {
				s.closedAt = now()
			}
			var open []pki.Closing
			if open, err = e.look(ctx, left); err == nil {
				err = e.keep(ctx, without(left, open), s.closedAt, now())
			}
			if err == nil && len(open) > 0 {
				s.detail = open[0].User + " connected again"
				e.c.Log.Warn("a user that must not connect is connected; closing it again", "user", open[0].User, "others", len(open)-1)
			}
		}
		if err == nil {
			pause = retry
			continue
		}
		s.detail = "the broker or the store does not answer"
		if ctx.Err() != nil {
			return s
		}
		e.c.Log.Warn("connections cannot be closed yet", "users", len(left), "error", err)
		if !wait(ctx, pause) {
			return s
		}
		pause = min(2*pause, maxRetry)
	}
}

// stillPromised returns those of list that stand in the store as they are: a device may have been enabled again.
func (e *Enroller) stillPromised(ctx context.Context, list []pki.Closing) (left []pki.Closing, err error) {
	err = e.c.View(ctx, func(tx Tx) error {
		left = nil
		all, err := promises(tx)
		if err != nil {
			return err
		}
		for _, c := range list {
			if all.hold(c) && all[c.User].Open() {
				left = append(left, c)
			}
		}
		return nil
	})
	return left, err
}

// byUser are promises by their user: a mass revocation makes very many.
type byUser map[string]pki.Closing

func promises(tx Tx) (byUser, error) {
	list, err := tx.Closings()
	if err != nil {
		return nil, err
	}
	out := make(byUser, len(list))
	for _, c := range list {
		out[c.User] = c
	}
	return out, nil
}

// hold reports whether there is c and not a later promise for the same user.
func (p byUser) hold(c pki.Closing) bool {
	o, ok := p[c.User]
	return ok && o.Since.Equal(c.Since)
}

// closeAll tells the broker to close the connections of all users of list.
func (e *Enroller) closeAll(ctx context.Context, list []pki.Closing) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(closers)
	for _, c := range list {
		g.Go(func() error { return e.c.Sessions.CloseUser(ctx, c.User, c.Why) })
	}
	return g.Wait()
}

// look returns those of list that are connected: at a first look soon, or else at a second one.
func (e *Enroller) look(ctx context.Context, list []pki.Closing) ([]pki.Closing, error) {
	for _, after := range []time.Duration{firstLook, secondLook - firstLook} {
		if !wait(ctx, after) {
			return nil, fleet.Wrap(fleet.Unavailable, ctx.Err(), "given up")
		}
		open, err := e.connected(ctx, list)
		if err != nil || len(open) > 0 {
			return open, err
		}
	}
	return nil, nil
}

func (e *Enroller) connected(ctx context.Context, list []pki.Closing) ([]pki.Closing, error) {
	var mu sync.Mutex
	var open []pki.Closing
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(closers)
	for _, c := range list {
		g.Go(func() error {
			yes, err := e.c.Sessions.UserConnected(ctx, c.User)
			if yes && err == nil {
				mu.Lock()
				open = append(open, c)
				mu.Unlock()
			}
			return err
		})
	}
	return open, g.Wait()
}

// without returns those of list whose user is not in open. If one was found at the first look, the others have not had
// their second yet, so none counts.
func without(list, open []pki.Closing) []pki.Closing {
	if len(open) > 0 {
		return nil
	}
	return list
}

// keep notes that promises were kept, but for the last look.
func (e *Enroller) keep(ctx context.Context, list []pki.Closing, closedAt, verifiedAt time.Time) error {
	if len(list) == 0 {
		return nil
	}
	return e.c.Update(ctx, func(tx Tx) error {
		all, err := promises(tx)
		if err != nil {
			return err
		}
		for _, c := range list {
			if !all.hold(c) {
				continue
			}
			if err := looked(tx, c, closedAt); err != nil {
				return err
			}
			if err := noteClosed(tx, c.Serial, closedAt, verifiedAt); err != nil {
				return err
			}
		}
		return nil
	})
}

// looked notes that the first two looks found nothing of c.
func looked(tx Tx, c pki.Closing, closedAt time.Time) error {
	if c.MayReturn {
		return tx.DropClosing(c.User)
	}
	c.LastLook = closedAt.Add(lastLook)
	return tx.PutClosing(c)
}

// lookLast looks a last time for the users whose moment has come, and forgets those that it does not find. next is when
// the next one's moment comes, or Run should look for promises anyhow; again says that one was found, so that closing it
// begins anew.
func (e *Enroller) lookLast(ctx context.Context, at time.Time) (next time.Duration, again bool, err error) {
	var due, done []pki.Closing
	err = e.c.View(ctx, func(tx Tx) error {
		due, done, next, err = dueLooks(tx, at)
		return err
	})
	if err != nil || len(due)+len(done) == 0 {
		return next, false, err
	}
	open, err := e.connected(ctx, due)
	if err != nil {
		return retry, false, err
	}
	found := byUser{}
	for _, c := range open {
		found[c.User] = c
		e.c.Log.Warn("a user that must not connect is connected a minute after it was closed; closing it again", "user", c.User)
	}
	err = e.c.Update(ctx, func(tx Tx) error {
		all, err := promises(tx)
		if err != nil {
			return err
		}
		for _, c := range slices.Concat(due, done) {
			if !all.hold(c) {
				continue
			}
			if _, yes := found[c.User]; !yes {
				err = tx.DropClosing(c.User)
			} else {
				c.LastLook = time.Time{}
				err = tx.PutClosing(c)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return next, len(open) > 0, err
}

// dueLooks returns the promises of which only the last look is left and due, those whose user may connect again, and when
// the next is due.
func dueLooks(tx Tx, at time.Time) (due, done []pki.Closing, next time.Duration, err error) {
	next = maxRetry
	all, err := tx.Closings()
	if err != nil {
		return nil, nil, next, err
	}
	for _, c := range all {
		switch {
		case c.Open(): // somebody is closing it
		case c.LastLook.After(at):
			next = min(next, c.LastLook.Sub(at))
		default:
			moot, err := welcome(tx, c)
			if err != nil {
				return nil, nil, next, err
			}
			if moot {
				done = append(done, c)
			} else {
				due = append(due, c)
			}
		}
	}
	return due, done, next, nil
}

// welcome reports whether the user of c, a device on the fallback, may connect again: the device was removed, and another
// was added under its name.
func welcome(tx Tx, c pki.Closing) (bool, error) {
	if c.User != string(c.Device) {
		return false, nil
	}
	dev, err := tx.Device(c.Device)
	if fleet.Is(err, fleet.NotFound) {
		return false, nil
	}
	return err == nil && !dev.Disabled && dev.RecoveryOff == "", err
}

func noteClosed(tx Tx, s fleet.Serial, closedAt, verifiedAt time.Time) error {
	if s == "" {
		return nil
	}
	c, err := tx.Certificate(s)
	if fleet.Is(err, fleet.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	c.ClosedAt, c.VerifiedAt = closedAt, verifiedAt
	return tx.PutCertificate(c)
}
