package cli_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"filippo.io/age"

	"muster/api"
	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/nvs"
	"muster/internal/esp/secureboot"
	"muster/test/espfile"
)

// factory is a desk with the files of an ESP32 product.
type factory struct {
	*desk
	out  string
	boot string
	app  string
	key  *age.X25519Identity // the operator's
}

func newFactory(t testing.TB, through func(http.Handler) http.Handler) *factory {
	t.Helper()
	d := sit(t, through)
	d.env["MUSTER_OPERATOR"], d.env["MUSTER_STATION"] = "anna", "line 1"
	var boot bytes.Buffer
	if err := image.Write(&boot, image.NewHeader(0), []image.Part{{Load: 0x3fff0018, Data: make([]byte, 64)}}); err != nil {
		t.Fatal(err)
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return &factory{desk: d, out: filepath.Join(d.dir, "factory"), boot: d.file("boot.bin", boot.String()), app: d.file("app.bin", string(espfile.App{}.Bytes(t))), key: key}
}

// args returns the flags of a run, with flash encryption, encrypted NVS and escrow.
func (f *factory) args(more ...string) []string {
	table := filepath.Join("..", "esp", "partition", "testdata", "seed_two_ota_nvs_enc.csv")
	return append([]string{
		"provision", "--out", f.out, "--bootloader", f.boot, "--app", f.app, "--partitions", table,
		"--flash-encryption", "on", "--nvs-encryption", "keys", "--recipient", f.key.Recipient().String(),
	}, more...)
}

// identity returns the file with the operator's identity.
func (f *factory) identity() string { return f.file("identity.txt", f.key.String()+"\n") }

// shown is what muster device decrypt-nvs prints.
type shown struct {
	Device  string `json:"device"`
	Entries []struct {
		Namespace string `json:"namespace"`
		Key       string `json:"key"`
		Value     string `json:"value"`
	} `json:"entries"`
}

// stored returns what the NVS partition of a device's folder holds, by muster device decrypt-nvs.
func (f *factory) stored(id string) map[string]string {
	f.t.Helper()
	out := decode[shown](f.desk, "device", "decrypt-nvs", filepath.Join(f.out, id, "nvs.bin"), "--escrow", filepath.Join(f.out, "escrow", id+".age"), "--identity", f.identity(), "--show-secrets")
	if out.Device != id {
		f.t.Errorf("the record is of %s", out.Device)
	}
	m := map[string]string{}
	for _, e := range out.Entries {
		m[e.Namespace+":"+e.Key] = e.Value
	}
	return m
}

// TestFactory goes from a CSV file to folders, and proves that a device made of one would be let in: its key fits its certificate,
// which musterd holds for current or next, its roots verify it, and its password is the one that musterd knows by its verifier.
func TestFactory(t *testing.T) {
	f := newFactory(t, nil)
	csv := f.file("lamps.csv", "id,product,label:site,mac,wifi_ssid,wifi_password,value:colour\n"+
		"lamp-1,lamp,berlin,24-0A-C4-00-00-01,hall,\"pass, \"\"word\"\"\",7\nlamp-2,lamp,hamburg,,hall,other,\n")
	template := f.file("nvs.csv", "key,type,encoding,value\nuser,namespace,,\nsite,data,string,{{label:site}}\ncolour,data,u8,{{colour}}\nname,data,string,lamp {{id}}\n")
	said := f.try(f.args("--from", csv, "--nvs-template", template)...)
	if said.code != 0 || !strings.Contains(said.out, "made 2, kept 0, failed 0") {
		t.Fatalf("%d %s%s", said.code, said.out, said.err)
	}
	one := f.stored("lamp-1")
	for k, want := range map[string]string{
		"muster:id": "lamp-1", "muster:mqtt": "broker.example.com:8883", "muster:fb_mqtt": "broker.example.com:8884", "muster:https": "muster.example.com:8443",
		"muster:rec_https": "muster.example.com:8444", "muster:roots": string(f.Trust), "muster:wifi_ssid": "hall", "muster:wifi_psk": `pass, "word"`,
		"user:site": "berlin", "user:colour": "7", "user:name": "lamp lamp-1",
	} {
		if one[k] != want {
			t.Errorf("%s is %q, want %q", k, one[k], want)
		}
	}
	if two := f.stored("lamp-2"); two["user:colour"] != "" || two["muster:fb_pw"] == one["muster:fb_pw"] || two["muster:key"] == one["muster:key"] || two["muster:bundle"] == "" {
		t.Error("the two lamps share something, or lack something")
	}
	pair, err := tls.X509KeyPair([]byte(one["muster:cert"]), []byte(one["muster:key"]))
	if err != nil {
		t.Fatal(err)
	}
	roots, mids := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(one["muster:roots"]))
	mids.AppendCertsFromPEM([]byte(one["muster:cert"]))
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: mids, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	d := decode[api.Device](f.desk, "device", "show", "lamp-1")
	if serial := pair.Leaf.SerialNumber.Text(16); d.Current != serial && d.Next != serial || d.Labels["site"] != "berlin" || d.FallbackPasswords != 1 {
		t.Errorf("musterd knows %+v, the device has %s", d, serial)
	}
	f.nothingInTheClear("lamp-1", one)
	log := read(t, filepath.Join(f.out, "station.log"))
	if strings.Count(log, `"station":"line 1","who":"anna","device":"lamp-`) != 2 || !strings.Contains(log, `"mac":"24:0a:c4:00:00:01","what":"provision","result":"ok","serial":"`) {
		t.Error(log)
	}
	// Again: nothing is made, nothing changes.
	again := f.try(f.args("--from", csv, "--nvs-template", template)...)
	if again.code != 0 || !strings.Contains(again.out, "made 0, kept 2, failed 0") || f.stored("lamp-1")["muster:fb_pw"] != one["muster:fb_pw"] {
		t.Errorf("%d %s%s", again.code, again.out, again.err)
	}
	if certs := decode[[]api.Certificate](f.desk, "certs", "list", "lamp-1"); len(certs) != 1 {
		t.Errorf("%d certificates", len(certs))
	}
}

