package admission_test

import (
	"crypto/sha256"
	"strings"
	"testing"
	"time"

	"muster/internal/admission"
	"muster/internal/fleet"
	"muster/internal/wire"
)

var (
	now      = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	right    = fleet.HashOf(sha256.Sum256([]byte("right")))
	rotated  = fleet.HashOf(sha256.Sum256([]byte("rotated")))
	wrong    = fleet.HashOf(sha256.Sum256([]byte("wrong")))
	noneHash = fleet.HashOf(sha256.Sum256([]byte("none")))
	empty    = fleet.HashOf(sha256.Sum256(nil))
)

// dev1 holds certificates 1001 (current) and 1002 (next), and a password that is being rotated.
func dev1() *admission.Record {
	return &admission.Record{
		Device: "dev1",
		Certificates: [2]admission.Certificate{
			{Serial: "1001", NotAfter: now.Add(time.Hour)},
			{Serial: "1002", NotAfter: now.Add(48 * time.Hour)},
		},
		Passwords: []fleet.Hash{right, rotated},
	}
}

func with(change func(*admission.Record)) *admission.Record {
	r := dev1()
	change(r)
	return r
}

// byCert and byPassword are the login of dev1 through each door; the other questions change what they need.
func byCert(change ...func(*admission.Question)) admission.Question {
	return ask(admission.Question{Kind: admission.User, Vhost: "devices", User: "urn:muster:device:dev1:1001", ClientID: "dev1"}, change)
}

func byPassword(change ...func(*admission.Question)) admission.Question {
	return ask(admission.Question{Kind: admission.User, Vhost: "fallback", User: "dev1", ClientID: "dev1", HasPassword: true, Password: right}, change)
}

// inFallback is any later question of a fallback session: the broker sends no password with those.
func inFallback(change ...func(*admission.Question)) admission.Question {
	return ask(admission.Question{Kind: admission.Vhost, Vhost: "fallback", User: "dev1", ClientID: "dev1"}, change)
}

func ask(q admission.Question, change []func(*admission.Question)) admission.Question {
	for _, c := range change {
		c(&q)
	}
	return q
}

func user(s string) func(*admission.Question) {
	return func(q *admission.Question) { q.User = s }
}
func clientID(s string) func(*admission.Question) {
	return func(q *admission.Question) { q.ClientID = s }
}
func vhost(s string) func(*admission.Question) {
	return func(q *admission.Question) { q.Vhost = s }
}
func kind(k admission.Kind) func(*admission.Question) {
	return func(q *admission.Question) { q.Kind = k }
}
func password(h fleet.Hash) func(*admission.Question) {
	return func(q *admission.Question) { q.HasPassword, q.Password = true, h }
}
func noPassword(q *admission.Question) { q.HasPassword, q.Password = false, "" }

