//go:build pkcs11

package pkcs11

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"muster/test/espfile"
)

const pin = "73519246"

// module is where Debian's softhsm2 puts the library.
const module = "/usr/lib/softhsm/libsofthsm2.so"

// hsm is a SoftHSM with a token of its own.
type hsm struct {
	t   *testing.T
	dir string
}

func newHSM(t *testing.T) *hsm {
	t.Helper()
	h := &hsm{t: t, dir: t.TempDir()}
	write(t, h.path("softhsm2.conf"), "directories.tokendir = "+h.path("tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	write(t, h.path("pin"), pin+"\n")
	if err := os.Mkdir(h.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", h.path("softhsm2.conf"))
	run(t, "softhsm2-util", "--init-token", "--free", "--label", "muster", "--pin", pin, "--so-pin", pin)
	return h
}

func (h *hsm) path(name string) string { return filepath.Join(h.dir, name) }

func (h *hsm) uri(id, object string) string {
	return "pkcs11:module-path=" + module + ";token=muster;id=" + id + ";object=" + object + "?pin-source=" + h.path("pin")
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fails is run for what must end with that code.
func fails(t *testing.T, code int, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	out, _ := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
		t.Fatalf("%s %s: %v, want exit code %d\n%s", name, strings.Join(args, " "), cmd.ProcessState, code, out)
	}
	return string(out)
}

// programs are built as make pkcs11 does.
func programs(t *testing.T) (musterd, muster string) {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-tags", "pkcs11", "-o", dir+"/", "muster/cmd/musterd", "muster/cmd/muster")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return filepath.Join(dir, "musterd"), filepath.Join(dir, "muster")
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// server is a musterd without a broker: it issues certificates all the same.
type server struct {
	t        *testing.T
	dir, url string
	token    string
	program  string
	client   *http.Client
	proc     *exec.Cmd
	log      *os.File
	ended    chan struct{}
}

func (s *server) start() {
	s.t.Helper()
	s.proc = exec.Command(s.program, "serve", "--config", filepath.Join(s.dir, "musterd.yaml"))
	s.proc.Stdout, s.proc.Stderr = s.log, s.log
	if err := s.proc.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ended = make(chan struct{})
	go func(p *exec.Cmd, ended chan struct{}) { defer close(ended); _ = p.Wait() }(s.proc, s.ended)
	eventually(s.t, "musterd answers", func() bool {
		_, err := s.get("/livez")
		return err == nil
	})
}

func (s *server) stop() {
	s.t.Helper()
	_ = s.proc.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		_ = s.proc.Process.Kill()
		s.t.Error("musterd did not stop")
	}
}

func (s *server) get(path string) (string, error) { return s.ask(http.MethodGet, path, nil) }

func (s *server) ask(method, path string, body any) (string, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, bytes.NewReader(raw))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+s.token)
	res, err := s.client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return string(text), err
}

// health is what /readyz says of the keys.
func (s *server) health() string {
	text, err := s.get("/readyz")
	if err != nil {
		return err.Error()
	}
	return text
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(45 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not in 45 s: %s", what)
		}
	}
}

// issue has a certificate issued for a new device and returns it with its intermediate, PEM.
func (s *server) issue(id string) string {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: id}}, key)
	if err != nil {
		s.t.Fatal(err)
	}
	if out, err := s.ask(http.MethodPost, "/api/v1/devices", map[string]string{"id": id, "product": "lamp"}); err != nil || strings.Contains(out, "urn:") {
		s.t.Fatal(out, err)
	}
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	out, err := s.ask(http.MethodPost, "/api/v1/devices/"+id+"/certificates", map[string]string{"csr": csr})
	if err != nil {
		s.t.Fatal(err)
	}
	var c struct {
		Chain string `json:"chain"`
	}
	if err := json.Unmarshal([]byte(out), &c); err != nil || c.Chain == "" {
		s.t.Fatal(out, err)
	}
	return c.Chain
}

