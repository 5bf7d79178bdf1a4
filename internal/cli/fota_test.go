package cli_test

import (
	"os"
	"path/filepath"
	"testing"

	"muster/internal/signing"
	"muster/test/espfile"
)

// A signature for esp32FOTA: made here or elsewhere, sent along with the image, given later, taken off.
func TestSignForESP32FOTA(t *testing.T) {
	d := sit(t, nil)
	key := filepath.Join(d.dir, "release.key")
	d.run("firmware", "keygen", "--out", key)
	d.run("firmware", "keys", "add", key+".pub.pem", "--product", "lamp")
	vectors := "../devapi/testdata/esp32fota/"
	boot := d.bootKey("sb_rsa3072_a") // RSA of 3072 bits does as well
	image := d.file("app.bin", read(t, vectors+"firmware.bin"))
	made := d.file("firmware.sign", read(t, vectors+"firmware.sign"))
	public := d.file("key.pub.pem", read(t, vectors+"key.pub.pem"))
	sign := func(more ...string) []string { return append([]string{"firmware", "sign", image}, more...) }

	d.fails(2, "either", sign("--esp32fota", boot, "--esp32fota-signature", made, "--esp32fota-public-key", public)...)
	d.fails(2, "either", sign("--esp32fota-signature", made)...)
	d.fails(2, "goes with", sign("--key", key, "--product", "lamp", "--version", "1.0.0", "--esp32fota-passphrase-file", "x")...)
	d.fails(2, "RSA alone", sign("--esp32fota", key)...)
	has(t, d.run(sign("--esp32fota-signature", made, "--esp32fota-public-key", public)...), "512 bytes", "app.bin.esp32fota")
	d.fails(5, "exists", sign("--esp32fota", boot)...)
	s := d.try(sign("--esp32fota", boot, "--force")...)
	has(t, s.out+s.err, "384 bytes", "setSignatureLen(384)")
	if err := os.WriteFile(image+".x", []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.fails(2, "no signature of this image", "firmware", "sign", image+".x", "--esp32fota-signature", made, "--esp32fota-public-key", public)

	d.run(sign("--force", "--key", key, "--product", "lamp", "--version", "1.0.0", "--esp32fota-signature", made, "--esp32fota-public-key", public)...)
	has(t, d.run("firmware", "upload", image, "--burn-secure-version"), "published lamp 1.0.0", "behind a signature by key")
	has(t, d.run("firmware", "show", "lamp", "1.0.0"), "esp32FOTA key")
	has(t, d.run("firmware", "esp32fota", "lamp", "1.0.0", "--off"), "as it is")
	d.fails(2, "--off alone", "firmware", "esp32fota", "lamp", "1.0.0")
	d.fails(2, "no signature for esp32FOTA", "firmware", "esp32fota", "lamp", "1.0.0", "--signature", made)
	has(t, d.run("firmware", "esp32fota", "lamp", "1.0.0", "--signature", image+".esp32fota"), "behind a signature")

	// The image as it goes out is what is signed: with its Secure Boot signature.
	next := d.file("next.bin", string(espfile.App{Chip: 0x09, SecureVersion: 3}.Bytes(t)))
	d.run("firmware", "sign", next, "--secure-boot", boot, "--key", key, "--product", "lamp", "--version", "1.1.0", "--esp32fota", boot)
	signed := filepath.Join(d.dir, "next.signed.bin")
	if _, err := signing.ReadFOTA(signed + ".esp32fota"); err != nil {
		t.Error(err)
	}
	d.fails(5, "--new-key", "firmware", "upload", signed) // another key than that of 1.0.0
	has(t, d.run("firmware", "show", "lamp", "1.1.0"), "1.1.0")
	has(t, d.run("firmware", "esp32fota", "lamp", "1.1.0", "--signature", signed+".esp32fota", "--new-key"), "behind a signature")
}

// What does not fit the OTA slots of its product is not published.
func TestOTASlot(t *testing.T) {
	d := sit(t, nil)
	d.release("1.0.0") // 200 000 bytes
	has(t, d.try("firmware", "slot").err, "any size")
	table := d.file("partitions.csv", read(t, "../../docs/examples/platformio/partitions.csv"))
	has(t, d.run("firmware", "slot", "lamp", "--partitions", table), "images of lamp may have 1966080 bytes")
	d.fails(5, "1.0.0 has 200000 bytes", "firmware", "slot", "lamp", "--bytes", "131072")
	has(t, d.run("firmware", "slot", "lamp", "--bytes", "131072", "--force"), "131072")
	has(t, d.run("firmware", "slot"), "lamp", "131072", "t-admin")
	image := d.file("large.bin", string(make([]byte, 131073)))
	d.run("firmware", "sign", image, "--key", filepath.Join(d.dir, "release.key"), "--product", "lamp", "--version", "1.1.0")
	d.fails(2, "make it 1 bytes smaller", "firmware", "upload", image)
	d.fails(2, "multiple of 4096", "firmware", "slot", "lamp", "--bytes", "131073")
	d.fails(2, "which product", "firmware", "slot", "--off")
	d.fails(2, "no OTA slots", "firmware", "slot", "lamp", "--partitions", d.file("one.csv", "nvs,data,nvs,0x9000,0x6000\nfactory,app,factory,0x10000,1M\n"))
	has(t, d.run("firmware", "slot", "lamp", "--off"), "any size")
	d.fails(3, "nobody said", "firmware", "slot", "lamp", "--off")
	has(t, d.run("firmware", "upload", image), "published lamp 1.1.0")
}