// TestLogin has every case of rabbitmq.md §4.2 that reaches the backend, and faults.md row 41.
func TestLogin(t *testing.T) {
	tests := []struct {
		name string
		q    admission.Question
		rec  *admission.Record
		want admission.Reason
	}{
		{"certificate", byCert(), dev1(), admission.Allowed},
		{"next certificate", byCert(user("urn:muster:device:dev1:1002")), dev1(), admission.Allowed},
		{"password", byPassword(), dev1(), admission.Allowed},
		{"password while it is rotated", byPassword(password(rotated)), dev1(), admission.Allowed},
		{"vhost by certificate", byCert(kind(admission.Vhost)), dev1(), admission.Allowed},
		{"vhost by password", inFallback(), dev1(), admission.Allowed},

		{"certificate with another's client id", byCert(clientID("dev2")), dev1(), admission.ClientID},
		{"certificate without client id", byCert(clientID("")), dev1(), admission.ClientID},
		{"client id of another case", byCert(clientID("DEV1")), dev1(), admission.ClientID},
		{"client id with a NUL", byCert(clientID("dev1\x00")), dev1(), admission.ClientID},
		{"client id of 300 bytes", byCert(clientID(strings.Repeat("d", 300))), dev1(), admission.ClientID},
		{"client id of invalid UTF-8", byCert(clientID("\xff\xfe")), dev1(), admission.ClientID},
		{"own certificate, another's user name and a password", byCert(user("dev2"), password(right)), dev1(), admission.UserName},
		{"own certificate, another's URI and a password", byCert(user("urn:muster:device:dev2:2001"), password(right)), dev1(), admission.ClientID},
		{"another's user name and client id and a password", byCert(user("urn:muster:device:dev2:2001"), clientID("dev2"), password(right)), dev1(), admission.PasswordUsed},
		{"own URI and its password", byCert(password(right)), dev1(), admission.PasswordUsed},
		{"own URI and the password none", byCert(password(noneHash)), dev1(), admission.PasswordUsed},
		{"own URI and an empty password", byCert(password(empty)), dev1(), admission.PasswordUsed},
		{"password on the certificate's port", byPassword(vhost("devices")), dev1(), admission.UserName},
		{"device id instead of the URI", byCert(user("dev1")), dev1(), admission.UserName},
		{"common name form", byCert(user("CN=dev1")), dev1(), admission.UserName},
		{"empty user", byCert(user("")), dev1(), admission.UserName},
		{"URI of another trade", byCert(user("urn:other:device:dev1:1001")), dev1(), admission.UserName},
		{"URI without serial", byCert(user("urn:muster:device:dev1")), dev1(), admission.UserName},
		{"URI with an empty serial", byCert(user("urn:muster:device:dev1:")), dev1(), admission.UserName},
		{"serial with a leading zero", byCert(user("urn:muster:device:dev1:01001")), dev1(), admission.UserName},
		{"serial in capitals", byCert(user("urn:muster:device:dev1:ABC")), dev1(), admission.UserName},
		{"two serials", byCert(user("urn:muster:device:dev1:1001:1002")), dev1(), admission.UserName},
		{"two URIs joined", byCert(user("urn:muster:device:dev1:1001,urn:muster:device:dev2:2001")), dev1(), admission.UserName},
		{"user with newline", byCert(user("urn:muster:device:dev1:1001\n")), dev1(), admission.UserName},

		{"certificate on the password's port", byCert(vhost("fallback")), dev1(), admission.UserName},
		{"certificate's URI with a password on the password's port", byCert(vhost("fallback"), password(right)), dev1(), admission.UserName},
		{"vhost in the user name", byPassword(user("devices:dev1")), dev1(), admission.UserName},
		{"no password", byPassword(noPassword), dev1(), admission.PasswordNeeded},
		{"wrong password", byPassword(password(wrong)), dev1(), admission.PasswordWrong},
		{"password none", byPassword(password(noneHash)), dev1(), admission.PasswordWrong},
		{"empty password", byPassword(password(empty)), dev1(), admission.PasswordWrong},
		{"password that nobody hashed", byPassword(password("")), dev1(), admission.PasswordWrong},
		{"empty hash in the record", byPassword(password("")), with(func(r *admission.Record) { r.Passwords = []fleet.Hash{""} }), admission.PasswordWrong},
		{"another's user name with own client id", byPassword(user("dev2")), dev1(), admission.ClientID},
		{"another's user name and client id with own record", byPassword(user("dev2"), clientID("dev2")), dev1(), admission.UnknownDevice},
		{"capitals in user name", byPassword(user("Dev1"), clientID("Dev1")), dev1(), admission.UserName},
		{"password with a later question", inFallback(password(right)), dev1(), admission.Malformed},

		{"unknown vhost", byCert(vhost("/")), dev1(), admission.UnknownVhost},
		{"no vhost, as AMQP and management ask", byPassword(vhost(""), clientID("")), dev1(), admission.UnknownVhost},
		{"vhost of another case", byCert(vhost("Devices")), dev1(), admission.UnknownVhost},
		{"AMQP's vhost question", inFallback(clientID("")), dev1(), admission.ClientID},
		{"unknown kind", byCert(kind("stream")), dev1(), admission.Malformed},
		{"no kind", byCert(kind("")), dev1(), admission.Malformed},

		{"unknown device", byCert(), nil, admission.UnknownDevice},
		{"unknown device by password", byPassword(), nil, admission.UnknownDevice},
		{"disabled", byCert(), with(func(r *admission.Record) { r.Disabled = true }), admission.Disabled},
		{"disabled by password", byPassword(), with(func(r *admission.Record) { r.Disabled = true }), admission.Disabled},
		{"disabled, later question", inFallback(), with(func(r *admission.Record) { r.Disabled = true }), admission.Disabled},
		{"superseded or revoked certificate", byCert(user("urn:muster:device:dev1:ff")), dev1(), admission.CertificateUnknown},
		{"no certificate yet", byCert(), with(func(r *admission.Record) { r.Certificates = [2]admission.Certificate{} }), admission.CertificateUnknown},
		{"expired certificate", byCert(), with(func(r *admission.Record) { r.Certificates[0].NotAfter = now }), admission.CertificateExpired},
		{"next one lives although current expired", byCert(user("urn:muster:device:dev1:1002")), with(func(r *admission.Record) { r.Certificates[0].NotAfter = now }), admission.Allowed},
		{"certificate while recovery is off", byCert(), with(func(r *admission.Record) { r.RecoveryOff = true }), admission.Allowed},
		{"recovery off", byPassword(), with(func(r *admission.Record) { r.RecoveryOff = true }), admission.RecoveryOff},
		{"recovery off, later question", inFallback(), with(func(r *admission.Record) { r.RecoveryOff = true }), admission.RecoveryOff},
		{"no password set", byPassword(), with(func(r *admission.Record) { r.Passwords = nil }), admission.NoPassword},
		{"no password set, later question", inFallback(), with(func(r *admission.Record) { r.Passwords = nil }), admission.NoPassword},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { checkReason(t, tt.q, tt.rec, tt.want) })
	}
}

