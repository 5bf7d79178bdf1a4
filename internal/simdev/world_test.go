package simdev_test

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
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/internal/wire"
)

// world is a broker and a backend for devices under test, in one bubble of fake time: a real MQTT broker behind real TLS,
// on pipes. The backend is a few lines of what muster does; its rules can be bent by a test.
type world struct {
	t    *testing.T
	mqtt *mqtt.Server
	ca   *ca
	srv  tls.Certificate

	mu        sync.Mutex
	down      map[string]bool // addresses that nobody listens on
	deny      bool            // every login is answered with "bad user name or password"
	denyNew   bool            // only those with a certificate that has not been used before
	revoked   map[fleet.Serial]bool
	used      map[fleet.Serial]bool
	byKey     map[string]wire.CertOrder // certificates by public key
	renew     bool                      // every hello with a certificate of the first generation is answered with renew
	silent    bool                      // nothing is answered
	hangUp    bool                      // telemetry is answered with the end of the connection, once
	life      time.Duration             // of certificates
	password  []string                  // that work
	pushPlain bool                      // certificates are not split
	wait      int                       // requests over the fallback are put off so often
	offer     *wire.OTAOffer
	image     []byte
	serve     func(http.ResponseWriter, *http.Request) bool // true: it has answered
	real      *muster                                       // takes the place of the few lines

	hellos    []wire.Hello
	reports   []wire.OTAReport
	certs     []wire.CertReport
	bad       int // messages that the codec refused
	telemetry map[uint64]int
	dials     map[string]int
	events    []simdev.Event
	conns     []net.Conn
	wg        sync.WaitGroup
	stops     []func()      // owned by the test
	turn      chan struct{} // capacity 1: who may have a session
}

const deviceID = fleet.DeviceID("dev-1")

var ends = simdev.Endpoints{
	Device: deviceID, MQTT: "broker.test:8883", FallbackMQTT: "broker.test:8884", HTTPS: "ota.test:8443", RecoveryHTTPS: "ota.test:8444",
}

// bubble runs f in a bubble with a world that is shut down at the end.
func bubble(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		f(t, w)
	})
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		t: t, ca: newCA(t), life: 90 * 24 * time.Hour, password: []string{"first-password"}, down: map[string]bool{}, revoked: map[fleet.Serial]bool{},
		used: map[fleet.Serial]bool{}, byKey: map[string]wire.CertOrder{}, telemetry: map[uint64]int{}, dials: map[string]int{}, turn: make(chan struct{}, 1),
	}
	w.srv = w.ca.server(t, 10*year, "broker.test", "ota.test")
	// Its $SYS topics, which nobody reads, would be made every second of the bubble's time: most of the work of hours.
	const never = 10 * 365 * 24 * 60 * 60 // seconds
	w.mqtt = mqtt.New(&mqtt.Options{InlineClient: true, SysTopicResendInterval: never, Logger: slog.New(slog.DiscardHandler)})
	if err := w.mqtt.AddHook(&backend{w: w}, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.mqtt.Serve(); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) close() {
	for _, stop := range w.stops {
		stop()
	}
	w.mu.Lock()
	for _, c := range w.conns {
		c.Close()
	}
	w.mu.Unlock()
	w.mqtt.Close()
	w.wg.Wait()
}

// device starts a device that ends with the test.
func (w *world) device(change func(*simdev.Config)) (d *simdev.Device, stop func()) {
	w.t.Helper()
	c := simdev.Config{Credentials: w.credentials(), Timing: simdev.QuickTiming(), Seed: 1, Dial: w.dial, OnEvent: w.event}
	c.Timing.TelemetryEvery = time.Minute
	if change != nil {
		change(&c)
	}
	d, err := simdev.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	return d, w.start(d)
}

func (w *world) start(d *simdev.Device) (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.t.Errorf("device: %v", err)
			}
		})
	}
	w.stops = append(w.stops, stop)
	return stop
}

