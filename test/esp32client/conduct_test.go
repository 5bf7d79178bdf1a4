package esp32client

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

const id fleet.DeviceID = "sensor-0001"

// issue signs a certificate for a device's public key, as muster's CA makes them; each begins a day after the one before.
func (c *ca) issue(name fleet.DeviceID, pub *ecdsa.PublicKey) (der []byte, serial fleet.Serial) {
	c.Helper()
	c.next++
	n := big.NewInt(c.next)
	serial = fleet.SerialOf(n)
	uri, err := url.Parse(wire.CertUser(name, serial))
	if err != nil {
		c.Fatal(err)
	}
	from := time.Unix(1790000000+86400*c.next, 0)
	der, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: string(name)}, DNSNames: []string{string(name)}, URIs: []*url.URL{uri},
		NotBefore: from, NotAfter: from.AddDate(0, 3, 0), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, c.cert, pub, c.key)
	if err != nil {
		c.Fatal(err)
	}
	return der, serial
}

// made is what the factory gave a device.
type made struct {
	*desk
	ca     *ca
	trust  *ecdsa.PrivateKey
	serial fleet.Serial
}

// provision writes what muster's factory writes, and starts the device.
func provision(t testing.TB) *made {
	t.Helper()
	m := &made{desk: start(t), ca: newCA(t, "root")}
	k, _ := key(t)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	var leaf, spki []byte
	leaf, m.serial = m.ca.issue(id, &k.PublicKey)
	m.trust, spki = key(t)
	block := func(kind string, der []byte) string {
		return hexed(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	m.do("put", "id", hexed([]byte(string(id)+"\x00")))
	m.do("put", "roots", block("CERTIFICATE", m.ca.cert.Raw))
	m.do("put", "trust_key", block("PUBLIC KEY", spki))
	m.do("put", "key", block("PRIVATE KEY", der))
	m.do("put", "cert", block("CERTIFICATE", leaf))
	m.do("put", "fb_pw", hexed([]byte("old-password")))
	m.fact("v", "1.0.0")
	m.fact("img", strings.Repeat("ab", 32))
	m.fact("buf", "1024")
	m.do("boot")
	return m
}

func (m *made) fact(name, value string) {
	m.Helper()
	m.do("fact", name, hexed([]byte(value)))
}

// hear sends a message of muster to the device.
func (m *made) hear(w wire.Down, payload []byte) []string {
	m.Helper()
	return m.do("message", wire.DownTopic(id, w), hexed(payload))
}

// answer is muster's answer to hello.
func (m *made) answer() []string {
	return m.hear(wire.DownCmd, wire.HelloAnswer(time.Unix(1795000000, 0)))
}

// csr returns the key of the request that the lines publish.
func (m *made) csr(lines []string) *ecdsa.PublicKey {
	m.Helper()
	all := published(m, lines, "cert")
	if len(all) != 1 {
		m.Fatalf("%d messages: %q", len(all), lines)
	}
	r, err := wire.DecodeCert(all[0])
	if err != nil {
		m.Fatal(err)
	}
	csr, err := pki.ParseCSR(r.CSR, pki.KeyPolicy{})
	if err != nil {
		m.Fatalf("muster refuses the request: %v", err)
	}
	if err := csr.ForDevice(id); err != nil {
		m.Fatal(err)
	}
	pub, err := x509.ParsePKIXPublicKey(csr.PublicKey)
	if err != nil {
		m.Fatal(err)
	}
	return pub.(*ecdsa.PublicKey)
}

// push sends a certificate in slices for a small buffer.
func (m *made) push(pub *ecdsa.PublicKey, password string, buffer int) (fleet.Serial, []string) {
	m.Helper()
	der, serial := m.ca.issue(id, pub)
	parts, err := wire.SplitCert(wire.CertOrder{Op: wire.CertPush, Serial: serial, Chain: [][]byte{der, m.ca.cert.Raw}, Password: password}, wire.Budget(wire.DownTopic(id, wire.DownCert), buffer))
	if err != nil || len(parts) < 2 {
		m.Fatalf("%d slices, %v", len(parts), err)
	}
	var lines []string
	for i := range parts {
		p := parts[(i+1)%len(parts)] // out of order, and each twice
		lines = append(lines, m.hear(wire.DownCert, p)...)
		if i == 0 {
			lines = append(lines, m.hear(wire.DownCert, p)...)
		}
	}
	return serial, lines
}

func TestHello(t *testing.T) {
	m := provision(t)
	for _, f := range [][2]string{{"hw", "rev-c"}, {"chip", "esp32s3"}, {"boot", "power-on"}, {"rev", "301"}, {"sv", "2"}, {"prev", strings.Repeat("cd", 32)}, {"psv", "1"}, {"one", "256"}} {
		m.fact(f[0], f[1])
	}
	m.do("boot")
	got := published(t, m.do("entered"), "hello")
	if len(got) != 1 {
		t.Fatalf("%q", got)
	}
	h, err := wire.DecodeHello(got[0])
	want := wire.Hello{Version: "1.0.0", Image: fleet.Hash(strings.Repeat("ab", 32)), Hardware: "rev-c", Chip: "esp32s3", SecureVersion: 2, Boot: "power-on", Serial: m.serial, Buffer: 1024, Revision: 301}
	if err != nil || h != want || string(got[0]) != string(wire.Encode(want)) {
		t.Errorf("in a small buffer: %s, %v", got[0], err)
	}
	m.fact("one", "0")
	m.do("boot")
	want.Previous, want.PreviousSecureVersion = fleet.Hash(strings.Repeat("cd", 32)), 1
	if got := published(t, m.do("entered"), "hello"); len(got) != 1 || string(got[0]) != string(wire.Encode(want)) {
		t.Errorf("got %s", got)
	}
	if m.answer(); m.one("now") != "1795000000" {
		t.Errorf("the time is %s", m.one("now"))
	}
	m.do("pass", "5000")
	if m.one("now") != "1795000005" {
		t.Errorf("five seconds later it is %s", m.one("now"))
	}
	m.do("boot")
	if m.one("now") != "1795000000" {
		t.Errorf("after a restart the time is %s", m.one("now"))
	}
}

// A renewal: a new key, a certificate in slices, promoted by connecting with it, and the old one again if the broker does not
// take the new.
func TestRenewal(t *testing.T) {
	m := provision(t)
	m.do("entered")
	m.answer()
	first := m.csr(m.hear(wire.DownCert, []byte(`{"op":"renew","in":600}`)))
	if again := m.csr(m.do("pass", "600000")); !again.Equal(first) {
		t.Error("the second request is for another key")
	}
	serial, lines := m.push(first, "", 256)
	if ok := published(t, lines, "cert"); len(ok) != 1 || string(ok[0]) != `{"ok":"`+string(serial)+`"}` || !says(lines, "leave") {
		t.Fatalf("%q", lines)
	}
	if got := m.one("left"); got != "again now" {
		t.Error(got)
	}
	// The broker says no for a while, as it does when muster is away: the new one has three tries, then the old one is tried.
	for i, want := range []fleet.Serial{serial, serial, serial, m.serial} {
		if got := m.one("next"); got != "devices "+string(want) {
			t.Errorf("attempt %d with %s", i, got)
		}
		m.do("failed", "denied")
	}
	m.do("boot")
	if got := m.one("next"); got != "devices "+string(serial) {
		t.Errorf("after a restart: %s", got)
	}
	h := published(t, m.do("entered"), "hello")
	if got, err := wire.DecodeHello(h[0]); err != nil || got.Serial != serial {
		t.Errorf("%v: %s", err, h)
	}
	// The next renewal overwrites the old slot, with another key.
	second := m.csr(m.hear(wire.DownCert, []byte(`{"op":"renew"}`)))
	if second.Equal(first) {
		t.Error("the key was used twice")
	}
	m.push(second, "", 256)
	m.do("left")
	m.do("failed", "refused")
	if m.do("failed", "refused"); m.one("next") != "devices "+string(serial) {
		t.Errorf("the new one is refused by an alert: %s", m.one("next"))
	}
}

// What is not this device's certificate is not stored.
func TestForeignCertificates(t *testing.T) {
	m := provision(t)
	m.do("entered")
	pub := m.csr(m.hear(wire.DownCert, []byte(`{"op":"renew"}`)))
	stranger, _ := key(t)
	writes := m.one("writes")
	for name, c := range map[string]func() ([]byte, fleet.Serial, *x509.Certificate){
		"another key": func() ([]byte, fleet.Serial, *x509.Certificate) {
			d, s := m.ca.issue(id, &stranger.PublicKey)
			return d, s, m.ca.cert
		},
		"another device": func() ([]byte, fleet.Serial, *x509.Certificate) {
			d, s := m.ca.issue("other", pub)
			return d, s, m.ca.cert
		},
		"another serial": func() ([]byte, fleet.Serial, *x509.Certificate) {
			d, _ := m.ca.issue(id, pub)
			return d, "77", m.ca.cert
		},
		"another root": func() ([]byte, fleet.Serial, *x509.Certificate) {
			o := newCA(t, "evil")
			d, s := o.issue(id, pub)
			return d, s, o.cert
		},
		"not a certificate": func() ([]byte, fleet.Serial, *x509.Certificate) { return []byte("certificate"), "77", m.ca.cert },
		"half a certificate": func() ([]byte, fleet.Serial, *x509.Certificate) {
			d, s := m.ca.issue(id, pub)
			return d[:len(d)/2], s, m.ca.cert
		},
	} {
		der, serial, above := c()
		lines := m.hear(wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertPush, Serial: serial, Chain: [][]byte{der, above.Raw}}))
		got := published(t, lines, "cert")
		if len(got) != 1 {
			t.Fatalf("%s: %q", name, lines)
		}
		if r, err := wire.DecodeCert(got[0]); err != nil || r.Error == "" || says(lines, "leave") {
			t.Errorf("%s: %s, %v", name, got[0], err)
		}
	}
	if got := m.one("writes"); got != writes {
		t.Errorf("something was written: %s writes, %s before", got, writes)
	}
}

