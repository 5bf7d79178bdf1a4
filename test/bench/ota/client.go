package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// identities is how many devices each client plays in turn: no device downloads without end, and muster would slow one
// down that does.
const identities = 16

// deadline ends a download that hangs.
const deadline = 30 * time.Second

// measure lets every client download again and again until length is over and returns how many downloads were completed
// by then. With check, bodies are compared with the image.
func measure(site *site, s *server, length time.Duration, check bool) (int, error) {
	var wg sync.WaitGroup
	var done atomic.Int64
	failed := make([]error, site.clients)
	end := time.Now().Add(length)
	for i := range site.clients {
		wg.Go(func() {
			buf := make([]byte, 64<<10)
			for n := 0; time.Now().Before(end); n++ {
				if err := download(site, s.addr, site.conf[i*identities+n%identities], buf, check); err != nil {
					failed[i] = fmt.Errorf("%s: %w", s.name, err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return int(done.Load()), errors.Join(failed...)
}

// download does what a device does, with as little of its own as possible.
func download(site *site, addr string, conf *tls.Config, buf []byte, check bool) error {
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(deadline)); err != nil {
		return err
	}
	c := tls.Client(raw, conf)
	if _, err := io.WriteString(c, "GET "+site.path+" HTTP/1.1\r\nHost: localhost\r\nUser-Agent: ESP32 HTTP Client/1.0\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	in := bufio.NewReaderSize(c, 4096)
	res, err := http.ReadResponse(in, nil)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK || res.ContentLength != int64(site.size) {
		return fmt.Errorf("%s, %d bytes announced", res.Status, res.ContentLength)
	}
	var n int
	for n < site.size {
		m, err := res.Body.Read(buf)
		if check && !bytes.Equal(buf[:m], site.image[n:n+m]) {
			return errors.New("another image came back")
		}
		n += m
		if err != nil && (err != io.EOF || n < site.size) {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
	}
	return nil
}

// ownCPU returns the CPU time that this process has used.
func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
