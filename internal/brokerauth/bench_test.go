package brokerauth_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"muster/internal/admission"
	"muster/internal/brokerauth"
	"muster/internal/fleet"
)

// million returns an Index of a million devices and reports its size.
func million(b *testing.B) *brokerauth.Index {
	b.Helper()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	x := brokerauth.NewIndex()
	end := time.Now().Add(time.Hour)
	for i := range 1_000_000 {
		x.Put(admission.Record{
			Device:       fleet.DeviceID(fmt.Sprintf("device-%07d", i)),
			Certificates: [2]admission.Certificate{{Serial: fleet.Serial(fmt.Sprintf("1%039x", i)), NotAfter: end}},
			Passwords:    []fleet.Hash{hash(fmt.Sprint(i))},
		})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.Logf("%.0f bytes a device", float64(after.HeapAlloc-before.HeapAlloc)/1e6)
	return x
}

// BenchmarkMillion measures what the broker waits for besides HTTP, with a million devices in the index.
func BenchmarkMillion(b *testing.B) {
	x := million(b)
	question := func(i int) admission.Question {
		return admission.Question{
			Kind: admission.Topic, Vhost: "devices", User: fmt.Sprintf("urn:muster:device:device-%07d:1%039x", i, i), ClientID: fmt.Sprintf("device-%07d", i),
			Resource: "topic", Name: "amq.topic", Permission: "write", RoutingKey: fmt.Sprintf("d.device-%07d.up.hello", i),
		}
	}
	questions := make([]admission.Question, 4096)
	for i := range questions {
		questions[i] = question(i * 241)
	}
	b.Run("Decide", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			if d := x.Decide(questions[i%len(questions)], time.Now()); !d.Allow {
				b.Fatal(d)
			}
			i++
		}
	})
	b.Run("DecideWhileWriting", func(b *testing.B) {
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					x.Put(record(fleet.DeviceID(fmt.Sprintf("other-%d", i%1000)), "1"))
				}
			}
		}()
		i := 0
		for b.Loop() {
			if d := x.Decide(questions[i%len(questions)], time.Now()); !d.Allow {
				b.Fatal(d)
			}
			i++
		}
		close(stop)
		<-done
	})
	b.Run("Handler", func(b *testing.B) {
		s := server(b, brokerauth.Config{Index: x})
		bodies := make([]string, len(questions))
		for i := range bodies {
			q := questions[i]
			user := strings.ReplaceAll(q.User, ":", "%3A")
			bodies[i] = "username=" + user + "&vhost=devices&resource=topic&name=amq.topic&permission=write&tags=&routing_key=" + q.RoutingKey +
				"&variable_map.client_id=" + q.ClientID + "&variable_map.username=" + user + "&variable_map.vhost=devices"
		}
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			r := httptest.NewRequest(http.MethodPost, "/topic", strings.NewReader(bodies[i%len(bodies)]))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if w.Body.String() != "allow" {
				b.Fatal(w.Body)
			}
			i++
		}
	})
	b.Run("PasswordLogin", func(b *testing.B) {
		s := server(b, brokerauth.Config{Index: x, Limits: brokerauth.Limits{Logins: brokerauth.PerSecond(1 << 20), DeviceLogins: brokerauth.PerSecond(1 << 20)}})
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			n := i * 241 % 1_000_000
			r := httptest.NewRequest(http.MethodPost, "/user", strings.NewReader(fmt.Sprintf("username=device-%07d&vhost=fallback&client_id=device-%07d&password=%d", n, n, n)))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if w.Body.String() != "allow" {
				b.Fatal(w.Body)
			}
			i++
		}
	})
}
