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

// How connections are closed: told to close, looked at shortly after, and again once a connect that was under way at that
// moment would show (rabbitmq.md §4.6).
const (
	firstLook  = 250 * time.Millisecond
	secondLook = 5 * time.Second
	closers    = 8                // calls to the broker at a time
	retry      = time.Second      // after a call failed; doubled up to maxRetry
	maxRetry   = 30 * time.Second // also how often Run looks for promises
)

// closeLoop keeps the promises to close connections that nobody waits for.
func (e *Enroller) closeLoop(ctx context.Context) {
	for ctx.Err() == nil {
		_, mine, err := e.claimClosings(ctx, func(pki.Closing) bool { return true })
		if err != nil && ctx.Err() == nil {
			e.c.Log.Warn("connections to be closed cannot be looked up", "error", err)
		}
		if len(mine) > 0 {
			now := time.Now()
			e.settle(ctx, now, now, mine)
			e.releaseClosings(mine)
			continue // what came meanwhile
		}
		t := time.NewTimer(maxRetry)
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

// settle closes the connections of the users of list until a second look finds none, or ctx ends. start is the moment of
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
		all, err := tx.Closings()
		if err != nil {
			return err
		}
		left = nil
		for _, c := range list {
			if promised(all, c) {
				left = append(left, c)
			}
		}
		return nil
	})
	return left, err
}

// promised reports whether all holds c and not a later promise for the same user.
func promised(all []pki.Closing, c pki.Closing) bool {
	for _, o := range all {
		if o.User == c.User {
			return o.Since.Equal(c.Since)
		}
	}
	return false
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

// keep notes that promises were kept.
func (e *Enroller) keep(ctx context.Context, list []pki.Closing, closedAt, verifiedAt time.Time) error {
	if len(list) == 0 {
		return nil
	}
	return e.c.Update(ctx, func(tx Tx) error {
		all, err := tx.Closings()
		if err != nil {
			return err
		}
		for _, c := range list {
			if !promised(all, c) {
				continue
			}
			if err := tx.DropClosing(c.User); err != nil {
				return err
			}
			if err := noteClosed(tx, c.Serial, closedAt, verifiedAt); err != nil {
				return err
			}
		}
		return nil
	})
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
