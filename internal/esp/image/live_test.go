package image_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/esp/image"
)

// esptool returns the command that shows an image, as it is on this machine: with hyphens since version 5.
func esptool(t *testing.T) ([]string, bool) {
	for _, name := range []string{"esptool", "esptool.py"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		help, err := exec.CommandContext(t.Context(), path, "--help").CombinedOutput()
		if err != nil {
			t.Fatalf("%s --help: %v\n%s", path, err, help)
		}
		if strings.Contains(string(help), "image-info") {
			return []string{path, "image-info"}, true
		}
		return []string{path, "image_info", "--version", "2"}, true
	}
	return nil, false
}

// TestOtherToolsAgree has images that muster wrote read by muster itself, and by esptool where it is installed.
func TestOtherToolsAgree(t *testing.T) {
	tool, ok := esptool(t)
	if ok {
		t.Logf("esptool is %s", tool)
	} else {
		t.Log("there is no esptool: the files in testdata stand for it")
	}
	for name, chip := range map[string]image.Header{"esp32": image.NewHeader(0), "esp32c3": image.NewHeader(5), "esp32s3": image.NewHeader(9)} {
		file := build(t, chip.Chip, nil)
		rep, err := image.Parse(bytes.NewReader(file), image.App)
		if err != nil || rep.Chip != name {
			t.Fatalf("%s: %v", name, err)
		}
		if !ok {
			continue
		}
		path := filepath.Join(t.TempDir(), "app.bin")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), tool[0], append(tool[1:], path)...).CombinedOutput()
		if text := string(out); err != nil || strings.Count(text, "(valid)") < 2 || !strings.Contains(text, string(rep.ImageHash)) {
			t.Errorf("%s: esptool does not find checksum and hash %s valid (%v)\n%s", name, rep.ImageHash, err, out)
		}
	}
}
