package ca

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

func TestCreate(t *testing.T) {
	now := time.Now()
	h := hierarchy(t)
	if err := h.check(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cert    *x509.Certificate
		life    time.Duration
		pathLen int
	}{"root": {h.Root.Cert, 20 * year, 2}, "spare": {h.Spare.Cert, 20 * year, 2}, "device": {h.Device.Cert, 4 * year, 0}, "server": {h.Server.Cert, 4 * year, 0}} {
		if c.cert.NotAfter.Sub(now) < c.life || !c.cert.NotBefore.Before(now) || c.cert.MaxPathLen != c.pathLen {
			t.Errorf("%s: %s to %s, path length %d", name, c.cert.NotBefore, c.cert.NotAfter, c.cert.MaxPathLen)
		}
	}
	if bytes.Equal(h.Root.Cert.RawSubjectPublicKeyInfo, h.Spare.Cert.RawSubjectPublicKeyInfo) {
		t.Error("the spare has the root's key")
	}
	if len(h.KeyHashes()) != 4 {
		t.Error("not every key is known")
	}
	for _, o := range []CreateOptions{{}, {At: now, RootLife: year}, {At: now, IntermediateLife: -1}, {At: now, Name: strings.Repeat("x", 41)}} {
		if _, err := Create(o); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestCheckFindsMixedUpParts(t *testing.T) {
	h, other := hierarchy(t), new(Hierarchy)
	made, err := Create(CreateOptions{At: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Hierarchy){
		"missing":         func(h *Hierarchy) { h.Spare = Pair{} },
		"foreign root":    func(h *Hierarchy) { h.Root = made.Root },
		"foreign device":  func(h *Hierarchy) { h.Device = made.Device },
		"key of another":  func(h *Hierarchy) { h.Device.Key = h.Server.Key },
		"swapped":         func(h *Hierarchy) { h.Device, h.Server = h.Server, h.Device },
		"root key":        func(h *Hierarchy) { h.Root.Key = made.Root.Key },
		"spare signed it": func(h *Hierarchy) { h.Root, h.Spare = h.Spare, h.Root },
	} {
		*other = *h
		change(other)
		if err := other.check(); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWriteAndLoad(t *testing.T) {
	h := hierarchy(t)
	dir := filepath.Join(t.TempDir(), "pki")
	pass := []byte("correct horse battery")
	if err := Write(h, dir, []byte("short")); !fleet.Is(err, fleet.Invalid) {
		t.Fatalf("a short passphrase: %v", err)
	}
	if err := Write(h, dir, pass); err != nil {
		t.Fatal(err)
	}
	if err := Write(h, dir, pass); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("overwrote a CA: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(dir), ".ca-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left %v behind (%v)", left, err)
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		isKey := strings.HasSuffix(path, extKey)
		if isKey && info.Mode().Perm() != 0o600 || isKey != bytes.Contains(text, []byte("ENCRYPTED PRIVATE KEY")) || bytes.Contains(text, []byte("BEGIN PRIVATE KEY")) {
			t.Errorf("%s: mode %s or content", path, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	got, err := Load(dir, pass)
	if err != nil {
		t.Fatal(err)
	}
	if got.Root.Key != nil || got.Spare.Key != nil {
		t.Error("a service loads the keys of roots")
	}
	if !bytes.Equal(got.TrustBundle(), h.TrustBundle()) || !bytes.Equal(got.ClientCAs(), h.ClientCAs()) {
		t.Error("other certificates than were written")
	}
	a, err := NewAuthority(got, pki.KeyPolicy{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Sign(t.Context(), order(t, "pump-7")); err != nil {
		t.Error(err)
	}
	if err := got.Check(); err != nil {
		t.Error(err)
	}
	if err := got.LoadRoots(dir, pass); err != nil || got.Root.Key == nil || got.Spare.Key == nil {
		t.Errorf("roots: %v", err)
	}

	if _, err := Load(dir, []byte("wrong horse battery")); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "passphrase") {
		t.Errorf("wrong passphrase: %v", err)
	}
	// The keys of the roots may be taken away.
	for _, f := range []string{fileRoot, fileSpare} {
		if err := os.Remove(filepath.Join(dir, f+extKey)); err != nil {
			t.Fatal(err)
		}
	}
	offline, err := Load(dir, pass)
	if err != nil {
		t.Fatalf("with the roots offline: %v", err)
	}
	if err := offline.LoadRoots(dir, pass); err != nil || offline.Root.Key != nil {
		t.Errorf("roots that are not there: %v", err)
	}
	key := filepath.Join(dir, fileDevice+extKey)
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir, pass); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(h.Device.Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir, pass); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "encrypted") {
		t.Errorf("a key without a passphrase: %v", err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir, pass); !fleet.Is(err, fleet.Invalid) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing key: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "nowhere"), pass); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("no folder: %v", err)
	}
}

// A real handshake: device and server certificates work together, in their own roles only.
func TestHandshake(t *testing.T) {
	h := hierarchy(t)
	a := newAuthority(t, h)
	srv, err := h.NewServer(time.Now(), []string{"broker.example", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	serverCert, err := tls.X509KeyPair(srv.Chain, srv.Key)
	if err != nil {
		t.Fatal(err)
	}
	spki, key := deviceKey(t)
	o := order(t, "pump-7")
	o.PublicKey = spki
	signed, err := a.Sign(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	deviceCert := tls.Certificate{Certificate: signed.Chain, PrivateKey: key}
	trust, clients := x509.NewCertPool(), x509.NewCertPool()
	if !trust.AppendCertsFromPEM(h.TrustBundle()) || !clients.AppendCertsFromPEM(h.ClientCAs()) {
		t.Fatal("bundles")
	}
	for name, c := range map[string]struct {
		server, client tls.Certificate
		host           string
		ok             bool
	}{
		"as meant":                  {serverCert, deviceCert, "broker.example", true},
		"by address":                {serverCert, deviceCert, "127.0.0.1", true},
		"another host":              {serverCert, deviceCert, "other.example", false},
		"a device plays the server": {deviceCert, deviceCert, "pump-7", false},
		"a server plays the device": {serverCert, serverCert, "broker.example", false},
		"a client without anything": {serverCert, tls.Certificate{}, "broker.example", false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := handshake(c.server, c.client, c.host, trust, clients); (err == nil) != c.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

func handshake(server, client tls.Certificate, host string, trust, clients *x509.CertPool) error {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	cc := &tls.Config{RootCAs: trust, ServerName: host}
	if client.Certificate != nil {
		cc.Certificates = []tls.Certificate{client}
	}
	s := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{server}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert})
	done := make(chan error, 1)
	go func() {
		_, err := s.Write([]byte("x"))
		if err != nil {
			far.Close()
		}
		done <- err
	}()
	c := tls.Client(near, cc)
	_, err := io.ReadFull(c, make([]byte, 1)) // with TLS 1.3 the client learns of a refusal only when it reads
	near.Close()
	return errors.Join(err, <-done)
}

func TestServerNames(t *testing.T) {
	h := hierarchy(t)
	for _, names := range [][]string{nil, {""}, {"*.example"}, {"a b"}, {"UPPER"}, {"-a"}, {"a-"}, {"a-.b"}, {"a..b"}, {".a"}, {"a."}, {strings.Repeat("a", 64)}, {strings.Repeat("a.", 127) + "a"}} {
		if _, err := h.NewServer(time.Now(), names); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%q: %v", names, err)
		}
	}
	s, err := h.NewServer(time.Now(), []string{"::1", "a.example", "a.example", "10.0.0.1", "10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(s.Chain)
	c := parse(t, block.Bytes)
	if len(c.DNSNames) != 1 || len(c.IPAddresses) != 2 || c.Subject.CommonName != "::1" {
		t.Errorf("%v %v %s", c.DNSNames, c.IPAddresses, c.Subject)
	}
	if life := time.Until(c.NotAfter); life < ServerLife-time.Minute || life > ServerLife {
		t.Errorf("holds for %s", life)
	}
	if _, err := h.NewServer(h.Server.Cert.NotAfter, []string{"a"}); !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("an expired CA: %v", err)
	}
	if _, err := (&Hierarchy{Server: Pair{Cert: h.Server.Cert}}).NewServer(time.Now(), []string{"a"}); !fleet.Is(err, fleet.Unavailable) {
		t.Errorf("without the key: %v", err)
	}
}

func TestSerials(t *testing.T) {
	seen := map[fleet.Serial]bool{}
	for range 1000 {
		s, err := NewSerial()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fleet.ParseSerial(string(s)); err != nil || len(s) != 32 || seen[s] {
			t.Fatalf("%s: %v", s, err)
		}
		seen[s] = true
	}
}