// credentials are those of a device whose certificate is of the first generation.
func (w *world) credentials() simdev.Credentials {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	o := w.ca.device(w.t, deviceID, &key.PublicKey, w.life)
	w.mu.Lock()
	w.used[o.Serial] = true
	w.byKey[spki(&key.PublicKey)] = o
	w.mu.Unlock()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	return simdev.Credentials{Key: der, Chain: o.Chain, Trust: [][]byte{w.ca.root.Raw}, Password: "first-password", Endpoints: ends}
}

// eventually waits in fake time.
func (w *world) eventually(limit time.Duration, what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if ok() {
			return
		}
	}
	seen := w.seen()
	for _, e := range seen[max(0, len(seen)-40):] {
		w.t.Logf("%s %s %s", e.At.Format("15:04:05.000"), e.Kind, e.Detail)
	}
	w.t.Fatalf("not within %s: %s", limit, what)
}

func (w *world) event(e simdev.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, e)
}

func (w *world) seen() []simdev.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.events)
}

// saw counts the events of a kind whose detail contains text.
func (w *world) saw(k simdev.Kind, text string) int {
	n := 0
	for _, e := range w.seen() {
		if e.Kind == k && strings.Contains(e.Detail, text) {
			n++
		}
	}
	return n
}

// set changes the rules.
func (w *world) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func get[T any](w *world, f func() T) T {
	w.mu.Lock()
	defer w.mu.Unlock()
	return f()
}

// kick closes every connection.
func (w *world) kick() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// tell publishes to the device. QoS 0, because this broker can lock itself up over its list of unacknowledged messages
// (Inflight.NextImmediate takes a read lock twice).
func (w *world) tell(word wire.Down, payload []byte) {
	if err := w.mqtt.Publish(wire.DownTopic(deviceID, word), payload, false, 0); err != nil {
		w.t.Errorf("publish: %v", err)
	}
}

// dial is the network.
func (w *world) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dials[addr]++
	if w.down[addr] {
		return nil, errors.New("connection refused")
	}
	near, far := net.Pipe()
	conn := newBuffered(far)
	w.conns = append(w.conns, conn)
	c := &tls.Config{Certificates: []tls.Certificate{w.srv}, SessionTicketsDisabled: true}
	if addr == ends.MQTT || addr == ends.HTTPS {
		c.ClientCAs, c.ClientAuth = w.ca.pool(), tls.RequireAndVerifyClientCert
		c.VerifyConnection = func(s tls.ConnectionState) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.revoked[fleet.SerialOf(s.PeerCertificates[0].SerialNumber)] {
				return errors.New("revoked") // becomes the alert bad_certificate
			}
			return nil
		}
	}
	w.wg.Go(func() {
		defer conn.Close()
		s := tls.Server(conn, c)
		if s.HandshakeContext(w.t.Context()) != nil {
			return
		}
		if addr == ends.HTTPS || addr == ends.RecoveryHTTPS {
			w.http(addr, s)
			return
		}
		name := addr
		if certs := s.ConnectionState().PeerCertificates; len(certs) > 0 {
			name = "cert/" + string(fleet.SerialOf(certs[0].SerialNumber))
		}
		// One session after the other: this broker forgets the subscription of a new one when the end of the old one
		// comes late.
		w.turn <- struct{}{}
		defer func() { <-w.turn }()
		_ = w.mqtt.EstablishConnection(name, s)
	})
	return near, nil
}

// http answers the requests of one connection.
func (w *world) http(addr string, conn net.Conn) {
	l := newOnce(conn)
	srv := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		user, pw, ok := r.BasicAuth()
		if addr == ends.RecoveryHTTPS && (!ok || user != string(deviceID) || !slices.Contains(get(w, func() []string { return w.password }), pw)) {
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		serve, image := get(w, func() func(http.ResponseWriter, *http.Request) bool { return w.serve }), get(w, func() []byte { return w.image })
		if serve != nil && serve(rw, r) {
			return
		}
		http.ServeContent(rw, r, "image", time.Time{}, bytes.NewReader(image))
	}), ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed || s == http.StateHijacked {
			l.Close()
		}
	}}
	_ = srv.Serve(l)
}

