package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/go-json-experiment/json"

	"muster/api"
	"muster/internal/access"
	"muster/internal/httpapi"
	"muster/internal/store/bolt"
	"muster/test/apirig"
)

var day = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// world is the API over a real store, with its own time.
type world struct {
	*apirig.Rig
	t      testing.TB
	srv    *httpapi.Server
	router routers.Router
	now    time.Time
}

func open(t testing.TB, change ...func(*httpapi.Config)) *world {
	t.Helper()
	w := &world{Rig: apirig.New(t), t: t, now: day}
	var err error
	for _, f := range change {
		f(&w.Config)
	}
	if w.srv, err = httpapi.New(w.Config); err != nil {
		t.Fatal(err)
	}
	w.srv.SetNow(func() time.Time { return w.now })
	w.AddTokens(t, day.Add(-time.Hour))
	if w.router, err = contract(); err != nil {
		t.Fatal(err)
	}
	return w
}

// contract reads openapi.yaml once for all tests.
var contract = sync.OnceValues(func() (routers.Router, error) {
	doc, err := openapi3.NewLoader().LoadFromData(api.Spec)
	if err != nil {
		return nil, err
	}
	return legacy.NewRouter(doc)
})

// result is an answer, read whole.
type result struct {
	*http.Response
	body []byte
}

func (r result) decode(t testing.TB, v any) {
	t.Helper()
	reflect.ValueOf(v).Elem().SetZero() // or maps would be merged
	if err := json.Unmarshal(r.body, v); err != nil {
		t.Fatalf("%s: %v", r.body, err)
	}
}

func (r result) problem(t testing.TB) api.Problem {
	t.Helper()
	var p api.Problem
	r.decode(t, &p)
	return p
}

// send makes a request as role, "" for without a token. A body that is not a string or nil is sent as JSON. The answer is
// held to the contract.
func (w *world) send(role access.Role, method, path string, body any, edit ...func(*http.Request)) result {
	w.t.Helper()
	var rd io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		rd = strings.NewReader(b)
	case []byte:
		rd = bytes.NewReader(b)
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			w.t.Fatal(err)
		}
		rd = bytes.NewReader(raw)
	}
	r := httptest.NewRequestWithContext(context.Background(), method, api.Base+path, rd)
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if role != "" {
		r.Header.Set("Authorization", "Bearer "+w.Tokens[role])
	}
	for _, f := range edit {
		f(r)
	}
	return w.do(r)
}

func (w *world) do(r *http.Request) result {
	w.t.Helper()
	rec := httptest.NewRecorder()
	w.srv.ServeHTTP(rec, r)
	res := result{rec.Result(), rec.Body.Bytes()}
	w.conforms(r, res)
	return res
}

// conforms checks an answer against openapi.yaml; a request for something that is not in there must be refused as a
// problem.
func (w *world) conforms(r *http.Request, res result) {
	w.t.Helper()
	if res.StatusCode >= 400 {
		if ct := res.Header.Get("Content-Type"); ct != "application/problem+json" {
			w.t.Errorf("%s %s: %d as %s", r.Method, r.URL.Path, res.StatusCode, ct)
			return
		}
		p := res.problem(w.t)
		if p.Status != res.StatusCode || p.Code == "" || p.Title == "" || p.RequestID == "" || p.RequestID != res.Header.Get("X-Request-Id") {
			w.t.Errorf("%s %s: poor problem %s", r.Method, r.URL.Path, res.body)
		}
	}
	route, params, err := w.router.FindRoute(r)
	if err != nil {
		if strings.HasPrefix(r.URL.Path, api.Base) && res.StatusCode < 400 {
			w.t.Errorf("%s %s is not in the contract and answers %d", r.Method, r.URL.Path, res.StatusCode)
		}
		return
	}
	in := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: r, PathParams: params, Route: route},
		Status:                 res.StatusCode, Header: res.Header, Options: &openapi3filter.Options{IncludeResponseStatus: true},
	}
	in.SetBodyBytes(res.body)
	switch res.Header.Get("Content-Type") {
	case "application/vnd.oai.openapi", "text/event-stream", "application/x-ndjson":
		return // text that kin-openapi has no decoder for
	}
	if err := openapi3filter.ValidateResponse(context.Background(), in); err != nil {
		w.t.Errorf("%s %s: the answer is not as in the contract: %v", r.Method, r.URL.Path, err)
	}
}

// want checks status and, for a refusal, its code.
func (w *world) want(res result, status int, code string) result {
	w.t.Helper()
	if res.StatusCode != status {
		w.t.Errorf("status %d, want %d: %s", res.StatusCode, status, res.body)
	} else if status >= 400 && res.problem(w.t).Code != code {
		w.t.Errorf("code %q, want %q", res.problem(w.t).Code, code)
	}
	return res
}

func (w *world) update(f func(*bolt.Tx) error) {
	w.t.Helper()
	if err := w.DB.Update(context.Background(), f); err != nil {
		w.t.Fatal(err)
	}
}

// devices adds n devices d000, d001, … of product lamp.
func (w *world) devices(n int) { w.t.Helper(); w.Devices(w.t, n, day) }

// audit returns the newest line of the trail as "who what on".
func (w *world) audit() string {
	w.t.Helper()
	es, err := w.Access.Audit(context.Background(), 0, 1)
	if err != nil || len(es) != 1 {
		w.t.Fatal(es, err)
	}
	return es[0].Who + " " + es[0].What + " " + es[0].On
}

// newKey returns a key and a request for it, PEM.
func newKey(t testing.TB) (key *ecdsa.PrivateKey, csr string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}
