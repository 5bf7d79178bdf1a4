package contract

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"muster/internal/admission"
	"muster/internal/broker"
	"muster/internal/brokerauth"
	"muster/internal/ca"
	"muster/internal/pki"
	"muster/internal/wire"
)

// command runs a program that muster did not write and returns what it said and its exit code.
func command(t *testing.T, stdin string, name string, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), answerTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %q did not end: %s", name, args, &out)
	}
	if err != nil && cmd.ProcessState == nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// TestTLSRefusals presents certificates that the broker's TLS layer itself must refuse, with OpenSSL.
func TestTLSRefusals(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	foreign := foreignCertificate(t, d)
	tests := []struct {
		name  string
		cert  *tls.Certificate
		alert string
	}{
		{"of a foreign CA", foreign, "unknown ca"},
		{"that has expired", w.expired(t, d), "certificate expired"},
		{"that signed itself", selfSigned(t, d), "unknown ca"},
	}
	for _, tt := range tests {
		for _, vhost := range everywhere {
			for _, version := range []string{"-tls1_2", "-tls1_3"} {
				t.Run(tt.name+" "+vhost+" "+version, func(t *testing.T) {
					t.Parallel()
					cert, key := files(t, tt.cert)
					out, code := command(t, "", "openssl", "s_client", "-connect", fmt.Sprintf("127.0.0.1:%d", w.port(vhost)), version,
						"-CAfile", w.trustFile(), "-servername", "localhost", "-cert", cert, "-key", key, "-cert_chain", cert, "-verify_return_error", "-ign_eof")
					if code == 0 || !strings.Contains(strings.ToLower(out), "alert "+tt.alert) {
						t.Errorf("exit code %d, want the alert %q:\n%s", code, tt.alert, out)
					}
				})
			}
			for name, version := range versions {
				t.Run(tt.name+" "+vhost+" MQTT "+name, func(t *testing.T) {
					t.Parallel()
					l := byCertificate(d)
					if vhost == wire.VhostFallback {
						l = byPassword(d) // even the right password does not help
					}
					c, err := dial(w.port(vhost), w.trust, tt.cert, version)
					if err != nil {
						return
					}
					t.Cleanup(c.close)
					if code, err := c.connect(l); !ended(err) {
						t.Errorf("code 0x%02X, %v, want the end of the connection", code, err)
					}
				})
			}
		}
	}
	t.Run("a good one is let through", func(t *testing.T) {
		w.enter(t, v311, wire.VhostDevices, d)
	})
}

