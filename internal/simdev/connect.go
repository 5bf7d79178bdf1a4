package simdev

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// online tries doors until ctx ends or the device restarts. It never gives up.
func (d *Device) online(ctx context.Context) error {
	if d.fw.Behaviour == NoMQTT {
		return d.idle(ctx)
	}
	for failures := 0; ; {
		w, ok := d.doors.next()
		if !ok {
			d.emit(Unreachable, "no certificate and no password: there is no way in")
			return d.idle(ctx)
		}
		again, err := d.attempt(ctx, w)
		if err != nil {
			return err
		}
		if again == atOnce {
			continue
		}
		if again == afterSession {
			failures = 0
		}
		if err := d.pause(ctx, failures); err != nil {
			return err
		}
		failures++
	}
}

// idle waits for the end of the life.
func (d *Device) idle(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r := <-d.orders:
		return r
	}
}

// pause waits before the next attempt: full jitter, so that a fleet that lost its broker does not come back as one.
func (d *Device) pause(ctx context.Context, failures int) error {
	t := time.NewTimer(d.backoff(failures))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r := <-d.orders:
		return r
	case <-t.C:
		return nil
	}
}

func (d *Device) backoff(failures int) time.Duration {
	top := d.c.Timing.BackoffCap
	if failures < 30 {
		top = min(top, d.c.Timing.BackoffBase<<failures)
	}
	return time.Duration(d.rnd.Int64N(int64(max(top, 1))))
}

// again says how soon the next attempt is made.
type again int

const (
	afterFailure again = iota
	afterSession       // at the front, which muster answered: the back-off starts afresh
	atOnce             // a new certificate waits to be used
)

// attempt tries one door, and lives the session behind it. The error is one that ends the life.
func (d *Device) attempt(ctx context.Context, w door) (again, error) {
	d.show(func(s *Snapshot) { s.Door = w.vhost() })
	l, o, why := d.connect(ctx, w)
	if ctx.Err() != nil {
		if l != nil {
			l.close(true)
		}
		return 0, ctx.Err()
	}
	if o != opened {
		d.failed(w, o, why)
		return afterFailure, nil
	}
	defer l.close(true)
	if err := d.entered(w, l); err != nil {
		l.close(false)
		return 0, err
	}
	s := newSession(d, l, w)
	end, err := s.run(ctx)
	_, crashed := errors.AsType[errPowerCut](err)
	l.close(!crashed)
	d.left(w, s, end, err)
	switch {
	case err != nil:
		return 0, err
	case s.stored:
		return atOnce, nil
	case s.answered && !w.fallback:
		return afterSession, nil
	}
	return afterFailure, nil
}

func (w door) vhost() string {
	if w.fallback {
		return wire.VhostFallback
	}
	return wire.VhostDevices
}

// failed notes an attempt that led to no session.
func (d *Device) failed(w door, o outcome, why string) {
	at := w.vhost()
	if !w.fallback {
		at += " with " + string(d.ids[w.side].serial)
		if o == refused || o == denied && d.doors.fresh == w.side {
			d.useless[d.ids[w.side].serial] = time.Now()
		}
	}
	if o == unreachable {
		d.count(func(c *Counts) { c.Unreachable++ })
		d.emit(Unreachable, "%s: %s", at, why)
	} else {
		d.count(func(c *Counts) { c.Refusals++ })
		d.emit(Refused, "%s: %s", at, why)
	}
	before := d.doors.slots
	if taken := d.doors.note(time.Now(), w, o); taken != "" {
		d.count(func(c *Counts) { c.Fallbacks++ })
		d.emit(FallbackTaken, "%s", taken)
		return
	}
	if next, ok := d.doors.next(); ok && !next.fallback && !w.fallback && next.side != w.side && len(before) > 1 {
		d.emit(SlotSwitched, "to %s", d.ids[next.side].serial)
	}
}

