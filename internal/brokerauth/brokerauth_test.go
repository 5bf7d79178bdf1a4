package brokerauth_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"muster/internal/admission"
	"muster/internal/brokerauth"
	"muster/internal/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "correct-horse-battery-staple"

func hash(s string) fleet.Hash { return fleet.HashOf(sha256.Sum256([]byte(s))) }

func record(id fleet.DeviceID, serial fleet.Serial) admission.Record {
	return admission.Record{
		Device:       id,
		Certificates: [2]admission.Certificate{{Serial: serial, NotAfter: time.Now().Add(time.Hour)}},
		Passwords:    []fleet.Hash{hash(secret)},
	}
}

func index(records ...admission.Record) *brokerauth.Index {
	x := brokerauth.NewIndex()
	x.Load(records)
	return x
}

func server(t testing.TB, c brokerauth.Config) *brokerauth.Server {
	t.Helper()
	if c.Index == nil {
		c.Index = index(record("dev1", "1001"), record("dev2", "2001"))
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s, err := brokerauth.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ask posts body to path and returns status and answer.
func ask(s http.Handler, path, body string) (int, string) {
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// Questions as RabbitMQ 4.3.6 sent them, with our vhosts for its /.
const (
	certUser     = "username=urn%3Amuster%3Adevice%3Adev1%3A1001&vhost=devices&client_id=dev1"
	certVhost    = "username=urn%3Amuster%3Adevice%3Adev1%3A1001&vhost=devices&ip=127.0.0.1&tags=&client_id=dev1"
	certQueue    = "username=urn%3Amuster%3Adevice%3Adev1%3A1001&vhost=devices&resource=queue&name=mqtt-subscription-dev1qos1&permission=configure&tags=&client_id=dev1"
	certExchange = "username=urn%3Amuster%3Adevice%3Adev1%3A1001&vhost=devices&resource=exchange&name=amq.topic&permission=read&tags=&client_id=dev1"
	certRead     = "username=urn%3Amuster%3Adevice%3Adev1%3A1001&vhost=devices&resource=topic&name=amq.topic&permission=read&tags=&routing_key=d.dev1.dn.%23&variable_map.client_id=dev1&variable_map.username=urn%3Amuster%3Adevice%3Adev1%3A1001&variable_map.vhost=devices"
	certWrite    = "username=urn%3Amuster%3Adevice%3Adev1%3A1001&vhost=devices&resource=topic&name=amq.topic&permission=write&tags=&routing_key=d.dev1.up.hello&variable_map.client_id=dev1&variable_map.username=urn%3Amuster%3Adevice%3Adev1%3A1001&variable_map.vhost=devices"
	passUser     = "username=dev1&vhost=fallback&client_id=dev1&password=" + secret
	passVhost    = "username=dev1&vhost=fallback&ip=127.0.0.1&tags=&client_id=dev1"
	passWrite    = "username=dev1&vhost=fallback&resource=topic&name=amq.topic&permission=write&tags=&routing_key=d.dev1.up.cert&variable_map.client_id=dev1&variable_map.username=dev1&variable_map.vhost=fallback"
	amqpUser     = "username=dev1&password=" + secret
)

func TestAnswers(t *testing.T) {
	s := server(t, brokerauth.Config{})
	swap := func(body, old, new string) string {
		if !strings.Contains(body, old) {
			t.Fatalf("%q is not in %q", old, body)
		}
		return strings.Replace(body, old, new, 1)
	}
	tests := []struct{ name, path, body, want string }{
		{"login by certificate", "/user", certUser, "allow"},
		{"vhost by certificate", "/vhost", certVhost, "allow"},
		{"queue", "/resource", certQueue, "allow"},
		{"exchange", "/resource", certExchange, "allow"},
		{"subscribe", "/topic", certRead, "allow"},
		{"publish", "/topic", certWrite, "allow"},
		{"login by password", "/user", passUser, "allow"},
		{"vhost by password", "/vhost", passVhost, "allow"},
		{"publish while recovering", "/topic", passWrite, "allow"},
		{"another order of fields", "/user", "client_id=dev1&vhost=devices&username=urn:muster:device:dev1:1001", "allow"},
		{"internals of older versions", "/user", certUser + "&sockOrAddr=x&is_loopback=true", "allow"},

		{"login over AMQP or management", "/user", amqpUser, "deny unknown-vhost"},
		{"certificate login over AMQP", "/user", "username=urn%3Amuster%3Adevice%3Adev1%3A1001", "deny unknown-vhost"},
		{"AMQP's vhost question", "/vhost", "username=dev1&vhost=fallback&ip=127.0.0.1&tags=", "deny client-id"},
		{"wrong password", "/user", swap(passUser, secret, "x"), "deny password-wrong"},
		{"empty password", "/user", swap(passUser, secret, ""), "deny password-wrong"},
		{"password on the certificate's port", "/user", certUser + "&password=none", "deny password-used"},
		{"empty password on the certificate's port", "/user", certUser + "&password=", "deny password-used"},
		{"plus is a space in a password", "/user", swap(passUser, secret, "correct+horse"), "deny password-wrong"},
		{"another's topic", "/topic", swap(certWrite, "d.dev1", "d.dev2"), "deny other-device"},
		{"wildcard", "/topic", swap(certRead, "d.dev1.dn.%23", "%23"), "deny topic-wildcard"},
		{"unknown device", "/user", "username=dev9&vhost=fallback&client_id=dev9&password=x", "deny unknown-device"},

		{"no fields", "/user", "", "deny malformed"},
		{"user name twice", "/user", certUser + "&username=dev2", "deny malformed"},
		{"user name twice, equal", "/user", certUser + "&username=urn%3Amuster%3Adevice%3Adev1%3A1001", "deny malformed"},
		{"client id twice", "/user", certUser + "&client_id=dev1", "deny malformed"},
		{"client id by two names", "/topic", certWrite + "&client_id=dev1", "deny malformed"},
		{"unknown field", "/user", certUser + "&x=1", "deny malformed"},
		{"capital field", "/user", swap(certUser, "username", "Username"), "deny malformed"},
		{"escaped field name", "/user", swap(certUser, "username", "user%6Eame"), "deny malformed"},
		{"field of another question", "/user", certUser + "&permission=read", "deny malformed"},
		{"password with another question", "/vhost", passVhost + "&password=" + secret, "deny malformed"},
		{"field without value sign", "/user", certUser + "&password", "deny malformed"},
		{"empty field", "/user", certUser + "&&", "deny malformed"},
		{"semicolon", "/user", swap(certUser, "&vhost", ";vhost"), "deny unknown-vhost"},
		{"missing user", "/user", "vhost=devices&client_id=dev1", "deny malformed"},
		{"missing vhost", "/vhost", "username=dev1&client_id=dev1", "deny malformed"},
		{"missing permission", "/resource", swap(certQueue, "&permission=configure", ""), "deny malformed"},
		{"missing routing key", "/topic", swap(certWrite, "&routing_key=d.dev1.up.hello", ""), "deny malformed"},
		{"missing client id of a topic", "/topic", swap(certWrite, "&variable_map.client_id=dev1", ""), "deny malformed"},
		{"contradicting user", "/topic", swap(certWrite, "variable_map.username=urn%3Amuster%3Adevice%3Adev1", "variable_map.username=urn%3Amuster%3Adevice%3Adev2"), "deny malformed"},
		{"contradicting vhost", "/topic", swap(certWrite, "variable_map.vhost=devices", "variable_map.vhost=fallback"), "deny malformed"},
		{"tags", "/vhost", swap(certVhost, "tags=", "tags=administrator"), "deny malformed"},
		{"bad escape", "/user", swap(certUser, "%3A", "%3"), "deny malformed"},
		{"escape that is not hex", "/user", swap(certUser, "%3A", "%zz"), "deny malformed"},
		{"escape at the end", "/user", certUser + "%", "deny malformed"},
		{"JSON", "/user", `{"username":"dev1"}`, "deny malformed"},
		{"unknown permission", "/resource", swap(certQueue, "configure", "delete"), "deny resource"},
		{"unknown resource", "/resource", swap(certQueue, "resource=queue", "resource=stream"), "deny resource"},
		{"unknown vhost", "/user", swap(certUser, "devices", "%2F"), "deny unknown-vhost"},
		{"longest question", "/user", certUser + strings.Repeat("0", brokerauth.MaxBody-len(certUser)), "deny client-id"},
		{"too long", "/user", certUser + strings.Repeat("0", brokerauth.MaxBody-len(certUser)+1), "deny oversized"},
		{"much too long", "/user", strings.Repeat("username=", 1<<17), "deny oversized"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, got := ask(s, tt.path, tt.body)
			if code != http.StatusOK || got != tt.want {
				t.Errorf("%s %.200s: %d %q, want 200 %q", tt.path, tt.body, code, got, tt.want)
			}
		})
	}
}

func TestWhatIsNoQuestion(t *testing.T) {
	s := server(t, brokerauth.Config{})
	tests := []struct {
		name, method, target, contentType string
		want                              int
	}{
		{"GET with a password", "GET", "/user?" + passUser, "", http.StatusMethodNotAllowed},
		{"GET", "GET", "/user", "", http.StatusMethodNotAllowed},
		{"PUT", "PUT", "/user", "application/x-www-form-urlencoded", http.StatusMethodNotAllowed},
		{"unknown path", "POST", "/", "application/x-www-form-urlencoded", http.StatusNotFound},
		{"path with a slash", "POST", "/user/", "application/x-www-form-urlencoded", http.StatusNotFound},
		{"query", "POST", "/user?username=dev1", "application/x-www-form-urlencoded", http.StatusBadRequest},
		{"JSON", "POST", "/user", "application/json", http.StatusBadRequest},
		{"multipart", "POST", "/user", "multipart/form-data; boundary=x", http.StatusBadRequest},
		{"no content type", "POST", "/user", "", http.StatusBadRequest},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest(tt.method, tt.target, strings.NewReader(certUser))
			r.Header.Set("Content-Type", tt.contentType)
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if w.Code != tt.want || strings.Contains(w.Body.String(), "allow") || strings.Contains(w.Body.String(), secret) {
				t.Errorf("%d %q, want %d", w.Code, w.Body, tt.want)
			}
		})
	}
	r := httptest.NewRequest("POST", "/user", strings.NewReader(certUser))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	if w.Body.String() != "allow" || w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("with a charset: %q, %v", w.Body, w.Header())
	}
}

