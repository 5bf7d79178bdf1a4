package flashcrypt

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"muster/internal/esp"
)

// espsecure returns the real tool if the machine has it. Without it the golden files alone speak.
func espsecure() string {
	for _, name := range []string{"espsecure", "espsecure.py"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

func TestItAgreesWithTheEspsecureOfThisMachine(t *testing.T) {
	type run struct {
		kind    esp.Cipher
		keySize int
		config  uint8 // ESP32 only
		args    []string
		address uint32
		n       int
	}
	var runs []run
	tool := espsecure()
	if tool != "" {
		runs = []run{
			{esp.CipherESP32, 32, DefaultConfig, nil, 0x1000, 4096},
			{esp.CipherESP32, 32, 0x6, []string{"--flash_crypt_conf", "0x6"}, 0x10010, 48},
			{esp.CipherESP32, 24, 0x9, []string{"--flash_crypt_conf", "0x9"}, 0xABCDE0, 480},
			{esp.CipherXTS128, 32, 0, []string{"--aes_xts"}, 0x10070, 304},
			{esp.CipherXTS256, 64, 0, []string{"--aes_xts"}, 0x8000, 3072},
		}
	}
	dir := t.TempDir()
	for i, r := range runs {
		key := bytes.Repeat([]byte{byte(0x31 + i), 0x5C, 0xE0}, 22)[:r.keySize]
		plain := bytes.Repeat([]byte("muster! "), r.n/8)
		name := func(s string) string { return filepath.Join(dir, fmt.Sprintf("%s%d.bin", s, i)) }
		for file, b := range map[string][]byte{name("key"): key, name("plain"): plain} {
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		args := append([]string{"encrypt_flash_data"}, r.args...)
		args = append(args, "--keyfile", name("key"), "--address", fmt.Sprintf("0x%x", r.address), "--output", name("out"), name("plain"))
		if out, err := exec.CommandContext(t.Context(), tool, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", tool, err, out)
		}
		want, err := os.ReadFile(name("out"))
		if err != nil {
			t.Fatal(err)
		}
		c := must(t, r.kind, key)
		if r.kind == esp.CipherESP32 {
			if c, err = NewESP32(key, r.config); err != nil {
				t.Fatal(err)
			}
		}
		got := make([]byte, len(plain))
		if err := c.Encrypt(got, plain, r.address); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s at 0x%x, %d bytes: differs from %s", r.kind, r.address, r.n, tool)
		}
	}
}
