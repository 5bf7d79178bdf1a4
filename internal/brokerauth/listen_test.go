package brokerauth_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"muster/internal/brokerauth"
	"muster/internal/fleet"
)

func TestListenRefusesToBeReachedFromOutside(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "[::]:0"} {
		l, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: address})
		if err == nil {
			l.Close()
		}
		if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "mutual TLS") {
			t.Errorf("%s: %v, want a refusal that names the ways out", address, err)
		}
	}
	for _, c := range []*tls.Config{{}, {ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: x509.NewCertPool()}, {ClientAuth: tls.RequireAndVerifyClientCert}} {
		l, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: "127.0.0.1:0", TLS: c})
		if err == nil {
			l.Close()
		}
		if !fleet.Is(err, fleet.Invalid) {
			t.Errorf("TLS without verified client certificates: %v", err)
		}
	}
	for _, address := range []string{"127.0.0.1:0", "localhost:0"} {
		l, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: address})
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		l.Close()
	}
	if _, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: "127.0.0.1:-1"}); !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("bad port: %v", err)
	}
}

func TestMutualTLSWithTheBroker(t *testing.T) {
	pool, own, broker := testCertificates(t)
	l, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: "127.0.0.1:0", TLS: &tls.Config{
		Certificates: []tls.Certificate{own}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}})
	if err != nil {
		t.Fatal(err)
	}
	s := server(t, brokerauth.Config{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	ask := func(conf *tls.Config) (string, error) {
		tr := &http.Transport{TLSClientConfig: conf}
		defer tr.CloseIdleConnections()
		res, err := (&http.Client{Transport: tr}).Post("https://"+l.Addr().String()+"/user", "application/x-www-form-urlencoded", strings.NewReader(certUser))
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return string(b), err
	}
	if got, err := ask(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{broker}}); err != nil || got != "allow" {
		t.Errorf("with the broker's certificate: %q, %v", got, err)
	}
	if got, err := ask(&tls.Config{RootCAs: pool}); err == nil {
		t.Errorf("without a certificate: %q", got)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// testCertificates returns a CA, a server certificate for 127.0.0.1 and a client certificate.
func testCertificates(t *testing.T) (*x509.CertPool, tls.Certificate, tls.Certificate) {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	leaf := func(n int64, usage x509.ExtKeyUsage) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(n), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
		der, err := x509.CreateCertificate(rand.Reader, c, root, key.Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	return pool, leaf(2, x509.ExtKeyUsageServerAuth), leaf(3, x509.ExtKeyUsageClientAuth)
}

func TestServeSaysWhyItStopped(t *testing.T) {
	s := server(t, brokerauth.Config{})
	l := listen(t)
	l.Close()
	if err := s.Serve(l); err == nil || !strings.Contains(err.Error(), "stopped answering") {
		t.Errorf("on a closed listener: %v", err)
	}
}

const socketChildEnv = "MUSTER_TEST_SOCKET_CHILD"

// TestSocketIsTakenOver hands a listening socket to another process as systemd does: a question that was queued while
// nobody answered is answered there.
func TestSocketIsTakenOver(t *testing.T) {
	if os.Getenv(socketChildEnv) != "" {
		runSocketChild(t)
		return
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	answered := make(chan error, 1)
	go func() {
		res, err := http.Post("http://"+l.Addr().String()+"/user", "application/x-www-form-urlencoded", strings.NewReader(certUser))
		if err == nil {
			b, readErr := io.ReadAll(res.Body)
			res.Body.Close()
			http.DefaultClient.CloseIdleConnections()
			if err = readErr; string(b) != "allow" {
				err = errors.New("answer: " + string(b))
			}
		}
		answered <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestSocketIsTakenOver$")
	child.ExtraFiles = []*os.File{file}
	child.Env = append(os.Environ(), socketChildEnv+"=1", "LISTEN_FDS=1", "LISTEN_FDNAMES="+brokerauth.SocketName)
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-answered:
		if err != nil {
			t.Errorf("the queued question: %v", err)
		}
	case <-ctx.Done():
		t.Error("the queued question was never answered")
	}
	stdin.Close()
	if err := child.Wait(); err != nil {
		t.Errorf("the process that took over: %v", err)
	}
}

// runSocketChild answers on the socket of systemd until its standard input ends.
func runSocketChild(t *testing.T) {
	os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	l, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: "127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	s := server(t, brokerauth.Config{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
