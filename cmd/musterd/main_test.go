package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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
