package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"muster/internal/broker"
	"muster/internal/broker/brokerconf"
	"muster/internal/devbroker"
	"muster/internal/fleet"
	"muster/internal/wire"
)

// node is the one RabbitMQ of this package, with an auth backend that says what the test wants.
type node struct {
	*devbroker.Broker
	dir   string
	roots *x509.CertPool
	allow atomic.Bool
	sign  func(c *x509.Certificate) (certFile, keyFile string, err error)
}

var the node

const password = "secret-of-the-test"

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "muster-broker-test")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	the.dir = dir
	if err := certificates(); err != nil {
		panic(err)
	}
	auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := "deny"
		if the.allow.Load() {
			answer = "allow"
		}
		fmt.Fprint(w, answer)
	}))
	defer auth.Close()
	hash := brokerconf.HashPassword(password, [4]byte{1, 2, 3, 4})
	the.Broker, err = devbroker.Start(ctx, devbroker.Options{
		Dir: filepath.Join(dir, "broker"), Bind: []string{dir + "/tls"}, Say: func(s string) { fmt.Println(s) },
		Conf: brokerconf.Config{
			DeviceCA: dir + "/tls/ca.pem", ServerCert: dir + "/tls/server.pem", ServerKey: dir + "/tls/server.key", AuthURL: auth.URL,
			Passwords: map[string]string{brokerconf.UserMuster: hash, brokerconf.UserMonitor: hash, brokerconf.UserAdmin: hash},
		},
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer the.Stop(ctx)
	return m.Run()
}

func certificates() error {
	if err := os.MkdirAll(the.dir+"/tls", 0o700); err != nil {
		return err
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	from, to := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: from, NotAfter: to, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	write := func(name, kind string, der []byte) error {
		return os.WriteFile(the.dir+"/tls/"+name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
	}
	the.roots = x509.NewCertPool()
	caCert, _ := x509.ParseCertificate(caDER)
	the.roots.AddCert(caCert)
	if err := write("ca.pem", "CERTIFICATE", caDER); err != nil {
		return err
	}
	the.sign = func(c *x509.Certificate) (string, string, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return "", "", err
		}
		c.NotBefore, c.NotAfter = from, to
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		if err != nil {
			return "", "", err
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return "", "", err
		}
		name := c.Subject.CommonName
		return the.dir + "/tls/" + name + ".pem", the.dir + "/tls/" + name + ".key", errors.Join(write(name+".pem", "CERTIFICATE", der), write(name+".key", "PRIVATE KEY", keyDER))
	}
	_, _, err = the.sign(&x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, DNSNames: []string{"localhost"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

func config() broker.Config {
	return broker.Config{
		Address: fmt.Sprintf("localhost:%d", the.Conf.AMQPSPort), User: brokerconf.UserMuster, Password: password,
		TLS: &tls.Config{RootCAs: the.roots}, Log: slog.New(slog.DiscardHandler), MinPause: 20 * time.Millisecond, MaxPause: 500 * time.Millisecond,
	}
}

func management(t *testing.T) *broker.Management {
	m := broker.NewManagement(broker.ManagementConfig{
		URL: fmt.Sprintf("https://localhost:%d", the.Conf.ManagementPort), TLS: &tls.Config{RootCAs: the.roots},
		MonitorUser: brokerconf.UserMonitor, MonitorPassword: password, AdminUser: brokerconf.UserAdmin, AdminPassword: password,
	})
	t.Cleanup(m.Close)
	return m
}

// eventually polls until ok or a minute has passed.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if ok() {
			return
		}
		<-time.After(5 * time.Millisecond)
	}
	t.Fatalf("%s: not within a minute", what)
}

// background runs f until the test ends.
func background(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// ledger collects what was stored.
type ledger struct {
	mu   sync.Mutex
	seen map[string]int
	fail bool
}

func (l *ledger) store(_ context.Context, ms []broker.Message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail {
		return fleet.Errorf(fleet.Unavailable, "disk full")
	}
	for _, m := range ms {
		l.seen[m.Key+" "+string(m.Body)]++
	}
	return nil
}

func (l *ledger) has(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen[key] > 0
}

func (l *ledger) setFail(f bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = f
}

func consumeUp(t *testing.T, l *ledger) *broker.Consumer {
	c := broker.NewConsumer(config(), wire.VhostDevices, broker.Subscription{Queue: wire.QueueUp, MaxBatch: 64, Linger: time.Millisecond, Handle: l.store})
	background(t, c.Run)
	eventually(t, "consumer connects", c.Connected)
	return c
}

func publisher(t *testing.T) *broker.Publisher {
	p := broker.NewPublisher(config(), wire.VhostDevices)
	background(t, p.Run)
	eventually(t, "publisher connects", p.Connected)
	return p
}

// Whatever the broker confirmed is stored, though the broker dies twice while reports flow. The ledger is the oracle.
func TestNothingConfirmedIsLostWhenTheBrokerIsKilled(t *testing.T) {
	l := &ledger{seen: map[string]int{}}
	consumeUp(t, l)
	p := publisher(t)
	var confirmed []string
	send := func(n int) {
		for len(confirmed) < n {
			var outs []broker.Out
			for i := range 20 {
				outs = append(outs, broker.Out{Key: "d.d1.up.state", Body: fmt.Appendf(nil, "%d-%d", len(confirmed), i)})
			}
			for i, err := range p.Publish(t.Context(), outs) {
				if err == nil {
					confirmed = append(confirmed, outs[i].Key+" "+string(outs[i].Body))
				}
			}
		}
	}
	send(500)
	for round := range 2 {
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := the.Kill(context.Background()); err != nil {
				t.Error(err)
			}
			if err := the.Boot(context.Background()); err != nil {
				t.Error(err)
			}
		})
		send(500 * (round + 2))
		wg.Wait()
	}
	for _, c := range confirmed {
		eventually(t, "the confirmed report "+c+" is stored", func() bool { return l.has(c) })
	}
}

// While the store fails nothing is acknowledged; when it is back the same reports are stored.
func TestReportsStayInTheQueueWhileTheyCannotBeStored(t *testing.T) {
	l := &ledger{seen: map[string]int{}}
	l.setFail(true)
	consumeUp(t, l)
	p := publisher(t)
	if err := p.Publish(t.Context(), []broker.Out{{Key: "d.d2.up.hello", Body: []byte("x")}})[0]; err != nil {
		t.Fatal(err)
	}
	m := management(t)
	var depth string
	eventually(t, "the report waits unacknowledged", func() bool {
		out, err := the.Ctl(t.Context(), "list_queues", "--quiet", "--vhost", "devices", "name", "messages_unacknowledged")
		depth = out
		return err == nil && strings.Contains(out, "muster.up\t1")
	})
	l.setFail(false)
	eventually(t, "the report is stored; before: "+depth, func() bool { return l.has("d.d2.up.hello x") })
	if v, err := m.Version(t.Context()); err != nil || m.CheckVersion(t.Context()) != nil {
		t.Errorf("%s, %v", v, err)
	}
}

// A report that is delivered again is not younger than it was, or evidence would change its order.
func TestAReportKeepsItsTimeWhenItComesAgain(t *testing.T) {
	seen := make(chan time.Time, 16)
	consume := func(answer error) (stop func()) {
		c := broker.NewConsumer(config(), wire.VhostDevices, broker.Subscription{Queue: wire.QueueUp, MaxBatch: 1, Handle: func(_ context.Context, ms []broker.Message) error {
			select {
			case seen <- ms[0].At:
			default:
			}
			return answer
		}})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	before := time.Now()
	stop := consume(errors.New("not yet"))
	if err := publisher(t).Publish(t.Context(), []broker.Out{{Key: "d.d3.up.hello", Body: []byte("x")}})[0]; err != nil {
		t.Fatal(err)
	}
	first := <-seen
	stop()
	for len(seen) > 0 {
		<-seen
	}
	stop = consume(nil)
	again := <-seen
	stop()
	if first.Before(before.Add(-time.Second)) || !again.Equal(first) {
		t.Errorf("published at %v, seen as of %v and then as of %v", before, first, again)
	}
}

// A queue that an operator declared otherwise is not taken over in silence.
func TestAQueueWithOtherArgumentsIsNamed(t *testing.T) {
	l := &ledger{seen: map[string]int{}}
	consumeUp(t, l) // has declared everything
	if out, err := the.Ctl(t.Context(), "delete_queue", "--vhost", "fallback", wire.QueueUp); err != nil && !strings.Contains(out, "No such queue") {
		t.Fatal(out, err)
	}
	raw, err := amqp.DialConfig(fmt.Sprintf("amqps://%s:%s@localhost:%d/fallback", brokerconf.UserMuster, password, the.Conf.AMQPSPort), amqp.Config{TLSClientConfig: &tls.Config{RootCAs: the.roots}})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	ch, err := raw.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclare(wire.QueueUp, true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	var log lockedBuilder
	conf := config()
	conf.Log = slog.New(slog.NewTextHandler(&log, nil))
	c := broker.NewConsumer(conf, wire.VhostFallback, broker.Subscription{Queue: wire.QueueUp, MaxBatch: 1, Handle: l.store})
	background(t, c.Run)
	eventually(t, "the log names the queue", func() bool {
		return strings.Contains(log.String(), "queue muster.up in vhost fallback exists with other arguments")
	})
	if c.Connected() {
		t.Error("it consumes all the same")
	}
	if _, err := ch.QueueDelete(wire.QueueUp, false, false, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it consumes once the queue is gone", c.Connected)
}

type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A device's session is seen with its serial, when it begins and when it ends; closing it by user name throws it out.
func TestSessionsAreSeenAndClosed(t *testing.T) {
	the.allow.Store(true)
	defer the.allow.Store(false)
	var mu sync.Mutex
	var events []broker.ConnectionEvent
	c := broker.NewConsumer(config(), wire.VhostDevices, broker.Subscription{
		Queue: wire.QueuePresence, MaxBatch: 16, Handle: func(_ context.Context, ms []broker.Message) error {
			mu.Lock()
			defer mu.Unlock()
			for _, m := range ms {
				if e, ok := broker.ParseConnectionEvent(m); ok && e.ClientID == "d1" {
					events = append(events, e)
				}
			}
			return nil
		},
	})
	background(t, c.Run)
	eventually(t, "consumer connects", c.Connected)

	serial := fleet.Serial("ab12cd34ef56")
	user := wire.CertUser("d1", serial)
	uri, err := url.Parse(user)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := the.sign(&x509.Certificate{SerialNumber: serial.Big(), Subject: pkix.Name{CommonName: "d1"}, DNSNames: []string{"d1"}, URIs: []*url.URL{uri}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		t.Fatal(err)
	}
	sub := exec.CommandContext(t.Context(), "mosquitto_sub", "-h", "localhost", "-p", fmt.Sprint(the.Conf.MQTTPort), "--cafile", the.dir+"/tls/ca.pem",
		"--cert", cert, "--key", key, "-i", "d1", "-t", "d/d1/dn/#", "-q", "1")
	var said lockedBuilder
	sub.Stdout, sub.Stderr = &said, &said
	if err := sub.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = sub.Process.Kill()
		_ = sub.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	}()
	find := func(began bool) (e broker.ConnectionEvent, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		for _, e := range events {
			if e.Began == began {
				return e, true
			}
		}
		return e, false
	}
	eventually(t, "the session is seen", func() bool { _, ok := find(true); return ok })
	e, _ := find(true)
	if e.Serial != serial || e.ClientID != "d1" || e.User != user || e.Vhost != wire.VhostDevices || e.Peer != "127.0.0.1" || time.Since(e.At) > time.Minute {
		t.Errorf("%+v", e)
	}
	m := management(t)
	eventually(t, "the management API lists it", func() bool {
		cs, err := m.Connections(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range cs {
			if c.User == user && c.Name == e.Name && c.Serial == serial {
				return true
			}
		}
		return false
	})
	if on, err := m.UserConnected(t.Context(), user); err != nil || !on {
		t.Errorf("connected %v, %v", on, err)
	}
	the.allow.Store(false)
	if err := m.CloseUser(t.Context(), user, "test"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its end is seen", func() bool { end, ok := find(false); return ok && end.Name == e.Name })
	if on, err := m.UserConnected(t.Context(), user); err != nil || on {
		t.Errorf("connected %v, %v", on, err)
	}
	if err := m.CloseUser(t.Context(), user, "nobody is there"); err != nil {
		t.Errorf("closing nobody: %v", err)
	}
}

// The probe is quiet on a broker that refuses strangers, and names every door that is open.
func TestTheProbeFindsOpenDoors(t *testing.T) {
	conf := broker.ProbeConfig{
		MQTT: fmt.Sprintf("localhost:%d", the.Conf.MQTTPort), Fallback: fmt.Sprintf("localhost:%d", the.Conf.FallbackPort), TLS: &tls.Config{RootCAs: the.roots},
	}
	if err := broker.Probe(t.Context(), conf); err != nil {
		t.Errorf("a sound broker: %v", err)
	}
	the.allow.Store(true)
	defer the.allow.Store(false)
	err := broker.Probe(t.Context(), conf)
	for _, door := range []string{"a password on", "a wrong password on", "a user name with a vhost on"} {
		if err == nil || !strings.Contains(err.Error(), "lets in "+door) {
			t.Errorf("%s: not found in: %v", door, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	conf.MQTT = l.Addr().String()
	if err := broker.Probe(t.Context(), conf); err == nil || !strings.Contains(err.Error(), "could not be probed") {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestPublishingWithoutAConnectionFailsAtOnce(t *testing.T) {
	p := broker.NewPublisher(config(), wire.VhostDevices)
	for _, err := range p.Publish(t.Context(), []broker.Out{{Key: "a"}, {Key: "b"}}) {
		if !fleet.Is(err, fleet.Unavailable) {
			t.Errorf("got %v", err)
		}
	}
}
