package contract

import (
	"crypto/rand"
	"strings"
	"testing"
	"time"

	"muster/internal/admission"
	"muster/internal/broker"
	"muster/internal/brokerauth"
	"muster/internal/wire"
)

// arrives publishes on topic and waits until muster has it under key.
func (w *world) arrives(t *testing.T, c *client, vhost, topic, key string, properties ...byte) {
	t.Helper()
	payload := rand.Text()
	if code, err := c.publish(topic, payload, properties...); err != nil || code != 0 {
		t.Fatalf("publish %s: 0x%02X, %v", topic, code, err)
	}
	m, ok := w.up.await(func(m broker.Message) bool { return string(m.Body) == payload })
	if !ok || m.Key != key || m.Vhost != vhost {
		t.Fatalf("publish %s: got %v %+v, want it under %s in vhost %s", topic, ok, m, key, vhost)
	}
}

// inBoth runs f in a session of a fresh device for each version of MQTT and each of the vhosts.
func inBoth(t *testing.T, name string, vhosts []string, f func(t *testing.T, c *client, vhost string, d device)) {
	t.Helper()
	for v, version := range versions {
		for _, vhost := range vhosts {
			t.Run(name+", "+vhost+", MQTT "+v, func(t *testing.T) {
				t.Parallel()
				d := w.newDevice(t)
				f(t, w.enter(t, version, vhost, d), vhost, d)
			})
		}
	}
}

var (
	devicesOnly  = []string{wire.VhostDevices}
	fallbackOnly = []string{wire.VhostFallback}
	everywhere   = []string{wire.VhostDevices, wire.VhostFallback}
)

// fill puts the ids of the device and of the bystander into a topic.
func fill(topic string, d, other device) string {
	return strings.NewReplacer("ME", string(d.id), "OTHER", string(other.id)).Replace(topic)
}

func TestSubscriptionsThatAreRefused(t *testing.T) {
	w := watch(t)
	tests := []struct {
		name, filter string
		reason       admission.Reason
	}{
		{"everything", "#", admission.TopicWildcard},
		{"everything one level down", "+/#", admission.TopicWildcard},
		{"all devices", "d/#", admission.TopicDenied},
		{"any device's branch", "d/+/dn/#", admission.TopicWildcard},
		{"any device's branch in AMQP's words", "d/*/dn/#", admission.TopicWildcard},
		{"another device's branch", "d/OTHER/dn/#", admission.OtherDevice},
		{"another device's topic", "d/OTHER/dn/cert", admission.OtherDevice},
		{"another device's reports", "d/OTHER/up/#", admission.OtherDevice},
		{"another device's branch with dots", "d.OTHER.dn.#", admission.OtherDevice},
		{"own reports", "d/ME/up/#", admission.TopicDenied},
		{"all that is own", "d/ME/#", admission.TopicDenied},
		{"plus under own branch", "d/ME/dn/+", admission.TopicWildcard},
		{"star under own branch", "d/ME/dn/*", admission.TopicWildcard},
		{"hash in the middle", "d/ME/dn/#/x", admission.TopicWildcard},
		{"system topics", "$SYS/#", admission.TopicForm},
		{"shared subscription", "$share/g/d/ME/dn/#", admission.TopicForm},
		{"shared subscription of another device", "$share/g/d/OTHER/dn/#", admission.TopicForm},
		{"300 bytes", "d/ME/dn/" + strings.Repeat("x", 292), admission.TopicLong},
		{"empty level", "d/ME/dn//#", admission.TopicForm},
	}
	for _, tt := range tests {
		inBoth(t, tt.name, everywhere, func(t *testing.T, c *client, vhost string, d device) {
			begin := time.Now()
			code, err := c.subscribe(fill(tt.filter, d, w.other(vhost)))
			if err == nil && code < 0x80 || err != nil && !ended(err) {
				t.Errorf("0x%02X, %v, want a SUBACK that refuses or the end of the session", code, err)
			}
			w.wantReason(t, admission.Topic, d.id, tt.reason, begin)
		})
	}
}

