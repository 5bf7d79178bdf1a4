package nvs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/fleet"
)

func file(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func open(name string) (io.ReadCloser, error) { return os.Open(filepath.Join("testdata", name)) }

func parse(t testing.TB, name string) *CSV {
	t.Helper()
	c, err := ParseCSV(bytes.NewReader(file(t, name)), CSVOptions{Open: open, AsGenerator: true})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func partitionKeys(t testing.TB, name string) *Keys {
	t.Helper()
	k, err := ParseKeyPartition(file(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return &k
}

// Golden files of nvs_partition_gen: CSV, size, keys, image.
var goldens = []struct {
	csv, image string
	options    Options
	keys       string
}{
	{"basic.csv", "basic_plain.bin", Options{Size: 0x6000}, ""},
	{"basic.csv", "basic_plain_0x3000.bin", Options{Size: 0x3000}, ""},
	{"basic.csv", "basic_enc_fixed.bin", Options{Size: 0x6000}, "nvs_keys_fixed.bin"},
	{"basic.csv", "basic_enc_hmac.bin", Options{Size: 0x6000}, "nvs_keys_hmac.bin"},
	{"basic.csv", "basic_enc_tool.bin", Options{Size: 0x6000}, "nvs_keys_tool.bin"},
	{"blob_3pages.csv", "blob_3pages.bin", Options{Size: 0x5000}, ""},
	{"blob_fit.csv", "blob_fit.bin", Options{Size: 0x4000}, ""},
	{"blob_fit.csv", "blob_fit_enc_fixed.bin", Options{Size: 0x4000}, "nvs_keys_fixed.bin"},
	{"str_fill126.csv", "str_fill126.bin", Options{Size: 0x4000}, ""},
	{"str_fill126.csv", "str_fill126_enc_fixed.bin", Options{Size: 0x4000}, "nvs_keys_fixed.bin"},
	{"str_max.csv", "str_max.bin", Options{Size: 0x4000}, ""},
	{"str_max.csv", "str_max_enc_fixed.bin", Options{Size: 0x4000}, "nvs_keys_fixed.bin"},
	{"ro.csv", "readonly_0x1000.bin", Options{Size: 0x1000, ReadOnly: true}, ""},
}

func TestItMakesWhatTheGeneratorMakes(t *testing.T) {
	for _, g := range goldens {
		o := g.options
		if g.keys != "" {
			o.Keys = partitionKeys(t, g.keys)
		}
		for _, as := range []bool{false, true} {
			o.AsGenerator = as
			got, err := Encode(parse(t, g.csv).Entries, o)
			if err != nil {
				t.Errorf("%s: %v", g.image, err)
			} else if want := file(t, g.image); !bytes.Equal(got, want) {
				t.Errorf("%s: differs from the generator's at 0x%x", g.image, differ(got, want))
			}
		}
	}
}

func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// What was decoded makes the same image again, and has no findings: the generator's images are sound.
func TestItReadsWhatTheGeneratorMakes(t *testing.T) {
	for _, g := range goldens {
		o := g.options
		if g.keys != "" {
			o.Keys = partitionKeys(t, g.keys)
		}
		image := file(t, g.image)
		p, err := Decode(image, o.Keys)
		if err != nil {
			t.Errorf("%s: %v", g.image, err)
			continue
		}
		if len(p.Findings) != 0 {
			t.Errorf("%s: findings %v", g.image, p.Findings)
		}
		again, err := Encode(p.Entries(), o)
		if err != nil || !bytes.Equal(again, image) {
			t.Errorf("%s: not the same again: %v", g.image, err)
		}
		same(t, g.image, p.Entries(), parse(t, g.csv).Entries)
	}
}

// same compares entries without their lines.
func same(t testing.TB, name string, got, want []Entry) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: %d entries, want %d", name, len(got), len(want))
		return
	}
	for i := range got {
		g, w := got[i], want[i]
		if g.Namespace != w.Namespace || g.Key != w.Key || g.Type != w.Type || g.Number != w.Number || !bytes.Equal(g.Data, w.Data) {
			t.Errorf("%s: entry %d is %v with %s, want %v with %s", name, i, g, g.Text(), w, w.Text())
		}
	}
}

func TestValuesOfTheGoldenFile(t *testing.T) {
	p, err := Decode(file(t, "basic_enc_fixed.bin"), partitionKeys(t, "nvs_keys_fixed.bin"))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct {
		namespace, key string
		typ            Type
		text           string
	}{
		{"cfg", "dev_id", String, "dev-24:0a:c4:00:00:01"},
		{"cfg", "u8", U8, "200"},
		{"cfg", "i8", I8, "-100"},
		{"cfg", "u16", U16, "65000"},
		{"cfg", "i16", I16, "-30000"},
		{"cfg", "u32", U32, "4000000000"},
		{"cfg", "i32", I32, "-2000000000"},
		{"cfg", "u64", U64, "18000000000000000000"},
		{"cfg", "i64", I64, "-9000000000000000000"},
		{"cfg", "hexblob", Blob, "00ff10e0deadbeef"},
		{"cfg", "empty_str", String, ""},
		{"cfg", "mqtt_host", String, "mqtt.example.test"}, // the generator's mistake with a namespace that is opened again
		{"tls", "device_crt", String, string(file(t, "device.pem"))},
	} {
		it, ok := p.Find(v.namespace, v.key)
		if !ok || it.Type != v.typ || it.Text() != v.text {
			t.Errorf("%s:%s is %v, %v, %s", v.namespace, v.key, ok, it, it.Text())
		}
	}
	chain, _ := p.Find("tls", "ca_chain")
	if !bytes.Equal(chain.Data, file(t, "ca_chain.pem")) {
		t.Error("the blob over several pages is another")
	}
	if it, ok := p.Find("tls", "mqtt_host"); ok {
		t.Errorf("found %v", it)
	}
}

// Without AsGenerator a namespace that is opened again gets its keys, and a finding says so.
func TestANamespaceThatIsOpenedAgain(t *testing.T) {
	c, err := ParseCSV(bytes.NewReader(file(t, "basic.csv")), CSVOptions{Open: open})
	if err != nil {
		t.Fatal(err)
	}
	last := c.Entries[len(c.Entries)-1]
	if last.Key != "mqtt_host" || last.Namespace != "tls" || last.Line != 20 {
		t.Errorf("the last entry is %v of line %d", last, last.Line)
	}
	if len(c.Findings) != 1 || c.Findings[0].Code != CodeGenerator || c.Findings[0].Severity != esp.Warning {
		t.Errorf("findings: %v", c.Findings)
	}
}

func TestAStringThatIsTooLong(t *testing.T) {
	_, err := Encode(parse(t, "str_over.csv").Entries, Options{Size: 0x4000})
	if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.TooLarge || e.Code != CodeValue || !bytes.Contains([]byte(e.Msg), []byte("line 3")) {
		t.Errorf("got %v", err)
	}
}

func TestKeyPartitions(t *testing.T) {
	for name, key := range map[string]func() (Keys, error){
		"nvs_keys_fixed.bin": func() (Keys, error) { return ParseKeys(file(t, "key_nvs_fixed.bin")) },
		"nvs_keys_hmac.bin":  func() (Keys, error) { return KeysFromHMAC(file(t, "key_hmac_up.bin")) },
		"nvs_keys_tool.bin":  func() (Keys, error) { return ParseKeyPartition(file(t, "nvs_keys_tool.bin")) },
	} {
		k, err := key()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(k.Partition(), file(t, name)) {
			t.Errorf("%s: differs from the generator's", name)
		}
		if got := partitionKeys(t, name); !bytes.Equal(got.Bytes(), k.Bytes()) {
			t.Errorf("%s: parsed to other keys", name)
		}
	}
}

// On flash the key partition is flash-encrypted; read like that it is no key partition.
func TestAKeyPartitionOnFlash(t *testing.T) {
	const offset = 0x310000
	for name, v := range map[string]struct {
		kind esp.Cipher
		key  string
	}{
		"nvs_keys_fixed_fe_esp32_0x310000.bin":  {esp.CipherESP32, "key_fe_esp32_256.bin"},
		"nvs_keys_fixed_fe_xts256_0x310000.bin": {esp.CipherXTS256, "key_fe_xts256.bin"},
	} {
		c, err := flashcrypt.New(v.kind, file(t, v.key))
		if err != nil {
			t.Fatal(err)
		}
		image := partitionKeys(t, "nvs_keys_fixed.bin").Partition()
		if err := c.Encrypt(image, image, offset); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(image, file(t, name)) {
			t.Errorf("%s: differs", name)
		}
		_, err = ParseKeyPartition(image)
		if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.Unprocessable || e.Code != CodeKeysCRC {
			t.Errorf("%s, still encrypted: %v", name, err)
		}
	}
}

func TestKeysThatADeviceMakesItself(t *testing.T) {
	c, err := flashcrypt.New(esp.CipherESP32, file(t, "key_fe_esp32_256.bin"))
	if err != nil {
		t.Fatal(err)
	}
	for name, old := range map[string]bool{"idf_ge_4_3": false, "idf_lt_4_3": true} {
		k, err := KeysOfDevice(c, 0x310000, old)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile("../flashcrypt/testdata/nvskeys_derived_esp32_0x310000_" + name + ".bin")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(k.Bytes(), want) {
			t.Errorf("%s: other keys than the device's", name)
		}
	}
	if _, err := KeysOfDevice(c, 7, false); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("an offset that flash encryption cannot have: %v", err)
	}
}

func TestDecryptIsTheGeneratorsPlainImage(t *testing.T) {
	for _, v := range [][2]string{{"basic_enc_fixed.bin", "nvs_keys_fixed.bin"}, {"basic_enc_hmac.bin", "nvs_keys_hmac.bin"}, {"basic_enc_tool.bin", "nvs_keys_tool.bin"}} {
		k := partitionKeys(t, v[1])
		plain, err := Decrypt(file(t, v[0]), *k)
		if err != nil || !bytes.Equal(plain, file(t, "basic_plain.bin")) {
			t.Errorf("%s: %v", v[0], err)
		}
		again, err := Encrypt(plain, *k)
		if err != nil || !bytes.Equal(again, file(t, v[0])) {
			t.Errorf("%s back: %v", v[0], err)
		}
	}
}