func checkReason(t *testing.T, q admission.Question, rec *admission.Record, want admission.Reason) {
	t.Helper()
	got := admission.Decide(q, rec, now)
	if got.Reason != want || got.Allow != (want == admission.Allowed) {
		t.Errorf("%+v: got allow=%v, %s; want %s", q, got.Allow, got.Reason, want)
	}
}

func TestDecisionNamesWhoAsked(t *testing.T) {
	got := admission.Decide(byCert(user("urn:muster:device:dev1:ff")), dev1(), now)
	if got.Device != "dev1" || got.Serial != "ff" {
		t.Errorf("got %+v, want the claimed device and serial", got)
	}
	got = admission.Decide(byCert(user("nobody")), dev1(), now)
	if got.Device != "" || got.Serial != "" {
		t.Errorf("got %+v, want no identity from a user name of no form", got)
	}
}

func TestResources(t *testing.T) {
	const queue = "mqtt-subscription-dev1qos1"
	tests := []struct {
		resource, name, permission string
		want                       bool
	}{
		{"queue", queue, "configure", true},
		{"queue", queue, "write", true},
		{"queue", queue, "read", true},
		{"queue", "mqtt-subscription-dev1qos0", "configure", true},
		{"exchange", "amq.topic", "write", true},
		{"exchange", "amq.topic", "read", true},

		{"queue", queue, "delete", false},
		{"queue", queue, "", false},
		{"queue", "mqtt-subscription-dev1qos2", "read", false},
		{"queue", "mqtt-subscription-dev1", "read", false},
		{"queue", "mqtt-subscription-dev2qos1", "read", false},
		{"queue", "mqtt-subscription-dev11qos1", "read", false},
		{"queue", "mqtt-subscription-dev1qos1qos1", "read", false},
		{"queue", " " + queue, "read", false},
		{"queue", queue + "\x00", "read", false},
		{"queue", "mqtt-will-dev1", "configure", false},
		{"queue", "muster.up", "read", false},
		{"queue", "muster.dead", "write", false},
		{"queue", "telemetry", "read", false},
		{"queue", "", "configure", false},
		{"exchange", "amq.topic", "configure", false},
		{"exchange", "amq.default", "write", false},
		{"exchange", "", "write", false},
		{"exchange", "amq.rabbitmq.event", "read", false},
		{"exchange", "muster.dlx", "write", false},
		{"topic", "amq.topic", "write", false},
		{"stream", queue, "read", false},
		{"", "", "", false},
	}
	for _, tt := range tests {
		want := admission.ResourceDenied
		if tt.want {
			want = admission.Allowed
		}
		set := func(q *admission.Question) {
			q.Kind, q.Resource, q.Name, q.Permission = admission.Resource, tt.resource, tt.name, tt.permission
		}
		t.Run(tt.resource+" "+tt.name+" "+tt.permission, func(t *testing.T) {
			checkReason(t, byCert(set), dev1(), want)
			checkReason(t, inFallback(set), dev1(), want)
		})
	}
}

