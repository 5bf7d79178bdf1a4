package contract

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"muster/internal/broker"
	"muster/internal/broker/brokerconf"
	"muster/internal/wire"
)

// logins are all the credentials of a device, as another protocol would try them.
func (d device) logins() map[string][2]string {
	return map[string][2]string{
		"device id and password":          {string(d.id), d.password},
		"certificate's name and password": {d.user(), d.password},
		"certificate's name and none":     {d.user(), "none"},
		"certificate's name alone":        {d.user(), ""},
	}
}

func TestDeviceCredentialsAreRefusedByAMQP(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	withCert := w.trust.Clone()
	withCert.Certificates = []tls.Certificate{*d.cert}
	dial := func(vhost string, conf *tls.Config, auth amqp.Authentication) error {
		conn, err := amqp.DialConfig(fmt.Sprintf("amqps://127.0.0.1:%d/%s", w.broker.Conf.AMQPSPort, vhost), amqp.Config{
			SASL: []amqp.Authentication{auth}, Vhost: vhost, TLSClientConfig: conf.Clone(), Dial: amqp.DefaultDial(answerTime),
		})
		if err == nil {
			conn.Close()
		}
		return err
	}
	for _, vhost := range append(everywhere, "/") {
		for name, l := range d.logins() {
			t.Run(name+", "+vhost, func(t *testing.T) {
				t.Parallel()
				for _, conf := range []*tls.Config{w.trust, withCert} {
					if err := dial(vhost, conf, &amqp.PlainAuth{Username: l[0], Password: l[1]}); err == nil {
						t.Error("the broker let a device in over AMQP")
					}
				}
			})
		}
		t.Run("certificate by SASL EXTERNAL, "+vhost, func(t *testing.T) {
			t.Parallel()
			if err := dial(vhost, withCert, &amqp.ExternalAuth{}); err == nil {
				t.Error("the broker let a device in over AMQP")
			}
		})
	}
	t.Run("muster's own user is let in", func(t *testing.T) {
		if err := dial(wire.VhostDevices, w.trust, &amqp.PlainAuth{Username: brokerconf.UserMuster, Password: w.amqpPassword}); err != nil {
			t.Errorf("%v: the cases above prove nothing", err)
		}
	})
}

func TestDeviceCredentialsAreRefusedByManagement(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	conf := w.trust.Clone()
	conf.Certificates = []tls.Certificate{*d.cert}
	tr := &http.Transport{TLSClientConfig: conf}
	t.Cleanup(tr.CloseIdleConnections)
	client := &http.Client{Transport: tr, Timeout: answerTime}
	get := func(t *testing.T, path, user, password string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("https://127.0.0.1:%d%s", w.broker.Conf.ManagementPort, path), nil)
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			r.SetBasicAuth(user, password)
		}
		res, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	for name, l := range d.logins() {
		for _, path := range []string{"/api/whoami", "/api/overview", "/api/connections", "/api/queues/devices/muster.up"} {
			if code, body := get(t, path, l[0], l[1]); code != http.StatusUnauthorized {
				t.Errorf("%s by %s: %d %s", path, name, code, body)
			}
		}
	}
	if code, body := get(t, "/api/whoami", "", ""); code != http.StatusUnauthorized {
		t.Errorf("by the certificate alone: %d %s", code, body)
	}
	code, body := get(t, "/api/whoami", brokerconf.UserMonitor, w.amqpPassword)
	var who struct{ Name string }
	if err := json.Unmarshal([]byte(body), &who); code != http.StatusOK || err != nil || who.Name != brokerconf.UserMonitor {
		t.Errorf("muster's own user: %d %s: the cases above prove nothing", code, body)
	}
}

// management returns a client of the broker's management API with muster's own users.
func (w *world) management() *broker.Management {
	return broker.NewManagement(broker.ManagementConfig{
		URL: fmt.Sprintf("https://127.0.0.1:%d", w.broker.Conf.ManagementPort), TLS: w.trust.Clone(),
		MonitorUser: brokerconf.UserMonitor, MonitorPassword: w.amqpPassword, AdminUser: brokerconf.UserAdmin, AdminPassword: w.amqpPassword,
	})
}

// TestARevokedSessionIsClosed is the broker's part of a revocation: store, live session closed, reconnect refused.
func TestARevokedSessionIsClosed(t *testing.T) {
	w := watch(t)
	m := w.management()
	t.Cleanup(m.Close)
	d := w.newDevice(t)
	c := w.enter(t, v5, wire.VhostDevices, d)
	w.arrives(t, c, wire.VhostDevices, wire.UpTopic(d.id, wire.UpHello), "d."+string(d.id)+".up.hello")
	r := d.record()
	r.Certificates[0].Serial = ""
	begin := time.Now()
	w.index.Put(r)
	if err := m.CloseUser(t.Context(), d.user(), "certificate revoked"); err != nil {
		t.Fatal(err)
	}
	if err := c.ping(); !ended(err) {
		t.Errorf("the session goes on: %v", err)
	}
	t.Logf("revoked and closed within %v", time.Since(begin).Round(time.Millisecond))
	if _, code := w.try(t, v5, wire.VhostDevices, d.cert, byCertificate(d)); code != badLogin5 {
		t.Errorf("the revoked certificate comes back with code 0x%02X, want 0x%02X", code, badLogin5)
	}
	payload := rand.Text()
	if _, err := c.publish(wire.UpTopic(d.id, wire.UpHello), payload); !ended(err) {
		t.Errorf("the closed session could publish: %v", err)
	}
	w.nobodyHeard(t, payload)
}
