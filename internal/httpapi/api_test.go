package httpapi_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/httpapi"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/uplink"
)

func TestDevices(t *testing.T) {
	t.Parallel() // it waits for the second look at closed connections
	w := open(t)
	in := api.NewDevice{ID: "s1", Product: "sensor", Hardware: "rev-b", Labels: api.Labels{"site": "berlin"}}
	res := w.want(w.send(access.Operator, "POST", "/devices", in), 201, "")
	var d api.Device
	res.decode(t, &d)
	if d.ID != "s1" || d.Labels["site"] != "berlin" || d.Rev == 0 || res.Header.Get("ETag") != fmt.Sprintf("%q", fmt.Sprint(d.Rev)) {
		t.Errorf("%+v %s", d, res.Header.Get("ETag"))
	}
	if got := w.audit(); got != "t-operator device.add s1" {
		t.Errorf("audit: %s", got)
	}
	w.want(w.send(access.Operator, "POST", "/devices", in), 201, "") // a double click
	in.Hardware = "rev-c"
	w.want(w.send(access.Operator, "POST", "/devices", in), 409, "device_exists")

	// Two people change it: the second one supposed what is not so any more.
	w.want(w.send(access.Operator, "PATCH", "/devices/s1", `{"hardware":"rev-d","labels":{"spare":"yes"}}`, header("If-Match", res.Header.Get("ETag"))), 200, "")
	w.want(w.send(access.Operator, "PATCH", "/devices/s1", `{"hardware":"rev-e"}`, header("If-Match", res.Header.Get("ETag"))), 412, "stale")
	w.want(w.send(access.Operator, "PATCH", "/devices/s1", `{"labels":{"site":null}}`), 200, "").decode(t, &d)
	if d.Hardware != "rev-d" || len(d.Labels) != 1 || d.Labels["spare"] != "yes" {
		t.Errorf("after the patches: %+v", d)
	}
	for range 2 {
		var out api.ShutOut
		w.want(w.send(access.Operator, "POST", "/devices/s1/disable", nil), 200, "").decode(t, &out)
		if out.Device != "s1" || !out.Clean || out.VerifiedAfter == "" || out.StoredAt.Sub(w.now) > time.Second || out.ClosedAt.IsZero() || !out.EndedAt.IsZero() || !out.RefusedAt.IsZero() || out.LastLook.IsZero() {
			t.Errorf("%+v", out)
		}
	}
	if w.want(w.send(access.Viewer, "GET", "/devices/s1", nil), 200, "").decode(t, &d); !d.Disabled {
		t.Error("not disabled")
	}
	if w.want(w.send(access.Operator, "POST", "/devices/s1/enable", nil), 200, "").decode(t, &d); d.Disabled {
		t.Error("not enabled")
	}
	var pw api.FallbackPassword
	w.want(w.send(access.Operator, "POST", "/devices/s1/fallback-password", nil), 201, "").decode(t, &pw)
	res = w.want(w.send(access.Viewer, "GET", "/devices/s1", nil), 200, "")
	if pw.Password == "" || bytes.Contains(res.body, []byte(pw.Password)) || bytes.Contains(res.body, []byte("sha256")) {
		t.Errorf("the device shows its password: %s", res.body)
	}
	w.want(w.send(access.Operator, "POST", "/devices/none/disable", nil), 404, "not_found")
	w.want(w.send(access.Viewer, "DELETE", "/devices/s1", nil), 403, "role_too_low")
	w.want(w.send(access.Operator, "DELETE", "/devices/s1", nil), 200, "")
	w.want(w.send(access.Viewer, "GET", "/devices/s1", nil), 404, "not_found")
	w.want(w.send(access.Operator, "DELETE", "/devices/s1", nil), 404, "not_found") // it never had a certificate
}

func TestImportIsAllOrNothing(t *testing.T) {
	w := open(t)
	var rep api.DeviceImportReport
	in := api.DeviceImport{Devices: []api.NewDevice{{ID: "a", Product: "p"}, {ID: "b", Product: "p"}}}
	w.want(w.send(access.Operator, "POST", "/device-imports", in), 200, "").decode(t, &rep)
	if rep.Created != 2 || rep.Unchanged != 0 {
		t.Errorf("%+v", rep)
	}
	w.now = w.now.Add(time.Hour)
	in.Devices = append(in.Devices, api.NewDevice{ID: "c", Product: "p"})
	w.want(w.send(access.Operator, "POST", "/device-imports", in), 200, "").decode(t, &rep)
	if rep.Created != 1 || rep.Unchanged != 2 {
		t.Errorf("%+v", rep)
	}
	in.Devices = append(in.Devices, api.NewDevice{ID: "d", Product: "p"}, api.NewDevice{ID: "B", Product: "p"})
	w.want(w.send(access.Operator, "POST", "/device-imports", in), 400, "invalid")
	w.want(w.send(access.Viewer, "GET", "/devices/d", nil), 404, "not_found")
}