// entered notes a door that opened, and which certificate is now the proven one.
func (d *Device) entered(w door, l *link) error {
	was := d.doors.recovering
	d.doors.note(time.Now(), w, opened)
	gap := time.Duration(0)
	if !d.lastEnd.IsZero() {
		gap = time.Since(d.lastEnd)
	}
	d.count(func(c *Counts) {
		c.Connects++
		c.LongestGapMS = max(c.LongestGapMS, gap.Milliseconds())
	})
	d.show(func(s *Snapshot) { s.Connected, s.Serial = true, l.serial })
	d.emit(Connected, "%s %s", w.vhost(), l.serial)
	if w.fallback {
		return nil
	}
	if was {
		d.emit(FallbackLeft, "certificate %s is accepted", l.serial)
	}
	use, _, err := d.mem.use.read()
	if err != nil || use == (useRecord{w.side, true}) {
		return err
	}
	if err := d.mem.use.write(useRecord{w.side, true}); err != nil {
		return err
	}
	if use == (useRecord{w.side, false}) {
		d.count(func(c *Counts) { c.Promotions++ })
		d.emit(Promoted, "%s", l.serial)
	}
	return nil
}

// left notes the end of a session.
func (d *Device) left(w door, s *session, end string, err error) {
	d.lastEnd = time.Now()
	d.show(func(s *Snapshot) { s.Connected = false })
	if err != nil {
		end = err.Error()
	}
	d.emit(Disconnected, "%s: %s", w.vhost(), end)
	if w.fallback && !s.stored && err == nil {
		d.doors.note(time.Now(), w, barren)
	}
}

// link is a connected MQTT client.
type link struct {
	client *paho.Client
	conn   net.Conn // TLS; closed by the client
	in     chan *paho.Publish
	lost   chan string
	ended  context.Context // done when the session is lost: nothing is acknowledged any more
	fall   context.CancelFunc
	gone   chan struct{} // closed by close: nobody reads in any more
	once   sync.Once
	serial fleet.Serial // of the certificate that was presented; empty on the fallback
	pw     string       // of the fallback
}

// close ends the session and waits for the client's goroutines. Polite says DISCONNECT first; a device without power
// does not.
func (l *link) close(polite bool) {
	l.once.Do(func() {
		l.fall()
		close(l.gone)
		l.conn.SetDeadline(time.Now().Add(time.Second)) // a peer that reads nothing holds up nobody
		if !polite {
			l.conn.Close()
		}
		_ = l.client.Disconnect(&paho.Disconnect{ReasonCode: 0})
		<-l.client.Done()
	})
}