// offerImage makes every hello with another image be answered with an offer.
func (w *world) offerImage(job string, image []byte) {
	sum := sha256.Sum256(image)
	fw, err := simdev.ParseImage(image)
	if err != nil {
		fw.Version = "unknown"
	}
	o := wire.OTAOffer{Job: fleet.RolloutID(job), Version: fw.Version, Size: int64(len(image)), SHA256: sum[:], Path: "/f/" + fmt.Sprintf("%x", sum[:8])}
	w.set(func() { w.image, w.offer = image, &o })
	w.tell(wire.DownOTA, wire.Encode(o))
}

// steps returns the steps of a job as they were reported.
func (w *world) steps(job string) []wire.OTAStep {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []wire.OTAStep
	for _, r := range w.reports {
		if string(r.Job) == job && (len(out) == 0 || out[len(out)-1] != r.Step) {
			out = append(out, r.Step)
		}
	}
	return out
}

// backend is what muster does, as far as a device can see it.
type backend struct {
	mqtt.HookBase
	w *world
}

func (b *backend) ID() string { return "backend" }

func (b *backend) Provides(what byte) bool {
	return what == mqtt.OnConnectAuthenticate || what == mqtt.OnACLCheck || what == mqtt.OnPublish
}

func (b *backend) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	w := b.w
	serial, front := strings.CutPrefix(cl.Net.Listener, "cert/")
	if real := get(w, func() *muster { return w.real }); real != nil {
		return real.admit(front, fleet.Serial(serial), string(pk.Connect.Password))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deny || front && w.denyNew && !w.used[fleet.Serial(serial)] || string(cl.ID) != string(deviceID) {
		return false
	}
	if !front {
		return string(pk.Connect.Username) == string(deviceID) && slices.Contains(w.password, string(pk.Connect.Password))
	}
	if pk.Connect.PasswordFlag {
		return false
	}
	if !w.used[fleet.Serial(serial)] {
		w.used[fleet.Serial(serial)] = true
		if n := len(w.password); n > 1 {
			w.password = w.password[n-1:] // the old one dies when the new certificate has been used
		}
	}
	return true
}

func (b *backend) OnACLCheck(*mqtt.Client, string, bool) bool { return true }

func (b *backend) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if cl.Net.Inline {
		return pk, nil
	}
	if strings.Contains(pk.TopicName, "/tm/") && b.w.hangsUp() {
		cl.Net.Conn.Close()
		return pk, packets.ErrRejectPacket
	}
	serial, front := strings.CutPrefix(cl.Net.Listener, "cert/")
	if !front {
		serial = ""
	}
	if real := get(b.w, func() *muster { return b.w.real }); real != nil {
		out := real.hear(front, pk.TopicName, pk.Payload)
		b.w.wg.Go(func() {
			for _, p := range out {
				b.w.tell(p.word, p.payload)
			}
		})
		return pk, nil
	}
	for _, p := range b.w.answer(pk.TopicName, pk.Payload, fleet.Serial(serial), front) {
		// Not from within the hook: the broker is not done with the device's message.
		b.w.wg.Go(func() { b.w.tell(p.word, p.payload) })
	}
	return pk, nil
}

func (w *world) hangsUp() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	was := w.hangUp
	w.hangUp = false
	return was
}

type reply struct {
	word    wire.Down
	payload []byte
}

