package est_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"muster/internal/enroll"
	"muster/internal/est"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
)

// A device without a certificate gets one by its password, connects, and renews with it; the broker's word moves the slots.
func TestLifeOverEST(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	k := newKey(t)
	first := r.issued(ask{op: "simpleenroll", body: csr(t, k, nil), user: string(dev), password: r.password()})
	if rec := r.record(first); rec.State != pki.Issued || rec.Via != pki.ViaEST || rec.By != "ops" {
		t.Errorf("first: %s via %s by %q", rec.State, rec.Via, rec.By)
	}
	r.connected(first)

	// Rekey, with the names of the certificate.
	k2 := newKey(t)
	again := ask{op: "simplereenroll", body: csr(t, k2, like(first)), cert: pair(r, first, k)}
	second := r.issued(again)
	if second.SerialNumber.Cmp(first.SerialNumber) == 0 || !k2.PublicKey.Equal(second.PublicKey) {
		t.Error("the answer is not a certificate for the new key")
	}
	if r.record(first).State != pki.Active || r.record(second).State != pki.Issued {
		t.Error("the old one must rule until the new one is used")
	}
	// The answer is lost: the same request gets the same certificate, also with the new one.
	for _, a := range []ask{again, {op: "simpleenroll", body: csr(t, k2, nil), cert: pair(r, second, k2)}} {
		if c := r.issued(a); !c.Equal(second) {
			t.Error("the same key got another certificate")
		}
	}
	r.connected(second)
	if r.record(first).State != pki.Superseded || r.record(second).State != pki.Active {
		t.Error("using the new one must retire the old one")
	}
	// The old one is out.
	if res, text := r.ask(again); res.StatusCode != 403 || !r.audited("certificate.renew-denied", "") {
		t.Errorf("with the retired one: %d %s", res.StatusCode, text)
	}
	for _, what := range []string{"device.enrol-password", "device.enrol", "certificate.issue"} {
		if !r.audited(what, "") {
			t.Errorf("no %s in the audit trail", what)
		}
	}
}

func TestPasswordWorksOnceForOneKey(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	pw := r.password()
	k := newKey(t)
	a := ask{op: "simpleenroll", body: csr(t, k, nil), user: string(dev), password: pw}
	c := r.issued(a)
	if same := r.issued(a); !same.Equal(c) {
		t.Error("the same request got another certificate")
	}
	a.body = csr(t, newKey(t), nil)
	if res, text := r.ask(a); res.StatusCode != 403 || !strings.Contains(text, "used already") || !r.audited("device.enrol-denied", "refused: "+enroll.CodeUsed) {
		t.Errorf("another key: %d %s", res.StatusCode, text)
	}
	// Its certificate was renewed and retired: the password brings nothing any more, not even for its own key.
	r.connected(c)
	k2 := newKey(t)
	r.connected(r.issued(ask{op: "simpleenroll", body: csr(t, k2, nil), cert: pair(r, c, k)}))
	a.body = csr(t, k, nil)
	if res, _ := r.ask(a); res.StatusCode != 403 {
		t.Errorf("after its certificate was retired: %d", res.StatusCode)
	}
	// A new password takes the old one's place.
	second := r.password()
	a.body = csr(t, newKey(t), nil)
	if res, _ := r.ask(a); res.StatusCode != 401 {
		t.Errorf("the replaced password: %d", res.StatusCode)
	}
	a.password = second
	r.issued(a)
}

func TestRefusedRequestSpendsNoPassword(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	pw := r.password()
	r.do(func(tx *bolt.Tx) error {
		return tx.PutDevice(fleet.Device{ID: "other", Product: "pump", CreatedAt: time.Now()})
	})
	k := newKey(t)
	der, err := base64.StdEncoding.DecodeString(csr(t, k, func(q *x509.CertificateRequest) { q.Subject.CommonName = "other" }))
	fatal(t, err)
	_, err = r.e.Issue(t.Context(), time.Now(), "other", der, enroll.IssueOptions{By: "ops"})
	fatal(t, err)
	a := ask{op: "simpleenroll", body: csr(t, k, nil), user: string(dev), password: pw}
	if res, text := r.ask(a); res.StatusCode != 409 {
		t.Errorf("another device's key: %d %s", res.StatusCode, text)
	}
	a.body = csr(t, newKey(t), nil)
	r.issued(a)
}