func TestPagesCoverTheListOnceAndBelongToIt(t *testing.T) {
	w := open(t)
	w.devices(25)
	var ids []string
	cursor, first := "", ""
	for n := 0; ; n++ {
		var page api.DeviceList
		w.want(w.send(access.Viewer, "GET", "/devices?product=lamp&limit=10&cursor="+cursor, nil), 200, "").decode(t, &page)
		for _, d := range page.Items {
			ids = append(ids, d.ID)
		}
		if cursor = page.NextCursor; cursor == "" {
			break
		}
		if first == "" {
			first = cursor
		}
		if n > 5 {
			t.Fatal("it does not end")
		}
	}
	if len(ids) != 25 || ids[0] != "d000" || ids[24] != "d024" {
		t.Errorf("%d devices: %v", len(ids), ids)
	}
	for _, path := range []string{"/devices?cursor=", "/devices?product=sensor&cursor=", "/quarantine?cursor=", "/audit?cursor=", "/rollouts?product=lamp&cursor="} {
		w.want(w.send(access.Viewer, "GET", path+first, nil), 400, "cursor_invalid")
	}
	w.want(w.send(access.Viewer, "GET", "/devices?limit=7&product=lamp&cursor="+first, nil), 200, "")
	flipped := []byte(first)
	flipped[len(flipped)/2] ^= 1
	w.want(w.send(access.Viewer, "GET", "/devices?product=lamp&cursor="+string(flipped), nil), 400, "cursor_invalid")
}

func TestDeviceFilters(t *testing.T) {
	w := open(t)
	w.devices(3)
	w.update(func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: "x1", Product: "sensor", Labels: map[string]string{"site": "a=b"}, CreatedAt: day}); err != nil {
			return err
		}
		return tx.PutStatus(fleet.Status{Device: "x1", Online: true, State: []byte(`{"battery":87}`)})
	})
	for query, want := range map[string]int{
		"": 4, "?product=lamp": 3, "?product=none": 0, "?q=00": 3, "?q=x": 1, "?online=true": 1, "?online=false": 3,
		"?label=site=a%3Db": 1, "?label=site=b": 0, "?label=site=a%3Db&product=lamp": 0,
	} {
		var page api.DeviceList
		if w.want(w.send(access.Viewer, "GET", "/devices"+query, nil), 200, "").decode(t, &page); len(page.Items) != want {
			t.Errorf("%s: %d devices, want %d", query, len(page.Items), want)
		}
	}
	res := w.send(access.Viewer, "GET", "/devices/x1", nil)
	if !bytes.Contains(res.body, []byte(`"state":{"battery":87}`)) {
		t.Errorf("%s", res.body)
	}
}

func TestCertificates(t *testing.T) {
	t.Parallel() // it waits for the second look at closed connections
	w := open(t)
	w.devices(1)
	w.now = time.Now()
	_, csr := newKey(t)
	var c, again api.Certificate
	w.want(w.send(access.Operator, "POST", "/devices/d000/certificates", api.CertificateRequest{CSR: csr, Lifetime: "24h"}), 201, "").decode(t, &c)
	w.want(w.send(access.Operator, "POST", "/devices/d000/certificates", api.CertificateRequest{CSR: csr}), 201, "").decode(t, &again)
	if c.Serial != again.Serial {
		t.Errorf("the same key got %s and %s", c.Serial, again.Serial)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM(w.Trust)
	block, rest := pem.Decode([]byte(c.Chain))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	between.AppendCertsFromPEM(rest)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("the chain: %v", err)
	}
	for path, want := range map[string]int{
		"/devices/d000/certificates": 1, "/certificates?within=1h": 0, "/certificates?within=48h": 1, "/certificates": 1,
	} {
		var list api.CertificateList
		if w.want(w.send(access.Viewer, "GET", path, nil), 200, "").decode(t, &list); len(list.Items) != want || want > 0 && list.Items[0].Chain != "" {
			t.Errorf("%s: %+v", path, list)
		}
	}
	var ren api.RenewalReport
	w.want(w.send(access.Operator, "POST", "/certificates/renewals", `{"devices":["d000"],"dry_run":true}`), 200, "").decode(t, &ren)
	if !ren.DryRun || ren.Due+len(ren.Skipped) != 1 {
		t.Errorf("%+v", ren)
	}
	w.want(w.send(access.Operator, "POST", "/certificates/renewals", `{"within":"1h","all":true}`), 400, "invalid")
	var rep api.RevocationReport
	w.want(w.send(access.Operator, "POST", "/certificates/"+c.Serial+"/revocation", `{"reason":"key-compromise"}`), 200, "").decode(t, &rep)
	if rep.Certificate.State != "revoked" || rep.Certificate.Reason != "key-compromise" || !rep.Clean || rep.StoredAfter == "" {
		t.Errorf("%+v", rep)
	}
	w.want(w.send(access.Viewer, "GET", "/certificates/"+c.Serial, nil), 200, "").decode(t, &c)
	if c.State != "revoked" || c.Reason != "key-compromise" {
		t.Errorf("%+v", c)
	}
	w.want(w.send(access.Operator, "POST", "/devices/d000/certificates", api.CertificateRequest{CSR: csr}), 403, "key_revoked")
	w.want(w.send(access.Viewer, "GET", "/certificates/5f2d", nil), 404, "not_found")
	w.want(w.send(access.Operator, "POST", "/devices/none/certificates", api.CertificateRequest{CSR: csr}), 404, "not_found")
}

