package esp32client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// The golden messages of api/samples: what muster reads, the device reads to the byte, and what muster refuses, it refuses.
func TestTheDeviceReadsTheSamples(t *testing.T) {
	d := start(t)
	for message, file := range map[string]string{"cmd": "cmd.json", "offer": "offer.json", "cert-order": "cert-order.json"} {
		b, err := os.ReadFile("../../api/samples/" + file)
		if err != nil {
			t.Fatal(err)
		}
		var samples struct {
			Cases []struct{ Name, Payload, Refused string }
		}
		if err := json.Unmarshal(b, &samples); err != nil || len(samples.Cases) < 10 {
			t.Fatalf("%s: %d cases, %v", file, len(samples.Cases), err)
		}
		for _, s := range samples.Cases {
			want := "refused"
			if s.Refused == "" {
				want = "ok " + hexed([]byte(s.Payload))
			}
			if got := d.one("decode", message, hexed([]byte(s.Payload))); got != want {
				t.Errorf("%s, %s: %s", message, s.Name, unhexed(got))
			}
		}
	}
}

// Beyond the samples: JSON that is nearly right is refused as muster refuses it.
func TestTheDeviceIsAsStrictAsMuster(t *testing.T) {
	d := start(t)
	for _, payload := range []string{
		``, ` `, `{`, `{}x`, `[]`, `null`, `{"op":"report",}`, `{"op":"report"}{}`, `{"op":"a","op":"a"}`, `{"OP":"report"}`, `{"op":null}`, `{"op":"hello","t":1e3}`,
		`{"op":"hello","t":01}`, `{"op":"hello","t":-0}`, `{"op":"hello","t":9223372036854775807}`, `{"op":"hello","t":9223372036854775808}`, `{"op":"hello","t":1.0}`,
		`{"op":"\ud800"}`, `{"op":"\ud83d\ude00"}`, `{"op":"\u00e9"}`, "{\"op\":\"\xff\"}", "{\"op\":\"a\nb\"}", `{"op":"a\nb"}`, `{"op":"\x41"}`, `{"op":"\u12"}`, `{"op":"`, ` { "op" : "report" } `,
		`{"op":"trust","tb":9007199254740992}`, `{"op":"trust","tb":9007199254740991}`, `{"op":"` + strings.Repeat("x", 128) + `"}`, `{"op":"` + strings.Repeat("x", 129) + `"}`,
		`{"op":"boot-previous-slot","job":"r","img":"n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg"}`, `{"op":"boot-previous-slot","job":"R","img":"n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg="}`,
	} {
		want := "refused"
		if c, err := wire.DecodeCmd([]byte(payload)); err == nil {
			want = "ok " + hexed(wire.Encode(c))
		}
		if got := d.one("decode", "cmd", hexed([]byte(payload))); got != want {
			t.Errorf("%q: the device says %q, muster %q", payload, unhexed(got), unhexed(want))
		}
	}
}

// What the device says is to the byte what muster's own encoder writes.
func TestTheDeviceWritesAsMuster(t *testing.T) {
	d := start(t)
	steps := []wire.OTAStep{wire.StepAccepted, wire.StepDownloading, wire.StepDownloaded, wire.StepInstalled, wire.StepRebooting, wire.StepVerifying, wire.StepFailed, wire.StepRejected, wire.StepRolledBack}
	for i, step := range steps {
		r := wire.OTAReport{Job: "r-2026-11-01", Step: step, Percent: i * 10, Error: `a "quoted" \ text é`}
		got, err := hex.DecodeString(d.one("ota", string(r.Job), strconv.Itoa(i), strconv.Itoa(r.Percent), hexed([]byte(r.Error))))
		if err != nil || string(got) != string(wire.Encode(r)) {
			t.Errorf("%s: %s", step, got)
		}
		if _, err := wire.DecodeOTA(got); err != nil {
			t.Error(err)
		}
	}
	// An error of a library may hold anything: what is said can still be read.
	got, err := hex.DecodeString(d.one("ota", "r1", "6", "0", hexed([]byte("tls\n\x00\xff"+strings.Repeat("é", 200)))))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := wire.DecodeOTA(got); err != nil || len(r.Error) != 127 {
		t.Errorf("%v: %s", err, got)
	}
}

// key makes a P-256 key and its SubjectPublicKeyInfo.
func key(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return k, der
}