// connect opens a door. Unless the outcome is opened, why says what went wrong.
func (d *Device) connect(ctx context.Context, w door) (*link, outcome, string) {
	ctx, cancel := context.WithTimeout(ctx, d.c.Timing.Connect)
	defer cancel()
	var id *identity
	login := paho.Connect{
		ClientID: string(d.id), CleanStart: true, KeepAlive: uint16(max(d.c.Timing.KeepAlive/time.Second, 1)),
		Properties: &paho.ConnectProperties{ReceiveMaximum: new(uint16(16))},
	}
	l := &link{in: make(chan *paho.Publish, 16), lost: make(chan string, 1), gone: make(chan struct{})}
	l.ended, l.fall = context.WithCancel(context.Background())
	addr := d.endpoints.FallbackMQTT
	if w.fallback {
		pw, err := d.passwordIn(w.side)
		if err != nil {
			return nil, unreachable, err.Error()
		}
		l.pw = pw
		login.UsernameFlag, login.Username, login.PasswordFlag, login.Password = true, string(d.id), true, []byte(pw)
	} else {
		one := d.ids[w.side]
		id, addr, l.serial = &one, d.endpoints.MQTT, one.serial
	}
	conf := d.tlsConfig(addr, id, w.fallback)
	if id != nil && d.fw.Behaviour == NoMTLS {
		// What a firmware does that reads its key store at the wrong place.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return nobodys(d.id) }
	}
	conn, err := d.dialTLS(ctx, addr, conf)
	if err != nil {
		return nil, judge(err, id != nil), err.Error()
	}
	// The client library writes in several goroutines, and a packet in several writes.
	heard := &hearing{Conn: conn}
	l.conn = conn
	l.client = paho.NewClient(paho.ClientConfig{
		Conn: packets.NewThreadSafeConn(heard), PacketTimeout: d.c.Timing.Ack,
		OnPublishReceived:  []func(paho.PublishReceived) (bool, error){l.receive},
		OnClientError:      func(err error) { l.end("connection lost: " + err.Error()) },
		OnServerDisconnect: func(p *paho.Disconnect) { l.end(fmt.Sprintf("closed by the broker with reason 0x%02x", p.ReasonCode)) },
	})
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	ack, err := l.client.Connect(ctx, &login)
	if err != nil {
		stop()
		conn.Close()
		if ack != nil && ack.ReasonCode >= 0x80 {
			return nil, judgeConnack(ack.ReasonCode), fmt.Sprintf("broker answers 0x%02x", ack.ReasonCode)
		}
		if first := heard.first(); first != nil {
			err = first // the alert about a certificate comes after the handshake in TLS 1.3
		}
		return nil, judge(err, id != nil), err.Error()
	}
	if !stop() {
		l.close(true) // ctx ended between
		return nil, unreachable, ctx.Err().Error()
	}
	conn.SetDeadline(time.Time{})
	return l, opened, ""
}

func (d *Device) passwordIn(s side) (string, error) {
	pws, err := d.mem.passwords()
	if err != nil {
		return "", err
	}
	for _, p := range pws {
		if p.at == s {
			return p.Password, nil
		}
	}
	return "", errors.New("no password")
}

// receive hands a message to the session. It is called by the client library, which waits for it.
func (l *link) receive(p paho.PublishReceived) (bool, error) {
	select {
	case l.in <- p.Packet:
	case <-l.gone:
	case <-p.Client.Done():
	}
	return true, nil
}

func (l *link) end(why string) {
	select {
	case l.lost <- why:
	default: // the first reason counts
	}
	l.fall()
}

// limit returns a context that ends after d, with ctx, and with the session: the client library itself goes on waiting
// for the acknowledgement of what it sent before the connection was lost.
func (l *link) limit(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	limit, cancel := context.WithTimeout(ctx, d)
	stop := context.AfterFunc(l.ended, cancel)
	return limit, func() {
		stop()
		cancel()
	}
}

// hearing remembers the first error of reading: the client library reports others, too.
type hearing struct {
	net.Conn
	mu  sync.Mutex
	err error
}

func (h *hearing) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if err != nil {
		h.mu.Lock()
		if h.err == nil {
			h.err = err
		}
		h.mu.Unlock()
	}
	return n, err
}

func (h *hearing) first() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// dialTLS opens a verified TLS connection.
func (d *Device) dialTLS(ctx context.Context, addr string, c *tls.Config) (*tls.Conn, error) {
	raw, err := d.c.Dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, c)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// nobodys returns a certificate with the device's name that no CA signed.
func nobodys(id fleet.DeviceID) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: string(id)}, DNSNames: []string{string(id)}, NotAfter: time.Unix(1<<32, 0)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// tlsConfig verifies the server's name and chain against the trust bundle, and presents id unless it is nil. The time of
// the verification is the device's, but a device never takes its own word alone that something has expired or has not
// begun (pki.md §2.3): without a clock it knows only that it is at least so late, and on the fallback, which is the way
// back from a wrong bound too, nothing of the pinned roots counts as expired.
func (d *Device) tlsConfig(addr string, id *identity, fallback bool) *tls.Config {
	host, _, _ := net.SplitHostPort(addr)
	at, sure := d.now()
	c := &tls.Config{ServerName: host, RootCAs: d.trust, MinVersion: tls.VersionTLS12, Time: func() time.Time { return at }}
	if !sure || fallback {
		// The standard verification knows one exact time only, so it is done here, in full.
		roots := d.trust
		c.InsecureSkipVerify = true
		c.VerifyConnection = func(s tls.ConnectionState) error { return verifyAt(at, s, roots, host, fallback) }
	}
	if id != nil {
		c.Certificates = []tls.Certificate{{Certificate: id.chain, PrivateKey: id.key, Leaf: id.leaf}}
	}
	return c
}

