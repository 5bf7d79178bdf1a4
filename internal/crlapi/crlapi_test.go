package crlapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"muster/internal/crlapi"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/revocation"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

// rig is a CA with a store, and the HTTP server over them.
type rig struct {
	*testing.T
	db     *bolt.DB
	issuer pki.Issuer
	other  pki.Issuer // signs nothing here
	lists  *revocation.Lists
	url    string
	dir    string
}

func issuer(t testing.TB, name string) pki.Issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte(name + " key"),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return pki.Issuer{Cert: c, Key: key}
}

func newRig(t *testing.T) *rig {
	r := &rig{T: t, db: storetest.Open(t), issuer: issuer(t, "devices 1"), other: issuer(t, "devices 2"), dir: t.TempDir()}
	r.lists = revocation.New(revocation.Config{
		Update: func(ctx context.Context, f func(revocation.Tx) error) error {
			return r.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(revocation.Tx) error) error {
			return r.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Issuers: func() []pki.Issuer { return []pki.Issuer{r.issuer, r.other} }, Log: slog.New(slog.DiscardHandler),
	})
	ts := httptest.NewServer(crlapi.New(r.lists, slog.New(slog.DiscardHandler)))
	t.Cleanup(ts.Close)
	r.url = ts.URL
	return r
}

// certify stores a certificate of the first issuer, and writes it to a file.
func (r *rig) certify(serial int64, ends time.Time) pki.Certificate {
	r.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.Fatal(err)
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "pump-7"}, NotBefore: ends.Add(-90 * 24 * time.Hour), NotAfter: ends, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, t, r.issuer.Cert, key.Public(), r.issuer.Key)
	if err != nil {
		r.Fatal(err)
	}
	s := fleet.SerialOf(big.NewInt(serial))
	c := pki.Certificate{Serial: s, Device: "pump-7", State: pki.Active, KeyHash: fleet.Hash(s), Chain: [][]byte{der, r.issuer.Cert.Raw}, NotAfter: ends}
	r.put(c)
	r.file(fmt.Sprint(serial, ".pem"), der)
	return c
}

func (r *rig) put(c pki.Certificate) {
	r.Helper()
	if err := r.db.Update(context.Background(), func(tx *bolt.Tx) error {
		if _, err := tx.Device(c.Device); fleet.Is(err, fleet.NotFound) {
			if err := tx.PutDevice(fleet.Device{ID: c.Device}); err != nil {
				return err
			}
		}
		return tx.PutCertificate(c)
	}); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) revoke(c pki.Certificate, at time.Time, reason int) {
	r.Helper()
	c.State, c.RevokedAt, c.Reason = pki.Revoked, at, reason
	r.put(c)
}

func (r *rig) file(name string, ders ...[]byte) string {
	r.Helper()
	var b bytes.Buffer
	for _, der := range ders {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		r.Fatal(err)
	}
	return path
}

func (r *rig) sign(at time.Time) pki.List {
	r.Helper()
	l, err := r.lists.SignNow(r.Context(), at, r.issuer.ID(), "ops")
	if err != nil {
		r.Fatal(err)
	}
	return l
}

func (r *rig) parsed(l pki.List) *x509.RevocationList {
	r.Helper()
	crl, err := x509.ParseRevocationList(l.DER)
	if err != nil {
		r.Fatal(err)
	}
	if err := crl.CheckSignatureFrom(r.issuer.Cert); err != nil {
		r.Error(err)
	}
	return crl
}

func (r *rig) get(path string) (*http.Response, []byte) {
	r.Helper()
	res, err := http.Get(r.url + path)
	if err != nil {
		r.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.Fatal(err)
	}
	return res, b
}