func TestPublicationsThatAreRefused(t *testing.T) {
	w := watch(t)
	long := "d/ME/up/tm/" + strings.Repeat("x", 289)
	tests := []struct {
		name, topic string
		vhosts      []string
		reason      admission.Reason
	}{
		{"another device's report", "d/OTHER/up/hello", everywhere, admission.OtherDevice},
		{"another device's command", "d/OTHER/dn/cmd", everywhere, admission.OtherDevice},
		{"another device's report with dots", "d.OTHER.up.hello", everywhere, admission.OtherDevice},
		{"another device's command with dots", "d.OTHER.dn.cmd", everywhere, admission.OtherDevice},
		{"another device's command, dots and slashes mixed", "d/OTHER.dn/cmd", everywhere, admission.OtherDevice},
		{"own command", "d/ME/dn/cmd", everywhere, admission.TopicDenied},
		{"own branch itself", "d/ME/up", everywhere, admission.TopicDenied},
		{"another tree", "x/ME/up/hello", everywhere, admission.TopicDenied},
		{"hash", "d/ME/up/#", everywhere, admission.TopicWildcard},
		{"plus", "d/ME/up/+", everywhere, admission.TopicWildcard},
		{"star", "d/ME/up/*", everywhere, admission.TopicWildcard},
		{"star for the device", "d/*/dn/cmd", everywhere, admission.TopicWildcard},
		{"plus for the device", "d/+/dn/cmd", everywhere, admission.TopicWildcard},
		{"hash for everything", "#", everywhere, admission.TopicWildcard},
		{"system topic", "$SYS/broker/uptime", everywhere, admission.TopicForm},
		{"shared subscription's name", "$share/g/d/ME/up/hello", everywhere, admission.TopicForm},
		{"300 bytes", long, everywhere, admission.TopicLong},
		{"129 bytes", "d/ME/up/tm/" + strings.Repeat("x", 128), everywhere, admission.TopicLong},
		{"NUL", "d/ME/up/he\x00llo", everywhere, admission.TopicForm},
		{"invalid UTF-8", "d/ME/up/\xff\xfe", everywhere, admission.TopicForm},
		{"newline", "d/ME/up/hello\n", everywhere, admission.TopicForm},
		{"empty level", "d/ME/up//hello", everywhere, admission.TopicForm},
		{"leading slash", "/d/ME/up/hello", everywhere, admission.TopicForm},
		{"trailing slash", "d/ME/up/hello/", everywhere, admission.TopicForm},
		{"many levels", "d/ME/up/" + strings.Repeat("x/", 20) + "x", everywhere, admission.TopicForm},
		{"state while recovering", "d/ME/up/state", fallbackOnly, admission.FallbackTopic},
		{"update report while recovering", "d/ME/up/ota", fallbackOnly, admission.FallbackTopic},
		{"telemetry while recovering", "d/ME/up/tm/x", fallbackOnly, admission.FallbackTopic},
	}
	for _, tt := range tests {
		inBoth(t, tt.name, tt.vhosts, func(t *testing.T, c *client, vhost string, d device) {
			begin, payload := time.Now(), rand.Text()
			code, err := c.publish(fill(tt.topic, d, w.other(vhost)), payload)
			if !ended(err) {
				t.Errorf("0x%02X, %v, want the end of the session", code, err)
			}
			w.wantReason(t, admission.Topic, d.id, tt.reason, begin)
			w.nobodyHeard(t, payload)
		})
	}
}

// TestDotsAreOnlyAnotherSpelling pins what the broker leaves to decide: it has turned / into . before it asks, so a device
// may write dots in its own topics and reaches nothing more by it.
func TestDotsAreOnlyAnotherSpelling(t *testing.T) {
	w := watch(t)
	inBoth(t, "own hello with dots", everywhere, func(t *testing.T, c *client, vhost string, d device) {
		w.arrives(t, c, vhost, "d."+string(d.id)+".up.hello", "d."+string(d.id)+".up.hello")
	})
	inBoth(t, "another device's topic behind own", devicesOnly, func(t *testing.T, c *client, vhost string, d device) {
		payload := rand.Text()
		code, err := c.publish(fill("d/ME/up/x.d.OTHER.up.hello", d, w.other(vhost)), payload)
		if err != nil || c.version == v5 && code != 0x10 {
			t.Errorf("0x%02X, %v, want it accepted and routed to nobody", code, err)
		}
		w.nobodyHeard(t, payload)
	})
}

