package cli_test

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An operator takes the device CA to its next generation, with the root elsewhere.
func TestARotationByHand(t *testing.T) {
	d := sit(t, nil)
	d.Authorities.Offline = true
	has(t, d.run("rotation", "list"), "no CA was replaced yet")
	d.fails(2, "number of a rotation", "rotation", "show", "one")
	d.fails(3, "no rotation 1", "rotation", "show", "1")
	d.fails(2, "use device-ca, server-ca or root", "rotation", "start", "moon")
	has(t, d.run("rotation", "start", "device-ca"), "rotation 1 of the device-ca is requested\n")
	d.fails(5, "rotation 1 is requested", "rotation", "start", "root")
	d.fails(5, "muster rotation requests", "rotation", "advance", "1")

	dir := t.TempDir()
	d.run("rotation", "requests", "1", "--out", dir)
	if text := read(t, filepath.Join(dir, "device-ca.csr")); !strings.HasPrefix(text, "-----BEGIN CERTIFICATE REQUEST-----") {
		t.Errorf("%q", text)
	}
	has(t, d.run("rotation", "requests", "1"), "BEGIN CERTIFICATE REQUEST")
	var pems strings.Builder
	for _, c := range d.Authorities.Certificates(1) {
		_ = pem.Encode(&pems, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	signed := filepath.Join(dir, "signed.pem")
	if err := os.WriteFile(signed, []byte(pems.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	has(t, d.run("rotation", "import", "1", signed), "rotation 1 is prepared")
	has(t, d.run("rotation", "certificates", "1"), "# new device CA\n-----BEGIN CERTIFICATE-----")
	d.fails(2, "--why", "rotation", "advance", "1", "--force")
	has(t, d.run("rotation", "advance", "1"), "rotation 1 of the device-ca is distributed\n", "mqtt: client of generation 1, roots of generation 0: good")
	d.Authorities.Refuse[1] = "tls: unknown certificate authority"
	said := d.try("rotation", "show", "1")
	if said.code != 5 || !strings.Contains(said.out, "against active stands\n  mqtt: client of generation 1") {
		t.Errorf("%+v", said)
	}
	delete(d.Authorities.Refuse, 1)
	has(t, d.run("rotation", "show", "1"), "nothing stands against active: muster rotation advance 1")
	has(t, d.run("rotation", "advance", "1"), "is active")
	has(t, d.run("rotation", "back", "1", "--why", "old clients"), "is distributed")
	has(t, d.run("rotation", "cancel", "1"), "is cancelled")
	has(t, d.run("rotation", "list"), "1         device-ca  0     cancelled")
	has(t, d.run("certs", "renew", "--issuer", string(d.Issuer.ID()), "--dry-run"), "")
	d.fails(2, "none of the others", "certs", "renew", "--issuer", "ab", "--all")
}
