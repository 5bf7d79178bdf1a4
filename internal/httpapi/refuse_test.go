package httpapi_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/httpapi"
	"muster/internal/inventory"
)

// concrete fills the parameters of a path with values of the right form.
var concrete = strings.NewReplacer(":device", "d000", ":serial", "5f2c", ":rollout", "r1", ":request", "0123456789abcdef", ":seq", "1",
	":token", "ci", ":key", strings.Repeat("k", 43), ":product", "lamp", ":version", "1.0.0")

func TestNobodyMayDoMoreThanHisRole(t *testing.T) {
	t.Parallel() // it waits for the second look at closed connections
	w := open(t)
	w.devices(1)
	for _, op := range httpapi.Operations() {
		for _, role := range []access.Role{access.Viewer, access.Operator, access.Admin} {
			res := w.send(role, op.Method, concrete.Replace(op.Path), nil)
			switch forbidden := res.StatusCode == http.StatusForbidden; {
			case forbidden == role.May(access.Role(op.Role)):
				t.Errorf("%s as %s: %d", op.ID, role, res.StatusCode)
			case forbidden:
				w.want(res, http.StatusForbidden, "role_too_low")
			}
		}
		res := w.send("", op.Method, concrete.Replace(op.Path), nil)
		w.want(res, http.StatusUnauthorized, "unauthorized")
		if res.Header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s: 401 without WWW-Authenticate", op.ID)
		}
		w.now = w.now.Add(time.Minute) // for the limiter
	}
}

// plan is the body of a new rollout with this plan.
func plan(p string) string { return `{"product":"lamp","version":"1.0.0","plan":` + p + `}` }

func TestARefusedAttemptIsOnRecordButCannotFillTheStore(t *testing.T) {
	w := open(t)
	w.want(w.send(access.Viewer, "POST", "/devices/d000/disable", nil), 403, "role_too_low")
	if got := w.audit(); got != "t-viewer refused.disableDevice d000" {
		t.Errorf("audit: %s", got)
	}
	for range 200 {
		w.send(access.Viewer, "POST", "/devices/d000/disable", nil)
	}
	es, err := w.Access.Audit(t.Context(), 0, 0)
	if err != nil || len(es) > 30 {
		t.Errorf("%d lines, %v", len(es), err)
	}
}

func TestWithoutATokenEveryPathLooksTheSame(t *testing.T) {
	w := open(t)
	var first string
	for _, path := range []string{"/devices", "/devices/none", "/nothing", "/tokens", "/openapi.yaml"} {
		res := w.want(w.send("", "GET", path, nil), 401, "unauthorized")
		p := res.problem(t)
		p.RequestID = ""
		if text := fmt.Sprint(p); first == "" {
			first = text
		} else if text != first {
			t.Errorf("%s tells more: %s", path, text)
		}
	}
}

func TestTokensThatAreNone(t *testing.T) {
	w := open(t)
	good := w.Tokens[access.Admin]
	for name, values := range map[string][]string{
		"none":           nil,
		"empty":          {""},
		"scheme only":    {"Bearer"},
		"other scheme":   {"Basic " + good},
		"no scheme":      {good},
		"two headers":    {"Bearer " + good, "Bearer " + good},
		"longer":         {"Bearer " + good + "x"},
		"unknown":        {"Bearer mst_" + strings.Repeat("A", 43)},
		"alg none":       {"Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."},
		"much":           {"Basic " + strings.Repeat("A", 1<<20)},
		"two in one":     {"Bearer " + good + ", Bearer " + good},
		"space at end":   {"Bearer " + good + " "},
		"upper-cased":    {"Bearer " + strings.ToUpper(good)},
		"tab for space":  {"Bearer\t" + good},
		"another prefix": {"Bearer " + strings.Replace(good, "mst_", "gst_", 1)},
	} {
		w.now = w.now.Add(time.Minute)
		r := httptest.NewRequest("GET", api.Base+"/whoami", nil)
		r.Header["Authorization"] = values
		if res := w.do(r); res.StatusCode != 401 {
			t.Errorf("%s: %d", name, res.StatusCode)
		}
	}
	for _, v := range []string{"Bearer " + good, "bearer " + good, "BEARER  " + good} {
		r := httptest.NewRequest("GET", api.Base+"/whoami", nil)
		r.Header.Set("Authorization", v)
		if res := w.do(r); res.StatusCode != 200 {
			t.Errorf("%.10s…: %d", v, res.StatusCode)
		}
	}
}

