package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// A device that was made with nothing but a password gets its certificate, connects, and renews it, by a client of EST that
// muster did not write (test/estclient) and mosquitto.
func TestEnrolmentByEST(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "est")
	e := &estDevice{scene: s, id: fleet.DeviceID(s.product + "-00"), dir: t.TempDir(), program: filepath.Join(t.TempDir(), "estclient")}
	build := exec.CommandContext(s.ctx, "go", "build", "-C", "../estclient", "-o", e.program, "github.com/globalsign/est/cmd/estclient")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.muster("device", "add", string(e.id), "--product", s.product)
	password := filepath.Join(e.dir, "password")
	s.muster("device", "enrol-password", string(e.id), "--for", "10m", "--out", password)
	secret := strings.TrimSpace(s.file(password))
	if info, err := os.Stat(password); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	trust := s.file(s.w.CAFile)
	e.write(simdev.TrustFile, trust)

	// First enrolment, over the listener that asks for no certificate.
	side := s.w.Config.Public.RecoveryHTTPS
	cas := e.est(side, "cacerts")
	if attrs := e.est(side, "csrattrs"); !strings.Contains(attrs, "1.2.840.113549.1.9.16.2.61") || !strings.Contains(attrs, "1.2.840.10045.2.1") {
		t.Errorf("csrattrs: %s", attrs)
	}
	first := e.newKey("first.key")
	login := []string{"-user", string(e.id), "-pass", secret, "-key", first, "-cn", string(e.id), "-dnsnames", string(e.id)}
	old := e.take(e.est(side, append([]string{"enroll"}, login...)...), cas, first)
	if again := e.take(e.est(side, append([]string{"enroll"}, login...)...), cas, first); !again.Equal(old) {
		t.Error("the same request got another certificate")
	}
	other := e.newKey("other.key")
	if out, code := s.command(e.program, e.args(side, "enroll", "-user", string(e.id), "-pass", secret, "-key", other, "-cn", string(e.id))...); code == 0 || !strings.Contains(out, "used already") {
		t.Errorf("another key by the same password: %d %s", code, out)
	}
	if ok, said := s.admitted(e.id, s.front(e.id, e.dir)); !ok {
		t.Fatalf("the broker refuses the certificate: %s", said)
	}
	was := fleet.SerialOf(old.SerialNumber)
	s.await("current after connecting", func() bool { return fleet.Serial(s.device(e.id).Current) == was })

	// Renewal with a new key, over the listener for certificates.
	front := s.w.Config.Public.HTTPS
	second := e.newKey("second.key")
	request := filepath.Join(e.dir, "second.csr")
	e.must("csr", "-key", second, "-cn", string(e.id), "-dnsnames", string(e.id), "-uris", old.URIs[0].String(), "-out", request)
	oldDir := e.copyOf()
	renewal := []string{"reenroll", "-certs", filepath.Join(oldDir, simdev.CertFile), "-key", filepath.Join(oldDir, simdev.KeyFile), "-csr", request}
	renewed := e.take(e.est(front, renewal...), cas, second)
	now := fleet.SerialOf(renewed.SerialNumber)
	if ok, said := s.admitted(e.id, s.front(e.id, oldDir)); !ok {
		t.Errorf("the old certificate must work until the new one is used: %s", said)
	}
	if ok, said := s.admitted(e.id, s.front(e.id, e.dir)); !ok {
		t.Fatalf("the broker refuses the renewed certificate: %s", said)
	}
	s.await("the old certificate is retired", func() bool {
		cs := s.certificates(e.id)
		return cs[was].State == api.CertificateStateSuperseded && cs[now].State == api.CertificateStateActive && cs[now].Via == "est"
	})
	s.wantRefused(e.id, s.front(e.id, oldDir))
	if out, code := s.command(e.program, e.args(front, renewal[0], renewal[1:]...)...); code == 0 || !strings.Contains(out, "403") && !strings.Contains(out, "does not let the device in") {
		t.Errorf("EST lets the retired certificate in: %d %s", code, out)
	}
	trail := s.muster("audit", "--limit", "500")
	for _, what := range []string{"device.enrol-password", "device.enrol", "certificate.issue", "certificate.renew-denied"} {
		if !strings.Contains(trail, what) {
			t.Errorf("no %s in the audit trail", what)
		}
	}
	if strings.Contains(trail, secret) || strings.Contains(s.file(s.w.LogFile()), secret) {
		t.Error("the password is in the audit trail or in the log")
	}
}

// estDevice is a device that consists of estclient, mosquitto and a folder.
type estDevice struct {
	*scene
	id      fleet.DeviceID
	dir     string // trust, certificate and key in use
	program string
}

func (e *estDevice) args(addr, command string, args ...string) []string {
	return append([]string{command, "-server", addr, "-explicit", filepath.Join(e.dir, simdev.TrustFile)}, args...)
}

func (e *estDevice) est(addr string, args ...string) string {
	e.Helper()
	return e.must(e.args(addr, args[0], args[1:]...)...)
}

func (e *estDevice) must(args ...string) string {
	e.Helper()
	out, code := e.command(e.program, args...)
	if code != 0 {
		e.Fatalf("estclient %q: %d %s", args, code, out)
	}
	return out
}

func (e *estDevice) write(name, text string) string {
	e.Helper()
	path := filepath.Join(e.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		e.Fatal(err)
	}
	return path
}

func (e *estDevice) newKey(name string) string {
	e.Helper()
	path := filepath.Join(e.dir, name)
	if out, code := e.command("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path); code != 0 {
		e.Fatal(out)
	}
	return path
}

// take puts a certificate that came by EST, its issuer and its key in use.
func (e *estDevice) take(answer, cas, key string) *x509.Certificate {
	e.Helper()
	read := func(text string) (out []*x509.Certificate) {
		for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				e.Fatal(err)
			}
			out = append(out, c)
		}
		return out
	}
	got := read(answer)
	if len(got) != 1 {
		e.Fatalf("%d certificates in %s", len(got), answer)
	}
	chain := answer
	for _, ca := range read(cas) {
		if got[0].CheckSignatureFrom(ca) == nil {
			chain += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}))
		}
	}
	e.write(simdev.CertFile, chain)
	e.write(simdev.KeyFile, e.file(key))
	return got[0]
}

// copyOf keeps what is in use now in another folder.
func (e *estDevice) copyOf() string {
	e.Helper()
	dir := e.TempDir()
	for _, name := range []string{simdev.TrustFile, simdev.CertFile, simdev.KeyFile} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(e.file(e.dir, name)), 0o600); err != nil {
			e.Fatal(err)
		}
	}
	return dir
}