func TestTheLongestTopicArrives(t *testing.T) {
	watch(t)
	inBoth(t, "128 bytes", devicesOnly, func(t *testing.T, c *client, _ string, d device) {
		topic := "d/" + string(d.id) + "/up/tm/"
		topic += strings.Repeat("x", wire.MaxTopicLen-len(topic))
		if code, err := c.publish(topic, "1"); err != nil || code != 0 {
			t.Errorf("0x%02X, %v", code, err)
		}
	})
}

// TestWillToAForeignTopicIsNotPublished cuts connections off without a DISCONNECT, so that their wills are due.
func TestWillToAForeignTopicIsNotPublished(t *testing.T) {
	w := watch(t)
	tests := []struct {
		name, topic string
		reason      admission.Reason
	}{
		{"another device's report", "d/OTHER/up/hello", admission.OtherDevice},
		{"another device's command", "d/OTHER/dn/cmd", admission.OtherDevice},
		{"wildcard", "d/*/dn/cmd", admission.TopicWildcard},
		{"300 bytes", "d/ME/up/" + strings.Repeat("x", 292), admission.TopicLong},
	}
	for _, tt := range tests {
		for v, version := range versions {
			for _, vhost := range everywhere {
				t.Run(tt.name+", "+vhost+", MQTT "+v, func(t *testing.T) {
					t.Parallel()
					d := w.newDevice(t)
					begin := time.Now()
					l, cert := byCertificate(d), d.cert
					if vhost == wire.VhostFallback {
						l, cert = byPassword(d), nil
					}
					l.willTopic, l.willPayload = fill(tt.topic, d, w.other(vhost)), rand.Text()
					c, code := w.try(t, version, vhost, cert, l)
					if code != 0 { // refused at once is as good
						return
					}
					c.close()
					w.wantReason(t, admission.Topic, d.id, tt.reason, begin)
					w.nobodyHeard(t, l.willPayload)
				})
			}
		}
	}
	t.Run("own", func(t *testing.T) {
		d := w.newDevice(t)
		l := byCertificate(d)
		l.willTopic, l.willPayload = wire.UpTopic(d.id, wire.UpState), rand.Text()
		c, code := w.try(t, v5, wire.VhostDevices, d.cert, l)
		if code != 0 {
			t.Fatalf("0x%02X", code)
		}
		c.close()
		if _, ok := w.up.await(func(m broker.Message) bool { return string(m.Body) == l.willPayload }); !ok {
			t.Error("a device's own will did not arrive: the cases above prove nothing")
		}
	})
}

// Packet too large (MQTT 5 §4.13).
const packetTooLarge = disconnected(0x95)

func TestUserPropertiesThatWouldKillConsumersAreRefused(t *testing.T) {
	w := watch(t)
	for _, vhost := range everywhere {
		t.Run("128 KiB, "+vhost, func(t *testing.T) {
			d := w.newDevice(t)
			c := w.enter(t, v5, vhost, d)
			payload := rand.Text()
			code, err := c.publish(wire.UpTopic(d.id, wire.UpHello), payload, userProperties(128<<10)...)
			// The broker may close while we still write, which can lose its DISCONNECT.
			if !ended(err) || code != 0 {
				t.Errorf("0x%02X, %v, want %v or the end of the session", code, err, packetTooLarge)
			}
			w.nobodyHeard(t, payload)
		})
		t.Run("60 KiB, "+vhost, func(t *testing.T) {
			d := w.newDevice(t)
			c := w.enter(t, v5, vhost, d)
			w.arrives(t, c, vhost, wire.UpTopic(d.id, wire.UpHello), "d."+string(d.id)+".up.hello", userProperties(60<<10)...)
		})
	}
}

// TestNoQueueButOwnIsEverAskedFor looks at all refusals so far: a device cannot name a queue over MQTT, so the broker asks
// for queues by the client id alone.
func TestNoQueueButOwnIsEverAskedFor(t *testing.T) {
	w := watch(t)
	d := w.newDevice(t)
	c := w.enter(t, v5, wire.VhostDevices, d)
	if code, err := c.subscribe(wire.DownFilter(d.id)); err != nil || code > 1 {
		t.Fatalf("0x%02X, %v", code, err)
	}
	if r, ok := w.refusals.find(func(r brokerauth.Refusal) bool {
		return r.Kind == admission.Resource && r.Reason == admission.ResourceDenied
	}); ok {
		t.Errorf("the broker asked for a resource that devices do not have: %+v", r)
	}
}