func TestTheListHoldsWhatIsRevokedUntilItHasStoodThereAfterItsEnd(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	good, bad, short := r.certify(11, now.Add(90*24*time.Hour)), r.certify(12, now.Add(90*24*time.Hour)), r.certify(13, now.Add(48*time.Hour))
	_ = good
	first := r.sign(now)
	number := r.parsed(first).Number
	if crl := r.parsed(first); len(crl.RevokedCertificateEntries) != 0 || crl.Number.Int64() < now.Unix() || crl.NextUpdate.Sub(crl.ThisUpdate) != 7*24*time.Hour || len(crl.AuthorityKeyId) == 0 {
		t.Errorf("the empty list: %d entries, number %s", len(crl.RevokedCertificateEntries), crl.Number)
	}
	r.revoke(bad, now, 1)
	r.revoke(short, now, 0)
	crl := r.parsed(r.sign(now.Add(time.Hour)))
	if len(crl.RevokedCertificateEntries) != 2 || crl.Number.Cmp(number) <= 0 {
		t.Fatalf("%d entries, number %s", len(crl.RevokedCertificateEntries), crl.Number)
	}
	for _, e := range crl.RevokedCertificateEntries {
		if want := map[int64]int{12: 1, 13: 0}[e.SerialNumber.Int64()]; e.ReasonCode != want || e.SerialNumber.Int64() == 13 && len(e.Extensions) != 0 {
			t.Errorf("serial %s: reason %d, %d extensions", e.SerialNumber, e.ReasonCode, len(e.Extensions))
		}
	}
	// It ends on day 2: it stands on the first list after that, and on none after.
	for day, want := range map[int]int{3: 2} {
		if crl := r.parsed(r.sign(now.Add(time.Duration(day) * 24 * time.Hour))); len(crl.RevokedCertificateEntries) != want {
			t.Errorf("on day %d %d entries, want %d", day, len(crl.RevokedCertificateEntries), want)
		}
	}
	if crl := r.parsed(r.sign(now.Add(4 * 24 * time.Hour))); len(crl.RevokedCertificateEntries) != 1 {
		t.Errorf("on day 4 %d entries", len(crl.RevokedCertificateEntries))
	}
	l, err := r.lists.SignNow(t.Context(), now, r.other.ID(), "")
	if err != nil || l.Entries != 0 {
		t.Errorf("the other issuer's list holds %d entries, %v", l.Entries, err)
	}
}

