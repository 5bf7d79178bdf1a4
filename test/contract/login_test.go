package contract

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"sync"
	"testing"
	"time"

	"muster/internal/admission"
	"muster/internal/brokerauth"
	"muster/internal/fleet"
	"muster/internal/wire"
)

// byCertificate and byPassword are the two right ways in.
func byCertificate(d device) login { return login{clientID: string(d.id)} }

func byPassword(d device) login {
	return login{clientID: string(d.id), user: text(string(d.id)), password: &d.password}
}

// enter opens a session that must be let in.
func (w *world) enter(t *testing.T, version byte, vhost string, d device) *client {
	t.Helper()
	l, cert := byCertificate(d), d.cert
	if vhost == wire.VhostFallback {
		l, cert = byPassword(d), nil
	}
	c, code := w.try(t, version, vhost, cert, l)
	if code != 0 {
		t.Fatalf("%s is refused in vhost %s with code 0x%02X", d.id, vhost, code)
	}
	return c
}

// try sends a CONNECT and returns the code of the answer. The session is closed with the test.
func (w *world) try(t *testing.T, version byte, vhost string, cert *tls.Certificate, l login) (*client, byte) {
	t.Helper()
	c, err := dial(w.port(vhost), w.trust, cert, version)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	code, err := c.connect(l)
	if err != nil {
		t.Fatalf("no CONNACK: %v", err)
	}
	return c, code
}

// Codes of a refused CONNECT: MQTT 3.1.1 §3.2.2.3, MQTT 5 §3.2.2.2.
const (
	badClientID311, badLogin311, notAuthorized311 = 2, 4, 5
	badClientID5, badLogin5, notAuthorized5       = 0x85, 0x86, 0x87
)

// refusedLogin is one way that must not lead in. reason is what muster says of it, for the device that is claimed;
// empty if the broker refuses by itself.
type refusedLogin struct {
	name   string
	vhost  string
	cert   *tls.Certificate
	login  login
	reason admission.Reason
	device fleet.DeviceID
	codes  [2]byte // of MQTT 3.1.1 and 5
}

var (
	badLogin    = [2]byte{badLogin311, badLogin5}
	badClientID = [2]byte{badClientID311, badClientID5}
)

func (w *world) refuseAll(t *testing.T, tests []refusedLogin) {
	t.Helper()
	for _, tt := range tests {
		for name, version := range versions {
			t.Run(tt.name+", MQTT "+name, func(t *testing.T) {
				t.Parallel()
				begin := time.Now()
				_, code := w.try(t, version, tt.vhost, tt.cert, tt.login)
				want := tt.codes[0]
				if version == v5 {
					want = tt.codes[1]
				}
				if code != want {
					t.Errorf("code 0x%02X, want 0x%02X", code, want)
				}
				if tt.reason != "" {
					w.wantReason(t, admission.User, tt.device, tt.reason, begin)
				}
			})
		}
	}
}

// wantReason waits until muster has said why it refused a device.
func (w *world) wantReason(t *testing.T, kind admission.Kind, id fleet.DeviceID, reason admission.Reason, since time.Time) {
	t.Helper()
	_, ok := w.refusals.await(func(r brokerauth.Refusal) bool {
		return r.Kind == kind && r.Device == id && r.Reason == reason && !r.At.Before(since)
	})
	if !ok {
		t.Errorf("muster did not refuse %q for the reason %s", id, reason)
	}
}

