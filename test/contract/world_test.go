package contract

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"muster/internal/admission"
	"muster/internal/broker"
	"muster/internal/broker/brokerconf"
	"muster/internal/brokerauth"
	"muster/internal/ca"
	"muster/internal/devbroker"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// w is the world of this package's tests: one broker, one auth backend, two bystanders.
var w *world

// parallel is how many tests run at once: RabbitMQ holds a refused login back for three seconds, so most of them wait.
const parallel = "16"

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", parallel); err != nil {
		panic(err)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	for _, tool := range []string{"mosquitto_pub", "mosquitto_sub", "openssl"} {
		if _, err := exec.LookPath(tool); err != nil {
			fmt.Fprintf(os.Stderr, "contract: %s is not on this machine: run make tools (Debian packages mosquitto-clients and openssl)\n", tool)
			return 1
		}
	}
	dir, err := os.MkdirTemp("", "muster-contract-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "contract:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	w, err = newWorld(dir)
	if err == nil {
		defer w.stop()
		err = w.start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "contract: the world could not be built:", err)
		return 1
	}
	return m.Run()
}

// world is the smallest muster that holds the broker contract: the real decision, its index and its server, the
// production configuration of the broker, certificates from the real authority, and consumers of muster.up.
type world struct {
	dir       string
	hierarchy *ca.Hierarchy
	authority *ca.Authority
	trust     *tls.Config // what a device trusts; presents nothing
	index     *brokerauth.Index
	auth      *brokerauth.Server
	socket    *os.File // the auth backend's, as systemd would hold it
	broker    *devbroker.Broker
	consumers map[string]*broker.Consumer
	losses    map[string]uint64 // of the consumers, when the world was ready

	amqpPassword string
	devices      atomic.Int64
	up           log[broker.Message]
	refusals     log[brokerauth.Refusal]

	mu         sync.Mutex // of the bystanders
	bystanders []*bystander

	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

func newWorld(dir string) (*world, error) {
	h, err := ca.Create(ca.CreateOptions{At: time.Now()})
	if err != nil {
		return nil, err
	}
	a, err := ca.NewAuthority(h, pki.KeyPolicy{}, nil)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(h.TrustBundle()) {
		return nil, errors.New("the trust bundle has no certificate")
	}
	return &world{
		dir: dir, hierarchy: h, authority: a, trust: &tls.Config{RootCAs: pool, ServerName: "localhost"},
		index: brokerauth.NewIndex(), consumers: map[string]*broker.Consumer{}, losses: map[string]uint64{}, amqpPassword: rand.Text(),
	}, nil
}

// start brings everything up, in the order of musterd: the auth backend first.
func (w *world) start() error {
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	l, err := brokerauth.Listen(ctx, brokerauth.ListenConfig{Address: "127.0.0.1:0"})
	if err != nil {
		return err
	}
	if w.socket, err = l.(*net.TCPListener).File(); err != nil {
		return err
	}
	if err := w.serveAuth(l); err != nil {
		return err
	}
	quiet := slog.New(slog.DiscardHandler)
	if err := w.startBroker(ctx, "http://"+l.Addr().String()); err != nil {
		return err
	}
	for _, vhost := range []string{wire.VhostDevices, wire.VhostFallback} {
		c := broker.NewConsumer(broker.Config{
			Address: fmt.Sprintf("127.0.0.1:%d", w.broker.Conf.AMQPSPort), User: brokerconf.UserMuster, Password: w.amqpPassword, TLS: w.trust, Log: quiet,
		}, vhost, broker.Subscription{Queue: wire.QueueUp, MaxBatch: 100, Handle: func(_ context.Context, batch []broker.Message) error {
			for _, m := range batch {
				w.up.add(m)
			}
			return nil
		}})
		w.consumers[vhost] = c
		w.tasks.Go(func() { _ = c.Run(ctx) })
	}
	for vhost, c := range w.consumers {
		if !within(30*time.Second, c.Connected) {
			return fmt.Errorf("no consumer in vhost %s", vhost)
		}
	}
	return w.startBystanders()
}

// serveAuth answers the broker on l.
func (w *world) serveAuth(l net.Listener) error {
	s, err := brokerauth.New(brokerauth.Config{Index: w.index, OnRefusal: w.refusals.add, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	w.auth = s
	w.tasks.Go(func() {
		if err := s.Serve(l); err != nil {
			panic(err)
		}
	})
	return nil
}

// restartAuth replaces the auth backend as a restart of musterd does under systemd: the socket stays open and keeps the
// questions that come in the meantime.
func (w *world) restartAuth(t *testing.T) {
	t.Helper()
	if err := w.auth.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(w.socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.serveAuth(l); err != nil {
		t.Fatal(err)
	}
}

func (w *world) startBroker(ctx context.Context, authURL string) error {
	tlsDir := filepath.Join(w.dir, "tls")
	server, err := w.hierarchy.NewServer(time.Now(), []string{"localhost", "127.0.0.1"})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(tlsDir, 0o700); err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"clients.pem": w.hierarchy.ClientCAs(), "server.pem": server.Chain, "server.key": server.Key, "trust.pem": w.hierarchy.TrustBundle(),
	} {
		if err := os.WriteFile(filepath.Join(tlsDir, name), content, 0o600); err != nil {
			return err
		}
	}
	hash := brokerconf.HashPassword(w.amqpPassword, [4]byte{1, 2, 3, 4})
	w.broker, err = devbroker.Start(ctx, devbroker.Options{
		Dir: filepath.Join(w.dir, "broker"), Bind: []string{tlsDir}, Say: func(s string) { fmt.Fprintln(os.Stderr, s) },
		Conf: brokerconf.Config{
			DeviceCA: filepath.Join(tlsDir, "clients.pem"), ServerCert: filepath.Join(tlsDir, "server.pem"), ServerKey: filepath.Join(tlsDir, "server.key"),
			AuthURL:   authURL,
			Passwords: map[string]string{brokerconf.UserMuster: hash, brokerconf.UserMonitor: hash, brokerconf.UserAdmin: hash},
		},
	})
	return err
}

// stop ends what start began, in the reverse order.
func (w *world) stop() {
	for _, b := range w.bystanders {
		b.close()
	}
	if w.cancel != nil {
		w.cancel()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if w.broker != nil {
		if err := w.broker.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "contract: stop the broker:", err)
		}
	}
	if w.auth != nil {
		if err := w.auth.Shutdown(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "contract:", err)
		}
	}
	w.tasks.Wait()
}

// ports of the broker by vhost.
func (w *world) port(vhost string) int {
	if vhost == wire.VhostFallback {
		return w.broker.Conf.FallbackPort
	}
	return w.broker.Conf.MQTTPort
}

// device is a registered device with all its credentials.
type device struct {
	id       fleet.DeviceID
	serial   fleet.Serial
	cert     *tls.Certificate
	password string
}

// newDevice registers a device that is in good standing.
func (w *world) newDevice(t testing.TB) device {
	t.Helper()
	d, err := w.register()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (w *world) register() (device, error) {
	d := device{id: fleet.DeviceID(fmt.Sprintf("dev-%d", w.devices.Add(1))), password: rand.Text()}
	var err error
	d.serial, d.cert, err = w.issue(d.id)
	if err != nil {
		return d, err
	}
	w.index.Put(d.record())
	return d, nil
}

// record is what the index holds of a device in good standing.
func (d device) record() admission.Record {
	return admission.Record{
		Device:       d.id,
		Certificates: [2]admission.Certificate{{Serial: d.serial, NotAfter: time.Now().Add(time.Hour)}},
		Passwords:    []fleet.Hash{fleet.HashOf(sha256.Sum256([]byte(d.password)))},
	}
}

func (d device) user() string { return wire.CertUser(d.id, d.serial) }

// issue returns a certificate from the real authority.
func (w *world) issue(id fleet.DeviceID) (fleet.Serial, *tls.Certificate, error) {
	return issueBy(w.authority, id)
}

func issueBy(a *ca.Authority, id fleet.DeviceID) (fleet.Serial, *tls.Certificate, error) {
	serial, err := ca.NewSerial()
	if err != nil {
		return "", nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", nil, err
	}
	now := time.Now()
	signed, err := a.Sign(context.Background(), pki.Order{
		Serial: serial, Device: id, PublicKey: spki, Validity: pki.Validity{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(90 * 24 * time.Hour)},
	})
	if err != nil {
		return "", nil, err
	}
	return serial, &tls.Certificate{Certificate: signed.Chain, PrivateKey: key}, nil
}

// expired returns a certificate that ended a minute ago: like a real one of d, with the dates changed and signed again by
// the same CA.
func (w *world) expired(t *testing.T, d device) *tls.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(d.cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Minute)
	der, err := x509.CreateCertificate(rand.Reader, c, w.hierarchy.Device.Cert, c.PublicKey, w.hierarchy.Device.Key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, d.cert.Certificate[1]}, PrivateKey: d.cert.PrivateKey}
}

