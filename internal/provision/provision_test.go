package provision_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/esp/nvs"
	"muster/internal/esp/partition"
	"muster/internal/fleet"
	"muster/internal/provision"
	"muster/test/espfile"
)

var update = flag.Bool("update", false, "write the golden scripts")

// variants are the products whose scripts are golden.
func variants(t testing.TB) map[string]provision.Product {
	full := sign(t, sealed(t, "esp32", esp.CipherESP32), "sb_rsa3072_a")
	full.Escrowed = true
	hmac := sealed(t, "esp32s3", esp.CipherXTS256)
	hmac.NVS, hmac.HMACBlock, hmac.Escrowed = provision.HMAC, 2, true
	c3 := sealed(t, "esp32c3", esp.CipherXTS128)
	c3.KeepDownload = true
	return map[string]provision.Product{
		"esp32-plain":    plain(t, "esp32"),
		"esp32-full":     full,
		"esp32s3-hmac":   hmac,
		"esp32s3-full":   sign(t, sealed(t, "esp32s3", esp.CipherXTS128), "sb_rsa3072_a"),
		"esp32c3-sealed": c3,
		"esp32c6-signed": sign(t, plain(t, "esp32c6"), "sb_ecdsa256"),
	}
}

var sums = regexp.MustCompile(`[0-9a-f]{64}`)

// TestScripts compares flash.sh with golden files. Hashes of signed images differ from run to run, and are left out.
func TestScripts(t *testing.T) {
	for name, p := range variants(t) {
		pl := plan(t, p)
		d := lamp
		d.MAC = map[bool]string{true: "24:0a:c4:00:00:01"}[name == "esp32-full"]
		got := sums.ReplaceAll(files(t, pl, d, secrets(t, pl))[provision.ScriptFile].Data, []byte(strings.Repeat("0", 64)))
		path := filepath.Join("testdata", name+".sh")
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the script is not as in %s; go test -update writes it, git diff shows it", name, path)
		}
	}
}

// TestAsEspsecure has a whole device encrypted byte for byte as espsecure and nvs_partition_gen did with the same keys.
func TestAsEspsecure(t *testing.T) {
	c := chip(t, "esp32")
	p := provision.Product{
		Chip: c, Table: table(t, c), Flash: esp.CipherESP32, NVS: provision.KeyPartition,
		Bootloader: file(t, "flashcrypt/testdata/pt_bootloader.bin"), App: file(t, "flashcrypt/testdata/pt_app.bin"),
	}
	pl := plan(t, p)
	s := provision.Secrets{Flash: file(t, "flashcrypt/testdata/key_fe_esp32_256.bin"), NVS: file(t, "nvs/testdata/key_nvs_fixed.bin")}
	made := files(t, pl, lamp, s)
	for name, golden := range map[string]string{
		"bootloader.bin": "flashcrypt/testdata/esp32_k256_0x1000_bootloader.bin", "partition-table.bin": "flashcrypt/testdata/esp32_k256_0x8000_partition_table.bin",
		"app.bin": "flashcrypt/testdata/esp32_k256_0x10000_app.bin", "nvs_key.bin": "nvs/testdata/nvs_keys_fixed_fe_esp32_0x310000.bin",
		"efuse/flash-encryption.bin": "flashcrypt/testdata/key_fe_esp32_256.bin",
	} {
		if !bytes.Equal(made[name].Data, file(t, golden)) {
			t.Errorf("%s is not %s", name, golden)
		}
	}
	c = chip(t, "esp32c3")
	p = provision.Product{Chip: c, Table: table(t, c), Flash: esp.CipherXTS128, Bootloader: bootloader(t, c), App: file(t, "image/testdata/app_esp32c3_small.bin")}
	pl = plan(t, p)
	made = files(t, pl, lamp, provision.Secrets{Flash: file(t, "flashcrypt/testdata/key_fe_xts128.bin")})
	if !bytes.Equal(made["partition-table.bin"].Data, file(t, "flashcrypt/testdata/fe_xts128_0x8000_partition_table.bin")) {
		t.Error("the partition table of a C3 is not as espsecure encrypts it")
	}
}