func TestAFloodWithoutATokenIsHeldOff(t *testing.T) {
	w := open(t)
	for range 50 {
		w.send("", "GET", "/whoami", nil, func(r *http.Request) { r.Header.Set("X-Forwarded-For", fmt.Sprint(time.Now())) })
	}
	res := w.want(w.send("", "GET", "/whoami", nil), 429, "too_many_failures")
	if res.Header.Get("Retry-After") == "" {
		t.Error("429 without Retry-After")
	}
	w.want(w.send(access.Viewer, "GET", "/whoami", nil), 200, "")
}

func TestATokenStopsWithItsDeletion(t *testing.T) {
	w := open(t)
	w.want(w.send(access.Viewer, "GET", "/whoami", nil), 200, "")
	w.want(w.send(access.Admin, "DELETE", "/tokens/t-viewer", nil), 204, "")
	w.want(w.send(access.Viewer, "GET", "/whoami", nil), 401, "unauthorized")
}

func header(k, v string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(k, v) }
}

// faults.md §7.3, rows that the API meets.
func TestBadRequestsAreRefusedClearly(t *testing.T) {
	w := open(t)
	w.devices(1)
	_, csr := newKey(t)
	big := `{"id":"x","product":"lamp","hardware":"` + strings.Repeat("a", 70<<10) + `"}`
	chunked := func(r *http.Request) { r.ContentLength = -1 }
	for name, c := range map[string]struct {
		method, path string
		body         any
		edit         func(*http.Request)
		status       int
		code         string
	}{
		"unknown path":              {"GET", "/nothing", nil, nil, 404, "no_such_path"},
		"path above":                {"GET", "/../devices", nil, nil, 404, "no_such_path"},
		"slash at end":              {"GET", "/devices/", nil, nil, 404, "no_such_path"},
		"PUT on a GET path":         {"PUT", "/devices/d000", nil, nil, 405, "method_not_allowed"},
		"PUT a device":              {"PUT", "/devices/d000", nil, nil, 405, "method_not_allowed"},
		"TRACE":                     {"TRACE", "/devices", nil, nil, 405, "method_not_allowed"},
		"HEAD":                      {"HEAD", "/devices", nil, nil, 405, ""},
		"override header":           {"POST", "/devices/d000", nil, header("X-HTTP-Method-Override", "PATCH"), 405, "method_not_allowed"},
		"no content type":           {"POST", "/devices", "{}", header("Content-Type", ""), 415, "media_type_unsupported"},
		"form":                      {"POST", "/devices", "a=b", header("Content-Type", "application/x-www-form-urlencoded"), 415, "media_type_unsupported"},
		"utf-16":                    {"POST", "/devices", "{}", header("Content-Type", "application/json; charset=utf-16"), 415, "media_type_unsupported"},
		"gzip":                      {"POST", "/devices", "{}", header("Content-Encoding", "gzip"), 415, "encoding_unsupported"},
		"impossible Accept":         {"GET", "/devices", nil, header("Accept", "text/html"), 406, "not_acceptable"},
		"Accept with q=0":           {"GET", "/devices", nil, header("Accept", "application/json;q=0"), 406, "not_acceptable"},
		"empty body":                {"POST", "/devices", "", nil, 400, "body_invalid"},
		"null":                      {"POST", "/certificates/renewals", "null", nil, 400, "body_invalid"},
		"array":                     {"POST", "/devices", "[]", nil, 400, "body_invalid"},
		"not JSON":                  {"POST", "/devices", "{id:1}", nil, 400, "body_invalid"},
		"two documents":             {"POST", "/devices", `{"id":"x","product":"lamp"}{}`, nil, 400, "body_invalid"},
		"unknown member":            {"POST", "/devices", `{"id":"x","product":"lamp","admin":true}`, nil, 400, "body_invalid"},
		"wrong case":                {"POST", "/devices", `{"ID":"x","product":"lamp"}`, nil, 400, "body_invalid"},
		"duplicate member":          {"POST", "/devices", `{"id":"x","id":"y","product":"lamp"}`, nil, 400, "body_invalid"},
		"wrong type":                {"POST", "/devices", `{"id":7,"product":"lamp"}`, nil, 400, "body_invalid"},
		"invalid UTF-8":             {"POST", "/devices", "{\"id\":\"x\",\"product\":\"lamp\",\"hardware\":\"\xff\"}", nil, 400, "body_invalid"},
		"deep":                      {"POST", "/devices", `{"labels":` + strings.Repeat("[", 30000) + `}`, nil, 400, "body_invalid"},
		"too large":                 {"POST", "/devices", big, nil, 413, "body_too_large"},
		"too large, chunked":        {"POST", "/devices", big, chunked, 413, "body_too_large"},
		"body where none is":        {"POST", "/devices/d000/disable", "{}", nil, 400, "body_unexpected"},
		"upper-case id":             {"GET", "/devices/D000", nil, nil, 400, "id_invalid"},
		"look-alike id":             {"GET", "/devices/d%D0%BE00", nil, nil, 400, "id_invalid"},
		"NUL in id":                 {"GET", "/devices/d%00", nil, nil, 400, "id_invalid"},
		"slash in id":               {"GET", "/devices/..%2f..%2fetc", nil, nil, 400, "id_invalid"},
		"dot at end":                {"GET", "/devices/d000.", nil, nil, 400, "id_invalid"},
		"space at end":              {"GET", "/devices/d000%20", nil, nil, 400, "id_invalid"},
		"long id":                   {"GET", "/devices/" + strings.Repeat("a", 1000), nil, nil, 400, "id_invalid"},
		"unknown id":                {"GET", "/devices/d999", nil, nil, 404, "not_found"},
		"serial with zeros":         {"GET", "/certificates/00ff", nil, nil, 400, "id_invalid"},
		"number 0":                  {"GET", "/quarantine/0", nil, nil, 400, "id_invalid"},
		"number -1":                 {"GET", "/quarantine/-1", nil, nil, 400, "id_invalid"},
		"number +1":                 {"GET", "/quarantine/+1", nil, nil, 400, "id_invalid"},
		"number 2^64":               {"GET", "/quarantine/18446744073709551616", nil, nil, 400, "id_invalid"},
		"number 2^63":               {"GET", "/quarantine/9223372036854775808", nil, nil, 404, "not_found"},
		"limit 0":                   {"GET", "/devices?limit=0", nil, nil, 400, "limit_invalid"},
		"limit -1":                  {"GET", "/devices?limit=-1", nil, nil, 400, "limit_invalid"},
		"limit 501":                 {"GET", "/devices?limit=501", nil, nil, 400, "limit_invalid"},
		"limit 1e9":                 {"GET", "/devices?limit=1000000000", nil, nil, 400, "limit_invalid"},
		"limit empty":               {"GET", "/devices?limit=", nil, nil, 400, "limit_invalid"},
		"limit twice":               {"GET", "/devices?limit=1&limit=2", nil, nil, 400, "query_invalid"},
		"forged cursor":             {"GET", "/devices?cursor=ZDAwMA", nil, nil, 400, "cursor_invalid"},
		"cursor of zeros":           {"GET", "/devices?cursor=" + strings.Repeat("A", 40), nil, nil, 400, "cursor_invalid"},
		"cursor not base64":         {"GET", "/devices?cursor=%00", nil, nil, 400, "query_invalid"},
		"unknown filter":            {"GET", "/devices?lable=a=b", nil, nil, 400, "query_unknown"},
		"filter where none is":      {"GET", "/whoami?x=1", nil, nil, 400, "query_unknown"},
		"broken query":              {"GET", "/devices?q=%zz", nil, nil, 400, "query_invalid"},
		"semicolon in query":        {"GET", "/devices?q=a;b", nil, nil, 400, "query_invalid"},
		"query not UTF-8":           {"GET", "/devices?q=%ff", nil, nil, 400, "query_invalid"},
		"label without value":       {"GET", "/devices?label=site", nil, nil, 400, "label_invalid"},
		"label of 10 KB":            {"GET", "/devices?label=a=" + strings.Repeat("x", 10<<10), nil, nil, 400, "label_invalid"},
		"20 labels":                 {"GET", "/devices?" + strings.Repeat("label=a=b&", 20), nil, nil, 400, "label_invalid"},
		"online maybe":              {"GET", "/devices?online=maybe", nil, nil, 400, "query_invalid"},
		"product upper-case":        {"GET", "/devices?product=Lamp", nil, nil, 400, "id_invalid"},
		"state of no rollout":       {"GET", "/rollouts?state=gone", nil, nil, 400, "state_invalid"},
		"bad if-match":              {"PATCH", "/devices/d000", `{}`, header("If-Match", "1"), 400, "if_match_invalid"},
		"weak if-match":             {"PATCH", "/devices/d000", `{}`, header("If-Match", `W/"1"`), 400, "if_match_invalid"},
		"csr is no PEM":             {"POST", "/devices/d000/certificates", `{"csr":"x"}`, nil, 400, "csr_malformed"},
		"csr is a certificate":      {"POST", "/devices/d000/certificates", map[string]string{"csr": strings.ReplaceAll(csr, " REQUEST", "")}, nil, 400, "csr_malformed"},
		"unknown reason":            {"POST", "/certificates/5f2c/revocation", `{"reason":"because"}`, nil, 400, "reason_invalid"},
		"within 0s":                 {"POST", "/certificates/renewals", `{"within":"0s"}`, nil, 400, "duration_invalid"},
		"within -1h":                {"POST", "/certificates/renewals", `{"within":"-1h"}`, nil, 400, "duration_invalid"},
		"within 9999999h":           {"POST", "/certificates/renewals", `{"within":"9999999h"}`, nil, 400, "duration_invalid"},
		"soak -1h":                  {"POST", "/rollouts", `{"product":"lamp","version":"1.0.0","plan":{"soak":"-1h"}}`, nil, 400, "duration_invalid"},
		"device timeout 0s":         {"POST", "/rollouts", `{"product":"lamp","version":"1.0.0","plan":{"device_timeout":"0s"}}`, nil, 400, "duration_invalid"},
		"verify for -1s":            {"POST", "/rollouts", plan(`{"verify_for":"-1s"}`), nil, 400, "duration_invalid"},
		"verify for a minute":       {"POST", "/rollouts", plan(`{"verify_for":"a minute"}`), nil, 400, "duration_invalid"},
		"window of 2s":              {"POST", "/rollouts", plan(`{"window":{"cron":"0 2 * * *","length":"2s"}}`), nil, 400, "duration_invalid"},
		"unknown field of a plan":   {"POST", "/rollouts", plan(`{"stagess":[]}`), nil, 400, "body_invalid"},
		"max_failures as text":      {"POST", "/rollouts", plan(`{"max_failures":"2"}`), nil, 400, "body_invalid"},
		"start_at yesterday":        {"POST", "/rollouts", plan(`{"start_at":"yesterday"}`), nil, 400, "body_invalid"},
		"where of 3 KB":             {"POST", "/rollouts", `{"product":"lamp","version":"1.0.0","target":{"where":"` + strings.Repeat("x", 3<<10) + `"}}`, nil, 400, "target_invalid"},
		"1001 devices":              {"POST", "/rollouts/plan", `{"product":"lamp","version":"1.0.0","target":{"devices":["a"` + strings.Repeat(`,"a"`, 1000) + `]}}`, nil, 400, "too_many_devices"},
		"plan of an unknown member": {"POST", "/rollouts/plan", `{"product":"lamp","version":"1.0.0","start":true}`, nil, 400, "body_invalid"},
		"plan without a body":       {"POST", "/rollouts/plan", nil, header("Content-Type", "application/json"), 400, "body_invalid"},
		"retry of a success":        {"POST", "/rollouts/r1/retry", `{"kind":"succeeded"}`, nil, 400, "kind_invalid"},
		"retry, start without as":   {"POST", "/rollouts/r1/retry", `{"start":true}`, nil, 400, "start_without_as"},
		"retry as a bad id":         {"POST", "/rollouts/r1/retry", `{"as":"A B"}`, nil, 400, "id_invalid"},
		"retry as text":             {"POST", "/rollouts/r1/retry", `{}`, header("Content-Type", "text/plain"), 415, "media_type_unsupported"},
		"retry of no rollout":       {"POST", "/rollouts/r1/retry", nil, nil, 404, "not_found"},
		"abort for 300 bytes":       {"POST", "/rollouts/r1/abort", `{"why":"` + strings.Repeat("x", 300) + `"}`, nil, 400, "why_invalid"},
		"abort for an escape":       {"POST", "/rollouts/r1/abort", `{"why":"\u001b[2J"}`, nil, 400, "why_invalid"},
		"abort with an array":       {"POST", "/rollouts/r1/abort", `[]`, nil, 400, "body_invalid"},
		"events of no rollout":      {"GET", "/rollouts/r1/events", nil, nil, 404, "not_found"},
		"events after -1":           {"GET", "/rollouts/r1/events", nil, header("Last-Event-ID", "-1"), 400, "last_event_id_invalid"},
		"events after text":         {"GET", "/rollouts/r1/events", nil, header("Last-Event-ID", "abc"), 400, "last_event_id_invalid"},
		"events after 2^64":         {"GET", "/rollouts/r1/events", nil, header("Last-Event-ID", "18446744073709551616"), 400, "last_event_id_invalid"},
		"events as JSON":            {"GET", "/rollouts/r1/events", nil, header("Accept", "application/json"), 406, "not_acceptable"},
		"why of no device":          {"GET", "/devices/none/why", nil, nil, 404, "not_found"},
		"pardon of no device":       {"POST", "/devices/none/pardon", nil, nil, 404, "not_found"},
		"rollout of no release":     {"POST", "/rollouts", `{"product":"lamp","version":"1.0.0"}`, nil, 404, "not_found"},
		"version v1":                {"GET", "/firmware/releases/lamp/v1", nil, nil, 400, "id_invalid"},
		"version in Arabic digits":  {"GET", "/firmware/releases/lamp/%D9%A1.0.0", nil, nil, 400, "id_invalid"},
		"boot key of another form":  {"POST", "/firmware/secure-boot-keys/lamp/x/revoke", nil, nil, 400, "id_invalid"},
		"boot key nobody has":       {"POST", "/firmware/secure-boot-keys/lamp/" + strings.Repeat("0", 64) + "/revoke", nil, nil, 404, "not_found"},
		"key id of another form":    {"POST", "/firmware/keys/x/revoke", nil, nil, 400, "id_invalid"},
		"own role raised in a body": {"POST", "/tokens", `{"name":"x","role":"root"}`, nil, 400, "invalid"},
		"token for 0s":              {"POST", "/tokens", `{"name":"x","role":"viewer","expires_in":"0s"}`, nil, 400, "duration_invalid"},
		"token name like a device":  {"POST", "/tokens", `{"name":"device-1","role":"viewer"}`, nil, 400, "invalid"},
		"upload without manifest":   {"POST", "/firmware/releases", "image", header("Content-Type", "application/octet-stream"), 400, "manifest_missing"},
		"upload, chunked": {"POST", "/firmware/releases", "image", func(r *http.Request) {
			r.Header.Set("Content-Type", "application/octet-stream")
			r.ContentLength = -1
		}, 411, "length_required"},
		"upload of too much": {"POST", "/firmware/releases", "image", func(r *http.Request) {
			r.Header.Set("Content-Type", "application/octet-stream")
			r.ContentLength = 1 << 40
		}, 413, "image_too_large"},
		"upload as a form": {"POST", "/firmware/releases", "image", header("Content-Type", "multipart/form-data"), 415, "media_type_unsupported"},
		"empty import":     {"POST", "/device-imports", `{"devices":[]}`, nil, 400, "invalid"},
		"request id":       {"POST", "/recovery/requests/zz/approve", nil, nil, 400, "id_invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			w := *w
			w.t = t
			edit := c.edit
			if edit == nil {
				edit = func(*http.Request) {}
			}
			res := w.send(access.Admin, c.method, c.path, c.body, edit)
			if c.method == "HEAD" {
				if res.StatusCode != c.status {
					t.Errorf("status %d", res.StatusCode)
				}
				return
			}
			w.want(res, c.status, c.code)
			if c.status == 405 && res.Header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if res.StatusCode >= 400 && strings.Contains(string(res.body), strings.Repeat("x", 200)) {
				t.Error("the refusal repeats what came in")
			}
		})
	}
}