// The power goes at any write of a renewal. Afterwards the device always has a certificate that it can use, with its key, and
// the renewal comes to its end.
func TestPowerCutsInARenewal(t *testing.T) {
	finished := false
	for cut := 0; !finished; cut++ {
		m := provision(t)
		m.do("cut", fmt.Sprint(cut))
		m.do("entered")
		lines := m.hear(wire.DownCert, []byte(`{"op":"renew"}`))
		if !m.off {
			m.push(m.csr(lines), "", 1024)
		}
		if !m.off {
			m.do("left")
			m.do("entered")
		}
		finished = !m.off
		m.do("boot")
		if got := m.one("next"); !strings.HasPrefix(got, "devices ") || strings.HasSuffix(got, "-") {
			t.Fatalf("cut %d: %s", cut, got)
		}
		h := published(t, m.do("entered"), "hello")
		hello, err := wire.DecodeHello(h[0])
		if err != nil || hello.Serial == "" {
			t.Fatalf("cut %d: %s, %v", cut, h, err)
		}
		serial, lines := m.push(m.csr(m.hear(wire.DownCert, []byte(`{"op":"renew"}`))), "", 1024)
		if m.do("left"); m.one("next") != "devices "+string(serial) {
			t.Errorf("cut %d: %s, %q", cut, m.one("next"), lines)
		}
		if cut > 30 {
			t.Fatal("a renewal of 30 writes")
		}
	}
}