// verifyAt verifies a server at a time that is at or later: a certificate whose validity has not begun by then proves
// that it is later. Lenient takes a certificate that has expired by then, but nothing else less.
func verifyAt(at time.Time, s tls.ConnectionState, roots *x509.CertPool, host string, lenient bool) error {
	if len(s.PeerCertificates) == 0 {
		return errors.New("the server has no certificate")
	}
	between := x509.NewCertPool()
	for i, c := range s.PeerCertificates {
		if c.NotBefore.After(at) {
			at = c.NotBefore
		}
		if i > 0 {
			between.AddCert(c)
		}
	}
	for _, c := range s.PeerCertificates {
		if lenient && c.NotAfter.Before(at) {
			at = c.NotAfter
		}
	}
	_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: host, CurrentTime: at})
	return err
}

// now returns the device's time, never before what it knows to be past, and whether it is more than a lower bound.
func (d *Device) now() (at time.Time, sure bool) {
	at, sure = time.Now(), true
	switch {
	case !d.told.IsZero():
		at = d.told.Add(time.Since(d.toldAt))
	case d.fault().Clock1970:
		at, sure = time.Unix(0, 0).Add(time.Since(d.bootedAt)), false
	}
	if at.Before(d.bound) {
		return d.bound, sure
	}
	return at, sure
}

// tellTime takes muster's time. The lower bound survives reboots; it is written once an hour, to spare the flash.
func (d *Device) tellTime(sec int64) error {
	t := time.Unix(sec, 0)
	if !t.After(d.bound) {
		return nil // never back
	}
	d.told, d.toldAt = t, time.Now()
	if t.Sub(d.bound) < time.Hour {
		return nil
	}
	d.bound = t
	return d.mem.clock.write(sec)
}

// judge tells a refusal of the device's certificate from everything else that can go wrong on the way.
func judge(err error, presented bool) outcome {
	if n, is := alertIn(err); is && presented && aboutCertificate[n] {
		return refused
	}
	return unreachable
}

// aboutCertificate are the alerts that are about the certificate that the client presented (RFC 8446 §6.2).
var aboutCertificate = map[uint8]bool{
	42: true, // bad_certificate
	43: true, // unsupported_certificate
	44: true, // certificate_revoked
	45: true, // certificate_expired
	46: true, // certificate_unknown
	48: true, // unknown_ca
	49: true, // access_denied
}

// alertIn returns the number of the alert that the other side sent. crypto/tls keeps its type to itself, so its kind is
// looked at: a byte within a "remote error".
func alertIn(err error) (uint8, bool) {
	op, is := errors.AsType[*net.OpError](err)
	if !is || op.Op != "remote error" || op.Err == nil {
		return 0, false
	}
	v := reflect.ValueOf(op.Err)
	if v.Kind() != reflect.Uint8 || !strings.HasPrefix(op.Err.Error(), "tls: ") {
		return 0, false
	}
	return uint8(v.Uint()), true
}

// judgeConnack: only words about the credential count as a denial (MQTT 5 §3.2.2.2).
func judgeConnack(code byte) outcome {
	switch code {
	case packets.ConnackBadUsernameOrPassword, packets.ConnackNotAuthorized, packets.ConnackInvalidClientID, packets.ConnackBanned:
		return denied
	}
	return unreachable
}
