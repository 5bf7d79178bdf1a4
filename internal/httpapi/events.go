package httpapi

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"muster/api"
	"muster/internal/dispatch"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Bounds of event streams.
const (
	maxStreams  = 64                     // at once
	followEvery = 500 * time.Millisecond // how often a followed rollout is looked at
	beatEvery   = 15 * time.Second       // a comment, when nothing else comes; the token is checked again too
	eventWrite  = 20 * time.Second       // for one event; whoever takes longer has gone
	linesAtOnce = 256                    // decisions
	eventsType  = "text/event-stream"
)

// stream is the body of an answer that goes on until ctx ends. emit sends one event or comment at once.
type stream func(ctx context.Context, emit func([]byte) error) error

// EndStreams ends all event streams, and lets none begin: an http.Server that shuts down waits for them.
func (s *Server) EndStreams() { s.endStreams() }

// followRollout streams what happens to a rollout (WHATWG HTML §9.2).
func (s *Server) followRollout(c *call) (answer, error) {
	id, err := c.rollout()
	if err != nil {
		return answer{}, err
	}
	after := uint64(0)
	if last := c.echo.Request().Header.Get("Last-Event-ID"); last != "" {
		if after, err = strconv.ParseUint(last, 10, 64); err != nil {
			return answer{}, fleet.Coded(fleet.Invalid, "last_event_id_invalid", "Last-Event-ID: send the id of an event of this stream, or none")
		}
	}
	r, lines, err := s.c.Rollouts.Since(c.ctx, id, after, linesAtOnce)
	if err != nil {
		return answer{}, err
	}
	f := &follower{s: s, c: c, id: id, after: after}
	return answer{status: http.StatusOK, body: stream(func(ctx context.Context, emit func([]byte) error) error {
		f.emit = emit
		return f.run(ctx, r, lines)
	})}, nil
}

// follower is one stream of one rollout.
type follower struct {
	s     *Server
	c     *call
	id    fleet.RolloutID
	rev   uint64 // last sent
	after uint64 // number of the last decision sent
	emit  func([]byte) error
}

// run sends the state and the decisions that it is given, and from then on what changes, until the rollout is over.
func (f *follower) run(ctx context.Context, r rollout.Rollout, lines []dispatch.Line) error {
	look, beat := time.NewTicker(followEvery), time.NewTicker(beatEvery)
	defer look.Stop()
	defer beat.Stop()
	if err := f.emit([]byte("retry: 2000\n\n")); err != nil {
		return err
	}
	for {
		sent, err := f.send(r, lines)
		if err != nil {
			return err
		}
		if sent {
			beat.Reset(beatEvery)
		}
		if len(lines) < linesAtOnce {
			if r.State.Final() && r.Sweep == "" {
				return f.event("end", "", api.RolloutEnd{State: api.RolloutState(r.State), Reason: r.Reason})
			}
			if err := f.wait(ctx, look.C, beat.C); err != nil {
				return err
			}
		}
		if r, lines, err = f.s.c.Rollouts.Since(ctx, f.id, f.after, linesAtOnce); err != nil {
			return err
		}
	}
}

// wait returns when it is time to look again.
func (f *follower) wait(ctx context.Context, look, beat <-chan time.Time) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-look:
			return nil
		case <-beat:
			// A token that was deleted, or has ended, must not go on reading.
			req := f.c.echo.Request()
			if _, err := f.s.c.Operators.Authenticate(ctx, f.s.now(), peer(req), bearer(req)); err != nil {
				return err
			}
			if err := f.emit([]byte(": still here\n\n")); err != nil {
				return err
			}
		}
	}
}

// send sends the rollout if it changed, and the decisions.
func (f *follower) send(r rollout.Rollout, lines []dispatch.Line) (sent bool, err error) {
	if r.Rev != f.rev {
		f.rev, sent = r.Rev, true
		if err := f.event("rollout", "", showRollout(r)); err != nil {
			return sent, err
		}
	}
	for _, l := range lines {
		f.after, sent = l.Seq, true
		if err := f.event("decision", strconv.FormatUint(l.Seq, 10), showDecision(l.Seq, l.Decision)); err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// event sends one event. JSON holds no line break, so its data is one line.
func (f *follower) event(name, id string, v any) error {
	raw, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return fleet.Wrap(fleet.Internal, err, "an event cannot be encoded")
	}
	var b bytes.Buffer
	b.WriteString("event: " + name + "\n")
	if id != "" {
		b.WriteString("id: " + id + "\n")
	}
	b.WriteString("data: ")
	b.Write(raw)
	b.WriteString("\n\n")
	return f.emit(b.Bytes())
}

// pour serves a stream. Its end, whatever the cause, is the end of the connection's answer: the other side connects again.
func (s *Server) pour(c *call, do stream) error {
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	default:
		return fleet.Coded(fleet.Unavailable, "too_many_streams", "%d event streams are served, which is as many as may be: try later, or ask for the rollout itself", maxStreams)
	}
	if s.ended.Err() != nil {
		return fleet.Coded(fleet.Unavailable, "shutting_down", "musterd is shutting down: connect again")
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	defer context.AfterFunc(s.ended, cancel)()

	w := c.echo.Response()
	w.Header().Set("Content-Type", eventsType)
	w.Header().Set("X-Accel-Buffering", "no") // a proxy must not hold events back
	w.WriteHeader(http.StatusOK)
	control := http.NewResponseController(w)
	// The server's limits are for one request and one answer, not for hours of them.
	if err := control.SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	err := do(ctx, func(b []byte) error {
		if err := control.SetWriteDeadline(time.Now().Add(eventWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		return control.Flush()
	})
	if err != nil && ctx.Err() == nil {
		s.c.Log.Debug("an event stream ended", "request", requestID(c.echo), "error", err)
	}
	return nil
}
