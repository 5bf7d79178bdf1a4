package httpapi_test

import (
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/access"
)

// newCAs returns what the ceremony makes of the requests of a rotation, PEM.
func (w *world) newCAs(rotation int64) string {
	var out strings.Builder
	for _, c := range w.Authorities.Certificates(rotation) {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return out.String()
}

func TestRotationsOverREST(t *testing.T) {
	w := open(t)
	w.devices(2)
	for _, c := range []struct {
		role   access.Role
		method string
		path   string
		body   any
		status int
		code   string
	}{
		{access.Operator, "POST", "/rotations", `{"kind":"root"}`, 403, "role_too_low"},
		{access.Admin, "POST", "/rotations", `{"kind":"moon"}`, 400, ""},
		{access.Admin, "POST", "/rotations", `{"kind":"root","device_key":"a\u0007"}`, 400, "key_invalid"},
		{access.Admin, "POST", "/rotations", `{"kind":"root","device_key":"pkcs11:x"}`, 503, ""},
		{access.Viewer, "GET", "/rotations/1", nil, 404, ""},
		{access.Viewer, "GET", "/rotations/0", nil, 400, "id_invalid"},
		{access.Viewer, "GET", "/rotations/+1", nil, 400, "id_invalid"},
		{access.Admin, "POST", "/rotations/1/advance", nil, 404, ""},
		{access.Admin, "PUT", "/rotations/1/certificates", `{"pem":"-----BEGIN"}`, 400, ""},
	} {
		if res := w.send(c.role, c.method, c.path, c.body); res.StatusCode != c.status {
			t.Errorf("%s %s %v: %d, want %d: %s", c.method, c.path, c.body, res.StatusCode, c.status, res.body)
		} else if c.code != "" && !strings.Contains(string(res.body), c.code) {
			t.Errorf("%s %s: %s, want %s", c.method, c.path, res.body, c.code)
		}
	}
	var r api.Rotation
	w.send(access.Admin, "POST", "/rotations", `{"kind":"root"}`).decode(t, &r)
	if r.ID != 1 || r.State != api.RotationStatePrepared || r.Next != "distributed" || len(r.Steps) != 1 && len(r.Steps) != 2 || r.Steps[0].By != "t-admin" {
		t.Errorf("%+v", r)
	}
	w.want(w.send(access.Admin, "POST", "/rotations", `{"kind":"root"}`), 409, "rotation_open")
	w.send(access.Admin, "POST", "/rotations/1/advance", nil).decode(t, &r)
	if r.State != api.RotationStateDistributed || r.Lacking.Count != 2 || !slices.Equal(r.Lacking.Devices, []string{"d000", "d001"}) || len(r.Blockers) == 0 {
		t.Errorf("%+v", r)
	}
	last := r.Steps[len(r.Steps)-1]
	if len(last.After) == 0 || !last.After[0].Ok || last.After[0].Client == nil || last.After[0].Words == "" {
		t.Errorf("the step is not proven: %+v", last)
	}
	refused := w.send(access.Admin, "POST", "/rotations/1/advance", nil)
	w.want(refused, 409, "rotation_gated")
	if !strings.Contains(string(refused.body), "d001") {
		t.Errorf("%s does not name the stragglers", refused.body)
	}
	w.want(w.send(access.Admin, "POST", "/rotations/1/advance", `{"force":true}`), 400, "invalid")
	w.want(w.send(access.Admin, "POST", "/rotations/1/cancel", `{"force":true}`), 400, "force_invalid")
	w.send(access.Admin, "POST", "/rotations/1/advance", `{"force":true,"why":"a drill"}`).decode(t, &r)
	if last := r.Steps[len(r.Steps)-1]; r.State != api.RotationStateActive || last.Why != "a drill" || len(last.Forced) == 0 {
		t.Errorf("%+v", r)
	}
	var g api.RotationCertificates
	w.send(access.Viewer, "GET", "/rotations/1/certificates", nil).decode(t, &g)
	if strings.Count(g.RootsPEM, "BEGIN") != 2 || strings.Count(g.DeviceCaPEM, "BEGIN") != 1 || strings.Count(g.ServerCaPEM, "BEGIN") != 1 {
		t.Errorf("%+v", g)
	}
	var l api.RotationList
	w.send(access.Viewer, "GET", "/rotations", nil).decode(t, &l)
	if len(l.Items) != 1 || l.Items[0].State != api.RotationStateActive {
		t.Errorf("%+v", l)
	}
	w.want(w.send(access.Operator, "POST", "/certificates/renewals", `{"issuer":"xyz"}`), 400, "id_invalid")
	var rep api.RenewalReport
	w.send(access.Operator, "POST", "/certificates/renewals", api.RenewalPass{Issuer: string(w.Issuer.ID()), DryRun: true}).decode(t, &rep)
	if rep.Due != 0 {
		t.Errorf("nobody holds a certificate, but %+v", rep)
	}
}
