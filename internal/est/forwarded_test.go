package est_test

import (
	"encoding/base64"
	"encoding/pem"
	"net/url"
	"testing"

	"muster/internal/enroll"
)

// A certificate in a header proves nothing: only the TLS connection does (RFC 9440 is for proxies, and there is none).
func TestForwardedCertificatesAreNotBelieved(t *testing.T) {
	r := newRig(t, enroll.Policy{})
	cert, _, _ := r.enrol()
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	for name, value := range map[string]string{
		"X-SSL-CERT": url.QueryEscape(text), "X-Client-Cert": url.QueryEscape(text), "X-Forwarded-Client-Cert": "Cert=" + url.QueryEscape(text),
		"Client-Cert": ":" + base64.StdEncoding.EncodeToString(cert.Raw) + ":",
	} {
		res, body := r.ask(ask{op: "simplereenroll", body: csr(t, newKey(t), like(cert)), header: map[string]string{name: value}})
		if res.StatusCode != 401 && res.StatusCode != 403 && res.StatusCode != 404 {
			t.Errorf("%s: %d %s", name, res.StatusCode, body)
		}
	}
}
