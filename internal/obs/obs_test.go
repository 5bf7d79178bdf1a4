package obs_test

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"muster/internal/obs"
)

func TestASecretThatIsLoggedByMistakeIsMasked(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var b strings.Builder
		log := obs.Logger(&b, "info", format)
		log.Info("x", "password", "hunter2", "api_token", "hunter2", "Authorization", "hunter2", "device", "d1")
		log.Debug("hidden")
		if s := b.String(); strings.Contains(s, "hunter2") || !strings.Contains(s, "d1") || strings.Contains(s, "hidden") {
			t.Errorf("%s: %s", format, s)
		}
	}
}

func TestReadyMeansThatEveryPartIsWell(t *testing.T) {
	h := obs.NewHealth("store", "broker")
	get := func() (int, string) {
		r := httptest.NewRecorder()
		h.Readyz(r, nil)
		return r.Code, r.Body.String()
	}
	if code, body := get(); code != 503 || !strings.Contains(body, "starting") {
		t.Errorf("%d %s", code, body)
	}
	h.Set("store", nil)
	h.Set("broker", errors.New("refused"))
	if code, body := get(); code != 503 || !strings.Contains(body, "refused") {
		t.Errorf("%d %s", code, body)
	}
	h.Set("broker", nil)
	if code, body := get(); code != 200 || !strings.Contains(body, `"ready":true`) {
		t.Errorf("%d %s", code, body)
	}
}

func TestARemarkIsShownAndDoesNotMakeUnready(t *testing.T) {
	h := obs.NewHealth("store")
	h.Set("store", nil)
	h.Remark("expiries", "token cron ends soon")
	h.Set("store", nil)
	h.Remark("store", "nearly full")
	h.Set("store", nil) // keeps the remark
	rs, ready := h.Reports()
	if !ready || len(rs) != 2 || rs[0].Remark != "token cron ends soon" || rs[1].Remark != "nearly full" || !rs[1].OK {
		t.Errorf("%v %+v", ready, rs)
	}
	h.Set("expiries", errors.New("the root has ended"))
	h.Remark("store", "")
	if rs, ready := h.Reports(); ready || rs[0].OK || rs[0].Remark == "" || rs[1].Remark != "" {
		t.Errorf("%v %+v", ready, rs)
	}
}

func TestTwoMustersKeepTheirMetricsApart(t *testing.T) {
	for range 2 {
		m := obs.NewMetrics()
		m.Counter("muster_reports_total", "Reports stored.", func() float64 { return 42 })
		m.CounterVec("muster_auth_total", "Decisions.", "answer").WithLabelValues("deny").Inc()
		r := httptest.NewRecorder()
		m.Handler().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
		if s := r.Body.String(); !strings.Contains(s, "muster_reports_total 42") || !strings.Contains(s, `muster_auth_total{answer="deny"} 1`) {
			t.Error(s)
		}
	}
}
