package simdev_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"muster/internal/downlink"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/recovery"
	"muster/internal/simdev"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

// muster is the real thing as far as a certificate and a password are concerned: enroll and recovery on a real store, with
// the outbox between. Its process can be ended before or after any of its commits; then it starts again from the file,
// and whoever waits for an acknowledgement says it again.
type muster struct {
	t     *testing.T
	w     *world
	path  string
	flash *simdev.MemFlash

	turn sync.Mutex // one event at a time
	db   *bolt.DB
	e    *enroll.Enroller
	r    *recovery.Recovery

	mu      sync.Mutex // guards what follows: signing works in several goroutines
	commits int
	cut     int  // the commit in which the process ends; 0: none
	after   bool // it ends after that commit, not before
	dead    bool
	deaths  int
}

var errProcess = errors.New("the process ended")

func newMuster(t *testing.T, w *world) *muster {
	t.Helper()
	m := &muster{t: t, w: w, path: filepath.Join(t.TempDir(), "muster.db"), flash: &simdev.MemFlash{}}
	m.boot()
	return m
}

// boot starts the process on what the file holds.
func (m *muster) boot() {
	m.t.Helper()
	if m.db != nil {
		if err := m.db.Close(); err != nil {
			m.t.Error(err)
		}
	}
	m.db = storetest.Reopen(m.t, m.path)
	m.dead = false
	log := slog.New(slog.DiscardHandler)
	var err error
	m.e, err = enroll.New(enroll.Config{
		Update: func(ctx context.Context, f func(enroll.Tx) error) error {
			return m.update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return m.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: signs{m.w}, Sessions: noSessions{}, Log: log,
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.r, err = recovery.New(recovery.Config{
		Update: func(ctx context.Context, f func(recovery.Tx) error) error {
			return m.update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(recovery.Tx) error) error {
			return m.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Enroll: m.e, Log: log, Policy: recovery.Policy{PerDeviceHour: 1000},
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// update is a transaction of the process.
func (m *muster) update(ctx context.Context, f func(*bolt.Tx) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errProcess
	}
	m.commits++
	if m.commits != m.cut {
		return m.db.Update(ctx, f)
	}
	m.dead = true
	m.deaths++
	if m.after {
		if err := m.db.Update(ctx, f); err != nil {
			return err
		}
	}
	return errProcess
}

// survive does a step until the process has not ended in it.
func (m *muster) survive(step func() error) {
	for {
		err := step()
		m.mu.Lock()
		dead := m.dead
		m.mu.Unlock()
		if !dead {
			if err != nil && !fleet.Is(err, fleet.NotFound) {
				m.t.Errorf("muster: %v", err)
			}
			return
		}
		m.boot()
	}
}

// make registers the device and returns what it is made with: a certificate that ends in ten minutes, and a password.
func (m *muster) make() simdev.Credentials {
	m.t.Helper()
	ctx, at, key := m.t.Context(), time.Now(), newKey(m.t)
	if err := m.db.Update(ctx, func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: deviceID, Product: "pump"}) }); err != nil {
		m.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		m.t.Fatal(err)
	}
	c, err := m.e.Issue(ctx, at, deviceID, csr, enroll.IssueOptions{Lifetime: 10 * time.Minute})
	if err != nil {
		m.t.Fatal(err)
	}
	pw, err := m.e.NewPassword(ctx, at, deviceID, "ops")
	if err != nil {
		m.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		m.t.Fatal(err)
	}
	m.commits = 0 // the device's life begins
	return simdev.Credentials{Key: der, Chain: c.Chain, Trust: [][]byte{m.w.ca.root.Raw}, Password: pw, Endpoints: ends}
}

// admit answers the broker, and hears of the connection that follows.
func (m *muster) admit(front bool, serial fleet.Serial, password string) (ok bool) {
	m.turn.Lock()
	defer m.turn.Unlock()
	d := m.device()
	if !front {
		return accepts(d, password)
	}
	if serial != d.Current && serial != d.Next {
		return false
	}
	m.survive(func() error {
		return m.update(m.t.Context(), func(tx *bolt.Tx) error { return m.e.Connected(tx, time.Now(), deviceID, serial) })
	})
	m.neverLockedOut("connected")
	return true
}

// hear takes a message of the device and returns what it is told.
func (m *muster) hear(front bool, topic string, payload []byte) (out []reply) {
	m.turn.Lock()
	defer m.turn.Unlock()
	_, word, err := wire.ParseUpKey(strings.ReplaceAll(topic, "/", "."))
	if err != nil || word != wire.UpHello && word != wire.UpCert {
		return nil
	}
	m.neverLockedOut("it says " + string(word))
	m.survive(func() error {
		return m.update(m.t.Context(), func(tx *bolt.Tx) error { return m.handle(tx, front, word, payload) })
	})
	m.survive(func() error { return m.e.SignPending(m.t.Context()) })
	m.survive(func() error { return m.pump(&out) })
	m.neverLockedOut("answered " + string(word))
	return out
}

func (m *muster) handle(tx *bolt.Tx, front bool, word wire.Up, payload []byte) error {
	at, vhost := time.Now(), wire.VhostFallback
	if front {
		vhost = wire.VhostDevices
	}
	if word == wire.UpHello {
		h, err := wire.DecodeHello(payload)
		if err != nil {
			return err
		}
		if err := tx.Enqueue(downlink.Entry{Device: deviceID, Vhost: vhost, Kind: downlink.Hello, At: at}); err != nil {
			return err
		}
		if front {
			return m.e.OpenIntents(tx, at, deviceID, vhost)
		}
		return m.r.Hello(tx, at, deviceID, h)
	}
	c, err := wire.DecodeCert(payload)
	switch {
	case err != nil:
		return err
	case c.Have != "":
		return m.e.Have(tx, at, deviceID, c.Have)
	case c.CSR == nil:
		return nil
	case front:
		return m.e.RequestByCSR(tx, at, deviceID, c.CSR, pki.ViaMQTT)
	}
	return m.r.CSR(tx, at, deviceID, c.CSR)
}

// pump empties the outbox: composes, sends, and only then drops. What was sent stays sent if the process ends.
func (m *muster) pump(out *[]reply) error {
	var entries []downlink.Entry
	if err := m.db.View(m.t.Context(), func(tx *bolt.Tx) (err error) { entries, err = tx.Outbox(0); return err }); err != nil {
		return err
	}
	for _, e := range entries {
		var said []reply
		err := m.update(m.t.Context(), func(tx *bolt.Tx) error {
			said = nil
			switch e.Kind {
			case downlink.Hello:
				said = append(said, reply{wire.DownCmd, wire.HelloAnswer(time.Now())})
			case downlink.No:
				said = append(said, reply{wire.DownCert, enroll.ComposeNo(e.Ref)})
			case downlink.Cert:
				payloads, err := m.e.ComposeCert(tx, time.Now(), deviceID, fleet.Serial(e.Ref), fleet.Status{Buffer: 256}, e.Vhost == wire.VhostFallback)
				for _, p := range payloads {
					said = append(said, reply{wire.DownCert, p})
				}
				return err
			default:
				return fmt.Errorf("nobody expects %s", e.Kind)
			}
			return nil
		})
		if err != nil {
			return err
		}
		*out = append(*out, said...)
		if err := m.update(m.t.Context(), func(tx *bolt.Tx) error { return tx.DropOutbox([]uint64{e.Seq}) }); err != nil {
			return err
		}
	}
	return nil
}

func (m *muster) device() (d fleet.Device) {
	if err := m.db.View(m.t.Context(), func(tx *bolt.Tx) (err error) { d, err = tx.Device(deviceID); return err }); err != nil {
		m.t.Error(err)
	}
	return d
}

func accepts(d fleet.Device, password string) bool {
	sum := fleet.HashOf(sha256.Sum256([]byte(password)))
	for _, p := range d.Passwords {
		if p.SHA256 == sum {
			return true
		}
	}
	return false
}

var passwordForm = regexp.MustCompile(`"password":"([^"]+)"`)

// neverLockedOut is what must hold at every moment: the device's flash holds a password that muster takes.
func (m *muster) neverLockedOut(when string) {
	d, held := m.device(), 0
	for _, name := range []string{"password.a", "password.b"} {
		b, err := m.flash.Read(name)
		if err != nil {
			continue
		}
		if found := passwordForm.FindSubmatch(b); found != nil {
			held++
			if accepts(d, string(found[1])) {
				return
			}
		}
	}
	m.t.Errorf("%s: none of the %d passwords that the device holds is good for muster, which knows %d", when, held, len(d.Passwords))
}

// signs is the world's CA as enroll knows it.
type signs struct{ w *world }

func (s signs) NewSerial() (fleet.Serial, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	return fleet.SerialOf(n.Add(n, big.NewInt(1<<40))), err
}

func (s signs) KeyHashes() []fleet.Hash { return nil }

func (s signs) Sign(_ context.Context, o pki.Order) (pki.Signed, error) {
	pub, err := x509.ParsePKIXPublicKey(o.PublicKey)
	if err != nil {
		return pki.Signed{}, err
	}
	uri, err := url.Parse(wire.CertUser(o.Device, o.Serial))
	if err != nil {
		return pki.Signed{}, err
	}
	n, _ := new(big.Int).SetString(string(o.Serial), 16)
	der := s.w.ca.sign(s.w.t, &x509.Certificate{
		SerialNumber: n, DNSNames: []string{string(o.Device)}, URIs: []*url.URL{uri}, NotBefore: o.NotBefore, NotAfter: o.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, pub)
	return pki.Signed{Chain: [][]byte{der, s.w.ca.root.Raw}, Validity: o.Validity}, nil
}

// noSessions is a broker where nobody is connected.
type noSessions struct{}

func (noSessions) CloseUser(context.Context, string, string) error     { return nil }
func (noSessions) UserConnected(context.Context, string) (bool, error) { return false, nil }

// rotate lets a device's certificate run out and the fallback bring a new one with a new password, while muster's process
// ends at one of its commits and the device's power goes at one of its writes. It reports which of the two happened.
func rotate(t *testing.T, commit int, after bool, cut simdev.Cut) (died, lostPower bool) {
	bubble(t, func(t *testing.T, w *world) {
		m := newMuster(t, w)
		c := m.make()
		w.set(func() { w.real = m })
		m.cut, m.after = commit, after
		d, _ := w.device(func(conf *simdev.Config) { conf.Credentials, conf.Flash, conf.Faults.PowerCut = c, m.flash, cut })
		back := func() bool { s := d.Snapshot(); return s.Connected && s.Door == wire.VhostDevices }
		w.eventually(2*time.Minute, "an answered hello", func() bool { return w.saw(simdev.Answered, "") > 0 && back() })
		first := d.Snapshot().Serial
		time.Sleep(11 * time.Minute)
		w.kick()
		w.eventually(5*time.Minute, "back at the front with a new certificate", func() bool { return back() && d.Snapshot().Serial != first })
		time.Sleep(time.Minute)
		m.turn.Lock()
		defer m.turn.Unlock()
		m.neverLockedOut("in the end")
		now := m.device()
		if !back() || now.Current != d.Snapshot().Serial || now.Next != "" {
			t.Errorf("muster has current %s, next %q; the device uses %s", now.Current, now.Next, d.Snapshot().Serial)
		}
		if accepts(now, c.Password) {
			t.Error("the password before still works")
		}
		died, lostPower = m.deaths > 0, d.Counts().PowerCuts > 0
	})
	return died, lostPower
}

// The password is replaced together with the certificate that it brought. muster's process ends before and after each of
// its commits: the device always holds a password that works.
func TestRotationSurvivesTheEndOfMusterAtEveryCommit(t *testing.T) {
	for _, after := range []bool{false, true} {
		cuts := 0
		for n := 1; ; n++ {
			died := false
			t.Run(fmt.Sprintf("commit %d after=%v", n, after), func(t *testing.T) { died, _ = rotate(t, n, after, simdev.Cut{}) })
			if !died || t.Failed() {
				break
			}
			cuts++
		}
		if cuts < 10 {
			t.Errorf("only %d commits were cut", cuts)
		}
	}
}

// Both sides lose power in the same rotation, at random.
func TestRotationSurvivesPowerCutsOnBothSides(t *testing.T) {
	seed := mathrand.Uint64()
	t.Logf("seed %d", seed)
	rnd := mathrand.New(mathrand.NewPCG(seed, 1))
	both := 0
	for range 15 {
		commit, after := 1+rnd.IntN(24), rnd.IntN(2) == 0
		cut := simdev.Cut{Write: 5 + rnd.Uint64N(12), Point: []simdev.CutPoint{simdev.CutBefore, simdev.CutMiddle, simdev.CutAfter}[rnd.IntN(3)]}
		t.Run(fmt.Sprintf("commit %d after=%v, %s write %d", commit, after, cut.Point, cut.Write), func(t *testing.T) {
			if died, lost := rotate(t, commit, after, cut); died && lost {
				both++
			}
		})
	}
	if both == 0 {
		t.Error("never on both sides")
	}
}
