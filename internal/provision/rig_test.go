package provision_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/nvs"
	"muster/internal/esp/partition"
	"muster/internal/esp/secureboot"
	"muster/internal/provision"
	"muster/internal/signing"
	"muster/test/espfile"
)

func file(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "esp", path))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func chip(t testing.TB, name string) esp.Chip {
	t.Helper()
	c, ok := esp.ChipByName(name)
	if !ok {
		t.Fatalf("no chip %s", name)
	}
	return c
}

// table is the seed's: two OTA slots, NVS keys.
func table(t testing.TB, c esp.Chip) partition.Table {
	t.Helper()
	tab, err := partition.ParseCSV(file(t, "partition/testdata/seed_two_ota_nvs_enc.csv"), partition.LayoutOf(c))
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func builtin(t testing.TB, name string, c esp.Chip) partition.Table {
	t.Helper()
	csv, ok := partition.Builtin(name)
	if !ok {
		t.Fatal(name)
	}
	tab, err := partition.ParseCSV(csv, partition.LayoutOf(c))
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func bootloader(t testing.TB, c esp.Chip) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := image.Write(&out, image.NewHeader(c.ID), []image.Part{{Load: 0x3fff0018, Data: make([]byte, 64)}}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// plain is a product without any protection.
func plain(t testing.TB, name string) provision.Product {
	c := chip(t, name)
	return provision.Product{Chip: c, Table: builtin(t, "arduino-default", c), Bootloader: bootloader(t, c), App: espfile.App{Chip: c.ID}.Bytes(t)}
}

// sealed is a product with flash encryption and NVS keys in a partition.
func sealed(t testing.TB, name string, cipher esp.Cipher) provision.Product {
	p := plain(t, name)
	p.Table, p.Flash, p.NVS = table(t, p.Chip), cipher, provision.KeyPartition
	return p
}

// sign signs both images of a product with the test keys of that name, which are burnt in that order.
func sign(t testing.TB, p provision.Product, keys ...string) provision.Product {
	t.Helper()
	var signers []crypto.Signer
	for _, k := range keys {
		path := filepath.Join(t.TempDir(), "key.pem")
		if err := os.WriteFile(path, file(t, "secureboot/testdata/"+k+".pem"), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := signing.LoadSecureBootKey(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		key, err := secureboot.KeyOf(s.Public())
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, s)
		p.SecureBoot = append(p.SecureBoot, key.Digest())
	}
	p.Bootloader, p.App = signed(t, p.Bootloader, signers), signed(t, p.App, signers)
	return p
}

func signed(t testing.TB, content []byte, by []crypto.Signer) []byte {
	t.Helper()
	s, err := secureboot.Start(bytes.NewReader(content), int64(len(content)), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range by {
		if err := s.Sign(rand.Reader, k); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if _, err := s.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func plan(t testing.TB, p provision.Product) *provision.Plan {
	t.Helper()
	pl, err := provision.New(p)
	if err != nil {
		t.Fatal(err)
	}
	return pl
}

var lamp = provision.Device{ID: "lamp-0001", Entries: provision.Identity{Device: "lamp-0001", MQTT: "broker.example.com:8883", Key: "secret key", Password: "secret password"}.Entries()}

// secrets are keys that everybody knows.
func secrets(t testing.TB, pl *provision.Plan) provision.Secrets {
	t.Helper()
	s, err := pl.NewSecrets(strings.NewReader(strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_", 4)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func files(t testing.TB, pl *provision.Plan, d provision.Device, s provision.Secrets) map[string]provision.File {
	t.Helper()
	made, err := pl.Make(d, s)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]provision.File{}
	for _, f := range made {
		if _, twice := out[f.Name]; twice {
			t.Errorf("two files are called %s", f.Name)
		}
		out[f.Name] = f
	}
	return out
}

func parseKeys(t testing.TB, raw []byte) *nvs.Keys {
	t.Helper()
	k, err := nvs.ParseKeys(raw)
	if err != nil {
		t.Fatal(err)
	}
	return &k
}

// espfileBootloader is a bootloader of about that size.
func espfileBootloader(t testing.TB, c esp.Chip, size int) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := image.Write(&out, image.NewHeader(c.ID), []image.Part{{Load: 0x3fff0018, Data: make([]byte, size)}}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