// publish registers a key and uploads an image of product lamp.
func (w *world) publish(version string) (jws string, img []byte) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		w.t.Fatal(err)
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	w.want(w.send(access.Admin, "POST", "/firmware/keys", api.NewSigningKey{Product: "lamp", PublicKey: text}), 201, "")
	img = bytes.Repeat([]byte(version), 1000)
	sum := fleet.HashOf(sha256.Sum256(img))
	jws, err = firmware.Sign(firmware.Manifest{Product: "lamp", Version: firmware.Version(version), Size: int64(len(img)), SHA256: sum, ImageHash: sum}, key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.want(w.upload(jws, img), 201, "")
	return jws, img
}

func (w *world) upload(jws string, img []byte) result {
	return w.send(access.Operator, "POST", "/firmware/releases", img, func(r *http.Request) {
		r.Header.Set("Content-Type", "application/octet-stream")
		r.Header.Set("Muster-Manifest", jws)
	})
}

func TestFirmware(t *testing.T) {
	w := open(t)
	jws, img := w.publish("1.1.0")
	w.now = w.now.Add(time.Minute)
	w.want(w.upload(jws, img), 200, "") // again
	w.want(w.upload(jws, append(img[:len(img)-1:len(img)-1], 'x')), 422, "image_mismatch")
	if res := w.upload(jws[:len(jws)-4]+"AAAA", img); res.StatusCode != 422 {
		t.Errorf("a bad signature: %d %s", res.StatusCode, res.body)
	}
	if res := w.upload("no jws", img); res.StatusCode != 422 && res.StatusCode != 400 {
		t.Errorf("no JWS: %d", res.StatusCode)
	}
	var rel api.Release
	w.want(w.send(access.Viewer, "GET", "/firmware/releases/lamp/1.1.0", nil), 200, "").decode(t, &rel)
	if rel.JWS != jws || rel.Size != int64(len(img)) || rel.UploadedBy != "t-operator" {
		t.Errorf("%+v", rel)
	}
	var list api.ReleaseList
	if w.want(w.send(access.Viewer, "GET", "/firmware/releases?product=lamp", nil), 200, "").decode(t, &list); len(list.Items) != 1 {
		t.Errorf("%+v", list)
	}
	var keys api.SigningKeyList
	w.want(w.send(access.Viewer, "GET", "/firmware/keys", nil), 200, "").decode(t, &keys)
	var key api.SigningKey
	w.want(w.send(access.Admin, "POST", "/firmware/keys/"+keys.Items[0].ID+"/revoke", nil), 200, "").decode(t, &key)
	if !key.Revoked || w.audit() != "t-admin key.revoke "+key.ID {
		t.Errorf("%+v, %s", key, w.audit())
	}
	if res := w.upload(jws, img); res.StatusCode != 422 {
		t.Errorf("signed by a revoked key: %d", res.StatusCode)
	}
}