// TestTopics has every row of rabbitmq.md §4.4 and faults.md rows 24 to 28 and 41 that reaches the backend. Keys are as
// the broker sends them: / already . and + already *.
func TestTopics(t *testing.T) {
	long := "d.dev1.up.tm." + strings.Repeat("x", wire.MaxTopicLen-len("d.dev1.up.tm."))
	tests := []struct {
		name, permission, key string
		devices, fallback     admission.Reason
	}{
		{"hello", "write", "d.dev1.up.hello", admission.Allowed, admission.Allowed},
		{"cert", "write", "d.dev1.up.cert", admission.Allowed, admission.Allowed},
		{"state", "write", "d.dev1.up.state", admission.Allowed, admission.FallbackTopic},
		{"ota", "write", "d.dev1.up.ota", admission.Allowed, admission.FallbackTopic},
		{"telemetry", "write", "d.dev1.up.tm.temp.1", admission.Allowed, admission.FallbackTopic},
		{"below hello", "write", "d.dev1.up.hello.x", admission.Allowed, admission.FallbackTopic},
		{"longest", "write", long, admission.Allowed, admission.FallbackTopic},
		{"most levels", "write", "d.dev1.up.4.5.6.7.8.9.10", admission.Allowed, admission.FallbackTopic},
		{"whole branch", "read", "d.dev1.dn.#", admission.Allowed, admission.Allowed},
		{"one topic", "read", "d.dev1.dn.cert", admission.Allowed, admission.Allowed},
		{"below one topic", "read", "d.dev1.dn.cmd.#", admission.Allowed, admission.Allowed},

		{"write of another's", "write", "d.dev2.up.hello", admission.OtherDevice, admission.OtherDevice},
		{"write of a longer id", "write", "d.dev11.up.hello", admission.OtherDevice, admission.OtherDevice},
		{"write of a shorter id", "write", "d.dev.up.hello", admission.OtherDevice, admission.OtherDevice},
		{"read of another's", "read", "d.dev2.dn.#", admission.OtherDevice, admission.OtherDevice},
		{"read of a longer id", "read", "d.dev11.dn.#", admission.OtherDevice, admission.OtherDevice},
		{"write of no id", "write", "d..up.hello", admission.TopicForm, admission.TopicForm},
		{"write to own dn", "write", "d.dev1.dn.cmd", admission.TopicDenied, admission.TopicDenied},
		{"read of own up", "read", "d.dev1.up.#", admission.TopicDenied, admission.TopicDenied},
		{"read of own up, one topic", "read", "d.dev1.up.hello", admission.TopicDenied, admission.TopicDenied},
		{"write of the branch itself", "write", "d.dev1.up", admission.TopicDenied, admission.TopicDenied},
		{"read of the branch itself", "read", "d.dev1.dn", admission.TopicDenied, admission.TopicDenied},
		{"read of all that is own", "read", "d.dev1.#", admission.TopicDenied, admission.TopicDenied},
		{"another tree", "write", "x.dev1.up.hello", admission.TopicDenied, admission.TopicDenied},
		{"capital tree", "write", "D.dev1.up.hello", admission.TopicDenied, admission.TopicDenied},

		{"dots for slashes reach no other device", "write", "d.dev1.up.hello.d.dev2.up.hello", admission.Allowed, admission.FallbackTopic},
		{"leading slash", "write", ".d.dev1.up.hello", admission.TopicForm, admission.TopicForm},
		{"trailing slash", "write", "d.dev1.up.hello.", admission.TopicForm, admission.TopicForm},
		{"empty level", "write", "d.dev1.up..hello", admission.TopicForm, admission.TopicForm},
		{"empty level before the wildcard", "read", "d.dev1.dn..#", admission.TopicForm, admission.TopicForm},
		{"a slash that the broker left", "write", "d.dev1.up/hello", admission.TopicForm, admission.TopicForm},
		{"eleven levels", "write", "d.dev1.up.4.5.6.7.8.9.10.11", admission.TopicForm, admission.TopicForm},

		{"everything", "read", "#", admission.TopicWildcard, admission.TopicWildcard},
		{"everything of devices", "read", "d.#", admission.TopicDenied, admission.TopicDenied},
		{"everyone's dn", "read", "d.*.dn.#", admission.TopicWildcard, admission.TopicWildcard},
		{"plus under own dn", "read", "d.dev1.dn.*", admission.TopicWildcard, admission.TopicWildcard},
		{"plus untranslated", "read", "d.dev1.dn.+", admission.TopicWildcard, admission.TopicWildcard},
		{"hash in the middle", "read", "d.dev1.dn.#.x", admission.TopicWildcard, admission.TopicWildcard},
		{"two hashes", "read", "d.dev1.dn.#.#", admission.TopicWildcard, admission.TopicWildcard},
		{"hash as part of a word", "read", "d.dev1.dn.x#", admission.TopicWildcard, admission.TopicWildcard},
		{"hash for the id", "read", "d.#.dn.cmd", admission.TopicWildcard, admission.TopicWildcard},
		{"hash in a publish", "write", "d.dev1.up.#", admission.TopicWildcard, admission.TopicWildcard},
		{"star in a publish", "write", "d.dev1.up.*", admission.TopicWildcard, admission.TopicWildcard},
		{"star for the id in a publish", "write", "d.*.up.hello", admission.TopicWildcard, admission.TopicWildcard},
		{"system topics", "read", "$SYS.#", admission.TopicForm, admission.TopicForm},
		{"system topic in a publish", "write", "$SYS.x", admission.TopicForm, admission.TopicForm},
		{"shared subscription of own", "read", "$share.g.d.dev1.dn.#", admission.TopicForm, admission.TopicForm},
		{"dollar in own branch", "write", "d.dev1.up.$x", admission.TopicForm, admission.TopicForm},

		{"empty", "write", "", admission.TopicForm, admission.TopicForm},
		{"NUL", "write", "d.dev1.up.he\x00llo", admission.TopicForm, admission.TopicForm},
		{"newline", "write", "d.dev1.up.hello\n", admission.TopicForm, admission.TopicForm},
		{"space", "write", "d.dev1.up.a b", admission.TopicForm, admission.TopicForm},
		{"delete character", "write", "d.dev1.up.a\x7f", admission.TopicForm, admission.TopicForm},
		{"byte order mark", "write", "\ufeffd.dev1.up.hello", admission.TopicForm, admission.TopicForm},
		{"invalid UTF-8", "write", "d.dev1.up.\xff", admission.TopicForm, admission.TopicForm},
		{"beyond ASCII", "write", "d.dev1.up.é", admission.TopicForm, admission.TopicForm},
		{"129 bytes", "write", long + "x", admission.TopicLong, admission.TopicLong},
		{"300 bytes", "write", "d.dev1.up." + strings.Repeat("x", 290), admission.TopicLong, admission.TopicLong},
		{"300 bytes of filter", "read", "d.dev1.dn." + strings.Repeat("x", 290), admission.TopicLong, admission.TopicLong},

		{"configure", "configure", "d.dev1.up.hello", admission.ResourceDenied, admission.ResourceDenied},
		{"no permission", "", "d.dev1.up.hello", admission.ResourceDenied, admission.ResourceDenied},
	}
	for _, tt := range tests {
		set := func(q *admission.Question) {
			q.Kind, q.Resource, q.Name, q.Permission, q.RoutingKey = admission.Topic, "topic", "amq.topic", tt.permission, tt.key
		}
		t.Run(tt.name, func(t *testing.T) {
			checkReason(t, byCert(set), dev1(), tt.devices)
			checkReason(t, inFallback(set), dev1(), tt.fallback)
		})
	}
}