// The fallback is for a device that is refused for long, or by an alert; there it asks for a certificate of a key that muster
// knows, keeps both passwords and comes back.
func TestFallback(t *testing.T) {
	m := provision(t)
	for range 12 {
		m.do("failed", "unreachable")
	}
	for range 9 {
		m.do("failed", "denied")
		m.do("pass", "400000")
	}
	if got := m.one("next"); got != "devices "+string(m.serial) {
		t.Fatalf("too soon on the fallback: %s", got)
	}
	m.do("pass", "1000")
	if m.do("failed", "denied"); m.one("next") != "fallback old-password" {
		t.Fatalf("not on the fallback: %s", m.one("next"))
	}
	lines := m.do("entered")
	if h, err := wire.DecodeHello(published(t, lines, "hello")[0]); err != nil || h.Serial != "" {
		t.Errorf("%+v, %v", h, err)
	}
	pub := m.csr(lines)
	if again := m.csr(m.do("message", wire.DownTopic(id, wire.DownCert), hexed([]byte(`{"op":"renew"}`)))); !again.Equal(pub) {
		t.Error("another key")
	}
	if lines := m.hear(wire.DownCert, []byte(`{"op":"no","why":"wait","in":60}`)); says(lines, "leave") {
		t.Error("it leaves although it is to wait")
	}
	serial, lines := m.push(pub, "new-password", 256)
	if !says(lines, "leave") {
		t.Fatalf("%q", lines)
	}
	m.do("left")
	if got := m.one("next"); got != "devices "+string(serial) {
		t.Fatal(got)
	}
	for range 3 {
		m.do("failed", "denied")
	}
	if got := m.one("next"); got != "fallback new-password" {
		t.Errorf("got %s", got)
	}
	if m.do("failed", "denied"); m.one("next") != "fallback old-password" {
		t.Errorf("the old password is gone: %s", m.one("next"))
	}
	m.do("boot")
	if got := m.one("next"); got != "devices "+string(serial) {
		t.Errorf("after a restart: %s", got)
	}
}