func TestRevokedDeviceNeedsANewPassword(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	first, _, cert := r.enrol()
	before := r.password()
	_, err := r.e.Revoke(t.Context(), time.Now(), fleet.SerialOf(first.SerialNumber), 0, "ops")
	fatal(t, err)
	if res, _ := r.ask(ask{op: "simplereenroll", body: csr(t, newKey(t), like(first)), cert: cert}); res.StatusCode != 403 {
		t.Errorf("the revoked certificate: %d", res.StatusCode)
	}
	a := ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: before}
	if res, _ := r.ask(a); res.StatusCode != 401 {
		t.Errorf("a password from before the revocation: %d", res.StatusCode)
	}
	a.password = r.password()
	r.issued(a)
}

func TestNewKeysWaitForAnOperator(t *testing.T) {
	r := newRig(t, enroll.Policy{ApproveEST: true})
	pw := r.password()
	a := ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: pw}
	for range 2 {
		if res, text := r.ask(a); res.StatusCode != 202 || res.Header.Get("Retry-After") != "600" || !strings.Contains(text, "operator") {
			t.Fatalf("%d, Retry-After %q: %s", res.StatusCode, res.Header.Get("Retry-After"), text)
		}
	}
	if res, _ := r.ask(ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: pw}); res.StatusCode != 403 {
		t.Errorf("another key while one waits: %d", res.StatusCode)
	}
	list, err := r.approver.Requests(t.Context())
	fatal(t, err)
	if len(list) != 1 || list[0].Via != pki.ViaEST {
		t.Fatalf("%+v", list)
	}
	_, err = r.approver.Approve(t.Context(), time.Now(), list[0].ID, "ops")
	fatal(t, err)
	c := r.issued(a)
	r.connected(c)

	pw = r.password()
	a = ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: pw}
	r.ask(a)
	list, err = r.approver.Requests(t.Context())
	fatal(t, err)
	for _, q := range list {
		if q.State == pki.Waiting {
			_, err = r.approver.Deny(t.Context(), time.Now(), q.ID, "ops")
			fatal(t, err)
		}
	}
	if res, text := r.ask(a); res.StatusCode != 403 {
		t.Errorf("a denied key: %d %s", res.StatusCode, text)
	}
}

func TestSlowSigningIsFetchedLater(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	r.auth.broken.Store(true)
	a := ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: r.password()}
	if res, text := r.ask(a); res.StatusCode != 202 || res.Header.Get("Retry-After") != "5" {
		t.Fatalf("%d, Retry-After %q: %s", res.StatusCode, res.Header.Get("Retry-After"), text)
	}
	r.auth.broken.Store(false)
	eventually(t, "signed", func() bool { res, _ := r.ask(a); return res.StatusCode == 200 })
	list, err := r.e.CertificatesOf(t.Context(), dev)
	fatal(t, err)
	if len(list) != 1 {
		t.Errorf("%d certificates, want one", len(list))
	}
}

func TestLimits(t *testing.T) {
	r := newRig(t, enroll.Policy{PerDay: 2})
	first, _, cert := r.enrol()
	a := ask{op: "simplereenroll", body: csr(t, newKey(t), like(first)), cert: cert}
	r.issued(a)
	a.body = csr(t, newKey(t), like(first))
	if res, text := r.ask(a); res.StatusCode != 429 || res.Header.Get("Retry-After") != "3600" {
		t.Errorf("over the day's limit: %d, Retry-After %q: %s", res.StatusCode, res.Header.Get("Retry-After"), text)
	}
	limited := func(a ask, n int) bool {
		for range n {
			if res, _ := r.ask(a); res.StatusCode == 429 && res.Header.Get("Retry-After") == "10" {
				return true
			}
		}
		return false
	}
	if !limited(a, 60) {
		t.Error("a device may ask as often as it likes")
	}
	guess := ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: "guess"}
	if !limited(guess, 30) {
		t.Error("a guesser may guess as often as it likes")
	}
}

// Who guesses does not keep the right password out, even from the same address.
func TestGuessingLocksNobodyOut(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	a := ask{op: "simpleenroll", body: csr(t, newKey(t), nil), user: string(dev), password: r.password()}
	for range 20 {
		r.ask(ask{op: "simpleenroll", body: a.body, user: string(dev), password: "guess"})
	}
	r.issued(a)
}

