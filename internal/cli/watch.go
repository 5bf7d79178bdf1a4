package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) rolloutWatch() *cobra.Command {
	var every time.Duration
	c := &cobra.Command{
		Use: "watch ID", Short: "follow a rollout until it ends", Args: cobra.ExactArgs(1),
		Long: `Follows a rollout until it is completed, halted, aborted or rolled back: a view that is redrawn on a terminal, a line for each
decision and each change in a pipe. The exit code tells how it went: 0 completed, 7 halted, aborted or rolled back. Leaving
with ctrl-c does not touch the rollout.`,
	}
	c.Flags().DurationVar(&every, "every", time.Second, "in a pipe, the shortest time between two lines about progress; how often to look where events cannot be had")
	return a.online(c, func(ctx context.Context, args []string) error {
		if every < 10*time.Millisecond {
			return usagef("--every is at least 10ms")
		}
		return a.watch(ctx, args[0], every)
	})
}

// Bounds of watching.
const (
	maxMisses   = 30              // looks in a row that may fail before it is given up: musterd may be restarting
	redrawEvery = time.Second     // on a terminal, so that times go on
	lastWords   = 2 * time.Second // after the end, for the decision that tells of it
)

// news is what a follower has to say: one field is set.
type news struct {
	rollout  *api.Rollout
	decision *api.Decision
	date     time.Time // the server's time; zero if it is not known
	lost     error     // musterd cannot be reached at this moment
	failed   error     // nothing more will come
	ended    bool      // the rollout is over
}

// watch shows what a follower says until the rollout is over.
func (a *app) watch(ctx context.Context, id string, every time.Duration) error {
	follow, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan news)
	go func() {
		defer close(updates)
		f := &follower{c: a.client, id: id, every: every, say: func(u news) bool {
			select {
			case updates <- u:
				return true
			case <-follow.Done():
				return false
			}
		}}
		f.run(follow)
	}()
	v := newView(a.ui, every)
	defer v.close()
	redraw := time.NewTicker(redrawEvery)
	defer redraw.Stop()
	var over <-chan time.Time // set when the rollout is over
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-over:
			return v.last()
		case <-redraw.C:
			v.redraw()
		case u, more := <-updates:
			switch {
			case !more || u.ended:
				return v.last()
			case u.failed != nil:
				return u.failed
			}
			if v.take(u) && over == nil {
				over = time.After(lastWords)
			}
			if over != nil && v.told() {
				return v.last()
			}
		}
	}
}

// follower tells of a rollout: by events, or by looking again and again where there are none to be had.
type follower struct {
	c       *client.Client
	id      string
	every   time.Duration
	say     func(news) bool // false: nobody listens any more
	seen    string          // id of the last decision
	decided int             // decisions told
	misses  int
}

func (f *follower) run(ctx context.Context) {
	for ctx.Err() == nil {
		end, err := f.stream(ctx)
		if end {
			f.say(news{ended: true})
			return
		}
		if noStream(err) {
			err = f.look(ctx)
		}
		switch {
		case err == nil:
			f.misses = 0
		case !passing(err) || f.misses == maxMisses:
			f.say(news{failed: err})
			return
		default:
			f.misses++
			if !f.say(news{lost: err}) {
				return
			}
		}
		t := time.NewTimer(f.every)
		select {
		case <-ctx.Done():
			t.Stop()
		case <-t.C:
		}
	}
}

// noStream reports whether musterd answers, but not with events: too many follow already, or it knows none.
func noStream(err error) bool {
	e, ok := errors.AsType[*client.Error](err)
	return ok && (e.Code == "too_many_streams" || e.Code == "no_such_path")
}

// passing reports whether an error may be over soon.
func passing(err error) bool {
	if _, ok := errors.AsType[*client.Unreachable](err); ok {
		return true
	}
	e, ok := errors.AsType[*client.Error](err)
	return ok && (e.Status == http.StatusServiceUnavailable || e.Status == http.StatusTooManyRequests)
}

// stream tells what an event stream says. end is true when it says that nothing more will come. A stream that ends in
// another way is no failure if something came: musterd restarts, or a proxy ends what lasts.
func (f *follower) stream(ctx context.Context) (end bool, err error) {
	s, err := f.c.Events(ctx, f.id, f.seen)
	if err != nil {
		return false, err
	}
	defer s.Close()
	begin := time.Now()
	for n := 0; ; n++ {
		e, err := s.Next()
		if err != nil {
			if n > 0 {
				err = nil
			}
			return false, err
		}
		u := news{}
		if !s.Date.IsZero() {
			u.date = s.Date.Add(time.Since(begin))
		}
		switch e.Name {
		case "end":
			return true, nil
		case "rollout":
			u.rollout = new(api.Rollout)
			err = json.Unmarshal(e.Data, u.rollout)
		case "decision":
			u.decision = new(api.Decision)
			err = json.Unmarshal(e.Data, u.decision)
			f.seen = e.ID
			f.decided++
		default:
			continue
		}
		if err != nil {
			return false, fmt.Errorf("an event of musterd cannot be read, is it another version? %w", err)
		}
		if !f.say(u) {
			return false, nil
		}
	}
}

// look asks once, for the rollout and for the decisions that are new.
func (f *follower) look(ctx context.Context) error {
	res, err := f.c.GetRollout(ctx, f.id)
	var date time.Time
	if err == nil {
		date, _ = http.ParseTime(res.Header.Get("Date"))
	}
	r, err := client.Read[api.Rollout](res, err)
	if err != nil {
		return err
	}
	l, err := client.Read[api.DecisionList](f.c.ListRolloutDecisions(ctx, f.id))
	if err != nil {
		return err
	}
	if !f.say(news{rollout: &r, date: date}) {
		return nil
	}
	for _, d := range l.Items[min(f.decided, len(l.Items)):] {
		f.decided++
		if !f.say(news{decision: &d, date: date}) {
			return nil
		}
	}
	return nil
}

// verdict says whether a rollout is over, and how.
func verdict(r api.Rollout) (done bool, err error) {
	switch r.State {
	case api.RolloutStateCompleted:
		return true, nil
	case api.RolloutStateHalted, api.RolloutStateAborted, api.RolloutStateRolledBack:
		return true, &outcome{fmt.Sprintf("rollout %s is %s: %s", r.ID, r.State, first(r.Reason, "no reason was given"))}
	}
	return false, nil
}
