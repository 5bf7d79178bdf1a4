package admission_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// pieces are what near misses are made of.
var pieces = []string{
	"d", "dev1", "dev2", "dev", "dev11", "up", "dn", "tm", "hello", "cert", "ota", "x", ".", ".", ".", "#", "*", "+", "/", "$share", "$SYS",
	"urn:muster:device:", ":", "1001", "1002", "2001", "0", "mqtt-subscription-", "qos0", "qos1", "amq.topic", "devices", "fallback", "\x00", "é", " ",
}

// nearMiss draws one of the likely values most of the time, else something built from pieces, else anything.
func nearMiss(likely ...string) *rapid.Generator[string] {
	built := rapid.Map(rapid.SliceOfN(rapid.SampledFrom(pieces), 0, 9), func(p []string) string { return strings.Join(p, "") })
	return rapid.Custom(func(t *rapid.T) string {
		switch n := rapid.IntRange(0, 19).Draw(t, "n"); {
		case n < 18:
			return rapid.SampledFrom(likely).Draw(t, "likely")
		case n == 18:
			return built.Draw(t, "built")
		}
		return rapid.String().Draw(t, "any")
	})
}

// key draws a routing key of one of three devices.
var key = rapid.Custom(func(t *rapid.T) string {
	return fmt.Sprintf("d.%s.%s.%s",
		rapid.SampledFrom([]string{"dev1", "dev1", "dev1", "dev2", "dev11"}).Draw(t, "id"),
		rapid.SampledFrom([]string{"up", "dn"}).Draw(t, "branch"),
		nearMiss("hello", "cert", "x.y", "#", "tm.1", "cmd.#", "1.2.3.4.5.6.7", "1.2.3.4.5.6.7.8").Draw(t, "words"))
})

// drawQuestion draws a login by certificate or by password, and then what it asks for; each part may be wrong.
func drawQuestion(t *rapid.T) admission.Question {
	q := admission.Question{
		Kind:       rapid.SampledFrom([]admission.Kind{"user", "vhost", "resource", "topic", "topic", "topic", ""}).Draw(t, "kind"),
		Vhost:      nearMiss("devices").Draw(t, "vhost"),
		User:       nearMiss("urn:muster:device:dev1:1001", "urn:muster:device:dev1:1002", "urn:muster:device:dev2:2001").Draw(t, "user"),
		ClientID:   nearMiss("dev1", "dev1", "dev1", "dev2").Draw(t, "client id"),
		Resource:   nearMiss("topic").Draw(t, "resource"),
		Name:       nearMiss("amq.topic").Draw(t, "name"),
		Permission: nearMiss("write", "read").Draw(t, "permission"),
		RoutingKey: rapid.OneOf(key, key, key, nearMiss("d.dev1.up.hello", "d.dev1.dn.#")).Draw(t, "routing key"),
	}
	if rapid.Bool().Draw(t, "by password") {
		q.Vhost = nearMiss("fallback").Draw(t, "vhost")
		q.User = nearMiss("dev1", "dev1", "dev2").Draw(t, "user")
		q.HasPassword = q.Kind == admission.User
	}
	if rapid.IntRange(0, 9).Draw(t, "odd password") == 0 {
		q.HasPassword = !q.HasPassword
	}
	if q.HasPassword {
		q.Password = rapid.SampledFrom([]fleet.Hash{right, right, wrong, "", noneHash}).Draw(t, "password")
	}
	if q.Kind == admission.Resource {
		q.Resource = nearMiss("queue", "queue", "exchange").Draw(t, "resource")
		q.Name = nearMiss("mqtt-subscription-dev1qos1", "mqtt-subscription-dev2qos0", "amq.topic").Draw(t, "name")
		q.Permission = nearMiss("write", "read", "configure").Draw(t, "permission")
	}
	return q
}

var (
	ownUser  = regexp.MustCompile(`^urn:muster:device:dev1:(1001|1002)$`)
	ownQueue = regexp.MustCompile(`^mqtt-subscription-dev1qos[01]$`)
	ownUp    = regexp.MustCompile(`^d\.dev1\.up(\.[!-\-0-~]+){1,7}$`)
	ownDown  = regexp.MustCompile(`^d\.dev1\.dn((\.[!-\-0-~]+){1,7}(\.#)?|\.#)$`)
)

// allowedToDev1 says the rules of DESIGN §5 a second time, in another form. It returns why q must not be allowed while
// the record is dev1's, "" if it must be.
func allowedToDev1(q admission.Question) string {
	switch {
	case q.ClientID != "dev1":
		return "client id"
	case q.Vhost == "devices" && (!ownUser.MatchString(q.User) || q.HasPassword):
		return "a login that is not the certificate's"
	case q.Vhost == "fallback" && (q.User != "dev1" || q.HasPassword != (q.Kind == "user")):
		return "a login that is not the password's"
	case q.Vhost == "fallback" && q.Kind == "user" && q.Password != right:
		return "wrong password"
	case q.Vhost != "devices" && q.Vhost != "fallback":
		return "vhost"
	}
	switch q.Kind {
	case "user", "vhost":
		return ""
	case "resource":
		return resourceOfDev1(q)
	case "topic":
		return topicOfDev1(q)
	}
	return "kind"
}

