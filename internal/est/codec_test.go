package est

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/fleet"
	"muster/internal/pki"
)

func FuzzDecodeBody(f *testing.F) {
	for _, s := range []string{"", "AA==", "QUJD\r\nREVG\r\n", "null", " A A = = ", "AB==", "-----BEGIN PRIVATE KEY-----", strings.Repeat("QUJD", 6000)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		der, err := DecodeBody(text)
		if err != nil {
			if der != nil || !fleet.Is(err, fleet.Invalid) && !fleet.Is(err, fleet.TooLarge) {
				t.Fatalf("%x, %v", der, err)
			}
			return
		}
		if len(der) == 0 || len(der) > pki.MaxCSR {
			t.Fatalf("%d bytes", len(der))
		}
		again, err := DecodeBody(encodeBody(der))
		if err != nil || !bytes.Equal(again, der) {
			t.Fatalf("%x becomes %x, %v", der, again, err)
		}
	})
}

func TestBodyHasRoomForTheLargestRequest(t *testing.T) {
	text := base64.StdEncoding.EncodeToString(make([]byte, pki.MaxCSR))
	var b strings.Builder
	for ; text != ""; text = text[min(8, len(text)):] {
		b.WriteString(text[:min(8, len(text))] + "\r\n")
	}
	if b.Len() > maxBody {
		t.Errorf("%d bytes with line breaks, the limit is %d", b.Len(), maxBody)
	}
	if _, err := DecodeBody([]byte(b.String())); err != nil {
		t.Error(err)
	}
	if _, err := DecodeBody([]byte(base64.StdEncoding.EncodeToString(make([]byte, pki.MaxCSR+1)))); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("a byte more: %v", err)
	}
}

// attributesText is openssl's reading of both forms, without its offsets: what RFC 9908 §3.4 and RFC 7030 §4.5.2 say.
const attributesText = `d=0 cons: SEQUENCE
d=1 cons: SEQUENCE
d=2 prim: OBJECT :1.2.840.113549.1.9.16.2.61
d=2 cons: SET
d=3 cons: SEQUENCE
d=4 prim: INTEGER :00
d=4 cons: SEQUENCE
d=5 cons: SET
d=6 cons: SEQUENCE
d=7 prim: OBJECT :commonName
NAME
d=4 cons: cont [ 0 ]
d=5 cons: SEQUENCE
d=6 prim: OBJECT :id-ecPublicKey
d=6 prim: OBJECT :prime256v1
d=4 cons: cont [ 1 ]
d=5 cons: SEQUENCE
d=6 prim: OBJECT :1.2.840.113549.1.9.16.2.62
d=6 cons: SET
d=7 cons: SEQUENCE
d=8 cons: SEQUENCE
d=9 prim: OBJECT :X509v3 Extended Key Usage
d=9 prim: OCTET STRING [HEX DUMP]:300A06082B06010505070302
d=1 cons: SEQUENCE
d=2 prim: OBJECT :id-ecPublicKey
d=2 cons: SET
d=3 prim: OBJECT :prime256v1
d=1 prim: OBJECT :ecdsa-with-SHA256
`

func TestAttributes(t *testing.T) {
	for _, id := range []fleet.DeviceID{"pump-7", ""} {
		der, err := attributes(id)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.ReplaceAll(attributesText, "NAME\n", "")
		if id != "" {
			want = strings.ReplaceAll(attributesText, "NAME", "d=7 prim: UTF8STRING :"+string(id))
		}
		if got := parse(t, der); got != want {
			t.Errorf("%q:\n%s\nwant\n%s", id, got, want)
		}
	}
}

// parse returns what openssl asn1parse says, a line a value: depth, kind, value.
func parse(t *testing.T, der []byte) string {
	t.Helper()
	cmd := exec.Command("openssl", "asn1parse", "-inform", "DER")
	cmd.Stdin = bytes.NewReader(der)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var b strings.Builder
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(strings.NewReplacer(":d=", " d=", " l=", " l= ").Replace(line)) // offset, depth, hl, l=, length, …
		if len(f) < 6 {
			t.Fatalf("openssl says %q", line)
		}
		b.WriteString(f[1] + " " + strings.Join(f[5:], " ") + "\n")
	}
	return b.String()
}

// openssl writes the same message from the same certificates.
func TestCertsOnly(t *testing.T) {
	dir := t.TempDir()
	var ders [][]byte
	var all []byte
	for i := range 2 {
		name := filepath.Join(dir, fmt.Sprint(i))
		run(t, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", name+".key", "-out", name+".pem", "-subj", "/CN="+fmt.Sprint(i))
		text, err := os.ReadFile(name + ".pem")
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		ders, all = append(ders, block.Bytes), append(all, text...)
		if err := os.WriteFile(filepath.Join(dir, "all.pem"), all, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := certsOnly(ders...)
		if err != nil {
			t.Fatal(err)
		}
		if want := run(t, "crl2pkcs7", "-nocrl", "-certfile", filepath.Join(dir, "all.pem"), "-outform", "DER"); !bytes.Equal(got, want) {
			t.Errorf("%x, openssl writes\n%x", got, want)
		}
	}
}

func run(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("openssl", args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("openssl %q: %v: %s", args, err, &said)
	}
	return out
}
