package secureboot_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/secureboot"
)

// tool is espsecure as it is on this machine: its commands are written with hyphens since version 5.
type tool struct {
	path  string
	under bool
}

// findTool looks for espsecure under the names that Debian and pip give it.
func findTool(t *testing.T) (tool, bool) {
	for _, name := range []string{"espsecure", "espsecure.py"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		help, err := exec.CommandContext(t.Context(), path, "--help").CombinedOutput()
		if err != nil {
			t.Fatalf("%s --help: %v\n%s", path, err, help)
		}
		return tool{path, !strings.Contains(string(help), "verify-signature")}, true
	}
	return tool{}, false
}

func (x tool) run(t *testing.T, command string, args ...string) {
	t.Helper()
	if x.under {
		command = strings.ReplaceAll(command, "-", "_")
	}
	out, err := exec.CommandContext(t.Context(), x.path, append([]string{command}, args...)...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s %v: %v\n%s", x.path, command, args, err, out)
	}
}

// verifier says whether a signed file is right.
type verifier func(t *testing.T, file []byte, key string)

// TestOtherToolsAgree has what muster signs verified by whoever can: muster itself always, espsecure where it is
// installed. What espsecure signs is verified by muster: the files in testdata always, new ones where it is installed.
func TestOtherToolsAgree(t *testing.T) {
	verifiers := map[string]verifier{"muster": verifyByMuster}
	signers := map[string]func(t *testing.T, plain []byte, key string) []byte{
		"muster": func(t *testing.T, plain []byte, key string) []byte { return sign(t, plain, false, key) },
	}
	if x, ok := findTool(t); ok {
		t.Logf("espsecure is %s", x.path)
		verifiers[x.path] = x.verify
		signers[x.path] = x.sign
	} else {
		t.Log("there is no espsecure: the files in testdata stand for it")
	}
	for by, signed := range signers {
		for _, key := range []string{"rsa3072_a", "ecdsa256"} {
			for _, plain := range [][]byte{padded(t), golden(t, "app_esp32_small.bin")} {
				file := signed(t, plain, key)
				for verified, verify := range verifiers {
					t.Logf("%d bytes, %s: signed by %s, verified by %s", len(plain), key, by, verified)
					verify(t, file, key)
				}
			}
		}
	}
}

func verifyByMuster(t *testing.T, file []byte, key string) {
	trust := secureboot.Policy{Keys: []secureboot.Slot{{Key: public(t, key).Digest()}}}
	if _, err := inspect(t, file).Check(trust); err != nil {
		t.Errorf("%s: %v", key, err)
	}
}

func (x tool) verify(t *testing.T, file []byte, key string) {
	dir := t.TempDir()
	x.run(t, "verify-signature", "--keyfile", "testdata/sb_"+key+".pub.pem", "--version", "2", put(t, dir, "app.bin", file))
	digest := filepath.Join(dir, "digest.bin")
	x.run(t, "digest-sbv2-public-key", "--keyfile", "testdata/sb_"+key+".pub.pem", "--output", digest)
	got, err := os.ReadFile(digest)
	if want := public(t, key).Digest(); err != nil || !bytes.Equal(got, want[:]) {
		t.Errorf("%s: its digest of the key is %x (%v)", key, got, err)
	}
}

func (x tool) sign(t *testing.T, plain []byte, key string) []byte {
	dir := t.TempDir()
	out := filepath.Join(dir, "signed.bin")
	x.run(t, "sign-data", "--version", "2", "--keyfile", "testdata/sb_"+key+".pem", "--output", out, put(t, dir, "app.bin", plain))
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func put(t *testing.T, dir, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestOpenSSLCommand runs the command that a Request shows, as an operator would beside an HSM. Without openssl only
// its form is tested.
func TestOpenSSLCommand(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	t.Logf("openssl is %q", openssl)
	for _, key := range []string{"rsa3072_a", "ecdsa256", "ecdsa384"} {
		s := start(t, padded(t), false)
		req, reqErr := s.Request(public(t, key))
		if reqErr != nil {
			t.Fatal(reqErr)
		}
		words := strings.Fields(req.OpenSSL())
		if words[0] != "openssl" || strings.Contains(req.OpenSSL(), "pss") != (req.Scheme == esp.RSA3072) {
			t.Errorf("%s: %s", key, req.OpenSSL())
		}
		if err != nil {
			continue
		}
		dir := t.TempDir()
		put(t, dir, "digest.bin", req.Digest)
		put(t, dir, "KEY.pem", golden(t, "sb_"+key+".pem"))
		cmd := exec.CommandContext(t.Context(), openssl, words[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", req.OpenSSL(), err, out)
			continue
		}
		sig, err := os.ReadFile(filepath.Join(dir, "signature.bin"))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Add(public(t, key), sig); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		verifyByMuster(t, finish(t, s), key)
	}
}
