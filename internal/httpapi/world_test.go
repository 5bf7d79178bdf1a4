package httpapi_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
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
	"muster/internal/blob"
	"muster/internal/dispatch"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/httpapi"
	"muster/internal/inventory"
	"muster/internal/ota"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/uplink"
)

var day = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// world is the API over a real store and the real use cases; only what needs a CA or a broker is played by doors and
// certs, on the same store.
type world struct {
	t      testing.TB
	db     *bolt.DB
	srv    *httpapi.Server
	conf   httpapi.Config
	access *access.Access
	router routers.Router
	log    *bytes.Buffer
	now    time.Time
	tokens map[access.Role]string
}

// wrap turns a transaction of the store into that of a use case.
func wrap[T any](do func(context.Context, func(*bolt.Tx) error) error) func(context.Context, func(T) error) error {
	return func(ctx context.Context, f func(T) error) error {
		return do(ctx, func(tx *bolt.Tx) error { return f(any(tx).(T)) })
	}
}

func open(t testing.TB, change ...func(*httpapi.Config)) *world {
	t.Helper()
	db := storetest.Open(t)
	w := &world{t: t, db: db, log: &bytes.Buffer{}, now: day, tokens: map[access.Role]string{}}
	w.access = access.New(access.Config{Update: wrap[access.Tx](db.Update), View: wrap[access.Tx](db.View)})
	images, err := blob.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = images.Close() })
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	const maxImage = 1 << 20
	w.conf = httpapi.Config{
		Devices:  inventory.New(inventory.Config{Update: wrap[inventory.Tx](db.Update), View: wrap[inventory.Tx](db.View)}),
		Firmware: ota.New(ota.Config{Update: wrap[ota.Tx](db.Update), View: wrap[ota.Tx](db.View), Images: images, MaxImage: maxImage}),
		Rollouts: dispatch.New(dispatch.Config{
			Update: wrap[dispatch.Tx](db.Update), View: wrap[dispatch.Tx](db.View),
			PresenceKnown: func() bool { return true }, Committed: func() {}, Log: log,
		}),
		Doors: doors{db}, Certificates: certs{db}, Recovery: recovery{db}, Quarantine: quarantine{db}, Operators: w.access,
		Trust:     func(context.Context) ([]byte, error) { return []byte("-----BEGIN CERTIFICATE-----\n"), nil },
		Endpoints: api.Endpoints{MQTT: "h:8883", FallbackMQTT: "h:8884", HTTPS: "https://h:8443", RecoveryHTTPS: "https://h:8444"},
		Version:   api.Version{Version: "0.1.0", Go: "go1.26", API: "v1"}, Log: log, MaxImage: maxImage,
		Livez:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") }),
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "muster_up 1\n") }),
	}
	for _, f := range change {
		f(&w.conf)
	}
	if w.srv, err = httpapi.New(w.conf); err != nil {
		t.Fatal(err)
	}
	w.srv.SetNow(func() time.Time { return w.now })
	for _, role := range []access.Role{access.Viewer, access.Operator, access.Admin} {
		if w.tokens[role], _, err = w.access.Create(t.Context(), day.Add(-time.Hour), "t-"+string(role), role, 0, "test"); err != nil {
			t.Fatal(err)
		}
	}
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
		r.Header.Set("Authorization", "Bearer "+w.tokens[role])
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
	if res.Header.Get("Content-Type") == "application/vnd.oai.openapi" {
		return // the contract itself, as text: kin-openapi has no decoder for it
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
	if err := w.db.Update(context.Background(), f); err != nil {
		w.t.Fatal(err)
	}
}

// devices adds n devices d000, d001, … of product lamp.
func (w *world) devices(n int) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		for i := range n {
			if err := tx.PutDevice(fleet.Device{ID: fleet.DeviceID(fmt.Sprintf("d%03d", i)), Product: "lamp", CreatedAt: day}); err != nil {
				return err
			}
		}
		return nil
	})
}

// audit returns the newest line of the trail as "who what on".
func (w *world) audit() string {
	w.t.Helper()
	es, err := w.access.Audit(context.Background(), 0, 1)
	if err != nil || len(es) != 1 {
		w.t.Fatal(es, err)
	}
	return es[0].Who + " " + es[0].What + " " + es[0].On
}

// The rest plays what needs a CA or a broker.

type doors struct{ db *bolt.DB }

func (d doors) set(ctx context.Context, at time.Time, id fleet.DeviceID, off bool, what, by string) error {
	return d.db.Update(ctx, func(tx *bolt.Tx) error {
		dev, err := tx.Device(id)
		if err != nil {
			return err
		}
		dev.Disabled = off
		if err := tx.PutDevice(dev); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: what, On: string(id)})
	})
}