// TestEncryptedWhereItMustBe decrypts every region with the device's key, by the package that speaks for espsecure, and finds
// what was to be there; NVS is never flash-encrypted.
func TestEncryptedWhereItMustBe(t *testing.T) {
	for name, p := range variants(t) {
		pl := plan(t, p)
		s := secrets(t, pl)
		made := files(t, pl, lamp, s)
		want := map[string][]byte{"bootloader.bin": p.Bootloader, "app.bin": p.App, "otadata.bin": partition.BlankOTA().Bytes()}
		want["partition-table.bin"], _ = p.Table.Binary()
		if p.NVS == provision.KeyPartition {
			want["nvs_key.bin"] = parseKeys(t, s.NVS).Partition()
		}
		for _, r := range pl.Regions() {
			data := made[r.File].Data
			if r.Encrypted != (p.Flash != "" && r.File != "nvs.bin") {
				t.Errorf("%s: %s encrypted: %t", name, r.Name, r.Encrypted)
			}
			if r.Encrypted {
				c, err := flashcrypt.New(p.Flash, s.Flash)
				if err != nil {
					t.Fatal(err)
				}
				clear := make([]byte, len(data))
				if err := c.Decrypt(clear, data, r.Offset); err != nil {
					t.Fatal(err)
				}
				data = clear
			}
			if w, ok := want[r.File]; ok && !bytes.Equal(data, flashcrypt.Pad(w)[:len(data)]) {
				t.Errorf("%s: %s holds something else", name, r.Name)
			}
			delete(want, r.File)
		}
		if len(want) > 0 {
			t.Errorf("%s: not written: %v", name, want)
		}
	}
}

// TestDumpReadsBack opens the NVS partition of each variant from a dump, of the partition and of the flash, with its record alone.
func TestDumpReadsBack(t *testing.T) {
	for name, p := range variants(t) {
		pl := plan(t, p)
		s := secrets(t, pl)
		made := files(t, pl, lamp, s)
		rec := pl.Record(lamp, "lamp", s, time.Unix(1e9, 0))
		flash := bytes.Repeat([]byte{0xFF}, 4<<20)
		for _, r := range pl.Regions() {
			copy(flash[r.Offset:], made[r.File].Data)
		}
		for what, dump := range map[string][]byte{"the partition": made["nvs.bin"].Data, "the flash": flash} {
			o, err := rec.Open(dump, "")
			if err != nil {
				t.Errorf("%s, %s: %v", name, what, err)
				continue
			}
			for _, e := range lamp.Entries {
				if it, ok := o.Find(e.Namespace, e.Key); !ok || it.Text() != e.Text() {
					t.Errorf("%s, %s: %s is not there", name, what, e.Key)
				}
			}
			if (p.NVS == provision.Clear) != bytes.Contains(dump, []byte("secret password")) {
				t.Errorf("%s, %s: NVS encryption is %q", name, what, p.NVS)
			}
		}
	}
}

