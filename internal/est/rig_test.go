package est_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"muster/internal/access"
	"muster/internal/brokerauth"
	"muster/internal/ca"
	"muster/internal/devapi"
	"muster/internal/enroll"
	"muster/internal/est"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/recovery"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

const dev = fleet.DeviceID("pump-7")

var hierarchy = sync.OnceValues(func() (*ca.Hierarchy, error) { return ca.Create(ca.CreateOptions{At: time.Now().Add(-time.Hour)}) })

// authority is the real one, which can be made to wait.
type authority struct {
	*ca.Authority
	broken atomic.Bool
}

func (a *authority) Sign(ctx context.Context, o pki.Order) (pki.Signed, error) {
	if a.broken.Load() {
		return pki.Signed{}, fleet.Errorf(fleet.Unavailable, "the key is away")
	}
	return a.Authority.Sign(ctx, o)
}

type noSessions struct{}

func (noSessions) CloseUser(context.Context, string, string) error     { return nil }
func (noSessions) UserConnected(context.Context, string) (bool, error) { return false, nil }

// rig is EST on both real listeners, over a real store, CA and admission.
type rig struct {
	t        *testing.T
	db       *bolt.DB
	auth     *authority
	e        *enroll.Enroller
	approver *recovery.Recovery
	trust    *x509.CertPool
	trustPEM []byte
	devices  string // address of the listener for certificates
	recovery string // and of the other
}

func newRig(t *testing.T, p enroll.Policy) *rig {
	t.Helper()
	h, err := hierarchy()
	fatal(t, err)
	real, err := ca.NewAuthority(h, pki.KeyPolicy{}, nil)
	fatal(t, err)
	r := &rig{t: t, db: storetest.Open(t), auth: &authority{Authority: real}, trust: x509.NewCertPool(), trustPEM: h.TrustBundle()}
	index := brokerauth.NewIndex()
	r.db.WatchCredentials(index.Put)
	log := slog.New(slog.DiscardHandler)
	update := func(ctx context.Context, f func(enroll.Tx) error) error {
		return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
	}
	r.e, err = enroll.New(enroll.Config{
		Update: update,
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: r.auth, Sessions: noSessions{}, Policy: p, Log: log,
	})
	fatal(t, err)
	r.approver, err = recovery.New(recovery.Config{
		Update: func(ctx context.Context, f func(recovery.Tx) error) error {
			return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(recovery.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Enroll: r.e, Log: log,
	})
	fatal(t, err)
	r.do(func(tx *bolt.Tx) error {
		return tx.PutDevice(fleet.Device{ID: dev, Product: "pump", CreatedAt: time.Now()})
	})

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.e.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })

	r.trust.AppendCertsFromPEM(r.trustPEM)
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(h.ClientCAs())
	server, err := h.NewServer(time.Now(), []string{"localhost", "127.0.0.1"})
	fatal(t, err)
	pair, err := tls.X509KeyPair(server.Chain, server.Key)
	fatal(t, err)
	cert := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &pair, nil }
	block, _ := pem.Decode(r.trustPEM)
	s := est.New(est.Config{Enroll: r.e, Admission: index, Identify: devapi.Identify, CACerts: func() [][]byte { return [][]byte{block.Bytes, h.Device.Cert.Raw} }, Log: log})
	api := devapi.New(devapi.Config{Admission: index, Log: log, TrustBundle: func() []byte { return r.trustPEM }, EST: s.Devices(), RecoveryEST: s.Recovery()})
	r.devices = r.listen(api.Devices(devapi.MutualTLS(cert, func() *x509.CertPool { return clients })))
	r.recovery = r.listen(api.Recovery(devapi.PasswordTLS(cert)))
	return r
}

func (r *rig) listen(s *devapi.Server) string {
	r.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(r.t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	r.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			r.t.Error(err)
		}
		if err := <-done; err != nil {
			r.t.Error(err)
		}
	})
	return l.Addr().String()
}

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (r *rig) do(f func(*bolt.Tx) error) {
	r.t.Helper()
	fatal(r.t, r.db.Update(context.Background(), f))
}

// password makes an enrolment password.
func (r *rig) password() string {
	r.t.Helper()
	p, _, err := r.e.NewEnrolment(r.t.Context(), time.Now(), dev, time.Hour, "ops")
	fatal(r.t, err)
	return p
}

// connected is what the broker reports when a device comes in with a certificate.
func (r *rig) connected(c *x509.Certificate) {
	r.t.Helper()
	r.do(func(tx *bolt.Tx) error { return r.e.Connected(tx, time.Now(), dev, fleet.SerialOf(c.SerialNumber)) })
}

func (r *rig) record(c *x509.Certificate) pki.Certificate {
	r.t.Helper()
	rec, err := r.e.Certificate(r.t.Context(), fleet.SerialOf(c.SerialNumber))
	fatal(r.t, err)
	return rec
}