func resourceOfDev1(q admission.Question) string {
	use := q.Permission == "write" || q.Permission == "read"
	switch {
	case q.Resource == "queue" && ownQueue.MatchString(q.Name) && (use || q.Permission == "configure"):
		return ""
	case q.Resource == "exchange" && q.Name == "amq.topic" && use:
		return ""
	}
	return "resource"
}

func topicOfDev1(q admission.Question) string {
	body, wild := strings.CutSuffix(q.RoutingKey, ".#")
	switch {
	case q.Resource != "topic" || q.Name != "amq.topic" || len(q.RoutingKey) > 128 || strings.ContainsAny(body, "#*+$/"):
		return "topic form"
	case q.Permission == "write" && (!ownUp.MatchString(q.RoutingKey) || wild):
		return "publish"
	case q.Permission == "write" && q.Vhost == "fallback" && q.RoutingKey != "d.dev1.up.hello" && q.RoutingKey != "d.dev1.up.cert":
		return "publish while recovering"
	case q.Permission == "read" && !ownDown.MatchString(q.RoutingKey):
		return "subscribe"
	case q.Permission != "write" && q.Permission != "read":
		return "permission"
	}
	return ""
}

func TestNothingIsEverAllowedForAnotherDevice(t *testing.T) {
	rec := &admission.Record{
		Device:       "dev1",
		Certificates: [2]admission.Certificate{{Serial: "1001", NotAfter: now.Add(time.Hour)}, {Serial: "1002", NotAfter: now.Add(time.Hour)}},
		Passwords:    []fleet.Hash{right},
	}
	allowed, denied := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		q := drawQuestion(t)
		d := admission.Decide(q, rec, now)
		if d.Allow != (d.Reason == admission.Allowed) || d.Reason.Text() == "" {
			t.Fatalf("%+v: decision %+v is not coherent", q, d)
		}
		if why := allowedToDev1(q); d.Allow != (why == "") {
			t.Fatalf("%+v: got allow=%v (%s), the rules said again: %q", q, d.Allow, d.Reason, why)
		}
		if !d.Allow {
			denied++
			return
		}
		allowed++
		if d.Device != "dev1" {
			t.Fatalf("%+v: allowed to %q by the record of dev1", q, d.Device)
		}
		if off := admission.Decide(q, &admission.Record{Device: "dev1", Disabled: true, Certificates: rec.Certificates, Passwords: rec.Passwords}, now); off.Allow {
			t.Fatalf("%+v: allowed to a disabled device", q)
		}
		if none := admission.Decide(q, nil, now); none.Allow {
			t.Fatalf("%+v: allowed without a record", q)
		}
	})
	if allowed < 5 || denied < 5 {
		t.Errorf("%d allowed, %d denied: the generator tests too little", allowed, denied)
	}
}

func FuzzDecide(f *testing.F) {
	f.Add("topic", "devices", "urn:muster:device:dev1:1001", "dev1", "topic", "amq.topic", "write", "d.dev1.up.hello", false)
	f.Add("topic", "devices", "urn:muster:device:dev1:1001", "dev1", "topic", "amq.topic", "read", "d.dev1.dn.#", false)
	f.Add("topic", "fallback", "dev1", "dev1", "topic", "amq.topic", "write", "d.dev1.up.cert", false)
	f.Add("resource", "devices", "urn:muster:device:dev1:1002", "dev1", "queue", "mqtt-subscription-dev1qos1", "configure", "", false)
	f.Add("user", "fallback", "dev1", "dev1", "", "", "", "", true)
	f.Add("user", "devices", "devices:dev1", "dev2", "", "", "", "", true)
	rec := &admission.Record{
		Device:       "dev1",
		Certificates: [2]admission.Certificate{{Serial: "1001", NotAfter: now.Add(time.Hour)}, {Serial: "1002", NotAfter: now.Add(time.Hour)}},
		Passwords:    []fleet.Hash{right},
	}
	f.Fuzz(func(t *testing.T, kind, vhost, user, client, resource, name, permission, key string, withPassword bool) {
		q := admission.Question{
			Kind: admission.Kind(kind), Vhost: vhost, User: user, ClientID: client,
			Resource: resource, Name: name, Permission: permission, RoutingKey: key, HasPassword: withPassword,
		}
		if withPassword {
			q.Password = right
		}
		d := admission.Decide(q, rec, now)
		if why := allowedToDev1(q); d.Allow != (why == "") {
			t.Errorf("%+v: got allow=%v (%s), the rules said again: %q", q, d.Allow, d.Reason, why)
		}
	})
}

func BenchmarkDecide(b *testing.B) {
	q := admission.Question{
		Kind: admission.Topic, Vhost: "devices", User: "urn:muster:device:dev1:1001", ClientID: "dev1",
		Resource: "topic", Name: "amq.topic", Permission: "write", RoutingKey: "d.dev1.up.hello",
	}
	rec := dev1()
	b.ReportAllocs()
	for b.Loop() {
		if d := admission.Decide(q, rec, now); !d.Allow {
			b.Fatal(d)
		}
	}
}