// TestDumpOfAnother refuses dumps that cannot be of the device, and prefers keys that the device made itself.
func TestDumpOfAnother(t *testing.T) {
	p := sealed(t, "esp32", esp.CipherESP32)
	pl := plan(t, p)
	s, other := secrets(t, pl), provision.Secrets{}
	made := files(t, pl, lamp, s)
	rec := pl.Record(lamp, "lamp", s, time.Unix(1e9, 0))
	other, err := pl.NewSecrets(strings.NewReader(strings.Repeat("another device's keys", 20)))
	if err != nil {
		t.Fatal(err)
	}
	theirs := pl.Record(lamp, "lamp", other, time.Unix(1e9, 0))
	for name, f := range map[string]func() error{
		"other keys":  func() error { _, err := theirs.Open(made["nvs.bin"].Data, ""); return err },
		"short":       func() error { _, err := rec.Open(made["nvs.bin"].Data[:0x4000], ""); return err },
		"no such":     func() error { _, err := rec.Open(made["nvs.bin"].Data, "spiffs"); return err },
		"from future": func() error { r := rec; r.Version = 2; _, err := r.Open(made["nvs.bin"].Data, ""); return err },
		"scheme":      func() error { r := rec; r.NVSScheme = "tea"; _, err := r.Open(made["nvs.bin"].Data, ""); return err },
		"no table":    func() error { r := rec; r.Table = []byte("x"); _, err := r.Open(made["nvs.bin"].Data, ""); return err },
	} {
		if err := f(); err == nil || fleet.KindOf(err) == fleet.Internal {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The device made keys of its own since: they are in its flash, under the flash-encryption key.
	own := parseKeys(t, other.NVS)
	flash := bytes.Repeat([]byte{0xFF}, 4<<20)
	image, err := nvs.Encode(lamp.Entries, nvs.Options{Size: 0x5000, Keys: own})
	if err != nil {
		t.Fatal(err)
	}
	copy(flash[0x9000:], image)
	c, err := flashcrypt.New(p.Flash, s.Flash)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Encrypt(flash[0x310000:0x311000], own.Partition(), 0x310000); err != nil {
		t.Fatal(err)
	}
	if o, err := rec.Open(flash, ""); err != nil || len(o.Findings) > 0 || !strings.Contains(o.Keys, "dump") {
		t.Errorf("opened %+v, %v", o, err)
	}
}

// TestOrderOfFuses holds the rules that no script may break (facts of ESP-IDF's workflow), whatever the product.
func TestOrderOfFuses(t *testing.T) {
	for name, p := range variants(t) {
		steps := plan(t, p).Steps()
		at := func(words ...string) int {
			return slices.IndexFunc(steps, func(s provision.Step) bool {
				return !slices.ContainsFunc(words, func(w string) bool { return !slices.Contains(s.Args, w) })
			})
		}
		last := -1
		for i, s := range steps {
			if s.Args[0] == "burn-key" {
				last = i
			} else if last != i-1 && s.Args[0] == "burn-key" {
				t.Errorf("%s: a key after another step", name)
			}
			if s.Last != (i == len(steps)-1 && s.ID == "close") {
				t.Errorf("%s: step %s last: %t", name, s.ID, s.Last)
			}
		}
		for _, on := range []string{"FLASH_CRYPT_CNT", "SPI_BOOT_CRYPT_CNT", "ABS_DONE_1", "SECURE_BOOT_EN", "RD_DIS"} {
			if i := at(on); i >= 0 && i < last {
				t.Errorf("%s: %s before the last key", name, on)
			}
		}
		if len(p.SecureBoot) > 0 != (at("write-protect-efuse", "RD_DIS") >= 0) {
			t.Errorf("%s: RD_DIS", name)
		}
		if i, j := at("write-protect-efuse", "DIS_ICACHE"), at("DIS_PAD_JTAG"); i >= 0 && i < j {
			t.Errorf("%s: protected before it was set", name)
		}
		if p.Flash == "" && p.NVS != provision.HMAC && len(p.SecureBoot) == 0 && len(steps) > 0 {
			t.Errorf("%s: burns %v", name, steps)
		}
	}
}

// TestRefusals says no to what would make a dead or an open device.
func TestRefusals(t *testing.T) {
	change := func(p provision.Product, f func(*provision.Product)) provision.Product { f(&p); return p }
	esp32, s3 := sealed(t, "esp32", esp.CipherESP32), sealed(t, "esp32s3", esp.CipherXTS256)
	signedC6 := sign(t, plain(t, "esp32c6"), "sb_ecdsa256")
	for _, tt := range []struct {
		name, words string
		p           provision.Product
	}{
		{"no chip", "chip is not known", change(esp32, func(p *provision.Product) { p.Chip = esp.Chip{} })},
		{"wrong cipher", "no flash encryption xts-256", change(esp32, func(p *provision.Product) { p.Flash = esp.CipherXTS256 })},
		{"key partition without flash encryption", "protected by flash encryption alone", change(esp32, func(p *provision.Product) { p.Flash = "" })},
		{"hmac on the esp32", "cannot derive", change(esp32, func(p *provision.Product) { p.NVS = provision.HMAC })},
		{"hmac block 6", "key block 0 to 5", change(s3, func(p *provision.Product) { p.NVS, p.HMACBlock = provision.HMAC, 6 })},
		{"no app", "all of the flash", change(esp32, func(p *provision.Product) { p.App, p.Bootloader = nil, nil })},
		{"no bootloader", "give both", change(plain(t, "esp32"), func(p *provision.Product) { p.Bootloader = nil })},
		{"app for another chip", "not for the esp32s3", change(plain(t, "esp32s3"), func(p *provision.Product) { p.App = espfile.App{}.Bytes(t) })},
		{"confused files", "confused", change(plain(t, "esp32"), func(p *provision.Product) { p.Bootloader = p.App })},
		{"damaged app", "the app", change(plain(t, "esp32"), func(p *provision.Product) { p.App = bytes.Clone(p.App); p.App[60]++ })},
		{"large app", "only", change(plain(t, "esp32"), func(p *provision.Product) {
			p.Table.Partitions[2].Size = 0x100
			p.Table.Partitions[2].Size = 0x1000
			p.App = espfile.App{Body: strings.Repeat("x", 8000)}.Bytes(t)
		})},
		{"large bootloader", "up to the partition table", change(plain(t, "esp32"), func(p *provision.Product) { p.Bootloader = make([]byte, 0x7001) })},
		{"not signed", "bootloader", change(signedC6, func(p *provision.Product) { p.Bootloader = bootloader(t, p.Chip) })},
		{"signed by somebody else", "", change(signedC6, func(p *provision.Product) { p.SecureBoot = sign(t, plain(t, "esp32s3"), "sb_rsa3072_a").SecureBoot })},
		{"no NVS", "no such NVS partition", change(esp32, func(p *provision.Product) { p.NVSPartition = "spiffs" })},
		{"no key partition", "nvs_keys", change(esp32, func(p *provision.Product) { p.Table = builtin(t, "arduino-default", p.Chip) })},
		{"flagged NVS", "flagged encrypted", change(esp32, func(p *provision.Product) {
			p.Table.Partitions = slices.Clone(p.Table.Partitions)
			p.Table.Partitions[0].Flags = partition.Encrypted
		})},
		{"no such partition", "no partition www", change(esp32, func(p *provision.Product) { p.Data = []provision.Data{{Partition: "www"}} })},
		{"twice the same place", "same place", change(esp32, func(p *provision.Product) { p.Data = []provision.Data{{Partition: "app0", Content: []byte{1}}} })},
		{"a chip whose eFuses muster does not know", "eFuses of the esp32p4", func() provision.Product { return sealed(t, "esp32p4", esp.CipherXTS128) }()},
		{"too many keys", "slots", change(sign(t, plain(t, "esp32"), "sb_rsa3072_a"), func(p *provision.Product) { p.SecureBoot = slices.Repeat(p.SecureBoot, 2) })},
	} {
		_, err := provision.New(tt.p)
		if err == nil || !strings.Contains(err.Error(), tt.words) || fleet.KindOf(err) == fleet.Internal {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	pl := plan(t, plain(t, "esp32"))
	for _, d := range []provision.Device{{ID: "Lamp'; rm -rf"}, {ID: "lamp", MAC: "24:0A:C4:00:00:01"}, {ID: "lamp", MAC: "'"}} {
		if _, err := pl.Make(d, provision.Secrets{}); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%v: %v", d.ID, err)
		}
	}
}

// TestDefaults has the offsets that Arduino and PlatformIO use, and each chip's own bootloader.
func TestDefaults(t *testing.T) {
	for name, want := range map[string]string{
		"esp32": "0x1000 0x8000 0x9000 0xe000 0x10000", "esp32s2": "0x1000 0x8000 0x9000 0xe000 0x10000",
		"esp32s3": "0x0 0x8000 0x9000 0xe000 0x10000", "esp32c3": "0x0 0x8000 0x9000 0xe000 0x10000", "esp32p4": "0x2000 0x8000 0x9000 0xe000 0x10000",
	} {
		var got []string
		for _, r := range plan(t, plain(t, name)).Regions() {
			got = append(got, fmt.Sprintf("0x%x", r.Offset))
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %s, want %s", name, s, want)
		}
	}
	// An IDF project with a larger bootloader moves the table; nothing is a constant.
	p := plain(t, "esp32")
	tab, err := partition.ParseCSV([]byte("nvs,data,nvs,,0x4000\notadata,data,ota,,0x2000\nota_0,app,ota_0,,1M\nota_1,app,ota_1,,1M\n"), partition.Layout{Bootloader: 0x1000, Table: 0x10000})
	if err != nil {
		t.Fatal(err)
	}
	p.Table, p.TableOffset, p.Bootloader = tab, 0x10000, espfileBootloader(t, p.Chip, 0x8000)
	regions := plan(t, p).Regions()
	if regions[1].Offset != 0x10000 || regions[2].Offset != 0x11000 || regions[4].Offset != 0x20000 {
		t.Errorf("%+v", regions)
	}
}

// TestNothingPrints keeps keys and passwords out of any print.
func TestNothingPrints(t *testing.T) {
	pl := plan(t, sealed(t, "esp32", esp.CipherESP32))
	s := secrets(t, pl)
	id := provision.Identity{Device: "lamp-0001", Password: "Passw0rd"}
	for _, verb := range []string{"%v", "%+v", "%#v"} {
		for _, v := range []any{s, id, id.Entries(), pl.Record(lamp, "lamp", s, time.Now())} {
			if text := fmt.Sprintf(verb, v); strings.Contains(text, "Passw0rd") || strings.Contains(text, "012345") || strings.Contains(text, "[48 49") || strings.Contains(text, "0x30, 0x31") {
				t.Errorf("%s of %T: %s", verb, v, text)
			}
		}
	}
}