func TestRefusals(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	first, _, cert := r.enrol()
	pw := r.password()
	good := csr(t, newKey(t), nil)
	dns := func(names ...string) func(*x509.CertificateRequest) {
		return func(q *x509.CertificateRequest) { q.DNSNames = names }
	}
	renamed := func(change func(*x509.CertificateRequest)) string {
		return csr(t, newKey(t), func(q *x509.CertificateRequest) { like(first)(q); change(q) })
	}
	overSized := strings.Repeat("A", 22000)
	ca := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: []byte{0x30, 3, 1, 1, 0xff}}
	broken, err := base64.StdEncoding.DecodeString(good)
	fatal(t, err)
	broken[len(broken)-1] ^= 1

	enrol := func(body string) ask { return ask{op: "simpleenroll", body: body, user: string(dev), password: pw} }
	renew := func(body string) ask { return ask{op: "simplereenroll", body: body, cert: cert} }
	with := func(a ask, header, value string) ask {
		a.header = map[string]string{header: value}
		return a
	}
	for _, c := range []struct {
		name   string
		ask    ask
		status int
	}{
		{"no password", ask{op: "simpleenroll", body: good}, 401},
		{"wrong password", ask{op: "simpleenroll", body: good, user: string(dev), password: "x"}, 401},
		{"long password", ask{op: "simpleenroll", body: good, user: string(dev), password: strings.Repeat("x", 200)}, 401},
		{"unknown device", ask{op: "simpleenroll", body: good, user: "nobody", password: pw}, 401},
		{"not a device id", ask{op: "simpleenroll", body: good, user: "../x", password: pw}, 401},
		{"bearer", with(ask{op: "simpleenroll", body: good}, "Authorization", "Bearer x"), 401},
		{"GET simpleenroll", ask{op: "simpleenroll", method: "GET"}, 405},
		{"GET simplereenroll", ask{op: "simplereenroll", method: "GET", cert: cert}, 405},
		{"POST cacerts", ask{op: "cacerts", body: good}, 405},
		{"serverkeygen", ask{op: "serverkeygen", body: good, cert: cert}, 404},
		{"fullcmc", ask{op: "fullcmc", body: good}, 404},
		{"a label", ask{op: "label/cacerts", method: "GET"}, 404},
		{"renewing without a certificate", ask{op: "simplereenroll", body: good, user: string(dev), password: pw}, 403},

		{"content type", with(enrol(good), "Content-Type", "text/plain"), 415},
		{"no content type", with(enrol(good), "Content-Type", ""), 415},
		{"compressed", with(enrol(good), "Content-Encoding", "gzip"), 415},
		{"empty", enrol(""), 400},
		{"null", enrol("null"), 400},
		{"not base64", enrol("?!"), 400},
		{"PEM", enrol("-----BEGIN CERTIFICATE REQUEST-----\n" + good + "\n-----END CERTIFICATE REQUEST-----\n"), 400},
		{"private key", enrol("-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"), 400},
		{"trailing bytes", enrol(base64.StdEncoding.EncodeToString(append(bytes.Clone(broken), 0))), 400},
		{"too large", enrol(overSized), 413},
		{"far too large", enrol(strings.Repeat("A", 1<<20)), 413},
		{"too large, chunked", ask{op: "simpleenroll", body: strings.Repeat("A", 1<<20), user: string(dev), password: pw, chunked: true}, 413},
		{"not signed by its key", enrol(base64.StdEncoding.EncodeToString(broken)), 403},
		{"another device's name", enrol(csr(t, newKey(t), func(q *x509.CertificateRequest) { q.Subject.CommonName = "pump-8" })), 403},
		{"another device's DNS name", enrol(csr(t, newKey(t), dns("pump-8"))), 422},
		{"a DNS name more", enrol(csr(t, newKey(t), dns(string(dev), "admin"))), 422},
		{"a wildcard", enrol(csr(t, newKey(t), dns("*"))), 422},
		{"an address", enrol(csr(t, newKey(t), func(q *x509.CertificateRequest) { q.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} })), 422},
		{"a URI without a certificate", enrol(csr(t, newKey(t), like(first))), 422},
		{"wants to be a CA", enrol(csr(t, newKey(t), func(q *x509.CertificateRequest) { q.ExtraExtensions = []pkix.Extension{ca} })), 422},

		{"renewal without names", renew(good), 403},
		{"renewal of another subject", renew(renamed(func(q *x509.CertificateRequest) { q.Subject.CommonName = "pump-8" })), 403},
		{"renewal with more subject", renew(renamed(func(q *x509.CertificateRequest) { q.Subject.Organization = []string{"x"} })), 403},
		{"renewal without the URI", renew(renamed(func(q *x509.CertificateRequest) { q.URIs = nil })), 403},
		{"renewal with a name more", renew(renamed(func(q *x509.CertificateRequest) { q.DNSNames = append(q.DNSNames, "x") })), 403},
		{"renewal with another serial", renew(renamed(func(q *x509.CertificateRequest) {
			q.URIs = append(q.URIs[:0:0], mustURL("urn:muster:device:pump-7:ff"))
		})), 403},
		{"renewal not signed by its key", renew(base64.StdEncoding.EncodeToString(broken)), 403},
		{"enrolment by certificate for another", ask{op: "simpleenroll", body: csr(t, newKey(t), dns("pump-8")), cert: cert}, 422},
	} {
		t.Run(c.name, func(t *testing.T) {
			// A limiter per run would need a server per run: refusals are few enough, but a device's budget is not endless.
			res, text := r.ask(c.ask)
			if res.StatusCode == 429 {
				t.Fatalf("the budget is used up: %s", text)
			}
			if res.StatusCode != c.status {
				t.Errorf("%d, want %d: %s", res.StatusCode, c.status, text)
			}
			if res.Header.Get("Content-Type") != "text/plain; charset=utf-8" || strings.TrimSpace(text) == "" || res.ContentLength != int64(len(text)) {
				t.Errorf("%q %d: %q", res.Header.Get("Content-Type"), res.ContentLength, text)
			}
			if got := res.Header.Get("WWW-Authenticate"); (c.status == 401) != strings.HasPrefix(got, "Basic realm=") {
				t.Errorf("WWW-Authenticate %q", got)
			}
			if got := res.Header.Get("Allow"); (c.status == 405) != (got != "") {
				t.Errorf("Allow %q", got)
			}
			if strings.Contains(text, pw) {
				t.Error("the answer holds the password")
			}
		})
	}
	list, err := r.e.CertificatesOf(t.Context(), dev)
	fatal(t, err)
	if len(list) != 1 {
		t.Errorf("the refusals left %d certificates", len(list))
	}

	_, err = r.e.Disable(t.Context(), time.Now(), dev, "ops")
	fatal(t, err)
	for _, a := range []ask{renew(csr(t, newKey(t), like(first))), enrol(good)} {
		if res, text := r.ask(a); res.StatusCode != 403 {
			t.Errorf("a disabled device: %s %d %s", a.op, res.StatusCode, text)
		}
	}
}