func TestRollouts(t *testing.T) {
	w := open(t)
	w.devices(8)
	w.publish("1.1.0")
	in := api.NewRollout{ID: "r1", Product: "lamp", Version: "1.1.0", Plan: api.Plan{Stages: []api.Stage{{Count: 1}, {Percent: 25}, {Percent: 100}}, Soak: "30m"}}
	var r api.Rollout
	w.want(w.send(access.Operator, "POST", "/rollouts", in), 201, "").decode(t, &r)
	if r.State != "draft" || r.Targets != 8 || len(r.Stages) != 3 || r.Stages[1].Quota != 2 || r.Plan.Soak != "30m0s" || r.CreatedBy != "t-operator" {
		t.Errorf("%+v", r)
	}
	w.want(w.send(access.Operator, "POST", "/rollouts", in), 409, "rollout_exists")
	w.want(w.send(access.Operator, "POST", "/rollouts/r1/pause", nil), 409, "conflict")
	for _, step := range []struct{ verb, state string }{{"start", "running"}, {"pause", "paused"}, {"resume", "running"}, {"abort", "aborted"}} {
		if w.want(w.send(access.Operator, "POST", "/rollouts/r1/"+step.verb, nil), 200, "").decode(t, &r); string(r.State) != step.state {
			t.Errorf("%s: %s", step.verb, r.State)
		}
		if got := w.audit(); got != "t-operator rollout."+step.verb+" r1" {
			t.Errorf("audit: %s", got)
		}
	}
	var jobs api.JobList
	if w.want(w.send(access.Viewer, "GET", "/rollouts/r1/devices?limit=5", nil), 200, "").decode(t, &jobs); len(jobs.Items) != 5 || jobs.NextCursor == "" {
		t.Errorf("%+v", jobs)
	}
	w.want(w.send(access.Viewer, "GET", "/rollouts/r1/devices?state=offered", nil), 200, "")
	var ds api.DecisionList
	if w.want(w.send(access.Viewer, "GET", "/rollouts/r1/decisions", nil), 200, "").decode(t, &ds); len(ds.Items) < 4 {
		t.Errorf("%+v", ds)
	}
	in.ID = ""
	var made api.Rollout
	w.now = w.now.Add(time.Hour)
	if w.want(w.send(access.Operator, "POST", "/rollouts", in), 201, "").decode(t, &made); made.ID == "" {
		t.Error("no id was made")
	}
	var list api.RolloutList
	w.want(w.send(access.Viewer, "GET", "/rollouts", nil), 200, "").decode(t, &list)
	if len(list.Items) != 2 || list.Items[0].ID != made.ID {
		t.Errorf("not the newest first: %+v", list)
	}
	w.want(w.send(access.Operator, "POST", "/rollouts", api.NewRollout{Product: "lamp", Version: "1.1.0", Target: api.Target{Labels: api.Labels{"a": "b"}}}), 422, "empty_target")
	w.want(w.send(access.Viewer, "GET", "/rollouts/none", nil), 404, "not_found")
}

func TestRecoveryAndQuarantine(t *testing.T) {
	w := open(t)
	w.devices(2)
	ids := []string{}
	w.update(func(tx *bolt.Tx) error {
		for i := range 3 {
			if err := tx.Quarantine(uplink.Quarantined{At: day, Vhost: "devices", Key: "d.x.up.hello", Body: []byte{0, 0xff}, Size: 2, Reason: fmt.Sprint("r", i)}); err != nil {
				return err
			}
		}
		for _, dev := range []fleet.DeviceID{"d000", "d001"} {
			key, _ := newKey(t)
			der, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				return err
			}
			h := fleet.HashOf(sha256.Sum256(der))
			ids = append(ids, string(h[:16]))
			if err := tx.PutRequest(pki.Request{ID: string(h[:16]), Device: dev, PublicKey: der, KeyHash: h, State: pki.Waiting, AskedAt: day}); err != nil {
				return err
			}
		}
		return nil
	})
	var list api.RecoveryRequestList
	if w.want(w.send(access.Viewer, "GET", "/recovery/requests?state=waiting", nil), 200, "").decode(t, &list); len(list.Items) != 2 {
		t.Errorf("%+v", list)
	}
	for i, verb := range []string{"approve", "deny"} {
		var req api.RecoveryRequest
		w.want(w.send(access.Operator, "POST", "/recovery/requests/"+ids[i]+"/"+verb, nil), 200, "").decode(t, &req)
		if want := map[string]api.RecoveryState{"approve": "approved", "deny": "denied"}[verb]; req.State != want || req.By != "t-operator" {
			t.Errorf("%+v", req)
		}
		w.want(w.send(access.Operator, "POST", "/recovery/requests/"+ids[i]+"/"+verb, nil), 200, "") // a double click
	}
	w.want(w.send(access.Operator, "POST", "/recovery/requests/"+ids[0]+"/deny", nil), 409, "decided")
	w.want(w.send(access.Operator, "POST", "/recovery/requests/0000000000000000/deny", nil), 404, "not_found")

	var q api.QuarantineList
	if w.want(w.send(access.Viewer, "GET", "/quarantine?limit=2", nil), 200, "").decode(t, &q); len(q.Items) != 2 || q.NextCursor == "" || q.Items[0].Body != nil {
		t.Errorf("%+v", q)
	}
	next := q.NextCursor
	if w.want(w.send(access.Viewer, "GET", "/quarantine?limit=2&cursor="+next, nil), 200, "").decode(t, &q); len(q.Items) != 1 || q.NextCursor != "" {
		t.Errorf("%+v", q)
	}
	var one api.Quarantined
	if w.want(w.send(access.Viewer, "GET", "/quarantine/1", nil), 200, "").decode(t, &one); !bytes.Equal(one.Body, []byte{0, 0xff}) {
		t.Errorf("%+v", one)
	}
	w.want(w.send(access.Operator, "DELETE", "/quarantine/1", nil), 204, "")
	w.want(w.send(access.Operator, "DELETE", "/quarantine/1", nil), 404, "not_found")
}