func TestListsOverHTTP(t *testing.T) {
	r := newRig(t)
	if res, _ := r.get("/crl/" + string(r.issuer.ID()) + ".crl"); res.StatusCode != 404 {
		t.Errorf("before there is one: %s", res.Status)
	}
	l := r.sign(time.Now())
	tag := fmt.Sprintf("%q", fmt.Sprint(l.Number))
	res, body := r.get("/crl/" + string(r.issuer.ID()) + ".crl")
	if res.StatusCode != 200 || !bytes.Equal(body, l.DER) || res.Header.Get("Content-Type") != "application/pkix-crl" || res.Header.Get("ETag") != tag {
		t.Errorf("%s %v", res.Status, res.Header)
	}
	req, _ := http.NewRequestWithContext(t.Context(), "GET", r.url+"/crl/"+string(r.issuer.ID())+".crl", nil)
	req.Header.Set("If-None-Match", tag)
	if res, err := http.DefaultClient.Do(req); err != nil || res.StatusCode != 304 {
		t.Errorf("again: %v %v", res, err)
	}
	for _, path := range []string{"/crl/", "/crl/x.crl", "/crl/0011.crl", "/crl/..%2f..%2fetc.crl", "/crl/" + strings.Repeat("ab", 100) + ".crl"} {
		if res, _ := r.get(path); res.StatusCode != 404 {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
}

// OpenSSL asks, by POST and by GET, and checks a certificate against the list.
func TestOpenSSLBelievesTheAnswers(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.certify(11, now.Add(90*24*time.Hour))
	r.revoke(r.certify(12, now.Add(90*24*time.Hour)), now.Add(-time.Minute), 1)
	ca := r.file("ca.pem", r.issuer.Cert.Raw)
	ask := func(args ...string) string {
		out, err := exec.CommandContext(t.Context(), "openssl", append([]string{"ocsp", "-issuer", ca, "-CAfile", ca, "-url", r.url + "/ocsp"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("openssl ocsp %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	if out := ask("-cert", filepath.Join(r.dir, "11.pem")); !strings.Contains(out, "Response verify OK") || !strings.Contains(out, "11.pem: good") {
		t.Errorf("good: %s", out)
	}
	if out := ask("-sha256", "-cert", filepath.Join(r.dir, "12.pem")); !strings.Contains(out, "12.pem: revoked") || !strings.Contains(out, "keyCompromise") {
		t.Errorf("revoked: %s", out)
	}
	if out := ask("-serial", "0x77"); !strings.Contains(out, "0x77: unknown") {
		t.Errorf("unknown: %s", out)
	}
	l := r.sign(now)
	crl := filepath.Join(r.dir, "list.pem")
	if err := os.WriteFile(crl, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: l.DER}), 0o600); err != nil {
		t.Fatal(err)
	}
	for serial, want := range map[string]string{"11": "OK", "12": "certificate revoked"} {
		out, _ := exec.CommandContext(t.Context(), "openssl", "verify", "-crl_check", "-CAfile", ca, "-CRLfile", crl, filepath.Join(r.dir, serial+".pem")).CombinedOutput()
		if !strings.Contains(string(out), want) {
			t.Errorf("%s: %s", serial, out)
		}
	}
}

func TestOCSPRequestsThatAreNotAnswered(t *testing.T) {
	r := newRig(t)
	stranger := issuer(t, "stranger")
	c := r.certify(11, time.Now().Add(time.Hour*999))
	leaf, err := x509.ParseCertificate(c.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := ocsp.CreateRequest(leaf, stranger.Cert, nil)
	if err != nil {
		t.Fatal(err)
	}
	good, err := ocsp.CreateRequest(leaf, r.issuer.Cert, nil)
	if err != nil {
		t.Fatal(err)
	}
	post := func(kind string, body []byte) (int, []byte) {
		res, err := http.Post(r.url+"/ocsp", kind, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, b
	}
	for name, tc := range map[string]struct {
		kind   string
		body   []byte
		status int
		want   []byte
	}{
		"nonsense":       {"application/ocsp-request", []byte("nonsense"), 200, ocsp.MalformedRequestErrorResponse},
		"nothing":        {"application/ocsp-request", nil, 200, ocsp.MalformedRequestErrorResponse},
		"another issuer": {"application/ocsp-request", foreign, 200, ocsp.UnauthorizedErrorResponse},
		"another type":   {"text/plain", good, 415, nil},
		"much too long":  {"application/ocsp-request", make([]byte, revocation.MaxRequest+1), 413, nil},
		"a huge serial":  {"application/ocsp-request", bytes.Repeat([]byte{0x30}, 2000), 200, ocsp.MalformedRequestErrorResponse},
	} {
		status, body := post(tc.kind, tc.body)
		if status != tc.status || tc.want != nil && !bytes.Equal(body, tc.want) {
			t.Errorf("%s: %d, %x", name, status, body)
		}
	}
	res, body := r.get("/ocsp/" + strings.ReplaceAll(base64.StdEncoding.EncodeToString(good), "/", "%2F"))
	answer, err := ocsp.ParseResponse(body, r.issuer.Cert)
	if err != nil || answer.Status != ocsp.Good || res.Header.Get("Content-Type") != "application/ocsp-response" {
		t.Errorf("by GET: %v, %s", err, res.Status)
	}
}

func FuzzAnswer(f *testing.F) {
	i := issuer(f, "devices 1")
	l := revocation.New(revocation.Config{
		View: func(_ context.Context, _ func(revocation.Tx) error) error {
			return fleet.Errorf(fleet.NotFound, "no such certificate")
		},
		Issuers: func() []pki.Issuer { return []pki.Issuer{i} }, Log: slog.New(slog.DiscardHandler),
	})
	good, err := ocsp.CreateRequest(i.Cert, i.Cert, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("nonsense"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if out := l.Answer(t.Context(), time.Now(), b); len(out) == 0 {
			t.Fatal("no answer at all")
		}
	})
}