func (d doors) Disable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error {
	return d.set(ctx, at, id, true, "device.disable", by)
}

func (d doors) Enable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error {
	return d.set(ctx, at, id, false, "device.enable", by)
}

func (d doors) NewPassword(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (string, error) {
	pw := "password-of-" + string(id)
	return pw, d.db.Update(ctx, func(tx *bolt.Tx) error {
		dev, err := tx.Device(id)
		if err != nil {
			return err
		}
		dev.Passwords = []fleet.Password{{SHA256: fleet.HashOf(sha256.Sum256([]byte(pw))), Since: at}}
		if err := tx.PutDevice(dev); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "device.password", On: string(id)})
	})
}

type certs struct{ db *bolt.DB }

func (c certs) Issue(ctx context.Context, at time.Time, id fleet.DeviceID, csr []byte, o enroll.IssueOptions) (out pki.Certificate, err error) {
	out = pki.Certificate{
		Serial: "5f2c", Device: id, State: pki.Issued, Via: pki.ViaOperator, PublicKey: csr, KeyHash: fleet.HashOf(sha256.Sum256(csr)),
		Chain: [][]byte{{1}, {2}}, NotBefore: at, NotAfter: at.Add(24 * time.Hour), IntendedAt: at, IssuedAt: at, By: o.By,
	}
	return out, c.db.Update(ctx, func(tx *bolt.Tx) error {
		if _, err := tx.Device(id); err != nil {
			return err
		}
		return tx.PutCertificate(out)
	})
}

func (c certs) Certificate(ctx context.Context, s fleet.Serial) (out pki.Certificate, err error) {
	err = c.db.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.Certificate(s); return err })
	return out, err
}

func (c certs) CertificatesOf(ctx context.Context, id fleet.DeviceID) (out []pki.Certificate, err error) {
	err = c.db.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.CertificatesOf(id); return err })
	return out, err
}

func (c certs) CertificatesEnding(ctx context.Context, before time.Time, limit int) (out []pki.Certificate, err error) {
	err = c.db.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.CertificatesEnding(before, limit); return err })
	return out, err
}

func (c certs) Revoke(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) (out enroll.Revocation, err error) {
	out = enroll.Revocation{Live: 1, Stored: time.Millisecond, Closed: 2 * time.Millisecond, Verified: time.Second, Clean: true}
	err = c.db.Update(ctx, func(tx *bolt.Tx) error {
		cert, err := tx.Certificate(s)
		if err != nil {
			return err
		}
		if cert.State != pki.Revoked {
			if err := cert.Become(pki.Revoked, at); err != nil {
				return err
			}
			cert.Reason, cert.By = reason, by
		}
		out.Certificate = cert
		return tx.PutCertificate(cert)
	})
	return out, err
}

func (c certs) RenewPass(_ context.Context, _ time.Time, o enroll.RenewOptions) (enroll.Renewals, error) {
	return enroll.Renewals{Due: len(o.Devices), Asked: o.Devices, Skipped: []enroll.Skip{{Device: "d9", Why: "it has no certificate"}}}, nil
}

type recovery struct{ db *bolt.DB }

func (r recovery) Requests(ctx context.Context) (out []pki.Request, err error) {
	err = r.db.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.Requests(); return err })
	return out, err
}

func (r recovery) decide(ctx context.Context, at time.Time, id string, to pki.RequestState, by string) (out pki.Request, err error) {
	err = r.db.Update(ctx, func(tx *bolt.Tx) error {
		if out, err = tx.Request(id); err != nil {
			return err
		}
		out.State, out.DecidedAt, out.By = to, at, by
		return tx.PutRequest(out)
	})
	return out, err
}

func (r recovery) Approve(ctx context.Context, at time.Time, id, by string) (pki.Request, error) {
	return r.decide(ctx, at, id, pki.Approved, by)
}

func (r recovery) Deny(ctx context.Context, at time.Time, id, by string) (pki.Request, error) {
	return r.decide(ctx, at, id, pki.Denied, by)
}

type quarantine struct{ db *bolt.DB }

func (q quarantine) Quarantined(ctx context.Context, after uint64, limit int) (out []uplink.Quarantined, err error) {
	err = q.db.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.Quarantined(after, limit); return err })
	return out, err
}

func (q quarantine) QuarantinedOne(ctx context.Context, seq uint64) (out uplink.Quarantined, err error) {
	err = q.db.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.QuarantinedOne(seq); return err })
	return out, err
}

func (q quarantine) DropQuarantined(ctx context.Context, at time.Time, seq uint64, by string) error {
	return q.db.Update(ctx, func(tx *bolt.Tx) error {
		if err := tx.DropQuarantined(seq); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "quarantine.drop", On: fmt.Sprint(seq)})
	})
}

func csrPEM() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("a key")}))
}