func TestTopicOfAnotherExchange(t *testing.T) {
	for _, name := range []string{"", "amq.default", "amq.direct", "muster.dlx"} {
		q := byCert(func(q *admission.Question) {
			q.Kind, q.Resource, q.Name, q.Permission, q.RoutingKey = admission.Topic, "topic", name, "write", "d.dev1.up.hello"
		})
		checkReason(t, q, dev1(), admission.ResourceDenied)
	}
}

// TestDoors checks that the device API's doors decide as the broker's do.
func TestDoors(t *testing.T) {
	if d := admission.AdmitCertificate(dev1(), "dev1", "1001", now); !d.Allow || d.Device != "dev1" || d.Serial != "1001" {
		t.Errorf("own certificate: %+v", d)
	}
	if d := admission.AdmitCertificate(dev1(), "dev2", "1001", now); d.Allow || d.Reason != admission.UnknownDevice {
		t.Errorf("another's name on a certificate: %+v", d)
	}
	if d := admission.AdmitCertificate(dev1(), "dev1", "", now); d.Allow || d.Reason != admission.CertificateUnknown {
		t.Errorf("no serial: %+v", d)
	}
	if d := admission.AdmitCertificate(&admission.Record{}, "", "", now); d.Allow {
		t.Errorf("empty record let nobody in: %+v", d)
	}
	if d := admission.AdmitPassword(dev1(), "dev1", right); !d.Allow {
		t.Errorf("own password: %+v", d)
	}
	if d := admission.AdmitPassword(dev1(), "dev1", wrong); d.Allow || d.Reason != admission.PasswordWrong {
		t.Errorf("wrong password: %+v", d)
	}
	if d := admission.AdmitPassword(nil, "dev1", right); d.Allow || d.Reason != admission.UnknownDevice {
		t.Errorf("unknown device: %+v", d)
	}
}

func TestEveryReasonHasWords(t *testing.T) {
	all := admission.Reasons()
	if len(all) != 23 {
		t.Errorf("%d reasons; metrics and documents name 23", len(all))
	}
	for _, r := range all {
		if r.Text() == "" || strings.Trim(string(r), "abcdefghijklmnopqrstuvwxyz-") != "" {
			t.Errorf("reason %q: text %q", r, r.Text())
		}
	}
	if admission.Reason("made-up").Text() != "" {
		t.Error("an unknown reason has a text")
	}
}
