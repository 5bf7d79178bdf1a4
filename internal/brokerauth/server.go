package brokerauth

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// Config is what a Server needs. Index is required, the zero value of the rest is good.
type Config struct {
	Index  *Index
	Limits Limits

	// OnRefusal hears of refusals, one at a time, from one goroutine that belongs to Serve. It never delays an answer:
	// while it is behind by more than backlog, refusals are counted and dropped.
	OnRefusal func(Refusal)

	Log      *slog.Logger          // nil: slog.Default()
	Registry prometheus.Registerer // nil: nothing is registered
}

// Server answers RabbitMQ's http auth backend. Use New.
type Server struct {
	index   *Index
	limiter *Limiter
	metrics *metrics
	log     *slog.Logger
	http    *http.Server

	onRefusal func(Refusal)
	refusals  chan Refusal

	complained atomic.Int64 // Unix seconds of the last complaint
}

const (
	backlog       = 1024             // refusals that wait for OnRefusal
	complainEvery = int64(60)        // seconds between complaints about malformed questions
	readTimeout   = 5 * time.Second  // for a whole question
	writeTimeout  = 5 * time.Second  // for an answer
	idleTimeout   = 10 * time.Minute // longer than the broker's client keeps a connection (2 minutes), so that it is never we who close
	maxHeader     = 4 << 10          // bytes; net/http adds 4 KiB of slack
)

// New returns a Server that has started nothing: Serve does, or use it as an http.Handler.
func New(c Config) (*Server, error) {
	if c.Index == nil {
		return nil, fleet.Errorf(fleet.Internal, "brokerauth: Config.Index is required")
	}
	m, err := newMetrics(c.Registry, c.Index)
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "brokerauth: register metrics")
	}
	s := &Server{
		index: c.Index, limiter: NewLimiter(c.Limits), metrics: m, log: c.Log,
		onRefusal: c.OnRefusal, refusals: make(chan Refusal, backlog),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.http = &http.Server{
		Handler: s, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// Serve answers on l, which Listen made, until Shutdown; then it returns nil. It can be called once.
func (s *Server) Serve(l net.Listener) error {
	done := make(chan struct{})
	var reporter sync.WaitGroup
	reporter.Go(func() { s.reportUntil(done) })
	defer func() {
		close(done)
		reporter.Wait()
	}()
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fleet.Wrap(fleet.Internal, err, "broker auth stopped answering on %s", l.Addr())
	}
	return nil
}

// Shutdown stops answering: it closes the listener and idle connections, and waits for questions in hand until ctx ends.
// RabbitMQ repeats a question whose kept connection was closed, so a restart on a socket that is handed over loses none.
func (s *Server) Shutdown(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		return fleet.Wrap(fleet.Unavailable, errors.Join(err, s.http.Close()), "broker auth: questions in hand were cut off")
	}
	return nil
}

// report hands a refusal to the reporter, or counts that it could not.
func (s *Server) report(r Refusal) {
	if s.onRefusal == nil {
		return
	}
	select {
	case s.refusals <- r:
	default:
		s.metrics.unreported.Inc()
	}
}

// reportUntil calls the hook for each refusal until done is closed, and then for those that still wait.
func (s *Server) reportUntil(done <-chan struct{}) {
	for {
		select {
		case r := <-s.refusals:
			s.onRefusal(r)
		case <-done:
			for len(s.refusals) > 0 {
				s.onRefusal(<-s.refusals)
			}
			return
		}
	}
}

// complain logs that a question was malformed, at most once a minute: a newer broker that sends another field refuses
// the whole fleet, and that must be seen.
func (s *Server) complain(kind admission.Kind, err error) {
	now, last := time.Now().Unix(), s.complained.Load()
	if now-last < complainEvery || !s.complained.CompareAndSwap(last, now) {
		return
	}
	s.log.Warn("a question to the broker auth backend was not one that RabbitMQ 4.1 to 4.3 asks; refused",
		"question", string(kind), "reason", err.Error())
}