func TestIndexChangesCountFromTheNextQuestion(t *testing.T) {
	x := index(record("dev1", "1001"))
	s := server(t, brokerauth.Config{Index: x})
	expect := func(step, want string) {
		t.Helper()
		if _, got := ask(s, "/user", certUser); got != want {
			t.Errorf("%s: %q, want %q", step, got, want)
		}
	}
	expect("at first", "allow")
	r, ok := x.Get("dev1")
	if !ok || r.Certificates[0].Serial != "1001" {
		t.Fatalf("Get: %+v, %v", r, ok)
	}
	r.Disabled = true
	expect("a copy was changed", "allow")
	x.Put(r)
	expect("disabled", "deny disabled")
	x.Put(record("dev1", "1002"))
	expect("certificate replaced", "deny certificate-unknown")
	x.Put(record("dev1", "1001"))
	expect("put back", "allow")
	x.Delete("dev1")
	expect("deleted", "deny unknown-device")
	x.Load([]admission.Record{record("dev1", "1001"), record("dev3", "3")})
	expect("loaded", "allow")
	x.Load([]admission.Record{record("dev3", "3")})
	expect("loaded without it", "deny unknown-device")
	if _, ok := x.Get("dev1"); ok || x.Len() != 1 {
		t.Errorf("after Load: Get %v, Len %d", ok, x.Len())
	}
	x.Put(record("dev1", "1001"))
	if ok, why := x.Admit("dev1", "1001", time.Now()); !ok {
		t.Errorf("Admit: %s", why)
	}
	if ok, why := x.Admit("dev1", "1001", time.Now().Add(2*time.Hour)); ok || why != string(admission.CertificateExpired) {
		t.Errorf("Admit after the end: %v, %s", ok, why)
	}
	if ok, why := x.AdmitPassword("dev1", hash(secret)); !ok {
		t.Errorf("AdmitPassword: %s", why)
	}
	if ok, why := x.AdmitPassword("dev1", hash("x")); ok {
		t.Errorf("AdmitPassword, wrong: %s", why)
	}
}

