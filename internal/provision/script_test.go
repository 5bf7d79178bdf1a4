package provision_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/provision"
)

// Fakes of Espressif's tools. They keep the eFuses of a board in files, and write down every call. $FAKE/cut names a word: the
// call with that word does its work, and then the plug is pulled; it is forgotten then. $FAKE/before is the same before the work.
const fakeTools = `#!/bin/sh
set -eu
me=$(basename "$0")
if [ "${1:-}" = version ]; then printf '%s v%s\n%s\n' "$me" "$FAKE_VERSION" "$FAKE_VERSION"; exit 0; fi
printf '%s %s\n' "$me" "$*" >>"$FAKE/calls"
pulled() { if [ -e "$FAKE/$1" ] && case " $2 " in *" $(cat "$FAKE/$1") "*) true ;; *) false ;; esac; then rm "$FAKE/$1"; exit 2; fi; }
pulled before "$*"
if [ -e "$FAKE/closed" ]; then echo 'no serial data received' >&2; exit 2; fi
while [ $# -gt 0 ]; do
  case $1 in
  read-mac|read_mac) printf 'Chip type:          ESP32-D0WD-V3 (revision v%s)\nMAC:                %s\n' "$FAKE_REVISION" "$(cat "$FAKE/mac")"; break ;;
  summary)
    printf '%s v%s\n{\n' "$me" "$FAKE_VERSION"
    for b in BLOCK1 BLOCK2 BLOCK_KEY0 BLOCK_KEY1 BLOCK_KEY2 BLOCK_KEY3 BLOCK_KEY4 BLOCK_KEY5; do
      v='00 00 00' rw=true
      if [ -e "$FAKE/$b" ]; then v='?? ?? ??' rw=false; fi
      printf '    "%s": {\n        "bit_len": 256,\n        "name": "%s",\n        "readable": %s,\n        "value": "%s",\n        "writeable": %s\n    },\n' $b $b $rw "$v" $rw
    done
    printf '    "LAST": {}\n}\n'; break ;;
  burn-key|burn_key)
    case $2 in flash_encryption) b=BLOCK1 ;; secure_boot_v2) b=BLOCK2 ;; *) b=$2 ;; esac
    [ ! -e "$FAKE/$b" ] || { echo 'already burnt' >&2; exit 2; }
    cp "$3" "$FAKE/$b"
    case ${4:-} in XTS_AES_256_KEY) cp "$3" "$FAKE/BLOCK_KEY$((${2#BLOCK_KEY} + 1))" ;; esac
    pulled cut "burn-key $*"; break ;;
  burn-efuse|burn_efuse)
    case $2 in UART_DOWNLOAD_DIS|ENABLE_SECURITY_DOWNLOAD) : >"$FAKE/closed" ;; esac
    pulled cut "$*"; break ;;
  write-flash|write_flash|erase-flash|erase_flash) pulled cut "$*"; break ;;
  *) shift ;;
  esac
done
`

// bench is a factory station with a device's folder, and a board plugged in.
type bench struct {
	t           *testing.T
	dir, fake   string
	version, in string
	revision    string // of the chip
}

func station(t *testing.T, p provision.Product, d provision.Device) *bench {
	t.Helper()
	b := &bench{t: t, dir: filepath.Join(t.TempDir(), string(d.ID)), fake: t.TempDir(), version: "5.1.0", revision: "3.1"}
	pl := plan(t, p)
	made, err := pl.Make(d, secrets(t, pl))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range made {
		path := filepath.Join(b.dir, f.Name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, f.Data, 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tool := range []string{"esptool", "espefuse", "espsecure"} {
		b.put(tool, fakeTools)
	}
	b.put("mac", "24:0A:C4:00:00:01\n")
	return b
}

func (b *bench) put(name, content string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.fake, name), []byte(content), 0o700); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) has(name string) bool {
	_, err := os.Stat(filepath.Join(b.fake, name))
	return err == nil
}

// run runs the script with in typed, and returns what it said and whether it succeeded.
func (b *bench) run(args ...string) (string, bool) {
	b.t.Helper()
	c := exec.Command(filepath.Join(b.dir, provision.ScriptFile), args...)
	c.Env = append(os.Environ(), "PATH="+b.fake+":"+os.Getenv("PATH"), "FAKE="+b.fake, "FAKE_VERSION="+b.version, "FAKE_REVISION="+b.revision, "MUSTER_OPERATOR=anna", "MUSTER_STATION=line \"1\"", "ESPPORT=", "ESPTOOL=", "ESPEFUSE=", "ESPSECURE=")
	c.Stdin = strings.NewReader(b.in)
	out, err := c.CombinedOutput()
	return string(out), err == nil
}

