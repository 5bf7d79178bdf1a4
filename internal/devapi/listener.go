package devapi

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// What a connection must achieve for its writes to go on. A device that writes flash while it reads takes its time, and
// one behind a bad radio link gets a few hundred bytes a second; one that takes nothing is gone.
const (
	writeStall = 20 * time.Second // allowed without any progress
	minRate    = 512              // bytes a second beyond it
	maxWrite   = 64 << 10         // bytes that get one deadline
)

// listener wraps a TCP listener: a bounded number of connections, each with write deadlines that follow its progress.
type listener struct {
	net.Listener
	slots chan struct{}
	done  chan struct{} // closed by Close
	once  sync.Once
}

func newListener(l net.Listener, max int) *listener {
	return &listener{Listener: l, slots: make(chan struct{}, max), done: make(chan struct{})}
}

// Accept waits for a free slot first: more connections wait in the kernel's backlog.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &conn{Conn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

// conn is a connection whose every write has a deadline. One deadline for a whole answer, as http.Server.WriteTimeout
// sets it, would cut off a slow device that is doing well, or let a dead one hold on.
type conn struct {
	net.Conn
	free  func()
	limit atomic.Int64 // deadline that the caller set for writes, in Unix nanoseconds; 0 for none
}

func (c *conn) Close() error {
	defer c.free()
	return c.Conn.Close()
}

// SetDeadline and SetWriteDeadline note the caller's own deadline: Write keeps to the earlier one.
func (c *conn) SetDeadline(t time.Time) error {
	c.note(t)
	return c.Conn.SetDeadline(t)
}

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.note(t)
	return c.Conn.SetWriteDeadline(t)
}

func (c *conn) note(t time.Time) {
	if t.IsZero() {
		c.limit.Store(0)
		return
	}
	c.limit.Store(t.UnixNano())
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	done := 0
	for {
		part := b[done:min(len(b), done+maxWrite)]
		if err := c.Conn.SetWriteDeadline(c.deadline(time.Now(), len(part))); err != nil {
			return done, err
		}
		n, err := c.Conn.Write(part)
		done += n
		if err != nil || done == len(b) {
			return done, err
		}
	}
}

func (c *conn) deadline(now time.Time, size int) time.Time {
	d := now.Add(writeStall + time.Duration(size)*time.Second/minRate)
	if n := c.limit.Load(); n != 0 && n < d.UnixNano() {
		return time.Unix(0, n)
	}
	return d
}