func (w *world) answer(topic string, payload []byte, serial fleet.Serial, front bool) (out []reply) {
	w.mu.Lock()
	defer w.mu.Unlock()
	name, tm := strings.CutPrefix(topic, wire.TelemetryTopic(deviceID, ""))
	if tm && name == "env" {
		var seq uint64
		if _, err := fmt.Sscanf(string(payload), `{"seq":%d,`, &seq); err != nil {
			w.bad++
		}
		w.telemetry[seq]++
		return nil
	}
	_, word, err := wire.ParseUpKey(strings.ReplaceAll(topic, "/", "."))
	if err != nil {
		return nil
	}
	switch word {
	case wire.UpHello:
		h, err := wire.DecodeHello(payload)
		if err != nil || h.Serial != serial {
			w.bad++
			return nil
		}
		w.hellos = append(w.hellos, h)
		if w.silent {
			return nil
		}
		out = append(out, reply{wire.DownCmd, wire.HelloAnswer(time.Now())})
		if front && w.renew && len(w.used) == 1 {
			out = append(out, w.intent()...)
		}
		if w.offer != nil && string(h.Image) != fmt.Sprintf("%x", w.offer.SHA256) {
			out = append(out, reply{wire.DownOTA, wire.Encode(*w.offer)})
		}
	case wire.UpOTA:
		r, err := wire.DecodeOTA(payload)
		if err != nil {
			w.bad++
			return nil
		}
		w.reports = append(w.reports, r)
		if r.Step == wire.StepRolledBack || r.Step == wire.StepFailed {
			w.offer = nil
		}
	case wire.UpCert:
		r, err := wire.DecodeCert(payload)
		if err != nil {
			w.bad++
			return nil
		}
		w.certs = append(w.certs, r)
		if r.CSR != nil {
			return w.request(r.CSR, front)
		}
	case wire.UpState:
		if _, err := wire.DecodeState(payload); err != nil {
			w.bad++
		}
	}
	return out
}

// intent is what a device with an old certificate is told: ask, or here it is.
func (w *world) intent() []reply {
	for _, o := range w.byKey {
		if !w.used[o.Serial] {
			return w.push(o)
		}
	}
	return []reply{{wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertRenew})}}
}

// request signs for a key: the same key gets the same certificate while that one is good.
func (w *world) request(csr []byte, front bool) []reply {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil || r.CheckSignature() != nil {
		w.bad++
		return nil
	}
	if !front && w.wait > 0 {
		w.wait--
		return []reply{{wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertNo, Why: "wait", Retry: 5})}}
	}
	pub := r.PublicKey.(*ecdsa.PublicKey)
	o, have := w.byKey[spki(pub)]
	if have {
		leaf, err := x509.ParseCertificate(o.Chain[0])
		have = err == nil && time.Now().Before(leaf.NotAfter) && !w.revoked[o.Serial]
	}
	if !have {
		o = w.ca.device(w.t, deviceID, pub, w.life)
		w.byKey[spki(pub)] = o
	}
	if !front {
		o.Password = fmt.Sprintf("password-%d", len(w.password)+len(w.used))
		w.password = append(w.password[:1:1], o.Password)
	}
	return w.push(o)
}

// push sends a certificate in slices for a buffer of 256 bytes.
func (w *world) push(o wire.CertOrder) []reply {
	budget := wire.Budget(wire.DownTopic(deviceID, wire.DownCert), 256)
	if w.pushPlain {
		budget = 1 << 16
	}
	parts, err := wire.SplitCert(o, budget)
	if err != nil {
		w.t.Errorf("split: %v", err)
	}
	var out []reply
	for _, p := range parts {
		out = append(out, reply{wire.DownCert, p})
	}
	return out
}

// ca signs.
type ca struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newCA(t testing.TB) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{root: root, key: key, next: 0x1000}
}

func (c *ca) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.root)
	return p
}

