package enroll_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/downlink"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

// A simulated device knows only what reached it: certificates for keys that it made, and passwords.
type simDevice struct {
	id       fleet.DeviceID
	keys     map[fleet.Hash]*ecdsa.PrivateKey
	held     []fleet.Serial // stored certificates: the one it uses, and at most one newer
	password string
	barred   bool // by an operator: nothing is promised to it
}

// walk is one life of a small fleet, with faults.
type walk struct {
	*rig
	rng     *rand.Rand
	devices []*simDevice
	policy  enroll.Policy
	story   []string
}

var errCrash = errors.New("killed")

// Whatever happens in whatever order, with kill -9 anywhere: what muster signed, it knows; a device that nobody barred
// keeps a way in; a revoked or disabled one has none; and the store's own check finds nothing (storetest, at the end).
func TestWalks(t *testing.T) {
	for seed := range uint64(25) {
		synctest.Test(t, func(t *testing.T) {
			p := enroll.Policy{Lifetime: 30 * day, Grace: day, PerDay: 1000}
			w := &walk{rig: newRig(t, p), rng: rand.New(rand.NewPCG(seed, 7)), policy: p}
			defer func() {
				if t.Failed() {
					t.Logf("seed %d:", seed)
					for _, s := range w.story {
						t.Log(s)
					}
				}
			}()
			for i := range 3 {
				d := &simDevice{id: fleet.DeviceID(fmt.Sprint("sim-", i)), keys: map[fleet.Hash]*ecdsa.PrivateKey{}}
				w.addDevice(d.id)
				w.devices = append(w.devices, d)
				w.provision(d)
			}
			for range 80 {
				time.Sleep(time.Duration(w.rng.IntN(12)) * time.Hour)
				w.step(w.devices[w.rng.IntN(len(w.devices))])
				if w.check(); t.Failed() {
					return
				}
			}
			for _, d := range w.devices {
				w.onRecord(d.id)
			}
		})
	}
}

func (w *walk) tell(format string, a ...any) {
	w.story = append(w.story, time.Now().Format("01-02 15h ")+fmt.Sprintf(format, a...))
}

// provision is what happens on the desk: a first certificate and a first password.
func (w *walk) provision(d *simDevice) {
	w.t.Helper()
	key := d.newKey(w.t)
	c, err := w.e.Issue(w.t.Context(), time.Now(), d.id, csrOf(w.t, key, d.id), enroll.IssueOptions{By: "ops"})
	if err != nil {
		w.t.Fatalf("%s: %v", d.id, err)
	}
	if d.password, err = w.e.NewPassword(w.t.Context(), time.Now(), d.id, "ops"); err != nil {
		w.t.Fatal(err)
	}
	d.held, d.barred = []fleet.Serial{c.Serial}, false
	w.tell("%s provisioned with %.6s", d.id, c.Serial)
	w.connect(d)
}

func (d *simDevice) newKey(t testing.TB) *ecdsa.PrivateKey {
	k := newKey(t)
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	d.keys[pki.KeyHash(spki)] = k
	return k
}

func (w *walk) step(d *simDevice) {
	w.t.Helper()
	now := time.Now()
	switch n := w.rng.IntN(20); n {
	case 0, 1, 2: // a new key, by either door
		via := pki.ViaMQTT
		if n == 0 {
			via = pki.ViaRecovery
		}
		w.ask(d, csrOf(w.t, d.newKey(w.t), d.id), via)
	case 3: // a key that it has
		for _, k := range d.keys {
			w.ask(d, csrOf(w.t, k, d.id), pki.ViaRecovery)
			break
		}
	case 4, 5, 6, 7:
		w.sign()
	case 8, 9, 10:
		w.deliver()
	case 11, 12, 13:
		w.connect(d)
	case 14:
		vhost := []string{wire.VhostDevices, wire.VhostFallback}[w.rng.IntN(2)]
		w.do(func(tx *bolt.Tx) error { return w.e.OpenIntents(tx, now, d.id, vhost) })
	case 15:
		r, err := w.e.RenewPass(w.t.Context(), now, enroll.RenewOptions{All: w.rng.IntN(4) == 0})
		if err != nil {
			w.t.Fatal(err)
		}
		w.tell("renewal: %v", r.Asked)
	case 16:
		s, err := w.e.Sweep(w.t.Context(), now)
		if err != nil {
			w.t.Fatal(err)
		}
		w.tell("sweep: %+v", s)
	case 17:
		if w.rng.IntN(4) == 0 {
			time.Sleep(20 * day)
			w.tell("twenty days pass")
		}
	case 18:
		w.toggle(d)
	case 19:
		if list := w.certs(d.id); w.rng.IntN(3) == 0 {
			s := list[w.rng.IntN(len(list))].Serial
			if _, err := w.e.Revoke(w.t.Context(), now, s, 5, "ops"); err != nil {
				w.t.Fatal(err)
			}
			d.barred = w.device(d.id).RecoveryOff != "" || w.device(d.id).Disabled
			w.tell("%s: %.6s revoked, barred %v", d.id, s, d.barred)
		} else if w.device(d.id).RecoveryOff != "" && !w.device(d.id).Disabled {
			w.provision(d)
		}
	}
}