// A trust bundle is taken if muster's trust key signed it and its version is above; an older one never, nor one of nobody.
func TestTrustBundles(t *testing.T) {
	m := provision(t)
	next := newCA(t, "next root")
	stranger, _ := key(t)
	bundle := func(version int64, k *ecdsa.PrivateKey, roots ...[]byte) string {
		s, err := pki.SignBundle(pki.Bundle{Version: version, Time: 1796000000, Roots: roots}, k)
		if err != nil {
			t.Fatal(err)
		}
		return hexed([]byte(s))
	}
	m.do("entered")
	if lines := m.hear(wire.DownCmd, []byte(`{"op":"trust","tb":2}`)); !says(lines, "fetch-trust device") {
		t.Fatalf("%q", lines)
	}
	if got := published(t, m.do("trust", bundle(2, stranger, next.cert.Raw)), "hello"); len(got) != 0 {
		t.Error("a stranger's bundle was taken")
	}
	got := published(t, m.do("trust", bundle(2, m.trust, m.ca.cert.Raw, next.cert.Raw)), "hello")
	if len(got) != 1 || !bytes.Contains(got[0], []byte(`"tb":2`)) {
		t.Fatalf("%q", got)
	}
	for _, old := range []int64{1, 2} {
		if got := published(t, m.do("trust", bundle(old, m.trust, next.cert.Raw)), "hello"); len(got) != 0 {
			t.Errorf("version %d was taken", old)
		}
		if lines := m.hear(wire.DownCmd, fmt.Appendf(nil, `{"op":"trust","tb":%d}`, old)); says(lines, "fetch-trust") {
			t.Errorf("version %d is fetched", old)
		}
	}
	m.do("boot")
	if got := published(t, m.do("entered"), "hello"); !bytes.Contains(got[0], []byte(`"tb":2`)) {
		t.Errorf("after a restart: %s", got)
	}
	if m.one("now") != "1796000000" {
		t.Errorf("the signed time is no bound: %s", m.one("now"))
	}
	// A certificate of the new root is believed now.
	m.ca = next
	if _, lines := m.push(m.csr(m.hear(wire.DownCert, []byte(`{"op":"renew"}`))), "", 1024); !says(lines, "leave") {
		t.Errorf("%q", lines)
	}
}

// An update: what is reported at which step, and that an image which does not prove itself is rolled back and never taken again.
func TestUpdate(t *testing.T) {
	m := provision(t)
	image := []byte("the new image")
	sum := sha256.Sum256(image)
	offer := wire.OTAOffer{Job: "r-1", Version: "1.1.0", Size: int64(len(image)), SHA256: sum[:], Path: "/fw/9f86d081884c7d65"}
	steps := func(lines []string) (out []string) {
		for _, p := range published(t, lines, "ota") {
			r, err := wire.DecodeOTA(p)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, strings.TrimSpace(string(r.Step)+" "+r.Error))
		}
		return out
	}
	expect := func(lines []string, want ...string) {
		t.Helper()
		if got := steps(lines); strings.Join(got, "|") != strings.Join(want, "|") {
			t.Errorf("reported %q, want %q", got, want)
		}
	}
	newImage := strings.Repeat("ef", 32)
	m.fact("installs", newImage)
	m.do("entered")
	m.answer()
	lines := m.hear(wire.DownOTA, wire.Encode(offer))
	expect(lines, "accepted")
	if !says(lines, "fetch-image /fw/9f86d081884c7d65 device 0") {
		t.Errorf("%q", lines)
	}
	if lines := m.hear(wire.DownOTA, wire.Encode(offer)); len(lines) != 0 {
		t.Errorf("the same again: %q", lines)
	}
	expect(m.do("progress", "50"), "downloading")
	expect(m.do("downloaded", "1", hexed(make([]byte, 32))), "failed SHA-256 differs")
	m.hear(wire.DownOTA, wire.Encode(offer))
	lines = m.do("downloaded", "1", hex.EncodeToString(sum[:]))
	expect(lines, "downloaded", "installed", "rebooting")
	if !says(lines, "install") || !says(lines, "select") || !says(lines, "restart update") {
		t.Errorf("%q", lines)
	}

	// The new image runs. It is kept only when muster has answered.
	old := strings.Repeat("ab", 32)
	m.fact("img", newImage)
	m.fact("prev", old)
	m.fact("verify", "1")
	m.do("boot")
	lines = m.do("entered")
	expect(lines, "verifying")
	if says(lines, "confirm") {
		t.Error("confirmed before muster answered")
	}
	if lines := m.answer(); !says(lines, "confirm") {
		t.Errorf("not confirmed: %q", lines)
	}
	if lines := m.hear(wire.DownOTA, wire.Encode(offer)); len(published(t, lines, "hello")) != 1 || len(steps(lines)) != 0 {
		t.Errorf("an offer of what runs: %q", lines)
	}

	// Back to the slot before, on command, but only to the very image that is meant.
	back := func(image string) []string {
		b, err := hex.DecodeString(image)
		if err != nil {
			t.Fatal(err)
		}
		return m.hear(wire.DownCmd, wire.Encode(wire.Cmd{Op: wire.CmdPrevious, Job: "r-2", Image: b}))
	}
	expect(back(strings.Repeat("00", 32)), "rejected the other slot holds another image")
	if lines := back(newImage); len(published(t, lines, "ota")) != 0 {
		t.Errorf("back to what runs: %q", lines)
	}
	expect(back(old), "accepted", "rebooting")
}

