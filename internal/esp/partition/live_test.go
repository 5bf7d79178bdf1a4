package partition_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"muster/internal/esp/partition"
)

// TestOtherToolsAgree compares with ESP-IDF's gen_esp32part.py where it is on the path, and with the files that it once
// wrote everywhere.
func TestOtherToolsAgree(t *testing.T) {
	tables := map[string][]byte{"seed_two_ota_nvs_enc": golden(t, "seed_two_ota_nvs_enc.csv")}
	written := map[string][]byte{"seed_two_ota_nvs_enc": golden(t, "seed_two_ota_nvs_enc.bin")}
	if path, err := exec.LookPath("gen_esp32part.py"); err == nil {
		t.Logf("gen_esp32part.py is %s", path)
		for _, name := range partition.Builtins() {
			tables[name], _ = partition.Builtin(name)
		}
		for name, csv := range tables {
			written[name] = generate(t, path, csv)
		}
	} else {
		t.Log("there is no gen_esp32part.py: the files in testdata stand for it")
	}
	for name, want := range written {
		got, err := parse(t, string(tables[name])).Binary()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: other bytes (%v)", name, err)
		}
	}
}

func generate(t *testing.T, tool string, csv []byte) []byte {
	t.Helper()
	in, out := filepath.Join(t.TempDir(), "in.csv"), filepath.Join(t.TempDir(), "out.bin")
	if err := os.WriteFile(in, csv, 0o600); err != nil {
		t.Fatal(err)
	}
	if said, err := exec.CommandContext(t.Context(), tool, "--quiet", in, out).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", tool, err, said)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
