package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"muster/api"
)

// Limits of an event stream.
const (
	maxEvent  = 8 << 20          // bytes of one event
	idleAfter = 45 * time.Second // musterd says something every 15 s
	eventType = "text/event-stream"
)

// Event is a server-sent event.
type Event struct {
	Name string // rollout, decision, end
	ID   string // of the last event that had one; give it to Events to go on after it
	Data []byte
}

// Stream is an event stream. It is for one goroutine.
type Stream struct {
	Date   time.Time // the server's time when it answered; zero if it did not say
	events *events
	idle   *time.Timer
	close  func()
	url    string
}

// Events follows a rollout, from the event after last on; with an empty last, from its first decision on. A refused call
// is not tried again: ask for the rollout itself instead. The caller closes the stream.
func (c *Client) Events(ctx context.Context, id, last string) (*Stream, error) {
	ctx, cancel := context.WithCancel(ctx)
	res, err := c.FollowRollout(ctx, id, &api.FollowRolloutParams{LastEventID: last}, func(_ context.Context, r *http.Request) error {
		r.Header.Set("Accept", eventType)
		if last == "" {
			r.Header.Del("Last-Event-ID")
		}
		return nil
	})
	if err != nil {
		cancel()
		return nil, err
	}
	s := &Stream{url: res.Request.URL.Scheme + "://" + res.Request.URL.Host, idle: time.AfterFunc(idleAfter, cancel)}
	s.Date, _ = http.ParseTime(res.Header.Get("Date"))
	s.close = func() { s.idle.Stop(); cancel(); _ = res.Body.Close() }
	s.events = &events{r: bufio.NewReader(&waking{res.Body, s.idle}), last: last}
	return s, nil
}

// Next returns the next event. When the stream ends, for whatever reason, it returns an *Unreachable error: connect again.
func (s *Stream) Next() (Event, error) {
	e, err := s.events.next()
	if err != nil {
		return Event{}, &Unreachable{s.url, err}
	}
	return e, nil
}

// Close ends the stream.
func (s *Stream) Close() { s.close() }

// waking puts the timer off with everything that comes, comments included.
type waking struct {
	r    io.Reader
	idle *time.Timer
}

func (w *waking) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.idle.Reset(idleAfter)
	}
	return n, err
}

// events reads a stream as WHATWG HTML §9.2.6 says. What is unknown is passed over.
type events struct {
	r    *bufio.Reader
	last string
}

var errLongEvent = errors.New("the event stream of musterd holds an event that is too long")

func (e *events) next() (Event, error) {
	var out Event
	var data bytes.Buffer
	some := false
	for {
		line, err := e.line()
		if err != nil {
			return Event{}, err // an event that is cut off is none
		}
		if line == "" {
			if some {
				out.ID, out.Data = e.last, data.Bytes()
				return out, nil
			}
			out = Event{}
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			out.Name = value
		case "id":
			if !strings.ContainsRune(value, 0) {
				e.last = value
			}
		case "data":
			if some {
				data.WriteByte('\n')
			}
			some = true
			if data.Len()+len(value) > maxEvent {
				return Event{}, errLongEvent
			}
			data.WriteString(value)
		}
	}
}

// line returns the next line without its end, which is LF or CR LF; musterd sends no bare CR.
func (e *events) line() (string, error) {
	var b []byte
	for {
		part, err := e.r.ReadSlice('\n')
		if len(b)+len(part) > maxEvent {
			return "", errLongEvent
		}
		b = append(b, part...)
		switch {
		case err == nil:
			return strings.TrimSuffix(string(b[:len(b)-1]), "\r"), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			if errors.Is(err, io.EOF) {
				err = errors.New("the event stream has ended")
			}
			return "", err
		}
	}
}