// files writes a certificate and its key as command line clients want them, and returns their paths.
func files(t *testing.T, c *tls.Certificate) (cert, key string) {
	t.Helper()
	var chain []byte
	for _, der := range c.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	for path, content := range map[string][]byte{cert: chain, key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func (w *world) trustFile() string { return filepath.Join(w.dir, "tls", "trust.pem") }

// bystander is a device that does nothing wrong, with a session that must outlive every test.
type bystander struct {
	device
	*client
	vhost string
}

func (w *world) startBystanders() error {
	for _, vhost := range []string{wire.VhostDevices, wire.VhostFallback} {
		d, err := w.register()
		if err != nil {
			return err
		}
		var cert *tls.Certificate
		l := login{clientID: string(d.id)}
		if vhost == wire.VhostDevices {
			cert = d.cert
		} else {
			l.user, l.password = text(string(d.id)), &d.password
		}
		c, err := dial(w.port(vhost), w.trust, cert, v311)
		if err != nil {
			return err
		}
		if code, err := c.connect(l); err != nil || code != 0 {
			return fmt.Errorf("bystander in vhost %s: code %d, %w", vhost, code, err)
		}
		if code, err := c.subscribe(wire.DownFilter(d.id)); err != nil || code > 1 {
			return fmt.Errorf("bystander in vhost %s subscribes: code %d, %w", vhost, code, err)
		}
		w.bystanders = append(w.bystanders, &bystander{d, c, vhost})
	}
	for vhost, c := range w.consumers {
		w.losses[vhost] = c.Losses()
	}
	return nil
}

// watch makes t fail if, at its end, a bystander has lost its session, got a message from somebody, or cannot reach
// muster's queue.
func watch(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	return alone(t)
}

// alone is watch for a test during which no other may run.
func alone(t *testing.T) *world {
	t.Helper()
	t.Cleanup(func() { w.undisturbed(t) })
	return w
}

func (w *world) undisturbed(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.bystanders {
		if err := b.ping(); err != nil {
			t.Fatalf("the bystander in vhost %s lost its session: %v", b.vhost, err)
		}
		if b.strays > 0 {
			b.strays = 0
			t.Errorf("the bystander in vhost %s got a message that muster did not send", b.vhost)
		}
		nonce := rand.Text()
		if code, err := b.publish(wire.UpTopic(b.id, wire.UpHello), nonce); err != nil || code != 0 {
			t.Fatalf("the bystander in vhost %s cannot publish: code %d, %v", b.vhost, code, err)
		}
		m, ok := w.up.await(func(m broker.Message) bool { return string(m.Body) == nonce })
		if !ok || m.Vhost != b.vhost || m.Key != "d."+string(b.id)+".up.hello" {
			t.Fatalf("the bystander's message in vhost %s did not reach %s: %v, %+v", b.vhost, wire.QueueUp, ok, m)
		}
	}
	for vhost, c := range w.consumers {
		if n := c.Losses() - w.losses[vhost]; n != 0 {
			w.losses[vhost] = c.Losses()
			t.Errorf("muster's consumer in vhost %s lost its connection %d times", vhost, n)
		}
	}
}

// other is the bystander whose topics, names and credentials the tests try to use.
func (w *world) other(vhost string) device {
	for _, b := range w.bystanders {
		if b.vhost == vhost {
			return b.device
		}
	}
	panic("no bystander in vhost " + vhost)
}

// nobodyHeard fails if a message with this payload reached muster.
func (w *world) nobodyHeard(t *testing.T, payload string) {
	t.Helper()
	if m, ok := w.up.find(func(m broker.Message) bool { return string(m.Body) == payload }); ok {
		t.Errorf("a message that had to be refused reached muster as %q", m.Key)
	}
}

// log collects what happens, from any goroutine.
type log[T any] struct {
	mu  sync.Mutex
	all []T
}

func (l *log[T]) add(v T) {
	l.mu.Lock()
	l.all = append(l.all, v)
	l.mu.Unlock()
}

func (l *log[T]) find(match func(T) bool) (T, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.all {
		if match(v) {
			return v, true
		}
	}
	var none T
	return none, false
}

// arrival is how long something that has happened at the broker may take to be seen here.
const arrival = 10 * time.Second

// await waits until something matches.
func (l *log[T]) await(match func(T) bool) (found T, ok bool) {
	within(arrival, func() bool {
		found, ok = l.find(match)
		return ok
	})
	return found, ok
}

// within asks ready again and again until it is true or d is over.
func within(d time.Duration, ready func() bool) bool {
	end := time.After(d)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if ready() {
			return true
		}
		select {
		case <-end:
			return ready()
		case <-tick.C:
		}
	}
}