// Signed documents of muster are believed, and nothing else is.
func TestSignedDocuments(t *testing.T) {
	d := start(t)
	k, spki := key(t)
	other, otherSPKI := key(t)
	ca := newCA(t, "root")
	b := pki.Bundle{Version: 7, Time: 1793491200, Roots: [][]byte{ca.cert.Raw}}
	sign := func(k *ecdsa.PrivateKey) string {
		s, err := pki.SignBundle(b, k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	// Many signatures, so that r and s with leading zero bits and bytes are among them.
	for range 40 {
		if got := d.one("bundle", hexed(spki), hexed([]byte(sign(k)))); got != "ok 7 1793491200 1" {
			t.Fatal(got)
		}
	}
	good := sign(k)
	m := firmware.Manifest{Product: "lamp", Version: "1.4.0", Size: 100, SHA256: fleet.HashOf(sha256.Sum256(nil)), ImageHash: fleet.HashOf(sha256.Sum256(nil)), Chip: "esp32s3", SecureVersion: 1, MinVersion: "1.0.0", MinChipRevision: 1, MaxChipRevision: 399}
	release, err := firmware.Sign(m, k)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := d.one("manifest", hexed(spki), hexed([]byte(release))), fmt.Sprintf("ok lamp 1.4.0 100 %s", m.SHA256); got != want {
		t.Error(got)
	}
	part := strings.Split(good, ".")
	header := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	for name, text := range map[string]string{
		"another key":         sign(other),
		"a manifest":          release,
		"a bit flipped":       part[0] + "." + flip(part[1]) + "." + part[2],
		"signature flipped":   part[0] + "." + part[1] + "." + flip(part[2]),
		"no signature":        part[0] + "." + part[1] + ".",
		"alg none":            header(`{"alg":"none","kid":"x","typ":"muster-trust+jws"}`) + "." + part[1] + "." + part[2],
		"a key in the header": header(`{"alg":"ES256","jwk":"x","kid":"x","typ":"muster-trust+jws"}`) + "." + part[1] + "." + part[2],
		"padding":             part[0] + "=." + part[1] + "." + part[2],
		"four parts":          good + ".x",
		"nothing":             "",
		"too long":            good + strings.Repeat("A", 16<<10),
		"a zero signature":    part[0] + "." + part[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64)),
	} {
		if got := d.one("bundle", hexed(spki), hexed([]byte(text))); !strings.HasPrefix(got, "refused ") {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := d.one("bundle", hexed(otherSPKI), hexed([]byte(good))); !strings.HasPrefix(got, "refused ") {
		t.Errorf("a device with another key: %s", got)
	}
	if got := d.one("manifest", hexed(spki), hexed([]byte(good))); !strings.HasPrefix(got, "refused ") {
		t.Errorf("a bundle as a manifest: %s", got)
	}
}

func flip(s string) string {
	b := []byte(s)
	if i := len(b) / 2; b[i] == 'A' {
		b[i] = 'B'
	} else {
		b[i] = 'A'
	}
	return string(b)
}

func unhexed(s string) string {
	f := strings.Fields(s)
	if len(f) == 2 {
		if b, err := hex.DecodeString(f[1]); err == nil {
			return f[0] + " " + string(b)
		}
	}
	return s
}

// Every byte of an image comes once, wherever the line breaks; a busy server is waited for.
func TestDownloadsGoOn(t *testing.T) {
	d := start(t)
	d.do("download", "1000")
	for _, c := range []struct{ send, want string }{
		{"answer 200 1000 - 0", "take 0 0 -"},
		{"took 400", ""},
		{"broke", "wait 400 2000 " + hexed([]byte("bytes=400-"))},
		{"answer 503 0 - 120", "wait 400 120000 " + hexed([]byte("bytes=400-"))},
		{"answer 429 0 - 0", "wait 400 8000 " + hexed([]byte("bytes=400-"))},
		{"answer 206 600 " + hexed([]byte("bytes 400-999/1000")) + " 0", "take 400 8000 " + hexed([]byte("bytes=400-"))},
		{"took 100", ""},
		{"broke", "wait 500 2000 " + hexed([]byte("bytes=500-"))},
		{"answer 206 500 " + hexed([]byte("bytes 400-899/1000")) + " 0", "wait 500 4000 " + hexed([]byte("bytes=500-"))}, // not what was asked for
		{"answer 200 1000 - 0", "restart 0 4000 -"},                                                                      // a proxy that knows no ranges
		{"took 1000", ""},
	} {
		if got := strings.Join(d.do(strings.Fields(c.send)...), "|"); got != c.want {
			t.Errorf("%s: got %q, want %q", c.send, got, c.want)
		}
	}
	d.do("download", "10")
	if got := d.one("answer", "404", "0", "-", "0"); !strings.HasPrefix(got, "fail") {
		t.Errorf("no grant: %s", got)
	}
	d.do("download", "10")
	for i := range 5 {
		want := "wait"
		if i == 4 {
			want = "fail"
		}
		if got := d.one("answer", "302", "0", "-", "0"); !strings.HasPrefix(got, want) {
			t.Errorf("redirect %d: %s", i, got)
		}
	}
}

// ca is a root that signs device certificates.
type ca struct {
	testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	next int64
}

func newCA(t testing.TB, name string) *ca {
	t.Helper()
	k, _ := key(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Unix(1700000000, 0), NotAfter: time.Unix(4000000000, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	tmpl.Subject.CommonName = name
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{t, k, cert, 0x10}
}