func TestOperators(t *testing.T) {
	w := open(t)
	var made api.CreatedToken
	w.want(w.send(access.Admin, "POST", "/tokens", api.NewToken{Name: "ci", Role: "operator"}), 201, "").decode(t, &made)
	if !made.Token.ExpiresAt.Equal(day.Add(90*24*time.Hour)) || made.Token.CreatedBy != "t-admin" {
		t.Errorf("%+v", made.Token)
	}
	w.want(w.send(access.Admin, "POST", "/tokens", api.NewToken{Name: "ci", Role: "operator"}), 409, "token_exists")
	w.want(w.send(access.Admin, "POST", "/tokens", api.NewToken{Name: "ever", Role: "viewer", ExpiresIn: "never"}), 201, "")
	res := w.want(w.send(access.Admin, "GET", "/tokens", nil), 200, "")
	if bytes.Contains(res.body, []byte(made.Secret)) || bytes.Contains(res.body, []byte("sha256")) {
		t.Errorf("%s", res.body)
	}
	w.Tokens["ci"] = made.Secret
	var me api.Token
	if w.want(w.send("ci", "GET", "/whoami", nil), 200, "").decode(t, &me); me.Name != "ci" || me.Role != "operator" {
		t.Errorf("%+v", me)
	}
	w.want(w.send("ci", "POST", "/tokens", api.NewToken{Name: "more", Role: "admin"}), 403, "role_too_low")
	w.want(w.send(access.Admin, "DELETE", "/tokens/ci", nil), 204, "")
	w.want(w.send(access.Admin, "DELETE", "/tokens/t-admin", nil), 409, "last_admin")
	var trail api.AuditList
	w.want(w.send(access.Viewer, "GET", "/audit?limit=2", nil), 200, "").decode(t, &trail)
	if len(trail.Items) != 2 || trail.Items[0].What != "login" || trail.Items[0].Who != "t-viewer" || trail.Items[1].What != "token.delete" || trail.NextCursor == "" {
		t.Errorf("%+v", trail)
	}
	first := trail.Items[1].Seq
	next := trail.NextCursor
	if w.want(w.send(access.Viewer, "GET", "/audit?limit=2&cursor="+next, nil), 200, "").decode(t, &trail); trail.Items[0].Seq != first-1 {
		t.Errorf("%+v after %d", trail, first)
	}
}

func TestSite(t *testing.T) {
	w := open(t)
	for _, path := range []string{"/trust", "/endpoints", "/version"} {
		w.want(w.send(access.Viewer, "GET", path, nil), 200, "")
	}
	if res := w.want(w.send(access.Viewer, "GET", "/openapi.yaml", nil), 200, ""); !bytes.Equal(res.body, api.Spec) {
		t.Error("another document")
	}
	for path, want := range map[string]int{"/livez": 200, "/metrics": 401, "/readyz": 401} { // no Readyz was given
		rec := httptest.NewRecorder()
		w.srv.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		if rec.Code != want {
			t.Errorf("%s: %d", path, rec.Code)
		}
	}
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.Header.Set("Authorization", "Bearer "+w.Tokens[access.Viewer])
	if res := w.do(r); res.StatusCode != 200 {
		t.Errorf("metrics with a token: %d", res.StatusCode)
	}
}

