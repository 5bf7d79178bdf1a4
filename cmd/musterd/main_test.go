package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/ca/keystore"
	"muster/internal/cli"
)

func musterd(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e strings.Builder
	code = run(args, &o, &e)
	return code, o.String(), e.String()
}

// initialised returns the settings file of a new muster, and the token that init showed.
func initialised(t *testing.T) (conf, token string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "muster")
	code, out, errs := musterd(t, "init", "--data-dir", dir, "--name", "muster.example.com")
	if code != 0 {
		t.Fatal(errs)
	}
	for _, word := range strings.Fields(out) {
		if strings.HasPrefix(word, "mst_") {
			token = word
		}
	}
	return filepath.Join(dir, "musterd.yaml"), token
}

// The token is shown and stored nowhere; every secret is its owner's alone.
func TestInitMakesAllThatServeNeedsAndKeepsItToItself(t *testing.T) {
	conf, token := initialised(t)
	if token == "" {
		t.Fatal("no token was shown")
	}
	if code, out, errs := musterd(t, "config", "check", "-c", conf); code != 0 || !strings.Contains(out, "a secret: not shown") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	err := filepath.WalkDir(filepath.Dir(conf), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.Contains(string(raw), token) {
			t.Errorf("%s holds the token", path)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		secret := strings.Contains(string(raw), "PRIVATE KEY") || strings.Contains(path, "/secrets/") || strings.HasSuffix(path, ".db") || strings.HasSuffix(path, "definitions.json")
		if secret && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is secret and has mode %#o", path, info.Mode().Perm())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestInitNeverTouchesAnotherMuster(t *testing.T) {
	conf, _ := initialised(t)
	before, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	code, _, errs := musterd(t, "init", "--data-dir", filepath.Dir(conf))
	after, err := os.ReadFile(conf)
	if code != 1 || !strings.Contains(errs, "holds a muster already") || err != nil || string(after) != string(before) {
		t.Errorf("%d %s", code, errs)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "thesis.txt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := musterd(t, "init", "--data-dir", full); code != 1 || !strings.Contains(errs, "is not empty") {
		t.Errorf("%d %s", code, errs)
	}
	if _, err := os.Stat(filepath.Join(full, "thesis.txt")); err != nil {
		t.Error("somebody's file is gone")
	}
}

// A wrong setting ends with EX_CONFIG and a line for each mistake; systemd must not restart on it.
func TestWrongSettingsAreToldApart(t *testing.T) {
	conf, _ := initialised(t)
	code, _, errs := musterd(t, "serve", "-c", conf, "--set", "listen.opps=x", "--set", "uplink.batch=many")
	if code != exitConfig || strings.Count(errs, "error:") != 2 {
		t.Errorf("%d %s", code, errs)
	}
	key := filepath.Join(filepath.Dir(conf), "tls", "ops.key")
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := musterd(t, "serve", "-c", conf); code != exitConfig || !strings.Contains(errs, "everybody may read") {
		t.Errorf("%d %s", code, errs)
	}
	if code, _, _ := musterd(t, "serve", "surplus"); code != exitUsage {
		t.Errorf("a surplus argument: %d", code)
	}
	if code, _, _ := musterd(t, "fsck", "--nonsense"); code != exitUsage {
		t.Errorf("an unknown flag: %d", code)
	}
}

func TestBackupAndRestore(t *testing.T) {
	conf, _ := initialised(t)
	dir := filepath.Dir(conf)
	copied := filepath.Join(t.TempDir(), "copy")
	if code, out, errs := musterd(t, "backup", copied, "-c", conf); code != 0 || !strings.Contains(out, "checked") {
		t.Fatal(errs)
	}
	if code, _, _ := musterd(t, "backup", copied, "-c", conf); code == 0 {
		t.Error("a backup was overwritten")
	}
	if code, out, errs := musterd(t, "fsck", "-c", conf); code != 0 || !strings.Contains(out, "sound") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if err := os.WriteFile(filepath.Join(dir, "muster.db"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := musterd(t, "fsck", "-c", conf); code == 0 {
		t.Errorf("a damaged store is called sound: %s", errs)
	}
	if err := os.Remove(filepath.Join(dir, "muster.db")); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := musterd(t, "restore", copied, "-c", conf); code != 0 {
		t.Fatal(errs)
	}
	if code, out, _ := musterd(t, "restore", copied, "-c", conf); code != 0 || !strings.Contains(out, "before-restore-") {
		t.Errorf("the store that was there is not kept: %s", out)
	}
	if code, _, errs := musterd(t, "fsck", "-c", conf); code != 0 {
		t.Error(errs)
	}
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := musterd(t, "restore", broken, "-c", conf); code == 0 {
		t.Error("garbage was restored")
	}
}

// muster is the operators' program on a machine without network.
func muster(t *testing.T, args ...string) string {
	t.Helper()
	var out, errs strings.Builder
	code := cli.Run(t.Context(), cli.Env{Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }})
	if code != 0 {
		t.Fatalf("muster %s: %d\n%s%s", strings.Join(args, " "), code, out.String(), errs.String())
	}
	return out.String()
}

// The root never comes near the server, and what comes out is a muster whose files are good for openssl.
func TestInitWithAnOfflineRoot(t *testing.T) {
	work := t.TempDir()
	at := func(name string) string { return filepath.Join(work, name) }
	if err := os.WriteFile(at("pass"), []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	root, dir := at("safe"), at("muster")
	muster(t, "ca", "root", "create", "--name", "acme", "--out", root, "--passphrase-file", at("pass"))
	roots := filepath.Join(root, "root.crt") + "," + filepath.Join(root, "spare-root.crt")

	refused := func(words string, args ...string) {
		t.Helper()
		if code, _, errs := musterd(t, args...); code != 1 || !strings.Contains(errs, words) {
			t.Errorf("musterd %s: %d %s", strings.Join(args, " "), code, errs)
		}
	}
	refused("name two files", "init", "--data-dir", dir, "--root-certs", filepath.Join(root, "root.crt"))
	refused("different names and keys", "init", "--data-dir", dir, "--root-certs", filepath.Join(root, "root.crt")+","+filepath.Join(root, "root.crt"))
	refused("does not wait", "init", "--data-dir", dir, "--import", at("x.crt"))
	code, out, errs := musterd(t, "init", "--data-dir", dir, "--root-certs", roots, "--name", "muster.example.com", "--set", "log.level=warn")
	if code != 0 || !strings.Contains(out, "--profile server-ca") {
		t.Fatal(out, errs)
	}
	refused("waits for the certificates", "init", "--data-dir", dir)
	if _, err := os.Stat(filepath.Join(dir, "musterd.yaml")); err == nil {
		t.Error("there are settings already")
	}

	for _, p := range []string{"device-ca", "server-ca"} {
		shown := muster(t, "ca", "root", "sign", "--root", root, "--csr", filepath.Join(dir, "init", p+".csr"), "--profile", p, "--out", at(p+".crt"), "--yes", "--passphrase-file", at("pass"))
		for _, field := range strings.Fields(out) {
			if len(field) == 64 && strings.Contains(shown, field) {
				shown = ""
			}
		}
		if shown != "" {
			t.Errorf("the key's hash is not the one that init showed:\n%s\n%s", out, shown)
		}
	}
	muster(t, "ca", "root", "sign", "--root", root, "--with", "spare-root", "--csr", filepath.Join(dir, "init", "device-ca.csr"), "--profile", "device-ca", "--out", at("spare.crt"), "--yes", "--passphrase-file", at("pass"))
	refused("two certificates", "init", "--data-dir", dir, "--import", at("device-ca.crt"))
	refused("was not signed by", "init", "--data-dir", dir, "--import", at("spare.crt")+","+at("server-ca.crt"))
	refused("neither of the keys", "init", "--data-dir", dir, "--import", at("device-ca.crt")+","+roots)
	refused("no such file", "init", "--data-dir", dir, "--import", at("none.crt"))
	// A try that fails late leaves nothing in the way of the next.
	blocked := filepath.Join(dir, "broker", "definitions.json.part", "x")
	if err := os.MkdirAll(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	refused("definitions.json", "init", "--data-dir", dir, "--import", at("device-ca.crt")+","+at("server-ca.crt"))
	if err := os.RemoveAll(filepath.Dir(blocked)); err != nil {
		t.Fatal(err)
	}
	if code, out, errs := musterd(t, "init", "--data-dir", dir, "--import", at("device-ca.crt")+","+at("server-ca.crt")); code != 0 || !strings.Contains(out, "mst_") {
		t.Fatal(out, errs)
	}
	refused("holds a muster already", "init", "--data-dir", dir, "--import", at("device-ca.crt")+","+at("server-ca.crt"))

	conf := filepath.Join(dir, "musterd.yaml")
	if code, out, errs := musterd(t, "config", "check", "-c", conf); code != 0 || !strings.Contains(out, `level: "warn"`) {
		t.Errorf("the settings of the first step are lost: %d %s %s", code, out, errs)
	}
	pki := filepath.Join(dir, "pki")
	for _, args := range [][]string{
		{"verify", "-x509_strict", "-CAfile", filepath.Join(pki, "root.crt"), filepath.Join(pki, "device-ca.crt")},
		{"verify", "-purpose", "sslserver", "-verify_hostname", "muster.example.com", "-CAfile", filepath.Join(pki, "trust-bundle.pem"), "-untrusted", filepath.Join(dir, "tls", "devices.crt"), filepath.Join(dir, "tls", "devices.crt")},
	} {
		if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
			t.Errorf("openssl %s: %s", strings.Join(args, " "), out)
		}
	}
	for _, f := range []string{"root.key", "spare-root.key"} {
		if _, err := os.Stat(filepath.Join(pki, f)); err == nil {
			t.Errorf("%s is on the server", f)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "init")); err == nil {
		t.Error("the folder of the first step is left")
	}
	if code, out, errs := musterd(t, "fsck", "-c", conf); code != 0 {
		t.Errorf("%s %s", out, errs)
	}
}

// Keys of the intermediates by URI: made or used, and never in the folder of the CA.
func TestInitWithKeysByURI(t *testing.T) {
	work := t.TempDir()
	dir := filepath.Join(work, "muster")
	sets := []string{"--set", "pki.device_key=softkms:path=" + filepath.Join(work, "device.key"), "--set", "pki.server_key=softkms:path=" + filepath.Join(work, "server.key")}
	init := append([]string{"init", "--data-dir", dir}, sets...)
	if code, _, errs := musterd(t, init...); code != 1 || !strings.Contains(errs, "device.key") && !strings.Contains(errs, "server.key") {
		t.Errorf("keys that are not there: %d %s", code, errs)
	}
	if code, _, errs := musterd(t, "init", "--data-dir", dir, "--create-keys"); code != 1 || !strings.Contains(errs, "pki.device_key") {
		t.Errorf("%d %s", code, errs)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v behind", left)
	}
	if code, _, errs := musterd(t, append(init, "--create-keys")...); code != 0 {
		t.Fatal(errs)
	}
	for _, f := range []string{"pki/device-ca.key", "pki/server-ca.key"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err == nil {
			t.Errorf("%s is there, too", f)
		}
	}
	if code, out, errs := musterd(t, "config", "check", "-c", filepath.Join(dir, "musterd.yaml")); code != 0 || !strings.Contains(out, "softkms:path=") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if code, _, errs := musterd(t, "init", "--data-dir", filepath.Join(work, "b"), "--set", "pki.device_key=pkcs11:token=x;object=y", "--set", "pki.server_key=pkcs11:token=x;object=z"); code != 1 || !strings.Contains(errs, "built without") {
		t.Errorf("%d %s", code, errs)
	}
	if code, _, errs := musterd(t, "init", "--data-dir", filepath.Join(work, "b"), "--set", "pki.device_key=softkms:x", "--set", "pki.server_key=softkms:x"); code != exitConfig || !strings.Contains(errs, "must differ") {
		t.Errorf("%d %s", code, errs)
	}
}

// The key managers of clouds need no build of their own.
func TestCloudKeyManagersAreCompiledIn(t *testing.T) {
	for _, ref := range []string{"awskms:key-id=x", "cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", "azurekms:name=k;vault=v", "softkms:path=/x"} {
		if err := keystore.Check(ref); err != nil {
			t.Error(err)
		}
	}
}
