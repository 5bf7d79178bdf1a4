package cli_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/signing"
	"muster/test/espfile"
)

// pss is how RSA signs for Secure Boot v2 (esp32.md §2).
var pss = &rsa.PSSOptions{SaltLength: 32, Hash: crypto.SHA256}

const bootKeys = "../esp/secureboot/testdata/"

// bootKey copies a Secure Boot key of the golden files to the desk.
func (d *desk) bootKey(name string) string {
	d.t.Helper()
	d.file(name+".pub.pem", read(d.t, bootKeys+name+".pub.pem"))
	return d.file(name+".pem", read(d.t, bootKeys+name+".pem"))
}

func TestSignForSecureBoot(t *testing.T) {
	d := sit(t, nil)
	key := filepath.Join(d.dir, "release.key")
	d.run("firmware", "keygen", "--out", key)
	a, b := d.bootKey("sb_rsa3072_a"), d.bootKey("sb_rsa3072_b")
	image := d.file("app.bin", string(espfile.App{Chip: 0x09, SecureVersion: 2}.Bytes(t)))
	signed := filepath.Join(d.dir, "app.signed.bin")
	release := []string{"--key", key, "--product", "lamp", "--version", "1.0.0"}
	sign := func(more ...string) []string { return append([]string{"firmware", "sign", image}, more...) }

	d.fails(2, "--key", sign()...)
	d.fails(2, "--product", sign("--key", key)...)
	d.fails(2, "needs --key", sign("--secure-boot", a, "--product", "lamp")...)
	d.fails(2, "--public-key", sign("--secure-boot-signature", a)...)
	d.fails(2, "go with --secure-boot", sign(append(release, "--append-signatures")...)...)
	d.fails(2, "chip", sign(append(release, "--secure-boot", a, "--chip", "esp32")...)...)
	if _, err := os.Stat(signed); err == nil {
		t.Error("a failure left a signed image behind")
	}
	d.fails(3, "no such file", sign("--secure-boot", filepath.Join(d.dir, "none"))...)

	out := d.run(sign(append(release, "--secure-boot", a, "--secure-boot", b)...)...)
	has(t, out, "app.signed.bin", "block 0 by key 00ae29ed", "block 1 by key 23430d28", "signed lamp 1.0.0", "app.signed.bin.jws", "esp32s3 image")
	has(t, d.run("firmware", "inspect", signed), "secure-boot-v2", "rsa-3072", "valid", "product", "lamp", "14 of 16 steps of the esp32s3 are left")
	r := decode[signing.Report](d, "firmware", "inspect", signed, "--key", key+".pub.pem")
	if !r.Verified || len(r.App.SecureBoot.Blocks) != 2 || r.Manifest.SecureVersion != 2 || r.Manifest.Chip != "esp32s3" || !r.Findings.Has("esp_not_secure_padded") {
		t.Errorf("%+v", r)
	}
	d.fails(5, "exists", sign("--secure-boot", a)...)

	// A key in a module: the digest out, the signature in.
	digest := filepath.Join(d.dir, "digest.bin")
	public := filepath.Join(d.dir, "sb_rsa3072_a.pub.pem")
	d.fails(2, "one --public-key", sign("--secure-boot-request", digest)...)
	has(t, d.run(sign("--secure-boot-request", digest, "--public-key", public)...), "rsa-3072", "00ae29ed")
	module, err := signing.LoadSecureBootKey(a, nil)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := module.Sign(rand.Reader, []byte(read(t, digest)), pss)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(d.dir, "module.bin")
	d.run(sign("--secure-boot-signature", d.file("digest.bin.sig", string(sig)), "--public-key", public, "--signed", other)...)
	has(t, d.run("firmware", "inspect", other), "00ae29ed", "valid")
	d.fails(2, "did not make this signature", sign("--secure-boot-signature", filepath.Join(d.dir, "digest.bin.sig"), "--public-key", filepath.Join(d.dir, "sb_rsa3072_b.pub.pem"), "--signed", other+"2")...)

	d.in = "correct horse\n"
	d.fails(2, "one passphrase only", sign("--secure-boot", a, "--key", key, "--product", "lamp", "--version", "1.0.0", "--passphrase-file", "-", "--secure-boot-passphrase-file", "-")...)
}

func TestInspectBroken(t *testing.T) {
	d := sit(t, nil)
	files, err := filepath.Glob("../esp/image/testdata/negative/*.bin")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, path := range files {
		s := d.try("firmware", "inspect", path)
		broken := strings.Contains(s.out, "error: ")
		// As a file of any kind, an application without a descriptor may be a bootloader.
		if want := map[bool]int{true: 1}[broken]; s.code != want || broken != strings.Contains(s.err, "broken: ") || strings.Contains(s.out, "\x1b") {
			t.Errorf("%s: exit %d\n%s%s", path, s.code, s.out, s.err)
		}
		js := d.try("firmware", "inspect", path, "--output", "json")
		if js.code != s.code || !strings.HasPrefix(js.out, "{") {
			t.Errorf("%s: exit %d\n%s", path, js.code, js.out)
		}
	}
	d.fails(3, "no such file", "firmware", "inspect", filepath.Join(d.dir, "none"))
}

