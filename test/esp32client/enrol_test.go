package esp32client

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"muster/internal/pki"
)

// estAnswer is what openssl makes of certificates for EST: base64 with line breaks of a CMS message, certs-only.
func estAnswer(t *testing.T, certs ...[]byte) []byte {
	t.Helper()
	var text []byte
	for _, der := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	file := filepath.Join(t.TempDir(), "certs.pem")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("openssl", "crl2pkcs7", "-nocrl", "-certfile", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(out)
	body := []byte(base64.StdEncoding.EncodeToString(block.Bytes))
	var lines []byte
	for len(body) > 0 {
		n := min(64, len(body))
		lines = append(append(lines, body[:n]...), '\n')
		body = body[n:]
	}
	return lines
}

// A device that was made with an enrolment password and no certificate gets its first one by EST, for a key that it made itself.
func TestFirstCertificateByEST(t *testing.T) {
	d := start(t)
	root := newCA(t, "root")
	middle := &ca{TB: t, next: 0x20}
	middle.key, _ = key(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: root.cert.NotBefore, NotAfter: root.cert.NotAfter, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	tmpl.Subject.CommonName = "intermediate"
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root.cert, middle.key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	if middle.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	d.do("put", "id", hexed([]byte(id)))
	d.do("put", "roots", hexed(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw})))
	d.do("put", "enrol_pw", hexed([]byte("enrolment-password")))
	d.do("boot")
	if got := d.one("next"); got != "devices -" {
		t.Errorf("without anything: %s", got)
	}
	request := func() []byte {
		t.Helper()
		b, err := hex.DecodeString(d.one("enrol-request"))
		if err != nil {
			t.Fatal(err)
		}
		der, err := base64.StdEncoding.DecodeString(string(b))
		if err != nil {
			t.Fatal(err)
		}
		csr, err := pki.ParseCSR(der, pki.KeyPolicy{})
		if err != nil {
			t.Fatal(err)
		}
		if err := csr.ForDevice(id); err != nil {
			t.Error(err)
		}
		return csr.PublicKey
	}
	spki := request()
	if again := request(); !bytes.Equal(again, spki) {
		t.Error("the second request is for another key, which the password would not serve")
	}
	pub, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	above := estAnswer(t, root.cert.Raw, middle.cert.Raw)
	leaf, serial := middle.issue(id, pub.(*ecdsa.PublicKey))
	good := estAnswer(t, leaf)
	strange, _ := middle.issue("other", pub.(*ecdsa.PublicKey))
	stranger, _ := key(t)
	foreign, _ := middle.issue(id, &stranger.PublicKey)
	writes := d.one("writes")
	for name, c := range map[string][2][]byte{
		"nothing":               {above, nil},
		"no base64":             {above, []byte("<html>")},
		"no message":            {above, []byte("AAAA")},
		"another device's":      {above, estAnswer(t, strange)},
		"another key":           {above, estAnswer(t, foreign)},
		"without its issuer":    {estAnswer(t, root.cert.Raw), good},
		"no certificates above": {nil, good},
	} {
		if lines := d.do("enrolled", hexed(c[0]), hexed(c[1])); lines[len(lines)-1] != "no" {
			t.Errorf("%s: %q", name, lines)
		}
	}
	whole, err := base64.StdEncoding.DecodeString(string(bytes.ReplaceAll(good, []byte("\n"), nil)))
	if err != nil {
		t.Fatal(err)
	}
	alone := estAnswer(t, root.cert.Raw)
	for n := range whole { // cut anywhere; and any byte changed, for a certificate that cannot be believed
		broken := bytes.Clone(whole)
		broken[n] ^= 0x80
		for _, c := range [][2][]byte{{above, whole[:n]}, {alone, broken}} {
			if lines := d.do("enrolled", hexed(c[0]), hexed([]byte(base64.StdEncoding.EncodeToString(c[1])))); lines[len(lines)-1] != "no" {
				t.Fatalf("at byte %d of %d: %q", n, len(whole), lines)
			}
		}
	}
	if got := d.one("writes"); got != writes {
		t.Errorf("%s writes, %s before", got, writes)
	}
	if got := d.one("enrolled", hexed(above), hexed(good)); got != "yes" {
		t.Fatal(got)
	}
	for _, when := range []string{"at once", "after a restart"} {
		if got := d.one("next"); got != "devices "+string(serial) {
			t.Errorf("%s: %s", when, got)
		}
		if got := d.one("enrol-request"); got != "none" {
			t.Errorf("%s it enrols again", when)
		}
		d.do("boot")
	}
}