func (b *bench) must(words string, args ...string) {
	b.t.Helper()
	if out, ok := b.run(args...); !ok || !strings.Contains(out, words) {
		b.t.Fatalf("%v: %t, want %q\n%s", args, ok, words, out)
	}
}

func (b *bench) refuses(words string, args ...string) {
	b.t.Helper()
	if out, ok := b.run(args...); ok || !strings.Contains(out, words) {
		b.t.Fatalf("%v: %t, want %q\n%s", args, ok, words, out)
	}
}

// calls returns what was called since the last time, only those with one of the words if there are any.
func (b *bench) calls(words ...string) (out []string) {
	raw, _ := os.ReadFile(filepath.Join(b.fake, "calls"))
	_ = os.Remove(filepath.Join(b.fake, "calls"))
	for line := range strings.Lines(string(raw)) {
		if len(words) == 0 || slices.ContainsFunc(words, func(w string) bool { return strings.Contains(line, w) }) {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

func (b *bench) log() string {
	raw, _ := os.ReadFile(filepath.Join(filepath.Dir(b.dir), "station.log"))
	return string(raw)
}

// TestPlainBoard flashes a board without any protection: nothing is asked, and nothing is burnt.
func TestPlainBoard(t *testing.T) {
	b := station(t, plain(t, "esp32"), lamp)
	b.must("done: board 24:0a:c4:00:00:01 is lamp-0001", "/dev/ttyUSB7")
	want := []string{
		"esptool --chip esp32 --port /dev/ttyUSB7 --baud 460800 --after no-reset read-mac",
		"esptool --chip esp32 --port /dev/ttyUSB7 --baud 460800 --after no-reset erase-flash",
		"esptool --chip esp32 --port /dev/ttyUSB7 --baud 460800 --after hard-reset write-flash --flash-mode keep --flash-freq keep --flash-size keep 0x1000 bootloader.bin 0x8000 partition-table.bin 0x9000 nvs.bin 0xe000 otadata.bin 0x10000 app.bin",
	}
	if got := b.calls(); !slices.Equal(got, want) {
		t.Errorf("%s", strings.Join(got, "\n"))
	}
	if _, err := os.Stat(filepath.Join(b.dir, "nvs.bin")); err == nil {
		t.Error("the key in the clear is still there")
	}
	b.must("finished already")
	if got := b.calls(); len(got) > 0 {
		t.Errorf("again: %v", got)
	}
	if log := b.log(); !strings.Contains(log, `"station":"line 1","who":"anna","device":"lamp-0001","mac":"24:0a:c4:00:00:01","what":"finished","result":"ok"`) {
		t.Error(log)
	}
}

// TestVersionFour spells the same as version 4 of the tools does.
func TestVersionFour(t *testing.T) {
	b := station(t, sealed(t, "esp32", esp.CipherESP32), lamp)
	b.version = "4.7.0"
	b.must("done", "--burn")
	got := strings.Join(b.calls(), "\n")
	for _, w := range []string{"--after no_reset write_flash --flash_mode keep --flash_freq keep --flash_size keep 0x1000", "--do-not-confirm burn_key flash_encryption efuse/", "write_protect_efuse DIS_CACHE", "summary --format json"} {
		if !strings.Contains(got, w) {
			t.Errorf("no call %s in\n%s", w, got)
		}
	}
}

// TestNothingIsBurntUnasked stops at every question that is not answered with the device's name.
func TestNothingIsBurntUnasked(t *testing.T) {
	b := station(t, sealed(t, "esp32s3", esp.CipherXTS256), lamp)
	for _, answer := range []string{"", "y\n", "lamp-0002\n"} {
		b.in = answer
		b.refuses("not confirmed")
	}
	if got := b.calls("burn", "protect"); len(got) > 0 || b.has("BLOCK_KEY0") {
		t.Fatalf("burnt: %v", got)
	}
	b.in = "lamp-0001\nno\n"
	b.refuses("CANNOT BE UNDONE either")
	if got := b.calls("write-flash", "ENABLE_SECURITY_DOWNLOAD"); len(got) > 0 {
		t.Errorf("flashed again, or closed: %v", got)
	}
	b.in = "lamp-0001\n"
	b.must("done")
	if got := b.calls("burn", "write-flash"); len(got) != 1 || !strings.HasSuffix(got[0], "burn-efuse ENABLE_SECURITY_DOWNLOAD 1") {
		t.Errorf("calls: %v", got)
	}
}

// TestPulledPlug pulls the plug at each call in turn, before and after its work, and runs the script again until it is done:
// every eFuse is burnt once, the key is the device's own, and the flash is written once more at most.
func TestPulledPlug(t *testing.T) {
	p := sign(t, sealed(t, "esp32", esp.CipherESP32), "sb_rsa3072_a")
	for _, when := range []string{"cut", "before"} {
		b := station(t, p, lamp)
		key, err := os.ReadFile(filepath.Join(b.dir, "efuse", "flash-encryption.bin"))
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"erase-flash", "write-flash", "flash_encryption", "secure_boot_v2", "FLASH_CRYPT_CNT", "ABS_DONE_1", "RD_DIS", "UART_DOWNLOAD_DIS"} {
			if when == "cut" && word == "RD_DIS" {
				continue // the fake pulls it before only
			}
			b.put(when, word)
			b.in = "yes\n"
			if out, ok := b.run("--burn"); ok {
				t.Fatalf("%s %s: not noticed\n%s", when, word, out)
			}
		}
		b.in = "yes\n"
		b.must("done", "--burn")
		all := strings.Join(b.calls("burn-key"), "\n")
		most := map[string]int{"cut": 1, "before": 2}[when]
		for _, w := range []string{"flash_encryption", "secure_boot_v2"} {
			if n := strings.Count(all, w); n != most {
				t.Errorf("%s: %s burnt %d times", when, w, n)
			}
		}
		if got, _ := os.ReadFile(filepath.Join(b.fake, "BLOCK1")); !bytes.Equal(got, key) {
			t.Errorf("%s: the board has another key", when)
		}
		if log := b.log(); strings.Count(log, `"result":"failed"`) < 7 || strings.Count(log, `"what":"finished"`) != 1 {
			t.Errorf("%s: the log says\n%s", when, log)
		}
	}
}

// TestWrongBoard refuses a board that is not meant, one that has keys already, and a second one for the same identity.
func TestWrongBoard(t *testing.T) {
	d := lamp
	d.MAC = "24:0a:c4:00:00:02"
	b := station(t, sealed(t, "esp32", esp.CipherESP32), d)
	b.refuses("this folder is for board 24:0a:c4:00:00:02, and here is 24:0a:c4:00:00:01", "--burn")
	if got := b.calls("flash", "burn"); len(got) > 0 {
		t.Errorf("touched: %v", got)
	}
	b = station(t, sealed(t, "esp32", esp.CipherESP32), lamp)
	b.put("BLOCK1", "somebody's key")
	b.refuses("in use already", "--burn")
	if got := b.calls("erase", "write-flash", "burn"); len(got) > 0 {
		t.Errorf("touched: %v", got)
	}
	if err := os.Remove(filepath.Join(b.fake, "BLOCK1")); err != nil {
		t.Fatal(err)
	}
	b.put("before", "burn-key")
	b.refuses("stopped at: flash-key", "--burn")
	b.put("mac", "MAC: 24:0a:c4:00:00:03")
	b.refuses("two boards must not have one identity", "--burn")
	b.must("done: board 24:0a:c4:00:00:03", "--burn", "--other-board")
	if !strings.Contains(b.log(), "board 24:0a:c4:00:00:01 given up") {
		t.Error(b.log())
	}
}

// TestOldChip touches no chip that is too old for Secure Boot, nor one that does not say how old it is.
func TestOldChip(t *testing.T) {
	b := station(t, sign(t, plain(t, "esp32"), "sb_rsa3072_a"), lamp)
	for revision, words := range map[string]string{"1.1": "it has revision v1.1, and v3.0 is needed", "2.99": "needed", "?": "does not tell"} {
		b.revision = revision
		b.refuses(words, "--burn")
	}
	if got := b.calls("flash", "burn"); len(got) > 0 {
		t.Errorf("touched: %v", got)
	}
	b.revision = "3.0"
	b.must("done", "--burn")
}

// TestDamagedFolder flashes nothing from a folder of which a file was changed, and checks one with espsecure.
func TestDamagedFolder(t *testing.T) {
	b := station(t, sealed(t, "esp32c3", esp.CipherXTS128), lamp)
	// The fake of espsecure decrypts nothing: what it would write is not there, so the check fails after the first call.
	b.refuses("bootloader.bin is not what muster encrypted", "--check")
	if got := b.calls(); len(got) != 1 || !strings.Contains(got[0], "decrypt-flash-data --aes-xts --keyfile efuse/flash-encryption.bin --address 0x0 --output ") {
		t.Errorf("calls: %v", got)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "app.bin"), []byte("something"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.refuses("missing or damaged", "--burn")
	if got := b.calls(); len(got) > 0 {
		t.Errorf("calls: %v", got)
	}
}

// standIn is espsecure for files that were decrypted before, by their address: it checks the options, and hands them out.
const standIn = `#!/bin/sh
set -eu
case $1 in
signature-info-v2) LC_ALL=C grep -qa "$(printf '\347')" "$2"; exit ;;
decrypt-flash-data) shift ;;
esac
while [ $# -gt 1 ]; do
  case $1 in
  --aes-xts) shift; continue ;;
  --keyfile) cmp -s "$2" "$FAKE/key" ;;
  --address) address=$2 ;;
  --output) out=$2 ;;
  esac
  shift 2
done
cp "$FAKE/$address.clear" "$out"
`

// decrypted puts the files of a station's folder, decrypted, where the stand-in for espsecure finds them.
func (b *bench) decrypted(p provision.Product, pl *provision.Plan) {
	b.t.Helper()
	b.put("espsecure", standIn)
	if p.Flash == "" {
		return
	}
	key := secrets(b.t, pl).Flash
	b.put("key", string(key))
	c, err := flashcrypt.New(p.Flash, key)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, r := range pl.Regions() {
		content, err := os.ReadFile(filepath.Join(b.dir, r.File))
		if err != nil {
			b.t.Fatal(err)
		}
		if err := c.Decrypt(content, content, r.Offset); err != nil {
			b.t.Fatal(err)
		}
		b.put(fmt.Sprintf("0x%x.clear", r.Offset), string(content))
	}
}

// TestCheck has whole folders checked: by a stand-in for espsecure everywhere, and by Espressif's own where it is installed.
func TestCheck(t *testing.T) {
	tools := map[string]string{"a stand-in": ""}
	for _, name := range []string{"espsecure", "espsecure.py"} {
		if path, err := exec.LookPath(name); err == nil {
			tools[name] = path
		}
	}
	t.Logf("espsecure: %v", tools)
	for _, p := range []provision.Product{
		sign(t, sealed(t, "esp32", esp.CipherESP32), "sb_rsa3072_a"), sealed(t, "esp32s3", esp.CipherXTS256),
		sign(t, plain(t, "esp32c6"), "sb_ecdsa256"),
	} {
		for name, path := range tools {
			b := station(t, p, lamp)
			if path == "" {
				b.decrypted(p, plan(t, p))
			} else {
				b.put("espsecure", "#!/bin/sh\nexec '"+path+"' \"$@\"\n")
				b.version = versionOf(t, path)
			}
			b.must("the folder is whole", "--check")
			if got := b.calls(); len(got) > 0 {
				t.Errorf("%s touched a board: %v", name, got)
			}
			if b.log() != "" {
				t.Errorf("%s: a check is on the station log", name)
			}
		}
	}
}

// versionOf asks a tool of Espressif's for its version.
func versionOf(t *testing.T, path string) string {
	out, err := exec.Command(path, "--help").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if _, v, ok := strings.Cut(string(out), "espsecure.py v"); ok {
		return strings.Fields(v)[0]
	}
	return "5.0.0"
}

// TestShellcheck has the scripts checked where the machine has shellcheck, and by the shell itself everywhere.
func TestShellcheck(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.sh")
	if err != nil || len(scripts) < 5 {
		t.Fatal(err, scripts)
	}
	if tool, err := exec.LookPath("shellcheck"); err == nil {
		if out, err := exec.Command(tool, scripts...).CombinedOutput(); err != nil {
			t.Errorf("%s", out)
		}
	}
	for _, s := range scripts {
		if out, err := exec.Command("sh", "-n", s).CombinedOutput(); err != nil {
			t.Errorf("%s: %s", s, out)
		}
	}
}