// TestTheTwoRightWaysIn is what makes the refusals of the other tests mean something.
func TestTheTwoRightWaysIn(t *testing.T) {
	w := watch(t)
	for name, version := range versions {
		for _, vhost := range []string{wire.VhostDevices, wire.VhostFallback} {
			t.Run(vhost+", MQTT "+name, func(t *testing.T) {
				t.Parallel()
				d := w.newDevice(t)
				c := w.enter(t, version, vhost, d)
				for _, filter := range []string{wire.DownFilter(d.id), wire.DownTopic(d.id, wire.DownCert)} {
					if code, err := c.subscribe(filter); err != nil || code > 1 {
						t.Errorf("subscribe %s: 0x%02X, %v", filter, code, err)
					}
				}
				for _, word := range []wire.Up{wire.UpHello, wire.UpCert} {
					w.arrives(t, c, vhost, wire.UpTopic(d.id, word), "d."+string(d.id)+".up."+string(word))
				}
				if err := c.ping(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestNoCertificateIsRefusedOnTheDevicePort(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	w.refuseAll(t, []refusedLogin{
		{name: "nothing at all", vhost: wire.VhostDevices, login: login{clientID: string(d.id)}, codes: badLogin},
		{name: "user name alone", vhost: wire.VhostDevices, login: login{clientID: string(d.id), user: text(d.user())}, codes: badLogin},
		{name: "empty password", vhost: wire.VhostDevices, login: login{clientID: string(d.id), user: text(d.user()), password: text("")}, codes: badLogin},
	})
}

func TestPasswordIsRefusedOnTheDevicePort(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	uri := login{clientID: string(d.id), user: text(d.user()), password: &d.password}
	none := login{clientID: string(d.id), user: text(d.user()), password: text("none")}
	w.refuseAll(t, []refusedLogin{
		{name: "right password", vhost: wire.VhostDevices, login: byPassword(d), reason: admission.UserName, codes: badLogin},
		{name: "user name of the certificate and the fallback password", vhost: wire.VhostDevices, login: uri, reason: admission.PasswordUsed, device: d.id, codes: badLogin},
		{name: "user name of the certificate and the password none", vhost: wire.VhostDevices, login: none, reason: admission.PasswordUsed, device: d.id, codes: badLogin},
		{name: "with the certificate too", vhost: wire.VhostDevices, cert: d.cert, login: byPassword(d), reason: admission.UserName, codes: badLogin},
	})
}

func TestCertificateIsRefusedOnTheFallbackPort(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	uri := login{clientID: string(d.id), user: text(d.user()), password: &d.password}
	w.refuseAll(t, []refusedLogin{
		{name: "certificate", vhost: wire.VhostFallback, cert: d.cert, login: byCertificate(d), reason: admission.UserName, codes: badLogin},
		{name: "certificate and its user name with a password", vhost: wire.VhostFallback, cert: d.cert, login: uri, reason: admission.UserName, codes: badLogin},
		{name: "user name of a certificate with a password", vhost: wire.VhostFallback, login: uri, reason: admission.UserName, codes: badLogin},
		{name: "no password", vhost: wire.VhostFallback, login: login{clientID: string(d.id), user: text(string(d.id))}, codes: badLogin},
		{name: "nothing at all", vhost: wire.VhostFallback, login: login{clientID: string(d.id)}, codes: badLogin},
	})
}

func TestAnothersClientIDIsRefused(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	for _, other := range []device{w.other(wire.VhostDevices), w.other(wire.VhostFallback)} {
		stolen := byPassword(d)
		stolen.clientID = string(other.id)
		w.refuseAll(t, []refusedLogin{
			{name: "by certificate", vhost: wire.VhostDevices, cert: d.cert, login: byCertificate(other), codes: badClientID},
			{name: "by password", vhost: wire.VhostFallback, login: stolen, reason: admission.ClientID, device: d.id, codes: badLogin},
		})
	}
	w.refuseAll(t, []refusedLogin{
		{name: "none by certificate", vhost: wire.VhostDevices, cert: d.cert, login: login{}, codes: badClientID},
		{name: "none by password", vhost: wire.VhostFallback, login: login{user: text(string(d.id)), password: &d.password}, reason: admission.ClientID, device: d.id, codes: badLogin},
		{name: "300 bytes", vhost: wire.VhostFallback, login: login{clientID: string(make([]byte, 300)), user: text(string(d.id)), password: &d.password}, reason: admission.ClientID, device: d.id, codes: badLogin},
	})
}

func TestAnothersUserNameWithAPasswordIsRefused(t *testing.T) {
	w := watch(t)
	d, other := w.newDevice(t), w.other(wire.VhostDevices)
	as := func(user, password string) login {
		return login{clientID: string(d.id), user: &user, password: &password}
	}
	w.refuseAll(t, []refusedLogin{
		{name: "other's id, other's password", vhost: wire.VhostDevices, cert: d.cert, login: as(string(other.id), other.password), reason: admission.UserName, codes: badLogin},
		{name: "other's id, own password", vhost: wire.VhostDevices, cert: d.cert, login: as(string(other.id), d.password), reason: admission.UserName, codes: badLogin},
		{name: "other's id, password none", vhost: wire.VhostDevices, cert: d.cert, login: as(string(other.id), "none"), reason: admission.UserName, codes: badLogin},
		{name: "other's URI, other's password", vhost: wire.VhostDevices, cert: d.cert, login: as(other.user(), other.password), reason: admission.ClientID, device: other.id, codes: badLogin},
		{name: "other's URI, password none", vhost: wire.VhostDevices, cert: d.cert, login: as(other.user(), "none"), reason: admission.ClientID, device: other.id, codes: badLogin},
		{name: "own URI, password none", vhost: wire.VhostDevices, cert: d.cert, login: as(d.user(), "none"), reason: admission.PasswordUsed, device: d.id, codes: badLogin},
		{name: "other's id and password on the fallback", vhost: wire.VhostFallback, login: as(string(other.id), other.password), reason: admission.ClientID, device: other.id, codes: badLogin},
		{name: "muster's own user", vhost: wire.VhostDevices, cert: d.cert, login: as("muster", "none"), reason: admission.UserName, codes: badLogin},
		{name: "muster's own user on the fallback", vhost: wire.VhostFallback, login: as("muster", "none"), reason: admission.ClientID, device: "muster", codes: badLogin},
		{name: "guest", vhost: wire.VhostFallback, login: as("guest", "guest"), reason: admission.ClientID, device: "guest", codes: badLogin},
	})
}

func TestVhostInTheUserNameIsRefused(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	as := func(user string) login { return login{clientID: string(d.id), user: &user, password: &d.password} }
	w.refuseAll(t, []refusedLogin{
		{name: "devices on the fallback port", vhost: wire.VhostFallback, login: as("devices:" + string(d.id)), reason: admission.UserName, codes: badLogin},
		{name: "devices and the URI on the fallback port", vhost: wire.VhostFallback, login: as("devices:" + d.user()), reason: admission.UserName, codes: badLogin},
		{name: "fallback on the device port", vhost: wire.VhostDevices, login: as("fallback:" + string(d.id)), reason: admission.UserName, codes: badLogin},
		{name: "fallback on the device port with a certificate", vhost: wire.VhostDevices, cert: d.cert, login: as("fallback:" + string(d.id)), reason: admission.UserName, codes: badLogin},
		{name: "fallback on the fallback port", vhost: wire.VhostFallback, login: as("fallback:" + string(d.id)), reason: admission.UserName, codes: badLogin},
	})
}

func TestWrongPasswordIsRefused(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	as := func(password string) login {
		return login{clientID: string(d.id), user: text(string(d.id)), password: &password}
	}
	w.refuseAll(t, []refusedLogin{
		{name: "wrong", vhost: wire.VhostFallback, login: as("wrong"), reason: admission.PasswordWrong, device: d.id, codes: badLogin},
		{name: "another device's", vhost: wire.VhostFallback, login: as(w.other(wire.VhostFallback).password), reason: admission.PasswordWrong, device: d.id, codes: badLogin},
		{name: "its hash", vhost: wire.VhostFallback, login: as(string(d.record().Passwords[0])), reason: admission.PasswordWrong, device: d.id, codes: badLogin},
		{name: "with a NUL", vhost: wire.VhostFallback, login: as(d.password + "\x00"), reason: admission.PasswordWrong, device: d.id, codes: badLogin},
		{name: "4 kB", vhost: wire.VhostFallback, login: as(string(make([]byte, 4000))), reason: admission.Oversized, codes: badLogin},
	})
}

// TestGuessingDoesNotLockADeviceOut floods a device's name with wrong passwords; the device itself still gets in.
func TestGuessingDoesNotLockADeviceOut(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	t.Run("flood", func(t *testing.T) {
		for range 24 {
			t.Run("guess", func(t *testing.T) {
				t.Parallel()
				l := byPassword(d)
				l.password = text("guess")
				if _, code := w.try(t, v311, wire.VhostFallback, nil, l); code != badLogin311 {
					t.Errorf("code 0x%02X, want 0x%02X", code, badLogin311)
				}
			})
		}
	})
	w.enter(t, v5, wire.VhostFallback, d)
}

// TestCertificatesThatDoNotCount has what the TLS layer lets through and muster must refuse.
func TestCertificatesThatDoNotCount(t *testing.T) {
	w := watch(t)
	tests := []struct {
		name   string
		change func(*admission.Record)
		reason admission.Reason
	}{
		{"superseded", func(r *admission.Record) { r.Certificates[0].Serial = "abc" }, admission.CertificateUnknown},
		{"revoked", func(r *admission.Record) { r.Certificates[0] = admission.Certificate{} }, admission.CertificateUnknown},
		{"ended by muster's own record", func(r *admission.Record) { r.Certificates[0].NotAfter = time.Now() }, admission.CertificateExpired},
		{"of a disabled device", func(r *admission.Record) { r.Disabled = true }, admission.Disabled},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := w.newDevice(t)
			live := w.enter(t, v5, wire.VhostDevices, d)
			w.arrives(t, live, wire.VhostDevices, wire.UpTopic(d.id, wire.UpHello), "d."+string(d.id)+".up.hello")
			r := d.record()
			tt.change(&r)
			w.index.Put(r)
			w.refuseAll(t, []refusedLogin{{name: "login", vhost: wire.VhostDevices, cert: d.cert, login: byCertificate(d), reason: tt.reason, device: d.id, codes: badLogin}})

			// The session that was there before gets no new right.
			begin := time.Now()
			payload := rand.Text()
			if code, err := live.publish(wire.UpTopic(d.id, wire.UpState), payload); !ended(err) {
				t.Errorf("a live session could use another topic: 0x%02X, %v", code, err)
			}
			w.wantReason(t, admission.Topic, d.id, tt.reason, begin)
			w.nobodyHeard(t, payload)
		})
	}
	t.Run("of a device that nobody knows", func(t *testing.T) {
		d := w.newDevice(t)
		w.index.Delete(d.id)
		w.refuseAll(t, []refusedLogin{
			{name: "by certificate", vhost: wire.VhostDevices, cert: d.cert, login: byCertificate(d), reason: admission.UnknownDevice, device: d.id, codes: badLogin},
			{name: "by password", vhost: wire.VhostFallback, login: byPassword(d), reason: admission.UnknownDevice, device: d.id, codes: badLogin},
		})
	})
}

// TestBothSlotsAreGood is the overlap of a renewal: current and next get in.
func TestBothSlotsAreGood(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	next, cert, err := w.issue(d.id)
	if err != nil {
		t.Fatal(err)
	}
	r := d.record()
	r.Certificates[1] = admission.Certificate{Serial: next, NotAfter: time.Now().Add(time.Hour)}
	w.index.Put(r)
	w.enter(t, v5, wire.VhostDevices, d)
	old := d
	d.serial, d.cert = next, cert
	w.enter(t, v311, wire.VhostDevices, d)
	w.index.Put(d.record())
	w.refuseAll(t, []refusedLogin{{name: "the old one after promotion", vhost: wire.VhostDevices, cert: old.cert, login: byCertificate(old), reason: admission.CertificateUnknown, device: d.id, codes: badLogin}})
}

func TestRecoveryThatIsClosedIsRefused(t *testing.T) {
	w := watch(t)
	tests := []struct {
		name   string
		change func(*admission.Record)
		reason admission.Reason
	}{
		{"disabled", func(r *admission.Record) { r.Disabled = true }, admission.Disabled},
		{"recovery off", func(r *admission.Record) { r.RecoveryOff = true }, admission.RecoveryOff},
		{"no password any more", func(r *admission.Record) { r.Passwords = nil }, admission.NoPassword},
		{"password replaced", func(r *admission.Record) {
			r.Passwords = []fleet.Hash{fleet.HashOf(sha256.Sum256([]byte("new")))}
		}, admission.PasswordWrong},
	}
	for _, tt := range tests {
		d := w.newDevice(t)
		r := d.record()
		tt.change(&r)
		w.index.Put(r)
		w.refuseAll(t, []refusedLogin{{name: tt.name, vhost: wire.VhostFallback, login: byPassword(d), reason: tt.reason, device: d.id, codes: badLogin}})
	}
}

// TestARestartOfTheAuthBackendDisturbsNobody replaces it again and again while devices connect, use new topics and leave.
func TestARestartOfTheAuthBackendDisturbsNobody(t *testing.T) {
	w := alone(t)
	idle := w.newDevice(t)
	live := w.enter(t, v5, wire.VhostDevices, idle)
	done := make(chan struct{})
	var devices sync.WaitGroup
	for range 4 {
		devices.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				if code, err := w.visit(); err != nil || code != 0 {
					t.Errorf("connection %d was disturbed: 0x%02X, %v", n, code, err)
					return
				}
			}
		})
	}
	for range 20 {
		w.restartAuth(t)
		w.arrives(t, live, wire.VhostDevices, wire.UpTopic(idle.id, wire.UpHello), "d."+string(idle.id)+".up.hello")
	}
	close(done)
	devices.Wait()
}

// visit connects as a new device, publishes and leaves. It returns the first code that is not 0.
func (w *world) visit() (byte, error) {
	d, err := w.register()
	if err != nil {
		return 0, err
	}
	c, err := dial(w.port(wire.VhostDevices), w.trust, d.cert, v311)
	if err != nil {
		return 0, err
	}
	defer c.close()
	if code, err := c.connect(byCertificate(d)); err != nil || code != 0 {
		return code, err
	}
	return c.publish(wire.UpTopic(d.id, wire.UpState), "{}")
}
