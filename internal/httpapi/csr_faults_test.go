package httpapi_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/access"
)

// Whatever is wrong with a request for a certificate or a revocation gets its status and its code, and nothing of it is
// repeated.
func TestFaultsOfRequestsAndSerials(t *testing.T) {
	w := open(t)
	w.devices(2)
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	der := func(k crypto.Signer, tpl x509.CertificateRequest) []byte {
		raw, err := x509.CreateCertificateRequest(rand.Reader, &tpl, k)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	inPEM := func(kind string, raw []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: raw}))
	}
	csr := func(raw []byte) string { return inPEM("CERTIFICATE REQUEST", raw) }
	asking := func(oid asn1.ObjectIdentifier, v any) string {
		raw, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return csr(der(ec(elliptic.P256()), x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Value: raw}}}))
	}
	cn := func(names ...string) string {
		var subject pkix.Name
		for _, n := range names {
			subject.ExtraNames = append(subject.ExtraNames, pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: n})
		}
		return csr(der(ec(elliptic.P256()), x509.CertificateRequest{Subject: subject}))
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good := csr(der(ec(elliptic.P256()), x509.CertificateRequest{}))
	forged := der(ec(elliptic.P256()), x509.CertificateRequest{})
	forged[len(forged)-1] ^= 1
	private, err := x509.MarshalPKCS8PrivateKey(ec(elliptic.P256()))
	if err != nil {
		t.Fatal(err)
	}
	taken := ec(elliptic.P256())
	var issued api.Certificate
	w.send(access.Operator, "POST", "/devices/d001/certificates", api.CertificateRequest{CSR: csr(der(taken, x509.CertificateRequest{}))}).decode(t, &issued)

	for name, c := range map[string]struct {
		csr    string
		status int
		code   string
	}{
		"empty":                    {"", 400, "csr_malformed"},
		"not base64":               {"-----BEGIN CERTIFICATE REQUEST-----\n!!!!\n-----END CERTIFICATE REQUEST-----\n", 400, "csr_malformed"},
		"garbage before":           {"hello\n" + good, 400, "csr_malformed"},
		"garbage behind":           {good + "hello", 400, "csr_malformed"},
		"two blocks":               {good + good, 400, "csr_malformed"},
		"PEM headers":              {strings.Replace(good, "-----\n", "-----\nProc-Type: 4,ENCRYPTED\n\n", 1), 400, "csr_malformed"},
		"private key":              {inPEM("PRIVATE KEY", private), 400, "private_key_submitted"},
		"private key in disguise":  {csr(private), 400, "private_key_submitted"},
		"trailing bytes":           {csr(append(der(ec(elliptic.P256()), x509.CertificateRequest{}), 0)), 400, "csr_malformed"},
		"forged signature":         {csr(forged), 400, "csr_signature"},
		"RSA 1024":                 {csr(der(weak, x509.CertificateRequest{})), 422, "key_not_allowed"},
		"P-224":                    {csr(der(ec(elliptic.P224()), x509.CertificateRequest{})), 422, "key_not_allowed"},
		"P-521":                    {csr(der(ec(elliptic.P521()), x509.CertificateRequest{})), 422, "key_not_allowed"},
		"key of another device":    {csr(der(taken, x509.CertificateRequest{})), 409, "key_in_use"},
		"name of another device":   {cn("d001"), 403, "identity_mismatch"},
		"two names":                {cn("d000", "admin"), 422, "subject_not_allowed"},
		"name with a newline":      {cn("d000\n"), 422, "subject_not_allowed"},
		"name with ,CN=":           {cn("d000,CN=admin"), 422, "subject_not_allowed"},
		"long name":                {cn(strings.Repeat("x", 2000)), 422, "subject_not_allowed"},
		"asks to be a CA":          {asking(asn1.ObjectIdentifier{2, 5, 29, 19}, struct{ CA bool }{true}), 422, "extension_not_allowed"},
		"asks to be a server":      {asking(asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}}), 422, "extension_not_allowed"},
		"asks for the right of CA": {asking(asn1.ObjectIdentifier{2, 5, 29, 15}, asn1.BitString{Bytes: []byte{4}, BitLength: 6}), 422, "extension_not_allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			w := *w
			w.t = t
			res := w.send(access.Operator, "POST", "/devices/d000/certificates", api.CertificateRequest{CSR: c.csr})
			w.want(res, c.status, c.code)
			if strings.Contains(string(res.body), "MII") || strings.Contains(string(res.body), "xxxxxxxx") {
				t.Error("the refusal repeats what came in")
			}
		})
	}
	revoke := func(serial, reason string) result {
		return w.send(access.Operator, "POST", "/certificates/"+serial+"/revocation", map[string]string{"reason": reason})
	}
	for _, serial := range []string{"-5", "0x5f", "00ab", "xyz", strings.Repeat("f", 41)} {
		if res := revoke(serial, "superseded"); res.StatusCode != 400 {
			t.Errorf("serial %s: %d", serial, res.StatusCode)
		}
	}
	w.want(revoke("deadbeef", "superseded"), 404, "not_found")
	for _, reason := range []string{"certificate-hold", "7", "remove-from-crl"} {
		if res := revoke(issued.Serial, reason); res.StatusCode != 400 {
			t.Errorf("reason %q: %d", reason, res.StatusCode)
		}
	}
}
