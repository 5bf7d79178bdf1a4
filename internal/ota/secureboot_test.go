package ota_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"

	"muster/internal/esp/secureboot"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/internal/store/bolt"
	"muster/test/espfile"
)

// bootKey is a Secure Boot key with its public half in PEM and its digest.
type bootKey struct {
	*ecdsa.PrivateKey
	pem    string
	digest fleet.Hash
}

func newBootKey(t *testing.T) bootKey {
	t.Helper()
	priv, text := newKey(t)
	k, err := secureboot.KeyOf(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return bootKey{priv, string(text), fleet.Hash(k.Digest().String())}
}

// bootImage is an image for a chip that takes ECDSA, signed by keys.
func bootImage(t *testing.T, version string, keys ...bootKey) []byte {
	t.Helper()
	b := espfile.App{Chip: 0x0D, Version: version}.Bytes(t)
	if len(keys) == 0 {
		return b
	}
	s, err := secureboot.Start(bytes.NewReader(b), int64(len(b)), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if err := s.Sign(rand.Reader, k.PrivateKey); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if _, err := s.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestSecureBootKeysOfAProduct(t *testing.T) {
	w := open(t)
	a, b, stranger := newBootKey(t), newBootKey(t), newBootKey(t)
	publish := func(version firmware.Version, keys ...bootKey) error {
		img := bootImage(t, string(version), keys...)
		_, err := w.publish(espManifest(t, version, img), img)
		return err
	}
	if err := publish("1.0.0"); err != nil {
		t.Errorf("a product without keys: %v", err)
	}
	ka, err := w.cat.AddSecureBootKey(t.Context(), start, "lamp", a.pem, "ann")
	if err != nil || ka.Digest != a.digest || ka.Scheme != "ecdsa-p256" || ka.Product != "lamp" || ka.AddedBy != "ann" {
		t.Fatalf("%+v, %v", ka, err)
	}
	if again, err := w.cat.AddSecureBootKey(t.Context(), start.Add(1), "lamp", "  "+strings.ToUpper(string(a.digest))+"\n", "bob"); err != nil || again != ka {
		t.Errorf("the same again, by its digest: %+v, %v", again, err)
	}
	if kb, err := w.cat.AddSecureBootKey(t.Context(), start, "lamp", string(b.digest), "ann"); err != nil || kb.Digest != b.digest || kb.Scheme != "" {
		t.Errorf("%+v, %v", kb, err)
	}
	if _, err := w.cat.AddSecureBootKey(t.Context(), start, "lamp2", stranger.pem, "ann"); err != nil { // another product's key is none of lamp's
		t.Error(err)
	}
	check := func(name string, err error, want string) {
		t.Helper()
		if got := codeOf(err); err != nil && got != want || err == nil && want != "" {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	check("not signed", publish("1.1.0"), "unprocessable esp_unsigned")
	check("signed by another product's key", publish("1.1.0", stranger), "unprocessable esp_key_unknown")
	check("signed by a", publish("1.1.0", a), "")
	check("signed by b", publish("1.2.0", b), "")
	check("signed by a stranger and b", publish("1.3.0", stranger, b), "")
	raw := []byte("MUSTERSIM1 and more")
	_, err = w.publish(manifest("1.4.0", raw), raw)
	check("a raw image", err, "unprocessable esp_unsigned")
	bad := bootImage(t, "1.4.0", a)
	bad[len(bad)-4096+150] ^= 1 // inside the first block: its CRC no longer holds, so it is absent
	m := manifest("1.4.0", bad)
	m.Chip, m.ImageHash = "esp32c6", espManifest(t, "1.4.0", bootImage(t, "1.4.0", a)).ImageHash
	if _, err := w.publish(m, bad); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("a damaged block: %v", err)
	}

	gone, err := w.cat.RevokeSecureBootKey(t.Context(), start.Add(2), "lamp", a.digest, "bob")
	if err != nil || !gone.Revoked || gone.RevokedBy != "bob" {
		t.Errorf("%+v, %v", gone, err)
	}
	if again, err := w.cat.RevokeSecureBootKey(t.Context(), start.Add(3), "lamp", a.digest, "eve"); err != nil || again != gone {
		t.Errorf("again: %+v, %v", again, err)
	}
	check("signed by a, which is revoked", publish("1.5.0", a), "unprocessable esp_key_revoked")
	check("signed by both", publish("1.5.0", a, b), "")
	check("published before, again", publish("1.1.0", a), "conflict release_exists") // ECDSA signatures differ each time
	_, err = w.cat.AddSecureBootKey(t.Context(), start, "lamp", a.pem, "ann")
	check("register a revoked key", err, "conflict key_revoked")
	_, err = w.cat.RevokeSecureBootKey(t.Context(), start, "lamp", stranger.digest, "bob")
	if !fleet.Is(err, fleet.NotFound) {
		t.Errorf("revoke another product's key: %v", err)
	}
	if _, err := w.cat.RevokeSecureBootKey(t.Context(), start, "lamp", b.digest, "bob"); err != nil {
		t.Error(err)
	}
	check("no live key is left", publish("1.6.0", b), "unprocessable esp_key_revoked")

	for p, want := range map[fleet.ProductID]int{"": 3, "lamp": 2, "lamp2": 1, "lock": 0} {
		if all, err := w.cat.SecureBootKeys(t.Context(), p); err != nil || len(all) != want {
			t.Errorf("product %q: %v, %v", p, all, err)
		}
	}
	got := w.audit()
	for _, want := range []string{"ann secure-boot-key.add " + string(a.digest), "bob secure-boot-key.revoke " + string(a.digest)} {
		if n := len(slices.DeleteFunc(slices.Clone(got), func(s string) bool { return s != want })); n != 1 {
			t.Errorf("%d × %s in %q", n, want, got)
		}
	}
}

// A release is offered, and its image handed out, only while a live key of its product signed it.
func TestNoOfferWithoutLiveKey(t *testing.T) {
	w := open(t)
	a, b := newBootKey(t), newBootKey(t)
	releases := map[string]firmware.Release{}
	for v, keys := range map[firmware.Version][]bootKey{"1.0.0": nil, "1.1.0": {a}, "1.2.0": {a, b}} { // before the product has keys
		img := bootImage(t, string(v), keys...)
		rel, err := w.publish(espManifest(t, v, img), img)
		if err != nil {
			t.Fatal(err)
		}
		releases[string(v)] = rel
	}
	device := 0
	offered := func(v string) string {
		t.Helper()
		rel := releases[v]
		device++
		id := fleet.DeviceID(fmt.Sprint("d", device))
		w.grant(fleet.RolloutID(fmt.Sprint("r", device)), id, rel)
		var err error
		w.update(func(tx *bolt.Tx) error {
			_, _, err = w.cat.Offer(tx, id, fleet.Status{Device: id, Chip: "esp32c6", ChipRevision: 100, Version: "0.9.0"})
			return nil
		})
		if _, got := w.cat.Granted(t.Context(), id, string(rel.SHA256)); (got == nil) != (err == nil) {
			t.Errorf("%s: granted %v, offered %v", v, got, err)
		}
		if err == nil {
			return ""
		}
		return codeOf(err)
	}
	check := func(when string, want map[string]string) {
		t.Helper()
		for v, code := range want {
			if got := offered(v); got != code {
				t.Errorf("%s: %s: %q, want %q", when, v, got, code)
			}
		}
	}
	do := func(_ firmware.SecureBootKey, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check("without keys", map[string]string{"1.0.0": "", "1.1.0": "", "1.2.0": ""})
	do(w.cat.AddSecureBootKey(t.Context(), start, "lamp", b.pem, "ann"))
	check("with the key of one", map[string]string{"1.0.0": "unprocessable secure-boot-unsigned", "1.1.0": "unprocessable secure-boot-key-unknown", "1.2.0": ""})
	do(w.cat.AddSecureBootKey(t.Context(), start, "lamp", a.pem, "ann"))
	do(w.cat.RevokeSecureBootKey(t.Context(), start, "lamp", a.digest, "ann"))
	check("with the other revoked", map[string]string{"1.1.0": "unprocessable secure-boot-key-revoked", "1.2.0": ""})
	do(w.cat.RevokeSecureBootKey(t.Context(), start, "lamp", b.digest, "ann"))
	check("with all revoked", map[string]string{"1.2.0": "unprocessable secure-boot-key-revoked"})
}

// A key that is revoked while the image is on its way does not publish it.
func TestSecureBootKeyRevokedDuringUpload(t *testing.T) {
	w := open(t)
	k := newBootKey(t)
	if _, err := w.cat.AddSecureBootKey(t.Context(), start, "lamp", k.pem, "ann"); err != nil {
		t.Fatal(err)
	}
	img := bootImage(t, "1.0.0", k)
	m := espManifest(t, "1.0.0", img)
	reader := &revokeBoot{Reader: bytes.NewReader(img), do: func() {
		if _, err := w.cat.RevokeSecureBootKey(t.Context(), start, "lamp", k.digest, "bob"); err != nil {
			t.Error(err)
		}
	}}
	_, err := w.cat.Publish(t.Context(), start, ota.Upload{JWS: w.sign(m), Image: reader, By: "ann"})
	if codeOf(err) != "unprocessable esp_key_revoked" {
		t.Error(err)
	}
}

type revokeBoot struct {
	*bytes.Reader
	do func()
}

func (r *revokeBoot) Read(p []byte) (int, error) {
	if r.do != nil {
		r.do()
		r.do = nil
	}
	return r.Reader.Read(p)
}

func TestAddSecureBootKeyRefuses(t *testing.T) {
	w := open(t)
	good := newBootKey(t)
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(p521.Public())
	if err != nil {
		t.Fatal(err)
	}
	priv, err := x509.MarshalPKCS8PrivateKey(good.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	for name, c := range map[string]struct {
		product fleet.ProductID
		text    string
		kind    fleet.Kind
	}{
		"no product":     {"", good.pem, fleet.Invalid},
		"bad product":    {"A/b", good.pem, fleet.Invalid},
		"empty":          {"lamp", "", fleet.Invalid},
		"short digest":   {"lamp", string(good.digest[:62]), fleet.Invalid},
		"long digest":    {"lamp", string(good.digest) + "00", fleet.Invalid},
		"private":        {"lamp", block("PRIVATE KEY", priv), fleet.Invalid},
		"two keys":       {"lamp", good.pem + good.pem, fleet.Invalid},
		"cut":            {"lamp", good.pem[:60], fleet.Invalid},
		"another curve":  {"lamp", block("PUBLIC KEY", der), fleet.Unprocessable},
		"no certificate": {"lamp", block("CERTIFICATE", der), fleet.Invalid},
	} {
		if _, err := w.cat.AddSecureBootKey(t.Context(), start, c.product, c.text, "ann"); !fleet.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := w.cat.SecureBootKeys(t.Context(), ""); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}