func TestARefusalDoesNotRepeatRawInput(t *testing.T) {
	w := open(t)
	for _, c := range [][3]string{
		{"GET", "/devices/EVIL-%3Cscript%3E", ""}, {"GET", "/devices?evil%3Cscript%3E=1", ""}, {"GET", "/devices?limit=EVIL", ""},
		{"POST", "/devices", `{"EVIL<script>":1}`}, {"POST", "/devices", `{"id":"EVIL<script>","product":"p"}`},
		{"POST", "/rollouts", `{"product":"lamp","version":"EVIL<script>"}`}, {"GET", "/EVIL%3Cscript%3E", ""},
	} {
		var body any
		if c[2] != "" {
			body = c[2]
		}
		res := w.send(access.Admin, c[0], c[1], body)
		if res.StatusCode < 400 || bytes.Contains(bytes.ToLower(res.body), []byte("evil")) {
			t.Errorf("%s %s: %d %s", c[0], c[1], res.StatusCode, res.body)
		}
	}
}

func TestAcceptThatIsMet(t *testing.T) {
	w := open(t)
	for _, v := range []string{"*/*", "application/*", "application/json", "text/html, application/json;q=0.9", "application/json; charset=utf-8"} {
		w.want(w.send(access.Viewer, "GET", "/whoami", nil, header("Accept", v)), 200, "")
	}
}

