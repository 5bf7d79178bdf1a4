package cli_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/ca/ceremony"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// offline is a desk without network: no musterd, no token.
func offline(t *testing.T) *desk {
	t.Helper()
	dir := t.TempDir()
	return &desk{t: t, dir: dir, ctx: t.Context(), env: map[string]string{"HOME": dir, "NO_COLOR": "1"}}
}

func (d *desk) path(name string) string { return filepath.Join(d.dir, name) }

func openssl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func csrFile(d *desk, name string, key any, change func(*x509.CertificateRequest)) string {
	d.t.Helper()
	tpl := x509.CertificateRequest{Subject: pkix.Name{CommonName: "whatever the server wants"}}
	if change != nil {
		change(&tpl)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &tpl, key)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.file(name, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})))
}

// shownCert is what sign says of a certificate.
type shownCert struct {
	Subject string `json:"subject"`
}

func ec(t *testing.T, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// What a ceremony makes is what openssl, which muster did not write, finds good.
func TestCeremonies(t *testing.T) {
	d := offline(t)
	pass := d.file("pass", "correct horse battery\n")
	root := d.path("acme-root")
	out := d.run("ca", "root", "create", "--name", "acme", "--out", root, "--passphrase-file", pass)
	has(t, out, "acme root 1", "acme root 2 (spare)", "key sha256")
	d.fails(5, "never overwritten", "ca", "root", "create", "--name", "acme", "--out", root, "--passphrase-file", pass)
	for _, f := range []string{"root.key", "spare-root.key"} {
		info, err := os.Stat(filepath.Join(root, f))
		if err != nil || info.Mode().Perm() != 0o600 || !strings.Contains(read(t, filepath.Join(root, f)), "ENCRYPTED PRIVATE KEY") {
			t.Errorf("%s: %v %v", f, info, err)
		}
	}

	device := ec(t, elliptic.P256())
	csr := csrFile(d, "device-ca.csr", device, func(r *x509.CertificateRequest) { r.DNSNames = []string{"evil.example.com"} })
	sign := func(out, csr, profile string, more ...string) []string {
		return append([]string{"ca", "root", "sign", "--root", root, "--csr", csr, "--profile", profile, "--out", d.path(out), "--passphrase-file", pass}, more...)
	}
	d.in = "no\n"
	d.fails(1, "nothing was signed", sign("device-ca.crt", csr, "device-ca")...)
	d.fails(2, "--yes", sign("device-ca.crt", csr, "device-ca")...)
	if _, err := os.Stat(d.path("device-ca.crt")); err == nil {
		t.Fatal("signed without a yes")
	}
	d.in = "yes\n"
	out = d.run(sign("device-ca.crt", csr, "device-ca")...)
	has(t, out, "about to sign", "acme devices 1", "device-ca.crt")
	d.run(sign("server-ca.crt", csrFile(d, "server-ca.csr", ec(t, elliptic.P384()), nil), "server-ca", "--yes")...)
	// The same key again is a renewal and keeps its name; a new one gets the next number.
	renewed := decode[shownCert](d, sign("device-ca-again.crt", csr, "device-ca", "--yes", "--years", "2")...)
	next := decode[shownCert](d, sign("device-ca-2.crt", csrFile(d, "d2.csr", ec(t, elliptic.P256()), nil), "device-ca", "--yes", "--with", "root")...)
	if renewed.Subject != "acme devices 1" || next.Subject != "acme devices 3" {
		t.Errorf("%q %q", renewed.Subject, next.Subject)
	}

	rootCert, spareCert := filepath.Join(root, "root.crt"), filepath.Join(root, "spare-root.crt")
	for _, f := range []string{"device-ca.crt", "server-ca.crt", "device-ca-again.crt"} {
		openssl(t, "verify", "-x509_strict", "-check_ss_sig", "-CAfile", rootCert, d.path(f))
	}
	text := openssl(t, "x509", "-noout", "-text", "-in", d.path("device-ca.crt"))
	has(t, text, "CN = acme devices 1", "CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "TLS Web Client Authentication", "Authority Key Identifier")
	if strings.Contains(text, "evil") || strings.Contains(text, "whatever") || strings.Contains(text, "Server Authentication") {
		t.Errorf("more than the key came from the request:\n%s", text)
	}
	has(t, openssl(t, "x509", "-noout", "-text", "-in", d.path("server-ca.crt")), "TLS Web Server Authentication", "secp384r1")

	// Who trusts only the spare accepts the root's intermediates through the cross-certificate.
	cross := d.path("cross.crt")
	has(t, d.run("ca", "root", "cross-sign", "--root", root, "--with", "spare-root", "--cert", rootCert, "--out", cross, "--passphrase-file", pass, "--yes"), "acme root 1")
	openssl(t, "verify", "-x509_strict", "-CAfile", spareCert, "-untrusted", cross, d.path("device-ca.crt"))
	leaf := d.path("leaf.csr")
	openssl(t, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", d.path("leaf.key"), "-subj", "/CN=pump-7", "-out", leaf)
	der, err := x509.MarshalPKCS8PrivateKey(device)
	if err != nil {
		t.Fatal(err)
	}
	key := d.file("device-ca.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	openssl(t, "x509", "-req", "-in", leaf, "-CA", d.path("device-ca.crt"), "-CAkey", key, "-CAcreateserial", "-days", "1", "-out", d.path("leaf.crt"))
	chain := d.file("chain.pem", read(t, d.path("device-ca.crt"))+read(t, cross))
	openssl(t, "verify", "-CAfile", spareCert, "-untrusted", chain, d.path("leaf.crt"))

	shown := d.run("ca", "root", "show", "--root", root)
	record := read(t, filepath.Join(root, "ceremonies.log"))
	has(t, shown, "acme root 1", "acme servers 1", "sign device-ca", "cross-sign")
	if lines := strings.Count(record, "\n"); lines != 7 || !strings.Contains(record, "host=") {
		t.Errorf("%d lines of record, want 7:\n%s", lines, record)
	}
	serial := strings.ToLower(strings.TrimPrefix(strings.TrimSpace(openssl(t, "x509", "-noout", "-serial", "-in", d.path("device-ca.crt"))), "serial="))
	has(t, record, "serial="+serial)
}

func TestCeremoniesRefuse(t *testing.T) {
	d := offline(t)
	pass := d.file("pass", "correct horse battery\n")
	root := d.path("root")
	d.fails(2, "at least 12 bytes", "ca", "root", "create", "--name", "acme", "--out", root, "--passphrase-file", d.file("short", "short\n"))
	d.fails(2, "no terminal", "ca", "root", "create", "--name", "acme", "--out", root)
	d.fails(2, "--years", "ca", "root", "create", "--name", "acme", "--out", root, "--years", "0", "--passphrase-file", pass)
	d.fails(2, "no key manager", "ca", "root", "create", "--name", "acme", "--out", root, "--root-key", "vault:x", "--passphrase-file", pass)
	if left, err := filepath.Glob(d.path("*root*")); err != nil || len(left) > 0 {
		t.Fatalf("left %v behind: %v", left, err)
	}
	d.run("ca", "root", "create", "--name", "acme", "--out", root, "--passphrase-file", pass)
	good := csrFile(d, "good.csr", ec(t, elliptic.P256()), nil)
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tampered := []byte(read(t, good))
	block, _ := pem.Decode(tampered)
	block.Bytes[len(block.Bytes)-1] ^= 1
	other := d.path("other")
	d.run("ca", "root", "create", "--name", "other", "--out", other, "--passphrase-file", pass)

	sign := func(csr string, more ...string) []string {
		return append([]string{"ca", "root", "sign", "--root", root, "--csr", csr, "--profile", "device-ca", "--out", d.path("out.crt"), "--yes", "--passphrase-file", pass}, more...)
	}
	for name, c := range map[string]struct {
		code  int
		words string
		args  []string
	}{
		"no proof of possession": {2, "not signed by its own key", sign(d.file("t.csr", string(pem.EncodeToMemory(block))))},
		"RSA":                    {2, "P-256 or P-384", sign(csrFile(d, "rsa.csr", weak, nil))},
		"P-521":                  {2, "P-256 or P-384", sign(csrFile(d, "521.csr", ec(t, elliptic.P521()), nil))},
		"a private key":          {2, "private key", sign(filepath.Join(root, "root.key"))},
		"a certificate":          {2, "not a CERTIFICATE REQUEST", sign(filepath.Join(root, "root.crt"))},
		"nothing":                {2, "PEM", sign(d.file("empty.csr", ""))},
		"too much":               {2, "larger than", sign(d.file("huge.csr", strings.Repeat("x", 20<<10)))},
		"no such file":           {3, "no such file", sign(d.path("none.csr"))},
		"profile":                {2, "--profile", sign(good, "--profile", "root")},
		"root's own name":        {2, "another name", sign(good, "--name", "acme root 1")},
		"name with a newline":    {2, "printable", sign(good, "--name", "a\nb")},
		"which":                  {2, "--with", sign(good, "--with", "third")},
		"passphrase":             {2, "wrong passphrase", sign(good, "--passphrase-file", d.file("wrong", "wrong horse battery\n"))},
		"file in the way":        {5, "exists already", sign(good, "--out", pass)},
		"no root there":          {3, "no such file", sign(good, "--root", d.dir)},
		"foreign key":            {2, "do not belong together", sign(good, "--root", mixed(d, root, other))},
		"root signs itself":      {5, "both roots are called", []string{"ca", "root", "cross-sign", "--root", root, "--cert", filepath.Join(root, "root.crt"), "--out", d.path("x.crt"), "--yes", "--passphrase-file", pass}},
		"two in a file": {2, "2 certificates", []string{"ca", "root", "cross-sign", "--root", root, "--out", d.path("x.crt"), "--yes", "--passphrase-file", pass,
			"--cert", d.file("two.crt", read(t, filepath.Join(other, "root.crt"))+read(t, filepath.Join(other, "spare-root.crt")))}},
	} {
		t.Run(name, func(t *testing.T) { d.t = t; d.fails(c.code, c.words, c.args...) })
	}
	d.t = t
	if _, err := os.Stat(d.path("out.crt")); err == nil || strings.Contains(read(t, filepath.Join(root, "ceremonies.log")), "sign device-ca") {
		t.Error("something was signed")
	}
	// One key, one intermediate.
	d.run(sign(good)...)
	d.fails(5, "key of its own", sign(good, "--profile", "server-ca", "--out", d.path("s.crt"))...)
	// An intermediate is no root.
	d.fails(2, "not a root", "ca", "root", "cross-sign", "--root", other, "--cert", d.path("out.crt"), "--out", d.path("x.crt"), "--yes", "--passphrase-file", pass)
	// Once the key is in the safe, the folder says so.
	if err := os.Remove(filepath.Join(root, "root.key")); err != nil {
		t.Fatal(err)
	}
	d.fails(3, "where the root's key is", sign(good, "--out", d.path("s.crt"))...)
}

// mixed is a folder with one root's certificate and another's key.
func mixed(d *desk, cert, key string) string {
	d.t.Helper()
	dir := d.path("mixed")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		d.t.Fatal(err)
	}
	d.file("mixed/root.crt", read(d.t, filepath.Join(cert, "root.crt")))
	d.file("mixed/root.key", read(d.t, filepath.Join(key, "root.key")))
	return dir
}

// The keys of roots may lie elsewhere, too.
func TestRootKeysByURI(t *testing.T) {
	d := offline(t)
	pass := d.file("pass", "correct horse battery\n")
	root, key := d.path("root"), d.path("safe.key")
	d.fails(2, "safe.key", "ca", "root", "create", "--name", "acme", "--out", root, "--root-key", "softkms:path="+key, "--passphrase-file", pass)
	d.run("ca", "root", "create", "--name", "acme", "--out", root, "--root-key", "softkms:path="+key, "--create-keys", "--passphrase-file", pass)
	if _, err := os.Stat(filepath.Join(root, "root.key")); err == nil {
		t.Error("the key is in the folder, too")
	}
	d.run("ca", "root", "sign", "--root", root, "--csr", csrFile(d, "d.csr", ec(t, elliptic.P256()), nil), "--profile", "device-ca", "--out", d.path("d.crt"), "--yes", "--passphrase-file", pass)
	openssl(t, "verify", "-CAfile", filepath.Join(root, "root.crt"), d.path("d.crt"))
	c, err := ceremony.ReadCertificate(d.path("d.crt"))
	if err != nil {
		t.Fatal(err)
	}
	has(t, d.run("ca", "root", "show", "--root", root, "--output", "json"), string(fleet.SerialOf(c.SerialNumber)), string(pki.KeyHash(c.RawSubjectPublicKeyInfo)))
}

func TestBlockKeys(t *testing.T) {
	d := sit(t, nil)
	k := ec(t, elliptic.P256())
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	inPEM := func(kind string, der []byte) string {
		return d.file("key.pem", string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
	}
	hash := string(pki.KeyHash(spki))
	for _, what := range []string{strings.ToUpper(hash), inPEM("PUBLIC KEY", spki), inPEM("PRIVATE KEY", private), inPEM("EC PRIVATE KEY", sec1), csrFile(d, "k.csr", k, nil)} {
		has(t, d.run("certs", "block-key", what, "--why", "in a repository"), "blocked "+hash)
	}
	has(t, d.run("certs", "blocked-keys"), hash, "in a repository", "t-admin")
	d.fails(2, "neither a hash", "certs", "block-key", d.file("x", "x"))
	d.fails(2, "no public key", "certs", "block-key", inPEM("PUBLIC KEY", spki[:20]))
	d.run("certs", "unblock-key", hash)
	d.fails(3, "no operator blocked", "certs", "unblock-key", hash)
}