// An image that never reaches muster is given up by the device itself, and is not taken a second time.
func TestRollback(t *testing.T) {
	m := provision(t)
	old, newImage := strings.Repeat("ab", 32), strings.Repeat("ef", 32)
	sum := sha256.Sum256([]byte("bad image"))
	offer := wire.Encode(wire.OTAOffer{Job: "r-1", Version: "1.1.0", Size: 9, SHA256: sum[:], Path: "/fw/x"})
	m.fact("installs", newImage)
	m.do("entered")
	m.answer()
	m.hear(wire.DownOTA, offer)
	m.do("downloaded", "1", hex.EncodeToString(sum[:]))
	m.fact("img", newImage)
	m.fact("verify", "1")
	m.do("boot")
	for range 9 {
		m.do("failed", "unreachable")
		if lines := m.do("pass", "60000"); says(lines, "restart") {
			t.Fatal("too soon")
		}
	}
	if lines := m.do("pass", "60000"); !says(lines, "restart rollback") {
		t.Fatalf("%q", lines)
	}
	m.fact("img", old) // the bootloader went back
	m.fact("failed", newImage)
	m.fact("verify", "0")
	m.do("boot")
	got := published(t, m.do("entered"), "ota")
	if len(got) != 1 || !bytes.Contains(got[0], []byte(`"rolled-back"`)) {
		t.Fatalf("%q", got)
	}
	got = published(t, m.hear(wire.DownOTA, offer), "ota")
	if len(got) != 1 || !bytes.Contains(got[0], []byte(`"rejected"`)) {
		t.Errorf("%q", got)
	}
	m.do("boot")
	if got := published(t, m.do("entered"), "ota"); len(got) != 0 {
		t.Errorf("reported twice: %q", got)
	}
}

// A device that holds release keys believes no offer without their signature.
func TestSignedReleases(t *testing.T) {
	m := provision(t)
	release, spki := key(t)
	stranger, _ := key(t)
	m.do("put", "rel_keys", hexed(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})))
	m.fact("chip", "esp32s3")
	m.do("boot")
	sum := sha256.Sum256([]byte("image"))
	offer := wire.OTAOffer{Job: "r-1", Version: "1.1.0", Size: 5, SHA256: sum[:], Path: "/fw/9f86d081884c7d65"}
	good := firmware.Manifest{Product: "lamp", Version: "1.1.0", Size: 5, SHA256: fleet.HashOf(sum), ImageHash: fleet.HashOf(sum), Chip: "esp32s3"}
	m.do("entered")
	m.answer()
	for name, c := range map[string]struct {
		change func(*firmware.Manifest)
		key    *ecdsa.PrivateKey
		want   string
	}{
		"the right one":   {nil, release, "fetch-image"},
		"another key":     {nil, stranger, "publish"},
		"another image":   {func(m *firmware.Manifest) { m.SHA256 = fleet.HashOf([32]byte{1}) }, release, "publish"},
		"another version": {func(m *firmware.Manifest) { m.Version = "1.2.0" }, release, "publish"},
		"another chip":    {func(m *firmware.Manifest) { m.Chip = "esp32" }, release, "publish"},
	} {
		lines := m.hear(wire.DownOTA, wire.Encode(offer))
		if !says(lines, "fetch-manifest "+offer.Path) || says(lines, "fetch-image") {
			t.Fatalf("%s: %q", name, lines)
		}
		x := good
		if c.change != nil {
			c.change(&x)
		}
		jws, err := firmware.Sign(x, c.key)
		if err != nil {
			t.Fatal(err)
		}
		lines = m.do("signed", hexed([]byte(jws)))
		if !says(lines, c.want) {
			t.Errorf("%s: %q", name, lines)
		}
		m.do("downloaded", "0", hexed([]byte("broken off"))) // the next case begins afresh
	}
}