// nothingInTheClear looks for secrets in every file but the key for the eFuses, in the log of musterd, and at the modes of files.
func (f *factory) nothingInTheClear(id string, entries map[string]string) {
	f.t.Helper()
	block, _ := pem.Decode([]byte(entries["muster:key"]))
	for _, secret := range []string{entries["muster:fb_pw"], entries["muster:wifi_psk"], strings.Split(entries["muster:key"], "\n")[1], string(block.Bytes[36:60])} {
		if strings.Contains(f.Log.String(), secret) {
			f.t.Error("the log holds a secret")
		}
		_ = filepath.WalkDir(f.out, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			if strings.Contains(read(f.t, path), secret) {
				f.t.Errorf("%s holds a secret in the clear", path)
			}
			if info, err := e.Info(); err != nil || info.Mode().Perm()&0o077 != 0 {
				f.t.Errorf("%s has mode %v", path, info.Mode())
			}
			return nil
		})
	}
	if left, _ := os.ReadDir(filepath.Join(f.out, ".partial")); len(left) > 0 {
		f.t.Errorf("left over: %v", left)
	}
	for _, dir := range []string{f.out, filepath.Join(f.out, id), filepath.Join(f.out, id, "efuse"), filepath.Join(f.out, "escrow")} {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			f.t.Errorf("%s: %v %v", dir, info.Mode(), err)
		}
	}
}

// TestFactoryCutOff fails every call of a run once, in turn, before and after musterd did its work; the run is repeated each time.
// Each device has one certificate in the end, of the one key that was made for it.
func TestFactoryCutOff(t *testing.T) {
	var countdown atomic.Int64
	var after atomic.Bool
	var mu sync.Mutex
	csrs := map[string][]string{} // keys that were asked for, by device
	f := newFactory(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/certificates") && r.Method == http.MethodPost {
				raw, _ := io.ReadAll(r.Body)
				r.Body = io.NopCloser(bytes.NewReader(raw))
				mu.Lock()
				csrs[r.URL.Path] = append(csrs[r.URL.Path], publicKeyOf(raw))
				mu.Unlock()
			}
			last := countdown.Add(-1) == 0
			if last && !after.Load() {
				panic(http.ErrAbortHandler)
			}
			if last {
				h.ServeHTTP(discard{http.Header{}}, r)
				panic(http.ErrAbortHandler)
			}
			h.ServeHTTP(w, r)
		})
	})
	csv := f.file("lamps.csv", "id,product\nlamp-1,lamp\nlamp-2,lamp\n")
	failed := 0
	for i := int64(1); ; i++ {
		after.Store(i%2 == 0)
		countdown.Store((i + 1) / 2)
		said := f.try(f.args("--from", csv)...)
		if said.code == 0 {
			break
		}
		if failed++; i > 60 {
			t.Fatalf("never done: %s%s", said.out, said.err)
		}
	}
	if failed < 6 {
		t.Errorf("only %d runs failed", failed)
	}
	for path, keys := range csrs {
		if slices.Sort(keys); len(slices.Compact(keys)) != 1 {
			t.Errorf("%s: %d keys", path, len(keys))
		}
	}
	countdown.Store(0)
	for _, id := range []string{"lamp-1", "lamp-2"} {
		if certs := decode[[]api.Certificate](f.desk, "certs", "list", id); len(certs) != 1 {
			t.Errorf("%s has %d certificates", id, len(certs))
		}
		e := f.stored(id)
		if _, err := tls.X509KeyPair([]byte(e["muster:cert"]), []byte(e["muster:key"])); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		if d := decode[api.Device](f.desk, "device", "show", id); d.FallbackPasswords != 1 {
			t.Errorf("%s has %d passwords", id, d.FallbackPasswords)
		}
	}
	if old, _ := filepath.Glob(filepath.Join(f.out, "escrow", "*.1.age")); len(old) > 0 {
		t.Errorf("records doubled: %v", old)
	}
}