// Certificates that are not of this CA do not get past the handshake.
func TestForeignCertificates(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	first, k, cert := r.enrol()
	selfSigned := func(change func(*x509.Certificate)) *tls.Certificate {
		tpl := &x509.Certificate{
			SerialNumber: first.SerialNumber, Subject: first.Subject, DNSNames: first.DNSNames, URIs: first.URIs,
			NotBefore: first.NotBefore, NotAfter: first.NotAfter, ExtKeyUsage: first.ExtKeyUsage,
		}
		change(tpl)
		der, err := x509.CreateCertificate(nil, tpl, tpl, k.Public(), k)
		fatal(t, err)
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
	}
	for name, c := range map[string]*tls.Certificate{
		"self-signed": selfSigned(func(*x509.Certificate) {}), "a CA": selfSigned(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }),
		"someone else's key": {Certificate: cert.Certificate, PrivateKey: wrongKey{k, newKey(t)}},
		"none":               {},
	} {
		conf := &tls.Config{RootCAs: r.trust, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }}
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}, Timeout: 10 * time.Second}
		res, err := client.Post("https://"+r.devices+est.Prefix+"simplereenroll", "application/pkcs10", strings.NewReader(csr(t, newKey(t), like(first))))
		if err == nil {
			res.Body.Close()
			t.Errorf("%s: %d, want no handshake", name, res.StatusCode)
		}
	}
}

