package httpapi_test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/httpapi"
)

// slow hands out its bytes after a while.
type slow struct {
	io.Reader
	wait <-chan time.Time
}

func (s *slow) Read(p []byte) (int, error) {
	<-s.wait
	return s.Reader.Read(p[:min(len(p), 512)])
}

// An image may take longer than the server's limit for a request; nothing else may.
func TestASlowUploadIsNotCutOff(t *testing.T) {
	w := open(t)
	w.now = time.Now()
	jws, img := w.publish("1.0.0")
	w.now = w.now.Add(time.Minute)
	for _, h2 := range []bool{false, true} {
		ts := httptest.NewUnstartedServer(w.srv)
		ts.Config = httpapi.HTTPServer(w.srv, w.Config.Log)
		ts.Config.ReadTimeout, ts.Config.WriteTimeout = 300*time.Millisecond, 300*time.Millisecond
		ts.EnableHTTP2 = h2
		ts.StartTLS()
		t.Cleanup(ts.Close)
		send := func(path, kind string, body []byte) (*http.Response, error) {
			wait := make(chan time.Time)
			time.AfterFunc(time.Second, func() { close(wait) })
			r, err := http.NewRequestWithContext(t.Context(), "POST", ts.URL+api.Base+path, &slow{bytes.NewReader(body), wait})
			if err != nil {
				t.Fatal(err)
			}
			r.ContentLength = int64(len(body))
			r.Header.Set("Content-Type", kind)
			r.Header.Set("Muster-Manifest", jws)
			r.Header.Set("Authorization", "Bearer "+w.Tokens[access.Operator])
			return ts.Client().Do(r)
		}
		res, err := send("/firmware/releases", "application/octet-stream", img)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Errorf("h2 %v: a slow image: %v %v", h2, res, err)
		}
		if res != nil {
			_ = res.Body.Close()
		}
		res, err = send("/devices", "application/json", []byte(`{"id":"x","product":"lamp"}`))
		if err == nil {
			if res.StatusCode < 400 {
				t.Errorf("h2 %v: a slow body was waited for: %d", h2, res.StatusCode)
			}
			_ = res.Body.Close()
		}
	}
}