// foreignCertificate is a certificate of another fleet's CA with d's name, serial number form and all.
func foreignCertificate(t *testing.T, d device) *tls.Certificate {
	t.Helper()
	h, err := ca.Create(ca.CreateOptions{At: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.NewAuthority(h, pki.KeyPolicy{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, cert, err := issueBy(a, d.id)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// selfSigned is a certificate in d's name that its own key signed.
func selfSigned(t *testing.T, d device) *tls.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(d.cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	c.Issuer = c.Subject
	der, err := x509.CreateCertificate(rand.Reader, c, c, c.PublicKey, d.cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: d.cert.PrivateKey}
}

// refusedTopic matches muster's refusal of any topic to d.
func refusedTopic(d device, since time.Time) func(brokerauth.Refusal) bool {
	return func(r brokerauth.Refusal) bool {
		return r.Kind == admission.Topic && r.Device == d.id && !r.At.Before(since)
	}
}

// TestOldTLSIsRefused: plain TLS 1.0 and 1.1 are no way in either.
func TestOldTLSIsRefused(t *testing.T) {
	w := watch(t)
	for _, vhost := range everywhere {
		conf := w.trust.Clone()
		conf.MinVersion, conf.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		if c, err := dial(w.port(vhost), conf, nil, v311); err == nil {
			c.close()
			t.Errorf("vhost %s: TLS 1.1 was accepted", vhost)
		}
	}
}

// mosquitto returns the arguments that mosquitto's clients need to connect as d.
func (w *world) mosquitto(t *testing.T, vhost string, d device) []string {
	t.Helper()
	args := []string{"-V", "mqttv311", "-h", "localhost", "-p", fmt.Sprint(w.port(vhost)), "--cafile", w.trustFile(), "-i", string(d.id), "-q", "1"}
	if vhost == wire.VhostFallback {
		return append(args, "-u", string(d.id), "-P", d.password)
	}
	cert, key := files(t, d.cert)
	return append(args, "--cert", cert, "--key", key)
}

// TestMosquitto is MQTT 3.1.1 by a client that everyone has.
func TestMosquitto(t *testing.T) {
	w := watch(t)
	for _, vhost := range everywhere {
		t.Run("hello arrives, "+vhost, func(t *testing.T) {
			t.Parallel()
			d := w.newDevice(t)
			payload := rand.Text()
			out, code := command(t, "", "mosquitto_pub", append(w.mosquitto(t, vhost, d), "-t", wire.UpTopic(d.id, wire.UpHello), "-m", payload)...)
			if code != 0 {
				t.Fatalf("exit code %d: %s", code, out)
			}
			if _, ok := w.up.await(func(m broker.Message) bool { return string(m.Body) == payload && m.Vhost == vhost }); !ok {
				t.Error("the message did not arrive")
			}
		})
		for _, filter := range []string{"#", "d/+/dn/#", "$SYS/#", "d/OTHER/dn/#"} {
			t.Run("subscription to "+strings.ReplaceAll(filter, "/", ".")+" is refused, "+vhost, func(t *testing.T) {
				t.Parallel()
				d := w.newDevice(t)
				begin := time.Now()
				out, code := command(t, "", "mosquitto_sub", append(w.mosquitto(t, vhost, d), "-E", "-t", fill(filter, d, w.other(vhost)))...)
				if code == 0 && !strings.Contains(out, "denied") {
					t.Errorf("exit code %d: %q", code, out)
				}
				if _, ok := w.refusals.await(refusedTopic(d, begin)); !ok {
					t.Error("muster did not refuse it")
				}
			})
		}
		t.Run("another device's topic is refused, "+vhost, func(t *testing.T) {
			t.Parallel()
			d := w.newDevice(t)
			payload, begin := rand.Text(), time.Now()
			args := append(w.mosquitto(t, vhost, d), "-t", fill("d/OTHER/up/hello", d, w.other(vhost)), "-m", payload, "--quiet")
			ctx, cancel := context.WithCancel(t.Context())
			cmd := exec.CommandContext(ctx, "mosquitto_pub", args...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, ok := w.refusals.await(refusedTopic(d, begin)); !ok {
				t.Error("muster did not refuse it")
			}
			cancel() // it tries again for ever
			_ = cmd.Wait()
			w.nobodyHeard(t, payload)
		})
	}
	t.Run("no certificate is refused", func(t *testing.T) {
		t.Parallel()
		d := w.newDevice(t)
		out, code := command(t, "", "mosquitto_pub", "-V", "mqttv311", "-h", "localhost", "-p", fmt.Sprint(w.port(wire.VhostDevices)), "--cafile", w.trustFile(),
			"-i", string(d.id), "-t", wire.UpTopic(d.id, wire.UpHello), "-m", "x")
		if code != badLogin311 {
			t.Errorf("exit code %d, want %d: %s", code, badLogin311, out)
		}
	})
	t.Run("wrong password is refused", func(t *testing.T) {
		t.Parallel()
		d := w.newDevice(t)
		begin := time.Now()
		bad := d
		bad.password = "wrong"
		out, code := command(t, "", "mosquitto_pub", append(w.mosquitto(t, wire.VhostFallback, bad), "-t", wire.UpTopic(d.id, wire.UpHello), "-m", "x")...)
		if code != badLogin311 {
			t.Errorf("exit code %d, want %d: %s", code, badLogin311, out)
		}
		w.wantReason(t, admission.User, d.id, admission.PasswordWrong, begin)
	})
}