// The whole way with keys that never leave a token: init makes them, devices get certificates, a restart finds them again,
// and a token that is gone is told, not waited for.
func TestKeysInAToken(t *testing.T) {
	h := newHSM(t)
	musterd, muster := programs(t)
	dir := filepath.Join(h.dir, "muster")
	ops := freePort(t)
	sets := []string{
		"pki.device_key=" + h.uri("01", "device-ca"), "pki.server_key=" + h.uri("02", "server-ca"), "pki.audit_key=" + h.uri("0a", "audit"),
		"listen.ops=" + ops, "listen.devices=" + freePort(t), "listen.recovery=" + freePort(t), "listen.broker_auth=" + freePort(t), "broker.amqps=" + freePort(t),
	}
	initArgs := []string{"init", "--data-dir", dir, "--token-file", h.path("token")}
	for _, s := range sets {
		initArgs = append(initArgs, "--set", s)
	}
	if out := fails(t, 1, musterd, initArgs...); !strings.Contains(out, "not found") || strings.Contains(out, pin) {
		t.Errorf("keys that are not there: %s", out)
	}
	write(t, h.path("pin"), "00000000\n")
	if out := fails(t, 1, musterd, append(initArgs, "--create-keys")...); !strings.Contains(out, "PIN") {
		t.Errorf("a wrong PIN: %s", out)
	}
	write(t, h.path("pin"), pin+"\n")
	run(t, musterd, append(initArgs, "--create-keys")...)
	if keys, err := filepath.Glob(filepath.Join(dir, "pki", "*-ca.key")); err != nil || len(keys) > 0 {
		t.Errorf("keys in files: %v", keys)
	}

	trust, err := os.ReadFile(filepath.Join(dir, "pki", "trust-bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(trust)
	token, err := os.ReadFile(h.path("token"))
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(h.path("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	_, port, _ := net.SplitHostPort(ops)
	s := &server{
		t: t, dir: dir, url: "https://localhost:" + port, token: strings.TrimSpace(string(token)), program: musterd, log: log,
		client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}},
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(h.path("log"))
			t.Logf("%s", text)
		}
	})
	s.start()
	s.verify(h, "lamp-1")
	s.stop()
	s.start()
	s.verify(h, "lamp-2")
	eventually(t, "the keys are well", func() bool {
		health := s.health()
		return strings.Contains(health, "ca-keys") && !strings.Contains(health, "ca-keys: ") && strings.Contains(health, "audit") && !strings.Contains(health, "audit: ")
	})
	if _, err := os.Stat(filepath.Join(dir, "pki", "audit.key")); err == nil {
		t.Error("the audit key is in a file")
	}
	s.stop()

	// The token is gone: musterd serves, and says what is wrong.
	if err := os.Rename(h.path("tokens"), h.path("elsewhere")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(h.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.start()
	var health string
	eventually(t, "the missing token is told", func() bool {
		health = s.health()
		return strings.Contains(health, "device CA cannot sign")
	})
	if !strings.Contains(health, "key manager of pkcs11:") || strings.Contains(health, pin) {
		t.Error(health)
	}
	s.stop()

	// A wrong PIN ends the start with the code on which systemd does not try again: the token would lock itself.
	if err := os.Remove(h.path("tokens")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(h.path("elsewhere"), h.path("tokens")); err != nil {
		t.Fatal(err)
	}
	write(t, h.path("pin"), "00000000\n")
	if out := fails(t, 78, musterd, "serve", "--config", filepath.Join(dir, "musterd.yaml")); !strings.Contains(out, "PIN") {
		t.Errorf("a wrong PIN: %s", out)
	}
	write(t, h.path("pin"), pin+"\n")

	// The key of a root in the token, too.
	root := h.path("root")
	write(t, h.path("pass"), "correct horse battery\n")
	run(t, muster, "ca", "root", "create", "--name", "acme", "--out", root, "--root-key", h.uri("03", "root"), "--create-keys", "--passphrase-file", h.path("pass"))
	if out := fails(t, 5, muster, "ca", "root", "create", "--name", "acme", "--out", root+"2", "--root-key", h.uri("03", "root"), "--create-keys", "--passphrase-file", h.path("pass")); !strings.Contains(out, "already") {
		t.Error(out)
	}
	run(t, "openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", h.path("d.key"), "-subj", "/CN=d", "-out", h.path("d.csr"))
	run(t, muster, "ca", "root", "sign", "--root", root, "--csr", h.path("d.csr"), "--profile", "device-ca", "--out", h.path("d.crt"), "--yes")
	run(t, "openssl", "verify", "-x509_strict", "-CAfile", filepath.Join(root, "root.crt"), h.path("d.crt"))
	h.signFirmware(muster)
}

// signFirmware has a release, an image for Secure Boot and one for esp32FOTA signed by keys in the token, of a file that is
// deleted before. muster and openssl verify it.
func (h *hsm) signFirmware(muster string) {
	t := h.t
	image := h.path("app.bin")
	write(t, image, string(espfile.App{Chip: 0x09}.Bytes(t)))
	put := func(id, object string, generate ...string) {
		t.Helper()
		key := h.path("import.pem")
		run(t, "openssl", append([]string{"genpkey", "-quiet", "-out", key}, generate...)...)
		run(t, "openssl", "pkey", "-in", key, "-pubout", "-out", h.path(object+".pub.pem"))
		run(t, "softhsm2-util", "--import", key, "--token", "muster", "--label", object, "--id", id, "--pin", pin)
		if err := os.Remove(key); err != nil {
			t.Fatal(err)
		}
	}
	put("04", "release", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
	put("05", "boot", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072")
	run(t, muster, "firmware", "sign", image, "--key", h.uri("04", "release"), "--secure-boot", h.uri("05", "boot"), "--esp32fota", h.uri("05", "boot"), "--product", "lamp", "--version", "1.0.0")
	signed := h.path("app.signed.bin")
	if out := run(t, muster, "firmware", "inspect", signed, "--key", h.path("release.pub.pem")); !strings.Contains(out, "rsa-3072") || !strings.Contains(out, "valid") {
		t.Error(out)
	}
	var fota struct {
		Signature string `json:"signature"`
	}
	text, err := os.ReadFile(signed + ".esp32fota")
	if err == nil {
		err = json.Unmarshal(text, &fota)
	}
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.StdEncoding.DecodeString(fota.Signature)
	if err != nil {
		t.Fatal(err)
	}
	write(t, h.path("fota.sign"), string(raw))
	run(t, "openssl", "dgst", "-sha256", "-verify", h.path("boot.pub.pem"), "-signature", h.path("fota.sign"), signed)
	if out := fails(t, 3, muster, "firmware", "sign", image, "--key", h.uri("09", "none"), "--product", "lamp", "--version", "1.0.0"); !strings.Contains(out, "release key") || strings.Contains(out, pin) {
		t.Errorf("a key that is not there: %s", out)
	}
}

// verify has openssl look at a certificate that was signed in the token.
func (s *server) verify(h *hsm, id string) {
	s.t.Helper()
	path := h.path(id + ".pem")
	write(s.t, path, s.issue(id))
	out := run(s.t, "openssl", "verify", "-purpose", "sslclient", "-CAfile", filepath.Join(s.dir, "pki", "trust-bundle.pem"), "-untrusted", path, path)
	if want := fmt.Sprintf("%s: OK", path); !strings.Contains(out, want) {
		s.t.Error(out)
	}
}
