package client_test

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"muster/api"
	"muster/internal/client"
)

// serve starts a server over TLS and a client that trusts it.
func serve(t *testing.T, h http.HandlerFunc) *client.Client {
	t.Helper()
	ts := httptest.NewTLSServer(h)
	t.Cleanup(ts.Close)
	c, err := client.New(client.Config{URL: ts.URL, Token: "mst_x", CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw})})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func problem(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"type":"t","title":"Title","status":%d,"code":%q,"detail":"what to do"}`, status, code)
}

func answer(w http.ResponseWriter, body string) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, body)
}

func TestARefusalIsAnError(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/devices/d1" || r.Header.Get("Authorization") != "Bearer mst_x" {
			t.Errorf("%s %v", r.URL.Path, r.Header)
		}
		problem(w, 404, "not_found")
	})
	_, err := client.Read[api.Device](c.GetDevice(t.Context(), "d1"))
	e, ok := errors.AsType[*client.Error](err)
	if !ok || e.Status != 404 || e.Code != "not_found" || err.Error() != "what to do" {
		t.Errorf("%v", err)
	}
}

func TestWhatDidNotComeFromMusterd(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"html":  func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>hello</html>") },
		"proxy": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "bad gateway", http.StatusBadGateway) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://evil.invalid/", http.StatusFound)
		},
		"other 4xx":  func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "{}", 404) },
		"bad status": func(w http.ResponseWriter, _ *http.Request) { problem(w, 404, "x"); _, _ = io.WriteString(w, "{}") },
	} {
		_, err := client.Read[api.Device](serve(t, h).GetDevice(t.Context(), "d1"))
		if _, ok := errors.AsType[*client.Unreachable](err); !ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) { answer(w, "{") })
	if _, err := client.Read[api.Device](c.GetDevice(t.Context(), "d1")); err == nil {
		t.Error("half an answer was taken")
	}
}

func TestOnlyWhatIsSafeIsRepeated(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		call   func(*client.Client) error
		tries  int32
	}{
		"get 503": {503, func(c *client.Client) error {
			_, err := client.Read[api.Device](c.GetDevice(t.Context(), "d1"))
			return err
		}, 2},
		"delete 503": {503, func(c *client.Client) error { return client.Done(c.DeleteToken(t.Context(), "x")) }, 2},
		"post 503": {503, func(c *client.Client) error {
			_, err := client.Read[api.Rollout](c.StartRollout(t.Context(), "r"))
			return err
		}, 1},
		"post 429": {429, func(c *client.Client) error {
			_, err := client.Read[api.Device](c.CreateDevice(t.Context(), api.NewDevice{ID: "d1", Product: "p"}))
			return err
		}, 2},
		"get 500": {500, func(c *client.Client) error {
			_, err := client.Read[api.Device](c.GetDevice(t.Context(), "d1"))
			return err
		}, 1},
	} {
		var n atomic.Int32
		var bodies []string
		cl := serve(t, func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			bodies = append(bodies, string(b))
			if n.Add(1) == 1 {
				w.Header().Set("Retry-After", "0")
				problem(w, c.status, "later")
				return
			}
			answer(w, "{}")
		})
		err := c.call(cl)
		if n.Load() != c.tries || (err == nil) != (c.tries == 2) {
			t.Errorf("%s: %d tries, %v", name, n.Load(), err)
		}
		if len(bodies) == 2 && bodies[0] != bodies[1] {
			t.Errorf("%s: another body the second time", name)
		}
	}
}

func TestItGivesUp(t *testing.T) {
	var n atomic.Int32
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		n.Add(1)
		w.Header().Set("Retry-After", "0")
		problem(w, 503, "unavailable")
	})
	_, err := client.Read[api.Device](c.GetDevice(t.Context(), "d1"))
	if e, ok := errors.AsType[*client.Error](err); !ok || e.Status != 503 || n.Load() != 4 {
		t.Errorf("after %d tries: %v", n.Load(), err)
	}
}

func TestOnlyTLSAndOnlyACA(t *testing.T) {
	for _, u := range []string{"", "http://h:1", "h:9443", "https://", "https://u:p@h", "https://h/path", "https://h?x=1", "ftp://h"} {
		if _, err := client.New(client.Config{URL: u}); err == nil {
			t.Errorf("%q was taken", u)
		}
	}
	if _, err := client.New(client.Config{URL: "https://h", CA: []byte("no PEM")}); err == nil {
		t.Error("a CA without a certificate was taken")
	}
	ts := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(ts.Close)
	c, err := client.New(client.Config{URL: ts.URL, Token: "mst_x"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read[api.Device](c.GetDevice(t.Context(), "d1")); err == nil || !strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("an unknown CA: %v", err)
	}
}

func TestUploadIsRefusedBeforeItIsSent(t *testing.T) {
	for status, want := range map[int]bool{201: true, 200: false} {
		c := serve(t, func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			if r.ContentLength != 5 || string(b) != "image" || r.Header.Get("Muster-Manifest") != "jws" {
				t.Errorf("%d %q %v", r.ContentLength, b, r.Header)
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, `{"version":"1.0.0"}`)
		})
		var sent int64
		rel, created, err := c.Upload(t.Context(), api.UploadReleaseParams{MusterManifest: "jws"}, strings.NewReader("image"), 5, func(n int64) { sent = n })
		if err != nil || created != want || rel.Version != "1.0.0" || sent != 5 {
			t.Errorf("%v %v %v %d", rel, created, err, sent)
		}
	}
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) { problem(w, 422, "signature_invalid") })
	var sent int64
	image := bytes.NewReader(make([]byte, 8<<20))
	_, _, err := c.Upload(t.Context(), api.UploadReleaseParams{MusterManifest: "jws"}, image, image.Size(), func(n int64) { sent = n })
	if e, ok := errors.AsType[*client.Error](err); !ok || e.Code != "signature_invalid" || sent > 0 {
		t.Errorf("%v after %d bytes", err, sent)
	}
}

func TestItems(t *testing.T) {
	pages := map[string][]int{"": {1, 2}, "a": {}, "b": {3}}
	next := map[string]string{"": "a", "a": "b"}
	var got []int
	for n, err := range client.Items(func(cursor string) ([]int, string, error) { return pages[cursor], next[cursor], nil }) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, n)
	}
	if fmt.Sprint(got) != "[1 2 3]" {
		t.Error(got)
	}
	n := 0
	for _, err := range client.Items(func(string) ([]int, string, error) { return nil, "", errors.New("no") }) {
		if n++; err == nil {
			t.Error("the error is lost")
		}
	}
	if n != 1 {
		t.Errorf("%d turns", n)
	}
}

func TestWhatIsNotSetIsNotSent(t *testing.T) {
	var query string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		query = r.URL.RawQuery
		answer(w, `{"items":[]}`)
	})
	online := false
	for want, p := range map[string]api.ListDevicesParams{
		"":                                 {},
		"label=a%3Db&label=c&online=false": {Label: []string{"a=b", "c"}, Online: &online},
		"cursor=x&limit=5":                 {Limit: 5, Cursor: "x"},
	} {
		if _, err := client.Read[api.DeviceList](c.ListDevices(t.Context(), &p)); err != nil || query != want {
			t.Errorf("%q, want %q: %v", query, want, err)
		}
	}
}