// discard is a client that is gone.
type discard struct{ h http.Header }

func (d discard) Header() http.Header         { return d.h }
func (d discard) Write(p []byte) (int, error) { return len(p), nil }
func (d discard) WriteHeader(int)             {}

// publicKeyOf returns the public key of a certificate request in a body.
func publicKeyOf(body []byte) string {
	text := strings.ReplaceAll(string(body), `\n`, "\n")
	block, _ := pem.Decode([]byte(text[max(0, strings.Index(text, "-----BEGIN")):]))
	if block == nil {
		return "none"
	}
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%x", r.RawSubjectPublicKeyInfo)
}

// TestFactorySecondIdentity refuses to give a device a second identity unasked, keeps the record of the first, and lets nobody
// else read either.
func TestFactorySecondIdentity(t *testing.T) {
	f := newFactory(t, nil)
	one := f.args("lamp-1", "--product", "lamp")
	f.run(one...)
	first := read(t, filepath.Join(f.out, "lamp-1", "nvs.bin"))
	elsewhere := slices.Clone(one)
	elsewhere[2] = filepath.Join(f.dir, "other")
	f.fails(1, "it has a certificate already, of a key that is not here", elsewhere...)
	if err := os.RemoveAll(filepath.Join(f.out, "lamp-1")); err != nil {
		t.Fatal(err)
	}
	f.fails(1, "With --again it gets a second one", one...)
	f.run(append(one, "--again")...)
	dump := f.file("returned.bin", first)
	f.fails(2, "not one entry", "device", "decrypt-nvs", dump, "--escrow", filepath.Join(f.out, "escrow", "lamp-1.age"), "--identity", f.identity())
	said := f.run("device", "decrypt-nvs", dump, "--escrow", filepath.Join(f.out, "escrow"), "--identity", f.identity())
	if !strings.Contains(said, "broker.example.com:8883") || strings.Contains(said, "PRIVATE KEY") || !strings.Contains(said, "(hidden, ") {
		t.Error(said)
	}
	stranger, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	f.fails(5, "sealed to somebody else", "device", "decrypt-nvs", dump, "--escrow", filepath.Join(f.out, "escrow", "lamp-1.age"), "--identity", f.file("stranger.txt", stranger.String()))
	f.fails(3, "none of the 2 records", "device", "decrypt-nvs", dump, "--escrow", filepath.Join(f.out, "escrow"), "--identity", f.file("stranger.txt", stranger.String()))
}

// TestFactoryCSR makes a device that makes its own key: its NVS holds passwords, and neither key nor certificate.
func TestFactoryCSR(t *testing.T) {
	f := newFactory(t, nil)
	f.run(f.args("lamp-1", "--product", "lamp", "--csr", "--enrol-for", "48h")...)
	e := f.stored("lamp-1")
	if e["muster:key"] != "" || e["muster:cert"] != "" || len(e["muster:fb_pw"]) != 43 || len(e["muster:enrol_pw"]) != 43 || e["muster:trust_key"] == "" {
		t.Errorf("%d entries", len(e))
	}
	if certs := decode[[]api.Certificate](f.desk, "certs", "list", "lamp-1"); len(certs) != 0 {
		t.Errorf("%d certificates", len(certs))
	}
}