func TestUploadESPImage(t *testing.T) {
	d := sit(t, nil)
	d.release("1.0.0") // a raw one
	key := filepath.Join(d.dir, "release.key")
	publish := func(version string, app espfile.App, flags ...string) said {
		d.t.Helper()
		image := d.file("app-"+version+".bin", string(app.Bytes(t)))
		d.run("firmware", "sign", image, "--key", key, "--product", "lamp", "--version", version, "--force")
		return d.try(append([]string{"firmware", "upload", image}, flags...)...)
	}
	s := publish("1.1.0", espfile.App{Version: "1.1.0", MaxRev: 399})
	if s.code != 0 || strings.Contains(s.err, "warning") {
		t.Errorf("exit %d\n%s%s", s.code, s.out, s.err)
	}
	has(t, d.run("firmware", "show", "lamp", "1.1.0"), "esp32", "up to v3.99")
	s = publish("1.2.0", espfile.App{Project: "toaster"})
	if s.code != 0 || !strings.Contains(s.err, `"toaster"`) || !strings.Contains(s.err, `"1.0.0"`) {
		t.Errorf("a name only warns: exit %d\n%s%s", s.code, s.out, s.err)
	}
	s = publish("1.3.0", espfile.App{Version: "1.3.0", SecureVersion: 1})
	if s.code != 2 || !strings.Contains(s.err, "from 0 to 1") || !strings.Contains(s.err, "31 of 32 steps of the esp32 are left") || !strings.Contains(s.err, "--burn-secure-version") {
		t.Errorf("exit %d\n%s%s", s.code, s.out, s.err)
	}
	d.fails(3, "", "firmware", "show", "lamp", "1.3.0")
	if s = publish("1.3.0", espfile.App{Version: "1.3.0", SecureVersion: 1}, "--burn-secure-version"); s.code != 0 {
		t.Errorf("exit %d\n%s%s", s.code, s.out, s.err)
	}
	if s = publish("1.4.0", espfile.App{Version: "1.4.0", SecureVersion: 1}); s.code != 0 {
		t.Errorf("the same secure version again: exit %d\n%s%s", s.code, s.out, s.err)
	}
}

func TestSecureBootKeys(t *testing.T) {
	d := sit(t, nil)
	d.release("1.0.0")
	key := filepath.Join(d.dir, "release.key")
	has(t, d.try("firmware", "secure-boot-keys", "list").err, "no Secure Boot keys")
	a := d.bootKey("sb_rsa3072_a")
	const digest = "00ae29ed5fecb4810f10f37512fadf0be39dedaa3884667fa18a9e891e704694"
	d.fails(2, "private key", "firmware", "secure-boot-keys", "add", "lamp", a)
	d.fails(1, "no such file", "firmware", "secure-boot-keys", "add", "lamp", "00ae")
	has(t, d.run("firmware", "secure-boot-keys", "add", "lamp", filepath.Join(d.dir, "sb_rsa3072_a.pub.pem")), digest)
	has(t, d.run("firmware", "secure-boot-keys", "add", "lamp", digest), digest)
	has(t, d.run("firmware", "secure-boot-keys", "list", "--product", "lamp"), "rsa-3072", "active", "t-admin")

	image := d.file("app.bin", string(espfile.App{Chip: 0x09, Version: "1.1.0"}.Bytes(t)))
	signed := filepath.Join(d.dir, "app.signed.bin")
	release := []string{"--key", key, "--product", "lamp", "--version", "1.1.0"}
	d.run(append([]string{"firmware", "sign", image}, release...)...)
	d.fails(2, "no Secure Boot signature", "firmware", "upload", image)
	d.run(append([]string{"firmware", "sign", image, "--secure-boot", a}, release...)...)
	d.run("firmware", "upload", signed)
	has(t, d.run("firmware", "secure-boot-keys", "revoke", "lamp", digest), "revoked")
	has(t, d.run("firmware", "secure-boot-keys", "list"), "revoked")
	d.run("firmware", "sign", signed, "--key", key, "--product", "lamp", "--version", "1.2.0", "--force")
	d.fails(2, "revoked key", "firmware", "upload", signed)
	d.fails(3, "", "firmware", "secure-boot-keys", "revoke", "lamp", strings.Repeat("0", 64))
}