// audited reports whether the trail has a line.
func (r *rig) audited(what, details string) bool {
	r.t.Helper()
	var list []access.Entry
	fatal(r.t, r.db.View(r.t.Context(), func(tx *bolt.Tx) (err error) { list, err = tx.AuditEntries(0, 1000); return err }))
	for _, e := range list {
		if e.What == what && (details == "" || e.Details == details) {
			return true
		}
	}
	return false
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fatal(t, err)
	return k
}

// csr returns a request in base64, the common name dev unless change says otherwise.
func csr(t testing.TB, k *ecdsa.PrivateKey, change func(*x509.CertificateRequest)) string {
	t.Helper()
	tpl := &x509.CertificateRequest{Subject: pkix.Name{CommonName: string(dev)}}
	if change != nil {
		change(tpl)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tpl, k)
	fatal(t, err)
	return base64.StdEncoding.EncodeToString(der)
}

// like makes a request with the names of a certificate.
func like(c *x509.Certificate) func(*x509.CertificateRequest) {
	return func(r *x509.CertificateRequest) {
		r.Subject, r.DNSNames, r.URIs = pkix.Name{CommonName: c.Subject.CommonName}, c.DNSNames, c.URIs
	}
}

// ask is one request.
type ask struct {
	method, op, body string
	cert             *tls.Certificate // to the listener for certificates; nil: to the other
	user, password   string
	header           map[string]string
	chunked          bool
}

func (r *rig) ask(a ask) (*http.Response, string) {
	r.t.Helper()
	host := r.recovery
	conf := &tls.Config{RootCAs: r.trust}
	if a.cert != nil {
		host, conf.Certificates = r.devices, []tls.Certificate{*a.cert}
	}
	if a.method == "" {
		a.method = "POST"
	}
	var body io.Reader = bytes.NewReader([]byte(a.body))
	if a.chunked {
		body = struct{ io.Reader }{body}
	}
	if a.body == "" && a.method != "POST" {
		body = nil
	}
	req, err := http.NewRequestWithContext(r.t.Context(), a.method, "https://"+host+est.Prefix+a.op, body)
	fatal(r.t, err)
	if a.method == "POST" {
		req.Header.Set("Content-Type", "application/pkcs10")
	}
	if a.user != "" {
		req.SetBasicAuth(a.user, a.password)
	}
	for k, v := range a.header {
		req.Header.Set(k, v)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}, Timeout: 20 * time.Second}
	res, err := client.Do(req)
	fatal(r.t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	fatal(r.t, err)
	return res, string(text)
}

// issued demands a certificate as the answer.
func (r *rig) issued(a ask) *x509.Certificate {
	r.t.Helper()
	res, text := r.ask(a)
	if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/pkcs7-mime; smime-type=certs-only" {
		r.t.Fatalf("%d %s: %s", res.StatusCode, res.Header.Get("Content-Type"), text)
	}
	list := certsIn(r.t, text)
	if len(list) != 1 {
		r.t.Fatalf("%d certificates in the answer, want the new one alone", len(list))
	}
	return list[0]
}

// enrol gives dev its first certificate, by password, and lets the broker report it.
func (r *rig) enrol() (*x509.Certificate, *ecdsa.PrivateKey, *tls.Certificate) {
	r.t.Helper()
	k := newKey(r.t)
	c := r.issued(ask{op: "simpleenroll", body: csr(r.t, k, nil), user: string(dev), password: r.password()})
	r.connected(c)
	return c, k, pair(r, c, k)
}

// pair is what a client presents: leaf and intermediate.
func pair(r *rig, c *x509.Certificate, k *ecdsa.PrivateKey) *tls.Certificate {
	return &tls.Certificate{Certificate: r.record(c).Chain, PrivateKey: k}
}

// certsIn reads a body with openssl, which muster did not write.
func certsIn(t testing.TB, text string) (out []*x509.Certificate) {
	t.Helper()
	der, err := base64.StdEncoding.DecodeString(text)
	fatal(t, err)
	raw := openssl(t, der, "pkcs7", "-inform", "DER", "-print_certs")
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		fatal(t, err)
		out = append(out, c)
	}
	return out
}

func openssl(t testing.TB, in []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("openssl", args...)
	var said bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("openssl %q: %v: %s", args, err, &said)
	}
	return out
}

// files writes what curl needs.
func (r *rig) files(c *x509.Certificate, k *ecdsa.PrivateKey) (trust, cert, key string) {
	r.t.Helper()
	dir := r.t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(k)
	fatal(r.t, err)
	var chain []byte
	for _, c := range r.record(c).Chain {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	trust, cert, key = filepath.Join(dir, "trust.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	fatal(r.t, os.WriteFile(trust, r.trustPEM, 0o600))
	fatal(r.t, os.WriteFile(cert, chain, 0o600))
	fatal(r.t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return trust, cert, key
}

// eventually fails the test if ok does not come true in time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("waited too long: %s", what)
		}
	}
}

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}