// TestFactoryRehearsal shows what would be done, says what is lost without escrow, and asks and writes nothing.
func TestFactoryRehearsal(t *testing.T) {
	f := newFactory(t, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("asked for %s", r.URL.Path) })
	})
	said := f.try("provision", "lamp-1", "--product", "lamp", "--out", f.out, "--bootloader", f.boot, "--app", f.app, "--partitions", "../esp/partition/testdata/seed_two_ota_nvs_enc.csv",
		"--flash-encryption", "on", "--nvs-encryption", "keys", "--dry-run")
	for _, want := range []string{"0x1000", "bootloader.bin", "CANNOT BE UNDONE", "espefuse burn-key flash_encryption efuse/flash-encryption.bin", "espefuse burn-efuse UART_DOWNLOAD_DIS 1"} {
		if !strings.Contains(said.out, want) {
			t.Errorf("no %q in\n%s", want, said.out)
		}
	}
	if said.code != 0 || !strings.Contains(said.err, "lost for good") || !strings.Contains(said.err, "flash-encryption key of each device") {
		t.Errorf("%d %s", said.code, said.err)
	}
	if _, err := os.Stat(f.out); err == nil {
		t.Error("something was written")
	}
}

// TestFactoryRefusals says what is wrong before anything is made.
func TestFactoryRefusals(t *testing.T) {
	f := newFactory(t, nil)
	c3 := f.file("c3.bin", string(espfile.App{Chip: 5}.Bytes(t)))
	for _, tt := range []struct {
		words string
		args  []string
	}{
		{"an id and --product", f.args()},
		{"two lines are about lamp-1", f.args("--from", f.file("a.csv", "id,product\nlamp-1,lamp\nlamp-1,lamp\n"))},
		{"two lines have the MAC", f.args("--from", f.file("b.csv", "id,product,mac\nlamp-1,lamp,240ac4000001\nlamp-2,lamp,24:0A:C4:00:00:01\n"))},
		{"is no MAC address", f.args("--from", f.file("c.csv", "id,product,mac\nlamp-1,lamp,240ac400000\n"))},
		{"one run is for one product", f.args("--from", f.file("d.csv", "id,product\nlamp-1,lamp\nbell-1,bell\n"))},
		{"a column that is none of", f.args("--from", f.file("e.csv", "id,product,colour\nlamp-1,lamp,red\n"))},
		{"which no column", f.args("lamp-1", "--product", "lamp", "--dry-run", "--nvs-template", f.file("t.csv", "key,type,encoding,value\nuser,namespace,,\na,data,u8,{{nope}}\n"))},
		{"cannot be the name", f.args("escrow", "--product", "lamp")},
		{"that is an identity", f.args("lamp-1", "--product", "lamp", "--recipient", f.key.String())},
		{"not for the esp32c3", []string{"provision", "lamp-1", "--product", "lamp", "--out", f.out, "--bootloader", f.boot, "--app", c3}},
		{"--chip must say", []string{"provision", "lamp-1", "--product", "lamp", "--out", f.out}},
		{"--nvs-encryption is", []string{"provision", "lamp-1", "--product", "lamp", "--out", f.out, "--chip", "esp32", "--nvs-encryption", "rot13"}},
		{"protected by flash encryption alone", []string{"provision", "lamp-1", "--product", "lamp", "--out", f.out, "--chip", "esp32s3", "--nvs-encryption", "keys"}},
	} {
		f.fails(2, tt.words, tt.args...)
	}
	if _, err := os.Stat(f.out); err == nil {
		t.Error("something was written")
	}
}

// TestFactoryDataOnly makes an NVS partition for a chip that derives its keys by HMAC and has its firmware already.
func TestFactoryDataOnly(t *testing.T) {
	f := newFactory(t, nil)
	f.run("provision", "lamp-1", "--product", "lamp", "--out", f.out, "--chip", "esp32s3", "--nvs-encryption", "hmac", "--hmac-block", "4")
	key, err := nvs.KeysFromHMAC([]byte(read(t, filepath.Join(f.out, "lamp-1", "efuse", "hmac.bin"))))
	if err != nil {
		t.Fatal(err)
	}
	p, err := nvs.Decode([]byte(read(t, filepath.Join(f.out, "lamp-1", "nvs.bin"))), &key)
	if it, ok := p.Find("muster", "id"); err != nil || !ok || it.Text() != "lamp-1" || slices.ContainsFunc(p.Findings, func(f esp.Finding) bool { return f.Severity == esp.Error }) {
		t.Errorf("%v %v", err, p.Findings)
	}
	script := read(t, filepath.Join(f.out, "lamp-1", "flash.sh"))
	if !strings.Contains(script, "burn-key BLOCK_KEY4 efuse/hmac.bin HMAC_UP") || strings.Contains(script, "0x8000") || strings.Contains(script, "erase-flash\n  flash_tool") {
		t.Error(script)
	}
}