func TestOnlyOurNamesAreAnswered(t *testing.T) {
	w := open(t, func(c *httpapi.Config) { c.Hosts = []string{"muster.example.com", "::1"} })
	for host, want := range map[string]int{
		"muster.example.com": 200, "Muster.Example.com:9443": 200, "[::1]:9443": 200,
		"evil.example.com": 421, "": 421, "muster.example.com.evil": 421,
	} {
		if res := w.send(access.Viewer, "GET", "/whoami", nil, func(r *http.Request) { r.Host = host }); res.StatusCode != want {
			t.Errorf("%q: %d", host, res.StatusCode)
		}
	}
}

type broken struct{ httpapi.Devices }

func (broken) Get(context.Context, fleet.DeviceID) (inventory.Row, error) {
	panic("index out of range")
}

func (broken) List(context.Context, inventory.Filter, fleet.Page) ([]inventory.Row, bool, error) {
	return nil, false, errors.New("disk on fire at /secret/path")
}

func TestAFaultOfOursStaysInside(t *testing.T) {
	w := open(t, func(c *httpapi.Config) { c.Devices = broken{} })
	for _, path := range []string{"/devices/d000", "/devices"} {
		res := w.want(w.send(access.Viewer, "GET", path, nil), 500, "internal")
		id := res.problem(t).RequestID
		if bytes.Contains(res.body, []byte("secret")) || bytes.Contains(res.body, []byte("index")) {
			t.Errorf("%s", res.body)
		}
		if !strings.Contains(w.Log.String(), id) {
			t.Errorf("the log does not know request %s", id)
		}
	}
	if !strings.Contains(w.Log.String(), "disk on fire") || !strings.Contains(w.Log.String(), "refuse_test.go") {
		t.Error("the log does not say what broke")
	}
}

