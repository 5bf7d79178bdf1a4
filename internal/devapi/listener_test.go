package devapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

// A device that takes a few bytes now and then gets all of its image, however long that is; one that takes none is let
// go. One deadline for the whole answer could not tell the two apart.
func TestWriteDeadlineFollowsProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		c := &conn{Conn: a, free: func() {}}
		data := bytes.Repeat([]byte("x"), 100<<10)
		written := make(chan error, 1)
		go func() {
			_, err := c.Write(data)
			written <- err
		}()
		began := time.Now()
		buf, got := make([]byte, 1024), 0
		for got < len(data) {
			n, err := b.Read(buf)
			if err != nil {
				t.Fatalf("after %d bytes and %v: %v", got, time.Since(began), err)
			}
			got += n
			time.Sleep(1800 * time.Millisecond) // about 570 bytes a second
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < 2*time.Minute {
			t.Errorf("took only %v", took)
		}

		began = time.Now()
		_, err := c.Write(make([]byte, 16<<10)) // nobody reads
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if took, want := time.Since(began), writeStall+32*time.Second; took != want {
			t.Errorf("let go after %v, want %v", took, want)
		}

		if err := c.SetWriteDeadline(time.Now().Add(5 * time.Second)); err != nil { // crypto/tls does, to say goodbye
			t.Fatal(err)
		}
		began = time.Now()
		if _, err := c.Write(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		a.Close()
		b.Close()
	})
}

// Beyond the limit a connection waits until another one ends; Close ends the waiting.
func TestConnectionLimit(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newListener(inner, 1)
	accepted := make(chan net.Conn)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	for range 2 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	first := <-accepted
	if len(l.slots) != 1 {
		t.Errorf("%d slots taken", len(l.slots))
	}
	select {
	case <-accepted:
		t.Error("accepted two")
	default:
	}
	for range 2 { // closing twice frees one slot
		_ = first.Close()
	}
	second := <-accepted
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}

func TestLimiter(t *testing.T) {
	l := newLimiter(0, 2)
	for i, want := range []bool{true, true, false, false} {
		if got := l.allow("a"); got != want {
			t.Errorf("%d: %v", i, got)
		}
	}
	if !l.allow("b") {
		t.Error("another name has a budget of its own")
	}
	for i := range maxKept { // a generation passes; a is still known from the old one
		l.allow(fmt.Sprint("x", i))
	}
	if l.allow("a") {
		t.Error("forgotten after one generation")
	}
	for i := range 3 * maxKept {
		l.allow(fmt.Sprint("y", i))
	}
	if len(l.now)+len(l.old) > 2*maxKept {
		t.Errorf("%d names kept", len(l.now)+len(l.old))
	}
}

func TestCounter(t *testing.T) {
	c := newCounter(2)
	for i, want := range []bool{true, true, false} {
		if got := c.enter("a"); got != want {
			t.Errorf("%d: %v", i, got)
		}
	}
	if !c.enter("b") {
		t.Error("another name has a count of its own")
	}
	c.leave("a")
	if !c.enter("a") {
		t.Error("nothing was freed")
	}
	c.leave("a")
	c.leave("a")
	c.leave("b")
	if len(c.n) != 0 {
		t.Errorf("left %v", c.n)
	}
}

// However images are asked for, the cache returns the right one and never holds more than it may.
func TestCacheBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCache(100)
		for range rapid.IntRange(1, 60).Draw(t, "requests") {
			size := rapid.IntRange(1, 60).Draw(t, "size")
			h := fleet.Hash(fmt.Sprint(size))
			b, err := c.get(h, int64(size), func() ([]byte, error) { return bytes.Repeat([]byte{byte(size)}, size), nil })
			if err != nil || (b == nil) != (size > 50) || b != nil && (len(b) != size || b[0] != byte(size)) {
				t.Fatalf("size %d: %d bytes, %v", size, len(b), err)
			}
			held := int64(0)
			for e := c.order.Front(); e != nil; e = e.Next() {
				held += int64(len(e.Value.(cached).bytes))
			}
			if held != c.used || held > c.max || len(c.items) != c.order.Len() {
				t.Fatalf("holds %d bytes, says %d, in %d of %d", held, c.used, c.order.Len(), len(c.items))
			}
		}
	})
}

func TestCacheKeepsNoFailure(t *testing.T) {
	c := newCache(100)
	broken := errors.New("broken")
	if _, err := c.get("h", 10, func() ([]byte, error) { return nil, broken }); err != broken {
		t.Error(err)
	}
	if b, err := c.get("h", 10, func() ([]byte, error) { return make([]byte, 10), nil }); err != nil || len(b) != 10 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestCacheLoadsOnce(t *testing.T) {
	c := newCache(100)
	var mu sync.Mutex
	loads := 0
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := c.get("h", 10, func() ([]byte, error) {
				mu.Lock()
				defer mu.Unlock()
				loads++
				return make([]byte, 10), nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if loads != 1 {
		t.Errorf("loaded %d times", loads)
	}
}

// Shutdown lets a download that is under way finish.
func TestShutdownWaits(t *testing.T) {
	w := start(t, func(c *Config) { c.CacheBytes = 1000 })
	cert := w.ca.server(t)
	s := w.api.Recovery(PasswordTLS(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	entered, gate := make(chan struct{}, 100), make(chan struct{})
	w.onRead = func() { entered <- struct{}{}; <-gate }
	body := make(chan []byte, 1)
	go func() {
		res, b := w.do(w.client(), "GET", "https://"+l.Addr().String()+w.rel.Path(), "Authorization", basic("d1", secret))
		if res.StatusCode != 200 {
			t.Error(res.Status)
		}
		body <- b
	}()
	<-entered
	stopped := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		stopped <- s.Shutdown(ctx)
	}()
	if err := <-served; err != nil { // returns as soon as nothing more is accepted
		t.Error(err)
	}
	close(gate)
	if b := <-body; !bytes.Equal(b, w.image) {
		t.Errorf("%d bytes", len(b))
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("still listening")
	}
}

// A device that goes away in the middle is counted as what it got.
func TestAbortedDownload(t *testing.T) {
	w := start(t, nil)
	rel := w.release("9.0.0", randomImage(20<<20)) // more than the kernel's buffers take
	w.grant("d1", rel)
	c := w.dial()
	if _, err := io.WriteString(c, "GET "+rel.Path()+" HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	got := w.downloads(1)
	if got[0].Complete || got[0].Bytes >= rel.Size || got[0].Status != 200 {
		t.Errorf("served %+v", got)
	}
}