// Every operation that changes something is in this list, and leaves a line in the audit trail that names who did it.
func TestMassRevocation(t *testing.T) {
	w := open(t)
	w.now = time.Now()
	w.devices(2)
	path := "/issuers/" + string(w.Issuer.ID()) + "/revocation"
	w.want(w.send(access.Viewer, "GET", path, nil), 404, "not_found")
	w.want(w.send(access.Admin, "POST", path, `{"drill":true}`), 404, "not_found") // it has signed nothing
	for i := range 2 {
		_, csr := newKey(t)
		w.want(w.send(access.Operator, "POST", fmt.Sprintf("/devices/d%03d/certificates", i), api.CertificateRequest{CSR: csr}), 201, "")
	}
	w.want(w.send(access.Operator, "POST", path, `{"drill":true}`), 403, "role_too_low")
	w.want(w.send(access.Admin, "POST", path, `{"reason":"because"}`), 400, "reason_invalid")
	w.want(w.send(access.Admin, "POST", "/issuers/X/revocation", `{}`), 400, "id_invalid")
	var m api.MassRevocation
	w.want(w.send(access.Admin, "POST", path, `{"drill":true}`), 200, "").decode(t, &m)
	if m.State != "drill" || m.Total != 2 || m.Revoked != 0 || m.Took == "" || m.Estimate == "" {
		t.Errorf("%+v", m)
	}
	w.want(w.send(access.Admin, "POST", path, `{"reason":"key-compromise"}`), 200, "").decode(t, &m)
	if m.State != "running" || m.Total != 2 || m.By != "t-admin" {
		t.Errorf("%+v", m)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Enroll.Run(ctx) }()
	for end := time.Now().Add(20 * time.Second); m.State != "done"; {
		if w.want(w.send(access.Viewer, "GET", path, nil), 200, "").decode(t, &m); time.Now().After(end) {
			t.Fatalf("%+v", m)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if m.Revoked != 2 || m.Reason != "key-compromise" || m.DoneAt.IsZero() {
		t.Errorf("%+v", m)
	}
}

// fotaOf is a signature of img for esp32FOTA.
func fotaOf(t *testing.T, img []byte) api.NewESP32FOTA {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(img)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return api.NewESP32FOTA{Signature: base64.StdEncoding.EncodeToString(signature), PublicKey: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}
}

func TestEveryChangeIsOnRecord(t *testing.T) {
	t.Parallel() // it waits for the second look at closed connections
	w := open(t)
	w.now = time.Now()
	w.devices(2)
	jws, img := w.publish("1.0.0")
	var keys api.SigningKeyList
	w.send(access.Viewer, "GET", "/firmware/keys", nil).decode(t, &keys)
	_, csr := newKey(t)
	var cert api.Certificate
	reqs := []string{}
	w.update(func(tx *bolt.Tx) error {
		for range 2 {
			key, _ := newKey(t)
			der, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				return err
			}
			h := fleet.HashOf(sha256.Sum256(der))
			reqs = append(reqs, string(h[:16]))
			if err := tx.PutRequest(pki.Request{ID: string(h[:16]), Device: "d001", PublicKey: der, KeyHash: h, State: pki.Waiting, AskedAt: w.now}); err != nil {
				return err
			}
		}
		return tx.Quarantine(uplink.Quarantined{At: w.now, Reason: "r"})
	})
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(other.Public())
	if err != nil {
		t.Fatal(err)
	}
	pub := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	plan := func(id string) api.NewRollout { return api.NewRollout{ID: id, Product: "lamp", Version: "1.0.0"} }

	left := map[string]bool{}
	for _, op := range httpapi.Operations() {
		if op.Method != "GET" {
			left[op.ID] = true
		}
	}
	do := func(op, method, path string, body any) result {
		t.Helper()
		delete(left, op)
		before, err := w.Access.Audit(t.Context(), 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		res := w.send(access.Admin, method, path, body)
		after, err := w.Access.Audit(t.Context(), 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode >= 300 || after[0].Seq == before[0].Seq || after[0].Who != "t-admin" || after[0].At.Before(w.now.Add(-time.Second)) {
			t.Errorf("%s: %d, newest line %+v, %s", op, res.StatusCode, after[0], res.body)
		}
		return res
	}
	do("createDevice", "POST", "/devices", api.NewDevice{ID: "n1", Product: "lamp"})
	do("importDevices", "POST", "/device-imports", api.DeviceImport{Devices: []api.NewDevice{{ID: "n2", Product: "lamp"}}})
	do("updateDevices", "POST", "/devices/bulk-update", `{"devices":["n1"],"join":["early"]}`)
	delete(left, "previewTarget") // changes nothing
	do("makeCheckpoint", "POST", "/audit/checkpoints", nil)
	do("updateDevice", "PATCH", "/devices/n1", `{"hardware":"b"}`)
	do("disableDevice", "POST", "/devices/n1/disable", nil)
	do("removeDevice", "DELETE", "/devices/n2", nil)
	do("enableDevice", "POST", "/devices/n1/enable", nil)
	do("newFallbackPassword", "POST", "/devices/n1/fallback-password", nil)
	do("newEnrolmentPassword", "POST", "/devices/n1/enrolment-password", `{"for":"1h"}`)
	do("issueCertificate", "POST", "/devices/d000/certificates", api.CertificateRequest{CSR: csr}).decode(t, &cert)
	do("renewCertificates", "POST", "/certificates/renewals", `{"devices":["d000"]}`)
	do("renewServerCertificate", "POST", "/server-certificates/ops/renewal", nil)
	do("signRevocationList", "POST", "/revocation-lists/"+string(w.Issuer.ID()), nil)
	do("publishTrustBundle", "POST", "/trust/bundle", api.NewTrustBundle{RootsPEM: string(w.Trust)})
	w.Authorities.Offline = true
	do("startRotation", "POST", "/rotations", `{"kind":"device-ca"}`)
	do("importRotationCertificates", "PUT", "/rotations/1/certificates", api.RotationImport{PEM: w.newCAs(1)})
	do("advanceRotation", "POST", "/rotations/1/advance", nil)
	w.want(w.send(access.Admin, "POST", "/rotations/1/advance", nil), 200, "")
	do("takeBackRotation", "POST", "/rotations/1/back", `{"why":"old clients"}`)
	do("cancelRotation", "POST", "/rotations/1/cancel", nil)
	do("blockKey", "POST", "/blocked-keys", api.NewBlockedKey{SHA256: strings.Repeat("ab", 32), Why: "leaked"})
	do("unblockKey", "DELETE", "/blocked-keys/"+strings.Repeat("ab", 32), nil)
	do("setCertificatePolicy", "PUT", "/certificates/policy", `{"lifetime":"1440h"}`)
	do("revokeIssuer", "POST", "/issuers/"+string(w.Issuer.ID())+"/revocation", `{"drill":true}`)
	do("revokeCertificate", "POST", "/certificates/"+cert.Serial+"/revocation", `{}`)
	do("addSigningKey", "POST", "/firmware/keys", api.NewSigningKey{PublicKey: pub})
	do("setFloor", "PUT", "/firmware/releases/lamp/1.0.0/floor", `{}`)
	do("clearFloor", "DELETE", "/firmware/releases/lamp/1.0.0/floor", nil)
	fota := fotaOf(t, img)
	do("setESP32FOTA", "PUT", "/firmware/releases/lamp/1.0.0/esp32fota", fota)
	w.want(w.send(access.Operator, "PUT", "/firmware/releases/lamp/1.0.0/esp32fota", api.NewESP32FOTA{Signature: "?", PublicKey: fota.PublicKey}), 400, "invalid")
	do("clearESP32FOTA", "DELETE", "/firmware/releases/lamp/1.0.0/esp32fota", nil)
	do("createRollout", "POST", "/rollouts", plan("r1"))
	for _, verb := range []string{"start", "pause", "resume", "abort"} {
		do(verb+"Rollout", "POST", "/rollouts/r1/"+verb, nil)
	}
	draft := plan("r2")
	draft.Plan.Approval, draft.Plan.Stages, draft.Plan.Rollback = true, []api.Stage{{Count: 1, Hold: true}, {Percent: 100}}, api.RollbackPlan{PreviousSlot: true}
	draft.Plan.MaxFailures, draft.Plan.VerifyFor = new(5), "0s"
	w.want(w.send(access.Operator, "POST", "/rollouts", draft), 201, "")
	do("approveRollout", "POST", "/rollouts/r2/approve", nil)
	w.want(w.send(access.Operator, "POST", "/rollouts/r2/start", nil), 200, "")
	first := w.grant("r2")
	w.step("r2", rollout.Confirmed{At: w.now, Device: first, Session: w.now.Add(time.Second)}, first)
	do("advanceRollout", "POST", "/rollouts/r2/advance", nil)
	second := w.grant("r2")
	w.step("r2", rollout.Reported{At: w.now, Device: second, Report: rollout.ReportFailed}, second)
	do("retryRollout", "POST", "/rollouts/r2/retry", nil)
	do("rollbackRollout", "POST", "/rollouts/r2/rollback", nil)
	do("pardonDevice", "POST", "/devices/d000/pardon", nil)
	delete(left, "planRollout") // changes nothing
	do("approveRecoveryRequest", "POST", "/recovery/requests/"+reqs[0]+"/approve", nil)
	do("denyRecoveryRequest", "POST", "/recovery/requests/"+reqs[1]+"/deny", nil)
	w.update(func(tx *bolt.Tx) error {
		return tx.PutStatus(fleet.Status{Device: "n1", Vhost: "fallback", Version: "2.0.0", HelloAt: w.now})
	})
	do("repairDevice", "PUT", "/recovery/firmware/n1", `{"version":"1.0.0"}`)
	do("cancelRepair", "DELETE", "/recovery/firmware/n1", nil)
	do("dropQuarantined", "DELETE", "/quarantine/1", nil)
	do("createToken", "POST", "/tokens", api.NewToken{Name: "ci", Role: "viewer"})
	do("deleteToken", "DELETE", "/tokens/ci", nil)
	digest := strings.Repeat("5f", 32)
	do("setOTASlot", "PUT", "/firmware/ota-slots/lamp", `{"bytes":1966080}`)
	do("clearOTASlot", "DELETE", "/firmware/ota-slots/lamp", nil)
	do("addSecureBootKey", "POST", "/firmware/secure-boot-keys", api.NewSecureBootKey{Product: "lamp", Key: digest})
	do("revokeSecureBootKey", "POST", "/firmware/secure-boot-keys/lamp/"+digest+"/revoke", nil)
	do("revokeSigningKey", "POST", "/firmware/keys/"+keys.Items[0].ID+"/revoke", nil)

	// The upload was made by publish, before.
	delete(left, "uploadRelease")
	es, err := w.Access.Audit(t.Context(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(es, func(e access.Entry) bool { return e.Who == "t-operator" && strings.Contains(e.On, "1.0.0") }) {
		t.Errorf("the release of %d bytes is not on record: %d", len(img), len(jws))
	}
	for op := range left {
		t.Errorf("%s is not tried here", op)
	}
}

// Labels, groups and target expressions, as an operator meets them.
func TestTargetsAndGroups(t *testing.T) {
	w := open(t)
	w.devices(4)
	var rep api.BulkReport
	w.send(access.Operator, "POST", "/devices/bulk-update", `{"devices":["d000","d001"],"labels":{"site":"york"},"join":["early"]}`).decode(t, &rep)
	if rep.Count != 2 || rep.Changed != 2 || len(rep.Sample) != 2 {
		t.Errorf("%+v", rep)
	}
	var p api.TargetPreview
	w.send(access.Viewer, "POST", "/targets/preview", `{"where":"labels.site == \"york\" && \"early\" in groups"}`).decode(t, &p)
	if p.Count != 2 || p.Scanned != 4 || fmt.Sprint(p.Sample) != "[d000 d001]" {
		t.Errorf("%+v", p)
	}
	for _, query := range []string{"group=early", "where=labels.site%20%3D%3D%20%22york%22"} {
		var l api.DeviceList
		w.send(access.Viewer, "GET", "/devices?"+query, nil).decode(t, &l)
		if len(l.Items) != 2 || fmt.Sprint(l.Items[0].Groups) != "[early]" {
			t.Errorf("%s: %+v", query, l.Items)
		}
	}
	w.send(access.Operator, "POST", "/devices/bulk-update", `{"where":"\"early\" in groups","leave":["early"],"dry_run":true}`).decode(t, &rep)
	if rep.Changed != 2 {
		t.Errorf("dry run: %+v", rep)
	}
	for body, code := range map[string]string{
		`{"where":"lables.site == \"x\""}`: "target_invalid",
		`{"where":"id"}`:                   "target_invalid",
		`{}`:                               "",
	} {
		if res := w.send(access.Viewer, "POST", "/targets/preview", body); res.StatusCode != 400 || !bytes.Contains(res.body, []byte(code)) {
			t.Errorf("%s: %d %s", body, res.StatusCode, res.body)
		}
	}
	for body, want := range map[string]int{
		`{"join":["early"]}`:                      400,
		`{"devices":["ghost"],"join":["early"]}`:  404,
		`{"devices":["d000"],"join":["Not OK"]}`:  400,
		`{"where":"true","devices":["d000"]}`:     400,
		`{"where":"true"}`:                        400,
		`{"devices":["Not OK"],"join":["early"]}`: 400,
		`{"devices":["d000"],"unknown":"member"}`: 400,
	} {
		if res := w.send(access.Operator, "POST", "/devices/bulk-update", body); res.StatusCode != want {
			t.Errorf("%s: %d %s", body, res.StatusCode, res.body)
		}
	}
	if res := w.send(access.Viewer, "POST", "/devices/bulk-update", `{"devices":["d000"]}`); res.StatusCode != 403 {
		t.Errorf("a viewer: %d", res.StatusCode)
	}
}