func TestEveryKindOfErrorHasItsStatus(t *testing.T) {
	for kind, want := range map[fleet.Kind]int{
		fleet.Invalid: 400, fleet.Unauthorized: 401, fleet.Forbidden: 403, fleet.NotFound: 404, fleet.Conflict: 409, fleet.TooLarge: 413,
		fleet.Unprocessable: 422, fleet.TooMany: 429, fleet.Internal: 500, fleet.Unavailable: 503, fleet.Full: 507, "new-kind": 500,
	} {
		w := open(t, func(c *httpapi.Config) { c.Devices = failing{fleet.Errorf(kind, "reason")} })
		res := w.send(access.Viewer, "GET", "/devices", nil)
		if res.StatusCode != want {
			t.Errorf("%s: %d", kind, res.StatusCode)
		}
		if retry := res.Header.Get("Retry-After") != ""; retry != (want == 429 || want == 503) {
			t.Errorf("%s: Retry-After %v", kind, retry)
		}
	}
}

type failing struct{ err error }

func (f failing) Add(context.Context, time.Time, []inventory.Spec, bool, string) ([]inventory.Added, error) {
	return nil, f.err
}
func (f failing) Preview(context.Context, inventory.Filter) (inventory.Preview, error) {
	return inventory.Preview{}, f.err
}
func (f failing) UpdateMany(context.Context, time.Time, inventory.Bulk, string) (inventory.BulkReport, error) {
	return inventory.BulkReport{}, f.err
}
func (f failing) Get(context.Context, fleet.DeviceID) (inventory.Row, error) {
	return inventory.Row{}, f.err
}
func (f failing) List(context.Context, inventory.Filter, fleet.Page) ([]inventory.Row, bool, error) {
	return nil, false, f.err
}
func (f failing) Update(context.Context, time.Time, fleet.DeviceID, inventory.Change, string) (fleet.Device, error) {
	return fleet.Device{}, f.err
}