// TestFactoryBrokenDisk lets parts of a run fail on the station's own disk, and repeats it: the same key, one certificate, and a
// device whose folder is complete is kept although the log could not be written.
func TestFactoryBrokenDisk(t *testing.T) {
	f := newFactory(t, nil)
	template := f.file("nvs.csv", "key,type,encoding,value\nuser,namespace,,\ncal,file,string,cal-{{id}}.txt\n")
	args := f.args("lamp-1", "--product", "lamp", "--nvs-template", template)
	f.fails(2, "cal-lamp-1.txt", args...)
	first := read(t, filepath.Join(f.out, ".partial", "lamp-1", "secrets.json"))
	calibration := f.file("cal-lamp-1.txt", "42")
	if err := os.Mkdir(filepath.Join(f.out, "escrow", "lamp-1.age"), 0o700); err != nil { // the record cannot take its place
		t.Fatal(err)
	}
	f.fails(1, "", args...)
	if err := os.Remove(filepath.Join(f.out, "escrow", "lamp-1.age")); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(f.out, "station.log")
	if err := errors.Join(os.Rename(log, log+".full"), os.Mkdir(log, 0o700)); err != nil {
		t.Fatal(err)
	}
	f.fails(1, "station.log", args...)
	if err := os.Remove(log); err != nil {
		t.Fatal(err)
	}
	if said := f.run(args...); !strings.Contains(said, "made 0, kept 1, failed 0") {
		t.Error(said)
	}
	e := f.stored("lamp-1")
	block, _ := pem.Decode([]byte(e["muster:key"]))
	if block == nil || !strings.Contains(first, base64.StdEncoding.EncodeToString(block.Bytes)) || e["user:cal"] != "42" {
		t.Error("the device has another key than at first, or lacks something")
	}
	if certs := decode[[]api.Certificate](f.desk, "certs", "list", "lamp-1"); len(certs) != 1 {
		t.Errorf("%d certificates", len(certs))
	}
	if n := strings.Count(read(t, log+".full"), `"result":"failed"`); n < 2 {
		t.Errorf("%d failures on record", n)
	}
	_ = calibration
}

// TestFactorySecureBoot signs bootloader and app with a key that the product has registered, and refuses another: devices would
// take no release. A second run of the line at the same time is refused as well.
func TestFactorySecureBoot(t *testing.T) {
	f := newFactory(t, nil)
	testdata := filepath.Join("..", "esp", "secureboot", "testdata")
	key := f.file("sb.pem", read(t, filepath.Join(testdata, "sb_ecdsa256.pem")))
	var boot bytes.Buffer
	if err := image.Write(&boot, image.NewHeader(0x0D), []image.Part{{Load: 0x4086c410, Data: make([]byte, 64)}}); err != nil {
		t.Fatal(err)
	}
	args := []string{"provision", "lamp-1", "--product", "lamp", "--out", f.out, "--secure-boot", key,
		"--bootloader", f.file("b.bin", boot.String()), "--app", f.file("a.bin", string(espfile.App{Chip: 0x0D}.Bytes(t)))}
	f.run("firmware", "secure-boot-keys", "add", "lamp", filepath.Join(testdata, "sb_rsa3072_a.pub.pem"))
	f.fails(5, "is none that lamp has registered", args...)
	f.run("firmware", "secure-boot-keys", "add", "lamp", filepath.Join(testdata, "sb_ecdsa256.pub.pem"))
	f.run(args...)
	for _, name := range []string{"bootloader.bin", "app.bin"} {
		content := read(t, filepath.Join(f.out, "lamp-1", name))
		rep, err := image.Parse(strings.NewReader(content), image.Any)
		if err != nil {
			t.Fatal(err)
		}
		blocks, err := secureboot.Inspect(strings.NewReader(content), rep)
		if err != nil || len(blocks.Blocks) != 1 || blocks.Blocks[0].Status != secureboot.Valid {
			t.Errorf("%s: %+v, %v", name, blocks, err)
		}
	}
	digest := read(t, filepath.Join(testdata, "digest_sb_ecdsa256.bin"))
	if read(t, filepath.Join(f.out, "lamp-1", "efuse", "secure-boot-0.bin")) != digest {
		t.Error("the digest is not espsecure's")
	}
	public := slices.Clone(args)
	public[7] = filepath.Join(testdata, "sb_ecdsa256.pub.pem")
	f.fails(2, "bootloader", append(public, "--dry-run")...) // the images are not signed, and nobody here can
}
