package esp32client

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/nvs"
	"muster/internal/esp/partition"
	factory "muster/internal/provision"
	"muster/test/espfile"
)

// flashed makes a device's NVS partition as `muster provision` does, encrypted, and gives the device what it would read there.
func flashed(t *testing.T, d *desk, identity factory.Identity) {
	t.Helper()
	chip, _ := esp.ChipByName("esp32")
	var boot bytes.Buffer
	if err := image.Write(&boot, image.NewHeader(chip.ID), []image.Part{{Load: 0x3fff0018, Data: make([]byte, 64)}}); err != nil {
		t.Fatal(err)
	}
	csv, err := os.ReadFile(filepath.Join(example, "partitions.csv"))
	if err != nil {
		t.Fatal(err)
	}
	const offset = 0x10000 // sdkconfig.defaults
	table, err := partition.ParseCSV(csv, partition.Layout{Bootloader: chip.Bootloader, Table: offset})
	if err != nil {
		t.Fatal(err)
	}
	plan, err := factory.New(factory.Product{Chip: chip, Table: table, TableOffset: offset, Bootloader: boot.Bytes(), App: espfile.App{}.Bytes(t), Flash: esp.CipherESP32, NVS: factory.KeyPartition})
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := plan.NewSecrets(bytes.NewReader(bytes.Repeat([]byte("0123456789abcdef"), 16)))
	if err != nil {
		t.Fatal(err)
	}
	files, err := plan.Make(factory.Device{ID: identity.Device, Entries: identity.Entries()}, secrets)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := nvs.ParseKeys(secrets.NVS)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name != plan.NVSFile() {
			continue
		}
		p, err := nvs.Decode(f.Data, &keys)
		if err != nil || len(p.Findings) > 0 {
			t.Fatal(err, p.Findings)
		}
		for _, it := range p.Items {
			if it.Namespace == factory.Namespace && it.Type != nvs.Namespace {
				d.do("put", it.Key, hexed(it.Data))
			}
		}
	}
	d.do("fact", "v", hexed([]byte("1.0.0")))
	d.do("boot")
}

// TestFactoryIdentity has the example client come up with what muster's factory wrote into its NVS: it goes to the front with its
// certificate; without one, to the fallback with its password, to ask for its first.
func TestFactoryIdentity(t *testing.T) {
	c := newCA(t, "root")
	k, _ := key(t)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	leaf, serial := c.issue(id, &k.PublicKey)
	_, spki := key(t)
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	identity := factory.Identity{
		Device: id, MQTT: "broker.example.com:8883", FallbackMQTT: "broker.example.com:8884", HTTPS: "muster.example.com:8443", RecoveryHTTPS: "muster.example.com:8444",
		Roots: block("CERTIFICATE", c.cert.Raw), TrustKey: block("PUBLIC KEY", spki), Password: "first-password", EnrolPassword: "once",
	}
	d := start(t)
	flashed(t, d, identity)
	if got := d.one("next"); got != "fallback first-password" {
		t.Errorf("without a key of the factory: %s", got)
	}
	identity.Chain, identity.Key = block("CERTIFICATE", leaf)+block("CERTIFICATE", c.cert.Raw), block("PRIVATE KEY", der)
	d = start(t)
	flashed(t, d, identity)
	if got := d.one("next"); got != "devices "+string(serial) {
		t.Errorf("with a key of the factory: %s", got)
	}
}