// wrongKey claims to be one key and signs with another.
type wrongKey struct {
	*ecdsa.PrivateKey
	other *ecdsa.PrivateKey
}

func (w wrongKey) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return w.other.Sign(r, digest, o)
}

// What RFC 8951 wants accepted.
func TestEncodings(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	pw := r.password()
	plain := csr(t, newKey(t), func(q *x509.CertificateRequest) { q.DNSNames = []string{string(dev)} })
	lines := func(end string, n int) string {
		var b strings.Builder
		for s := plain; s != ""; s = s[min(n, len(s)):] {
			b.WriteString(s[:min(n, len(s))] + end)
		}
		return b.String()
	}
	for name, a := range map[string]ask{
		"one line": {body: plain}, "CRLF": {body: lines("\r\n", 64)}, "LF": {body: lines("\n", 76)}, "short lines": {body: lines("\r\n", 8)},
		"chunked":            {body: plain, chunked: true},
		"binary, so it says": {body: plain, header: map[string]string{"Content-Transfer-Encoding": "binary"}},
		"parameters":         {body: plain, header: map[string]string{"Content-Type": "Application/PKCS10; charset=us-ascii"}},
	} {
		a.op, a.user, a.password = "simpleenroll", string(dev), pw
		if res, text := r.ask(a); res.StatusCode != 200 {
			t.Errorf("%s: %d %s", name, res.StatusCode, text)
		}
	}
}

func TestCACerts(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	_, _, cert := r.enrol()
	h, err := hierarchy()
	fatal(t, err)
	for _, c := range []*tls.Certificate{nil, cert} {
		res, text := r.ask(ask{op: "cacerts", method: "GET", cert: c})
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/pkcs7-mime" {
			t.Fatalf("%d %s", res.StatusCode, text)
		}
		list := certsIn(t, text)
		if len(list) != 2 || !list[0].Equal(h.Root.Cert) || !list[1].Equal(h.Device.Cert) {
			t.Errorf("%d certificates", len(list))
		}
		head, none := r.ask(ask{op: "cacerts", method: "HEAD", cert: c})
		if head.StatusCode != 200 || none != "" || head.ContentLength != int64(len(text)) {
			t.Errorf("HEAD: %d, %d bytes promised of %d", head.StatusCode, head.ContentLength, len(text))
		}
	}
}

// curl and openssl, without a line of muster's on the client's side, renew a certificate.
func TestCurlAndOpenSSL(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	first, k, _ := r.enrol()
	trust, cert, key := r.files(first, k)
	dir := t.TempDir()
	newKeyFile, body, answer := filepath.Join(dir, "new.pem"), filepath.Join(dir, "csr.b64"), filepath.Join(dir, "answer.b64")
	openssl(t, nil, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", newKeyFile)
	san := "subjectAltName=DNS:" + first.DNSNames[0] + ",URI:" + first.URIs[0].String()
	der := openssl(t, nil, "req", "-new", "-key", newKeyFile, "-subj", "/CN="+string(dev), "-addext", san, "-outform", "DER")
	fatal(t, os.WriteFile(body, openssl(t, der, "base64"), 0o600))
	out, err := exec.Command("curl", "-sS", "-o", answer, "-w", "%{http_code}", "--cacert", trust, "--cert", cert, "--key", key,
		"-H", "Content-Type: application/pkcs10", "--data-binary", "@"+body, "https://"+r.devices+est.Prefix+"simplereenroll").CombinedOutput()
	if err != nil || string(out) != "200" {
		t.Fatalf("curl: %v %s", err, out)
	}
	text, err := os.ReadFile(answer)
	fatal(t, err)
	// openssl decodes the base64 too.
	if pem := openssl(t, openssl(t, text, "base64", "-d"), "pkcs7", "-inform", "DER", "-print_certs"); !bytes.Contains(pem, []byte("subject=CN = "+string(dev))) {
		t.Errorf("%s", pem)
	}
	list := certsIn(t, string(text))
	if len(list) != 1 || r.record(list[0]).State != pki.Issued {
		t.Errorf("%d certificates", len(list))
	}
}