func TestIndexKeepsItsOwnCopy(t *testing.T) {
	r := record("dev1", "1001")
	x := index(r)
	r.Passwords[0] = hash("attacker")
	if ok, why := x.AdmitPassword("dev1", hash("attacker")); ok {
		t.Errorf("Load: a password changed by the caller works: %s", why)
	}
	r = record("dev1", "1001")
	x.Put(r)
	r.Passwords[0] = hash("attacker")
	if ok, why := x.AdmitPassword("dev1", hash("attacker")); ok {
		t.Errorf("Put: a password changed by the caller works: %s", why)
	}
	got, _ := x.Get("dev1")
	got.Passwords[0] = hash("attacker")
	if ok, why := x.AdmitPassword("dev1", hash("attacker")); ok {
		t.Errorf("Get: a password changed by the caller works: %s", why)
	}
}

func TestIndexUnderManyWriters(t *testing.T) {
	x := index(record("dev1", "1001"))
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 500 {
				id := fleet.DeviceID(fmt.Sprintf("w%d-%d", w, i))
				x.Put(record(id, "1"))
				x.Put(record("dev1", "1001"))
				if i%100 == 0 {
					x.Load([]admission.Record{record("dev1", "1001")})
				}
				x.Delete(id)
			}
		})
	}
	for range 4 {
		wg.Go(func() {
			for range 2000 {
				if ok, why := x.Admit("dev1", "1001", time.Now()); !ok {
					t.Errorf("a device that was never away: %s", why)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestRefusalsAreReported(t *testing.T) {
	heard := make(chan brokerauth.Refusal, 10)
	s := server(t, brokerauth.Config{OnRefusal: func(r brokerauth.Refusal) { heard <- r }})
	url := serve(t, s)
	before := time.Now()
	post(t, url+"/vhost", strings.Replace(certVhost, "1001", "1009", 1), "deny certificate-unknown")
	post(t, url+"/vhost", certVhost, "allow")
	post(t, url+"/user", amqpUser, "deny unknown-vhost")
	select {
	case r := <-heard:
		if r.Kind != "vhost" || r.Vhost != "devices" || r.Device != "dev1" || r.Serial != "1009" || r.Peer != "127.0.0.1" ||
			r.Reason != admission.CertificateUnknown || r.Allow || r.At.Before(before) {
			t.Errorf("heard %+v", r)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the refusal was not reported")
	}
	select {
	case r := <-heard:
		if r.Kind != "user" || r.Vhost != "" || r.Reason != admission.UnknownVhost {
			t.Errorf("heard %+v, want the AMQP login", r)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the second refusal was not reported")
	}
}

func TestRefusedLoginsOfAWatchedDevice(t *testing.T) {
	x := index(record("dev1", "1001"))
	s := server(t, brokerauth.Config{Index: x})
	other := strings.Replace(certUser, "1001", "1002", 1)
	ask(s, "/user", other) // before anybody watches
	seen, stop := x.WatchLogins("dev1")
	second, stopSecond := x.WatchLogins("dev1")
	begin := time.Now()
	ask(s, "/user", certUser) // allowed
	ask(s, "/user", other)
	ask(s, "/user", strings.ReplaceAll(other, "dev1", "dev2"))                                  // somebody else
	ask(s, "/topic", strings.Replace(certWrite, "routing_key=d.dev1", "routing_key=d.dev2", 1)) // no login
	got := seen()
	if len(got) != 1 || got[0].Serial != "1002" || got[0].At.Before(begin) || !strings.HasPrefix(got[0].Why, string(admission.CertificateUnknown)+": ") {
		t.Errorf("%+v", got)
	}
	stop()
	x.Delete("dev1") // removed while somebody still watches
	ask(s, "/user", certUser)
	if n := len(seen()); n != 1 {
		t.Errorf("a stopped watch has %d", n)
	}
	if got := second(); len(got) != 2 || got[1].Serial != "1001" {
		t.Errorf("%+v", got)
	}
	for range 100 {
		ask(s, "/user", other)
	}
	if n := len(second()); n != 64 {
		t.Errorf("%d are kept", n)
	}
	stopSecond()
}

// TestASlowReporterDelaysNobody holds the reporter while more refusals come than can wait.
func TestTheLastRefusalIsKeptForKnownDevicesOnly(t *testing.T) {
	x := index(record("dev1", "1001"))
	s := server(t, brokerauth.Config{Index: x})
	if _, _, ok := x.LastRefusal("dev1"); ok {
		t.Error("a refusal before the first question")
	}
	begin := time.Now()
	ask(s, "/user", certUser)                                                                   // allowed
	ask(s, "/user", strings.ReplaceAll(certUser, "dev1", "dev9"))                               // nobody
	ask(s, "/user", strings.Replace(certUser, "1001", "1002", 1))                               // another certificate
	ask(s, "/topic", strings.Replace(certWrite, "routing_key=d.dev1", "routing_key=d.dev2", 1)) // the last
	why, at, ok := x.LastRefusal("dev1")
	if !ok || why != "other-device: it used a topic of another device" || at.Before(begin) || at.After(time.Now()) {
		t.Errorf("%q %v %v", why, at, ok)
	}
	if why, _, ok := x.LastRefusal("dev9"); ok {
		t.Errorf("a device that does not exist: %q", why)
	}
	x.Delete("dev1")
	x.Put(record("dev1", "1001"))
	if _, _, ok := x.LastRefusal("dev1"); ok {
		t.Error("it is kept for a device that was removed")
	}
	// However many are refused, what is kept is bounded.
	const fleetSize = 300_000
	for i := range fleetSize {
		id := fleet.DeviceID(fmt.Sprint("d", i))
		x.Put(record(id, "1001"))
		x.Note(id, "password-wrong", begin)
	}
	kept := 0
	for i := range fleetSize {
		if _, _, ok := x.LastRefusal(fleet.DeviceID(fmt.Sprint("d", i))); ok {
			kept++
		}
	}
	if kept > 256*1024 || kept < 200_000 {
		t.Errorf("%d refusals are kept", kept)
	}
}

func TestASlowReporterDelaysNobody(t *testing.T) {
	reg := prometheus.NewRegistry()
	release := make(chan struct{})
	var heard int
	s := server(t, brokerauth.Config{Registry: reg, OnRefusal: func(brokerauth.Refusal) { <-release; heard++ }})
	l := listen(t)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	bad := strings.Replace(certUser, "1001", "1009", 1)
	const n = 3000
	for range n {
		if _, got := ask(s, "/user", bad); got != "deny certificate-unknown" {
			t.Fatal(got)
		}
	}
	close(release)
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	dropped := metric(t, reg, "muster_broker_auth_refusals_unreported_total")
	if heard+int(dropped) != n || heard < 1024 || dropped == 0 {
		t.Errorf("%d heard and %v dropped of %d; want at least the backlog of 1024, and all accounted for", heard, dropped, n)
	}
}

func metric(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue() + f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func TestAnswersAreCounted(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := server(t, brokerauth.Config{Registry: reg})
	ask(s, "/user", certUser)
	ask(s, "/user", certUser)
	ask(s, "/topic", strings.Replace(certWrite, "d.dev1", "d.dev2", 1))
	var got []string
	want := map[string]float64{"user allowed": 2, "topic other-device": 1}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "muster_broker_auth_answers_total" && m.GetCounter().GetValue() > 0 {
				key := m.GetLabel()[0].GetValue() + " " + m.GetLabel()[1].GetValue()
				got = append(got, key)
				if m.GetCounter().GetValue() != want[key] {
					t.Errorf("%s: %v, want %v", key, m.GetCounter().GetValue(), want[key])
				}
			}
		}
	}
	if len(got) != len(want) {
		t.Errorf("counted %q, want %v", got, want)
	}
	if n := metric(t, reg, "muster_broker_auth_devices"); n != 2 {
		t.Errorf("devices gauge: %v, want 2", n)
	}
	if _, err := brokerauth.New(brokerauth.Config{Index: brokerauth.NewIndex(), Registry: reg}); err == nil {
		t.Error("a second server on the same registry was accepted")
	}
}

func TestFallbackLoginsAreLimited(t *testing.T) {
	var heard int
	reported := make(chan struct{}, 100)
	s := server(t, brokerauth.Config{
		Limits:    brokerauth.Limits{DeviceLogins: brokerauth.PerMinute(3), DeviceFailures: brokerauth.PerMinute(2)},
		OnRefusal: func(brokerauth.Refusal) { reported <- struct{}{} },
	})
	l := listen(t)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	wrong := strings.Replace(passUser, secret, "guess", 1)
	count := map[string]int{}
	for range 50 {
		_, got := ask(s, "/user", wrong)
		count[got]++
	}
	if count["deny password-wrong"] != 2 || count["deny rate"] != 48 {
		t.Errorf("50 wrong passwords: %v, want 2 refused as wrong and the rest by rate", count)
	}
	for i := range 3 {
		if _, got := ask(s, "/user", passUser); got != "allow" {
			t.Errorf("right password %d after the flood of wrong ones: %q", i, got)
		}
	}
	if _, got := ask(s, "/user", passUser); got != "deny rate" {
		t.Errorf("fourth right password within a minute: %q, want deny rate", got)
	}
	if _, got := ask(s, "/vhost", passVhost); got != "allow" {
		t.Errorf("later questions of a session that is in: %q", got)
	}
	if _, got := ask(s, "/user", strings.ReplaceAll(passUser, "dev1", "dev2")); got != "allow" {
		t.Errorf("another device: %q", got)
	}
	if _, got := ask(s, "/user", certUser); got != "allow" {
		t.Errorf("the same device by certificate: %q", got)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	heard = len(reported)
	if heard != 3 {
		t.Errorf("%d refusals reported, want 3: two wrong passwords and the right one over its budget", heard)
	}
}

func TestNothingSecretIsLogged(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	s := server(t, brokerauth.Config{Log: slog.New(slog.NewTextHandler(&lockedWriter{mu: &mu, w: &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	url := serve(t, s)
	post(t, url+"/user", passUser, "allow")
	post(t, url+"/user", passUser+"x", "deny password-wrong")
	post(t, url+"/user", passUser+"&zz="+secret, "deny malformed")
	post(t, url+"/user", passUser+"&"+"password="+secret, "deny malformed")
	mu.Lock()
	defer mu.Unlock()
	if strings.Contains(log.String(), secret) {
		t.Errorf("the log holds a password: %s", &log)
	}
	if strings.Count(log.String(), "was not one that RabbitMQ") != 1 || !strings.Contains(log.String(), "zz") {
		t.Errorf("want one complaint that names the field: %s", &log)
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := brokerauth.Listen(t.Context(), brokerauth.ListenConfig{Address: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// serve runs s on a loopback port until the test ends and returns its URL.
func serve(t testing.TB, s *brokerauth.Server) string {
	t.Helper()
	l := listen(t)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

func post(t *testing.T, target, body, want string) {
	t.Helper()
	res, err := http.Post(target, "application/x-www-form-urlencoded", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK || string(got) != want {
		t.Errorf("%s: %d %q, %v; want 200 %q", target, res.StatusCode, got, err, want)
	}
}

// FuzzAnswer sends any body to any question and compares with a second reading of the form by net/url.
func FuzzAnswer(f *testing.F) {
	for i, b := range []string{certUser, certVhost, certQueue, certExchange, certRead, certWrite, passUser, passVhost, passWrite, amqpUser, "%", "a=b", "username=%zz"} {
		f.Add(i%4, b)
	}
	x := index(record("dev1", "1001"))
	s := server(f, brokerauth.Config{Index: x, Limits: brokerauth.Limits{DeviceLogins: brokerauth.PerSecond(1 << 20), Logins: brokerauth.PerSecond(1 << 20)}})
	paths := []string{"/user", "/vhost", "/resource", "/topic"}
	f.Fuzz(func(t *testing.T, n int, body string) {
		path := paths[uint(n)%4]
		code, got := ask(s, path, body)
		if code != http.StatusOK || got != "allow" && !strings.HasPrefix(got, "deny ") {
			t.Fatalf("%s %q: %d %q", path, body, code, got)
		}
		if got != "allow" {
			return
		}
		form, err := url.ParseQuery(body)
		if err != nil {
			t.Fatalf("allowed what net/url cannot read: %v", err)
		}
		for k, v := range form {
			if len(v) != 1 {
				t.Errorf("allowed with field %q %d times", k, len(v))
			}
		}
		client := form.Get("client_id") + form.Get("variable_map.client_id")
		if user := form.Get("username"); client != "dev1" || user != "dev1" && user != "urn:muster:device:dev1:1001" {
			t.Errorf("allowed %q: user %q, client id %q", body, user, client)
		}
		if p := form.Get("password"); p != "" && p != secret {
			t.Errorf("allowed with the password %q", p)
		}
	})
}

func TestOnlyKnownAndEnabledDevicesAreHeard(t *testing.T) {
	x := brokerauth.NewIndex()
	x.Put(admission.Record{Device: "d1"})
	x.Put(admission.Record{Device: "d2", Disabled: true})
	for id, want := range map[fleet.DeviceID]bool{"d1": true, "d2": false, "d3": false} {
		if ok, why := x.Heard(id); ok != want || ok != (why == "") {
			t.Errorf("%s: %v %q", id, ok, why)
		}
	}
}