func (w *walk) toggle(d *simDevice) {
	w.t.Helper()
	off := w.device(d.id).Disabled
	var err error
	if off {
		err = w.e.Enable(w.t.Context(), time.Now(), d.id, "ops")
	} else {
		err = w.disable(time.Now(), d.id)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	d.barred = !off || w.device(d.id).RecoveryOff != ""
	w.tell("%s: disabled %v", d.id, !off)
}

func (w *walk) ask(d *simDevice, csr []byte, via pki.Via) {
	w.t.Helper()
	w.tell("%s asks via %s", d.id, via)
	if err := w.request(time.Now(), d.id, csr, via); err != nil {
		w.t.Fatal(err)
	}
}

// sign runs the signer, sometimes into a crash.
func (w *walk) sign() {
	w.t.Helper()
	crash := true
	switch w.rng.IntN(4) {
	case 0:
		w.auth.fail(errCrash)
	case 1:
		w.updating = func() error { return errCrash }
	default:
		crash = false
	}
	err := w.e.SignPending(w.t.Context())
	if err != nil && !errors.Is(err, errCrash) {
		w.t.Fatal(err)
	}
	w.tell("signing: %v", err)
	if crash {
		w.kill(w.policy)
	}
}

// deliver sends what is in the outbox; a message may get lost, and a device may fail to store it.
func (w *walk) deliver() {
	w.t.Helper()
	for _, e := range w.outbox() {
		if e.Kind != downlink.Cert {
			continue
		}
		var d *simDevice
		for _, x := range w.devices {
			if x.id == e.Device {
				d = x
			}
		}
		var payloads [][]byte
		w.do(func(tx *bolt.Tx) (err error) {
			payloads, err = w.e.ComposeCert(tx, time.Now(), e.Device, fleet.Serial(e.Ref), fleet.Status{Buffer: 4096}, e.Vhost == wire.VhostFallback)
			return err
		})
		if len(payloads) == 0 || w.rng.IntN(3) == 0 {
			continue
		}
		m, err := wire.DecodeCertOrder(payloads[0])
		if err != nil {
			w.t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(m.Chain[0])
		if err != nil {
			w.t.Fatal(err)
		}
		if d.keys[pki.KeyHash(leaf.RawSubjectPublicKeyInfo)] == nil {
			w.t.Errorf("%s got a certificate for a key that it never had", d.id)
			continue
		}
		// It has two slots: the one it uses, and the newest.
		if d.held[0] != m.Serial {
			d.held = []fleet.Serial{d.held[0], m.Serial}
		}
		if m.Password != "" {
			d.password = m.Password
		}
		w.tell("%s stores %.6s", d.id, m.Serial)
	}
}

// lets reports whether the broker would let a device in with a certificate: what admission's record says.
func (w *walk) lets(id fleet.DeviceID, s fleet.Serial) bool {
	w.t.Helper()
	d := w.device(id)
	if d.Disabled || d.Current != s && d.Next != s {
		return false
	}
	c := w.cert(s)
	return c.State.Live() && time.Now().Before(c.NotAfter)
}

// connect tries the newest certificate and goes back to the older one.
func (w *walk) connect(d *simDevice) {
	w.t.Helper()
	for i := len(d.held) - 1; i >= 0; i-- {
		s := d.held[i]
		if !w.lets(d.id, s) {
			continue
		}
		w.connected(time.Now(), d.id, s)
		d.held = []fleet.Serial{s}
		w.tell("%s connects with %.6s", d.id, s)
		return
	}
}

func (w *walk) check() {
	w.t.Helper()
	for _, o := range w.auth.all() {
		if c, err := w.e.Certificate(w.t.Context(), o.Serial); err != nil || c.Device != o.Device {
			w.t.Errorf("%s was signed and is not recorded: %v", o.Serial, err)
		}
	}
	for _, d := range w.devices {
		dev := w.device(d.id)
		if n := len(dev.Passwords); n > 16 {
			w.t.Errorf("%s has %d passwords", d.id, n)
		}
		expired := false
		in := 0
		for _, s := range d.held {
			if w.lets(d.id, s) {
				in++
			}
			if !time.Now().Before(w.cert(s).NotAfter) {
				expired = true
			}
		}
		switch {
		case d.barred && (in > 0 && dev.Disabled || dev.RecoveryOff != "" && in > 0):
			w.t.Errorf("%s is barred and gets in", d.id)
		case d.barred:
		case !w.passwordWorks(d.id, d.password):
			w.t.Errorf("%s: its fallback password does not work any more", d.id)
		case in == 0 && !expired:
			w.t.Errorf("%s: none of its certificates works, and none has expired", d.id)
		}
		active := 0
		for _, c := range w.certs(d.id) {
			if c.State == pki.Active {
				active++
			}
		}
		if active > 1 || dev.Current != "" && dev.Current == dev.Next {
			w.t.Errorf("%s has %d active certificates, slots %s and %s", d.id, active, dev.Current, dev.Next)
		}
	}
}