func (c *ca) sign(t testing.TB, tpl *x509.Certificate, pub any) []byte {
	t.Helper()
	tpl.KeyUsage, tpl.BasicConstraintsValid = x509.KeyUsageDigitalSignature, true
	der, err := x509.CreateCertificate(rand.Reader, tpl, c.root, pub, c.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (c *ca) server(t testing.TB, life time.Duration, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der := c.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: names, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public())
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// device signs a device certificate as muster does.
func (c *ca) device(t testing.TB, id fleet.DeviceID, pub *ecdsa.PublicKey, life time.Duration) wire.CertOrder {
	t.Helper()
	c.next++
	serial := fleet.SerialOf(big.NewInt(c.next))
	uri, err := url.Parse(wire.CertUser(id, serial))
	if err != nil {
		t.Fatal(err)
	}
	der := c.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(c.next), Subject: pkix.Name{CommonName: string(id)}, DNSNames: []string{string(id)}, URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, pub)
	return wire.CertOrder{Op: wire.CertPush, Serial: serial, Chain: [][]byte{der, c.root.Raw}}
}

func spki(pub *ecdsa.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		panic(err)
	}
	return string(der)
}

// buffered is the far end of a pipe, with the buffer that a socket has: without it both ends could wait for the other to
// read.
type buffered struct {
	net.Conn
	mu    sync.Mutex
	more  sync.Cond
	b     []byte
	err   error
	until time.Time   // of reading; zero: for ever
	timer *time.Timer // wakes Read at until
}

func newBuffered(c net.Conn) *buffered {
	p := &buffered{Conn: c}
	p.more.L = &p.mu
	go p.fill()
	return p
}

func (p *buffered) fill() {
	b := make([]byte, 32<<10)
	for {
		n, err := p.Conn.Read(b)
		p.mu.Lock()
		p.b = append(p.b, b[:n]...)
		p.err = err
		p.more.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *buffered) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case !p.until.IsZero() && !time.Now().Before(p.until):
			return 0, os.ErrDeadlineExceeded
		case len(p.b) > 0:
			n := copy(b, p.b)
			p.b = p.b[n:]
			return n, nil
		case p.err != nil:
			return 0, p.err
		}
		p.more.Wait()
	}
}

func (p *buffered) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
	p.until = t
	if !t.IsZero() {
		p.timer = time.AfterFunc(time.Until(t), p.more.Broadcast)
	}
	p.more.Broadcast()
	return nil
}

func (p *buffered) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// once is a listener for one connection.
type once struct {
	conn   chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newOnce(c net.Conn) *once {
	l := &once{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
	l.conn <- c
	return l
}

func (l *once) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *once) Close() error   { l.close.Do(func() { close(l.closed) }); return nil }
func (l *once) Addr() net.Addr { return &net.TCPAddr{} }

// missing returns the acknowledged telemetry that the backend never got.
func (w *world) missing(d *simdev.Device) []uint64 {
	w.mu.Lock()
	got := maps.Clone(w.telemetry)
	w.mu.Unlock()
	var out []uint64
	for _, r := range d.Acked() {
		for seq := r.From; seq <= r.To; seq++ {
			if got[seq] == 0 {
				out = append(out, seq)
			}
		}
	}
	return out
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// publicKeyOf returns the key of the only certificate that was issued for one.
func publicKeyOf(t testing.TB, w *world) *ecdsa.PublicKey {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for der := range w.byKey {
		pub, err := x509.ParsePKIXPublicKey([]byte(der))
		if err != nil {
			t.Fatal(err)
		}
		return pub.(*ecdsa.PublicKey)
	}
	t.Fatal("no certificate was issued")
	return nil
}

// newWorldCredentials are good credentials without a world around them.
func newWorldCredentials(t testing.TB) simdev.Credentials {
	t.Helper()
	c, key := newCA(t), newKey(t)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return simdev.Credentials{
		Key: der, Chain: c.device(t, deviceID, &key.PublicKey, time.Hour).Chain, Trust: [][]byte{c.root.Raw}, Password: "first-password", Endpoints: ends,
	}
}
