package app

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"muster/internal/config"
)

// settled makes what init makes, with mutual TLS between broker and musterd.
func settled(t *testing.T) config.Config {
	t.Helper()
	c, err := config.Load("", nil, []string{"data_dir=" + filepath.Join(t.TempDir(), "muster"), "tls.broker_auth=true", "broker.auth_url=https://localhost:9080"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), c, nil); err != nil {
		t.Fatal(err)
	}
	return c
}

// handshake connects a client with a certificate to conf and returns what each saw.
func handshake(t *testing.T, conf *tls.Config, roots *x509.CertPool, client tls.Certificate) (*x509.Certificate, error) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			err = c.(*tls.Conn).HandshakeContext(t.Context())
			c.Close()
		}
		done <- err
	}()
	d := &net.Dialer{Timeout: 10 * time.Second}
	c, err := tls.DialWithDialer(d, "tcp", l.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "localhost", Certificates: []tls.Certificate{client}})
	if c != nil {
		defer c.Close()
	}
	if serverErr := <-done; serverErr != nil || err != nil {
		return nil, errors.Join(serverErr, err)
	}
	return c.ConnectionState().PeerCertificates[0], nil
}

// The pair of the mutual TLS with the broker: a new client certificate is believed after a reload, and the old one no more.
func TestTheBrokersClientCertificateCanBeReplaced(t *testing.T) {
	c := settled(t)
	cr, err := loadCredentials(&c)
	if err != nil {
		t.Fatal(err)
	}
	dir := c.Path(c.Broker.TLSDir)
	load := func() tls.Certificate {
		t.Helper()
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, fileAuthClientCert), filepath.Join(dir, fileAuthClientKey))
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	conf, old := cr.authTLS(), load()
	leaf, err := handshake(t, conf, cr.brokerRoots.Pool(), old)
	if err != nil || !leaf.Equal(cr.auth.Chain()[0]) {
		t.Fatalf("%v, %v", leaf, err)
	}
	for _, name := range []string{fileAuthClientCert, fileAuthClientKey} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := makeAuthClient(dir); err != nil {
		t.Fatal(err)
	}
	fresh := load()
	if _, err := handshake(t, conf, cr.brokerRoots.Pool(), fresh); err == nil {
		t.Error("a certificate that was not taken over is believed")
	}
	cr.reloadTrust(false, slog.New(slog.DiscardHandler).Info)
	if _, err := handshake(t, conf, cr.brokerRoots.Pool(), fresh); err != nil {
		t.Errorf("the new one: %v", err)
	}
	if _, err := handshake(t, conf, cr.brokerRoots.Pool(), old); err == nil {
		t.Error("the old one is believed still")
	}
	if items := cr.clients(); len(items) != 1 || items[0].NotAfter.Before(time.Now().AddDate(9, 0, 0)) {
		t.Errorf("%+v", items)
	}
}

// A broker on another machine may have files of its own; one whose files are here but wrong keeps musterd from starting.
func TestTheBrokersFilesMayBeElsewhereButNotWrong(t *testing.T) {
	c := settled(t)
	key := filepath.Join(c.Path(c.Broker.TLSDir), fileBrokerKey)
	if err := os.WriteFile(key, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadCredentials(&c); err == nil {
		t.Error("a key that is none is taken")
	}
	for _, name := range []string{fileBrokerCert, fileBrokerKey} {
		if err := os.Remove(filepath.Join(c.Path(c.Broker.TLSDir), name)); err != nil {
			t.Fatal(err)
		}
	}
	if cr, err := loadCredentials(&c); err != nil || cr.broker != nil {
		t.Errorf("%v", err)
	}
	if len(brokerDoors(&c)) != 4 {
		t.Errorf("%v", brokerDoors(&c))
	}
}
