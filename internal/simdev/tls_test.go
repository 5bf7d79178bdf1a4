package simdev

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"muster/internal/wire"
)

func testRoot(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// chain makes a root and a server certificate with the given validity.
func chain(t *testing.T, from, to time.Time) (*x509.CertPool, tls.ConnectionState) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: t0.AddDate(-10, 0, 0), NotAfter: t0.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"broker.test"}, NotBefore: from, NotAfter: to}
	var out []*x509.Certificate
	for _, tpl := range []*x509.Certificate{root, leaf} {
		der, err := x509.CreateCertificate(rand.Reader, tpl, root, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	pool := x509.NewCertPool()
	pool.AddCert(out[0])
	return pool, tls.ConnectionState{PeerCertificates: out[1:]}
}

func TestServersAreVerifiedAtATimeThatADeviceCanKnow(t *testing.T) {
	year := 365 * 24 * time.Hour
	roots, state := chain(t, t0, t0.Add(year))
	strangers, _ := chain(t, t0, t0.Add(year))
	for _, c := range []struct {
		name    string
		at      time.Time
		roots   *x509.CertPool
		host    string
		lenient bool
		good    bool
	}{
		{"within", t0.Add(time.Hour), roots, "broker.test", false, true},
		{"bound before its begin: it is later than that", t0.Add(-time.Hour), roots, "broker.test", false, true},
		{"bound after its end", t0.Add(2 * year), roots, "broker.test", false, false},
		{"bound after its end, on the fallback", t0.Add(2 * year), roots, "broker.test", true, true},
		{"another name", t0, roots, "other.test", false, false},
		{"another name on the fallback", t0, roots, "other.test", true, false},
		{"another root", t0, strangers, "broker.test", false, false},
		{"another root on the fallback", t0.Add(2 * year), strangers, "broker.test", true, false},
	} {
		if err := verifyAt(c.at, state, c.roots, c.host, c.lenient); (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if verifyAt(t0, tls.ConnectionState{}, roots, "broker.test", true) == nil {
		t.Error("a server without a certificate was believed")
	}
}

// What crypto/tls really says when a server refuses a client certificate, in both versions of the protocol.
func TestAlertsAboutTheCertificateAreRecognised(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(testRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	tpl := &x509.Certificate{SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key) // expired, and signed by nobody
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MaxVersion: version})
			_ = s.Handshake()
			_, _ = io.Copy(io.Discard, conn) // until the client is done: a reset would eat the alert
			conn.Close()
		}()
		conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true})
		if err == nil {
			_, err = conn.Read(make([]byte, 1)) // TLS 1.3: the alert comes after the handshake
			conn.Close()
		}
		if got := judge(fmt.Errorf("wrapped: %w", err), true); got != refused {
			t.Errorf("version %x: %v is %v", version, err, got)
		}
		if got := judge(err, false); got != unreachable {
			t.Errorf("version %x, nothing presented: %v", version, got)
		}
		l.Close()
		<-done
	}
	for _, err := range []error{io.EOF, context.DeadlineExceeded, errors.New("tls: expired certificate"), &net.OpError{Op: "dial", Err: errors.New("refused")}, &net.OpError{Op: "remote error", Err: errors.New("x")}} {
		if judge(err, true) != unreachable {
			t.Errorf("%v is about the certificate", err)
		}
	}
}

// A download over a real socket that breaks three times, from a server that speaks the real ServeContent.
func TestLoaderResumesOverARealSocket(t *testing.T) {
	image := MakeImage("1.1.0", Good, 1<<20, 1)
	var requests, partials atomic.Int32
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			partials.Add(1)
		}
		if n := requests.Add(1); n == 2 {
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		} else if n <= 4 {
			w = &breaking{ResponseWriter: w, left: 200_000}
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(image))
	}))
	defer srv.Close()
	srv.Config.ErrorLog = nil
	sum := sha256.Sum256(image)
	d := &Device{c: Config{OnEvent: func(Event) {}}}
	l := &loader{client: srv.Client(), base: srv.URL, offer: wire.OTAOffer{Size: int64(len(image)), SHA256: sum[:], Path: "/f/x"}, report: make(chan int, 100), every: 10, tries: 3, busyTries: 3, pause: time.Millisecond, device: d, rnd: mathrand.New(mathrand.NewPCG(1, 1))}
	p, err := l.load(t.Context(), partial{sha: sum})
	if err != nil || sha256.Sum256(p.b) != sum {
		t.Fatalf("%d bytes, %v", len(p.b), err)
	}
	if requests.Load() != 5 || partials.Load() != 4 {
		t.Errorf("%d requests, %d for a part", requests.Load(), partials.Load())
	}
	if n := len(l.report); n < 5 || n > 9 {
		t.Errorf("%d reports of progress", n)
	}
}

// breaking is an answer that ends in the middle.
type breaking struct {
	http.ResponseWriter
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.left < len(p) {
		b.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	b.left -= len(p)
	return b.ResponseWriter.Write(p)
}
