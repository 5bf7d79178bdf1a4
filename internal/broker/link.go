// Package broker speaks to RabbitMQ: AMQP 0-9-1 for messages, the management API for connections. It reconnects by
// itself: amqp091's own recovery is not used, because it does not fence acknowledgements (rabbitmq.md §5.1).
package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"muster/internal/fleet"
)

// Config says how RabbitMQ is reached. TLS is needed; it is cloned.
type Config struct {
	Address  string // AMQPS, host:port
	User     string
	Password string
	TLS      *tls.Config
	// Roots, if set, returns what the next connection trusts, in place of TLS.RootCAs.
	Roots func() *x509.CertPool
	Log   *slog.Logger
	// MinPause and MaxPause bound the pause before a new attempt; zero means 1 s and 1 min.
	MinPause, MaxPause time.Duration
}

const (
	heartbeat    = 10 * time.Second
	dialTimeout  = 10 * time.Second
	setupTimeout = 20 * time.Second // declaring queues and beginning to consume
	writeTimeout = 20 * time.Second // a write that takes longer has lost its peer: contexts do not interrupt it
)

// link keeps one AMQP connection to one vhost for one purpose. Each connection is a session of its own: channels and
// delivery tags never outlive it, so nothing of an old session can be acknowledged in a new one.
type link struct {
	c     Config
	vhost string
	what  string // purpose, for the log and the connection's name
	up    atomic.Bool
	lost  atomic.Uint64
}

// run holds sessions until ctx ends. use gets each connection; it returns when that is dead or ctx ended.
func (l *link) run(ctx context.Context, use func(context.Context, *amqp.Connection) error) error {
	low, high := l.c.MinPause, l.c.MaxPause
	if low == 0 {
		low = time.Second
	}
	if high == 0 {
		high = time.Minute
	}
	pause := low
	for {
		began := time.Now()
		err := l.session(ctx, use)
		l.up.Store(false)
		if ctx.Err() != nil {
			return nil
		}
		l.lost.Add(1)
		if time.Since(began) > high {
			pause = low
		}
		wait := pause/2 + rand.N(pause/2+1)
		l.c.Log.Warn("broker connection lost", "vhost", l.vhost, "for", l.what, "error", err, "again_in", wait.Round(time.Millisecond))
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		pause = min(2*pause, high)
	}
}

func (l *link) session(ctx context.Context, use func(context.Context, *amqp.Connection) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := l.dial(ctx)
	if err != nil {
		return err
	}
	// Close can wait for a peer that is gone; the connection's deadlines bound it.
	defer conn.Close()
	go func() { // ends with the session: cancel is deferred
		<-ctx.Done()
		_ = conn.CloseDeadline(time.Now().Add(3 * time.Second))
	}()
	return use(ctx, conn)
}

func (l *link) dial(ctx context.Context) (*amqp.Connection, error) {
	tlsConf := l.c.TLS.Clone()
	if l.c.Roots != nil {
		tlsConf.RootCAs = l.c.Roots()
	}
	if tlsConf.ServerName == "" {
		host, _, err := net.SplitHostPort(l.c.Address)
		if err != nil {
			return nil, err
		}
		tlsConf.ServerName = host
	}
	props := amqp.NewConnectionProperties()
	// The scheme says nothing of TLS because Dial does it.
	props.SetClientConnectionName("musterd " + l.what)
	return amqp.DialConfig("amqp://"+l.c.Address, amqp.Config{
		SASL:       []amqp.Authentication{&amqp.PlainAuth{Username: l.c.User, Password: l.c.Password}},
		Vhost:      l.vhost,
		Heartbeat:  heartbeat,
		Properties: props,
		Dial: func(network, addr string) (net.Conn, error) {
			d := tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: tlsConf}
			dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			conn, err := d.DialContext(dialCtx, network, addr)
			if err != nil {
				return nil, err
			}
			// The AMQP handshake has this long; the library lifts the deadline after it.
			if err := conn.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
				conn.Close()
				return nil, err
			}
			return &impatientConn{conn}, nil
		},
	})
}

// impatientConn gives every write a deadline.
type impatientConn struct{ net.Conn }

func (c *impatientConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// openChannel is conn.Channel with an end: on a half-dead connection it would hang.
func openChannel(ctx context.Context, conn *amqp.Connection) (*amqp.Channel, error) {
	type result struct {
		ch  *amqp.Channel
		err error
	}
	out := make(chan result, 1)
	go func() { // ends at the latest when the caller's session closes the connection
		ch, err := conn.Channel()
		out <- result{ch, err}
	}()
	t := time.NewTimer(dialTimeout)
	defer t.Stop()
	select {
	case r := <-out:
		return r.ch, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.C:
		return nil, errors.New("the broker does not open a channel")
	}
}

// closed returns why a connection or channel ended.
func closed(e *amqp.Error) error {
	if e == nil {
		return errors.New("closed")
	}
	return e
}

// errUnavailable is what callers see while there is no connection.
func errUnavailable() error {
	return fleet.Errorf(fleet.Unavailable, "the broker cannot be reached now")
}