// The secret of a token reaches neither the log nor a refusal.
func TestTokensAreNotLogged(t *testing.T) {
	w := open(t)
	w.send(access.Admin, "GET", "/whoami", nil)
	w.send(access.Admin, "POST", "/devices", `{`)
	res := w.send(access.Admin, "POST", "/tokens", map[string]string{"name": "ci", "role": "viewer"})
	var made api.CreatedToken
	res.decode(t, &made)
	for _, secret := range []string{w.Tokens[access.Admin], made.Secret} {
		if secret == "" || strings.Contains(w.Log.String(), secret[4:]) {
			t.Error("the log holds a token")
		}
	}
}

// What net/http refuses before a handler sees it, with the limits that HTTPServer sets.
func TestTheListenerRefusesWhatNoHandlerShouldSee(t *testing.T) {
	w := open(t)
	ts := httptest.NewUnstartedServer(w.srv)
	ts.Config = httpapi.HTTPServer(w.srv, slog.New(slog.DiscardHandler))
	ts.StartTLS()
	t.Cleanup(ts.Close)
	client := ts.Client()
	raw := func(text string) string {
		t.Helper()
		conn, err := client.Transport.(*http.Transport).DialContext(t.Context(), "tcp", ts.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		tc := tlsClient(conn, client)
		defer tc.Close()
		if err := tc.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(tc, text)
		line, _ := bufio.NewReader(tc).ReadString('\n')
		return strings.TrimSpace(line)
	}
	many := strings.Repeat("X-A: "+strings.Repeat("b", 90)+"\r\n", 1000)
	for name, c := range map[string]struct{ text, want string }{
		"header of 1 MB":           {"GET /api/v1/whoami HTTP/1.1\r\nHost: h\r\nAuthorization: Basic " + strings.Repeat("A", 1<<20) + "\r\n\r\n", "431"},
		"1000 headers":             {"GET /api/v1/whoami HTTP/1.1\r\nHost: h\r\n" + many + "\r\n", "431"},
		"two Content-Lengths":      {"POST /api/v1/devices HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "400"},
		"CL and TE":                {"POST /api/v1/devices HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "4"},
		"no Host":                  {"GET /api/v1/whoami HTTP/1.1\r\n\r\n", "400"},
		"two Hosts":                {"GET /api/v1/whoami HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"},
		"no token":                 {"GET /api/v1/whoami HTTP/1.1\r\nHost: h\r\n\r\n", "401"},
		"CONNECT":                  {"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", "4"},
		"absolute URI, no token":   {"GET http://169.254.169.254/api/v1/whoami HTTP/1.1\r\nHost: h\r\n\r\n", "401"},
		"obs-fold without a token": {"GET /api/v1/whoami HTTP/1.1\r\nHost: h\r\nX-A: a\r\n b\r\n\r\n", "4"},
	} {
		line := raw(c.text)
		if !strings.HasPrefix(line, "HTTP/1.1 "+c.want) {
			t.Errorf("%s: %q", name, line)
		}
	}
}
