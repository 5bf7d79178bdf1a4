package ota_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	"muster/internal/fleet"
	"muster/internal/ota"
)

func rsaKey(t *testing.T) (*rsa.PrivateKey, []byte) {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return k, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func fotaSign(t *testing.T, k *rsa.PrivateKey, image []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(image)
	b, err := rsa.SignPKCS1v15(nil, k, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A signature for esp32FOTA is kept only if a device would take it, and another key only if that is meant.
func TestSignForFOTA(t *testing.T) {
	w := open(t)
	one, two := []byte("the first image"), []byte("the second image")
	if _, err := w.publish(manifest("1.0.0", one), one); err != nil {
		t.Fatal(err)
	}
	if _, err := w.publish(manifest("1.1.0", two), two); err != nil {
		t.Fatal(err)
	}
	key, text := rsaKey(t)
	other, otherText := rsaKey(t)
	_, ec := newKey(t)
	good := fotaSign(t, key, one)
	pssSum := sha256.Sum256(one)
	pss, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, pssSum[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		order ota.FOTAOrder
		code  string
	}{
		"another image":   {ota.FOTAOrder{Signature: fotaSign(t, key, two), PublicKey: text}, "esp32fota_signature"},
		"another key":     {ota.FOTAOrder{Signature: good, PublicKey: otherText}, "esp32fota_signature"},
		"PSS":             {ota.FOTAOrder{Signature: pss, PublicKey: text}, "esp32fota_signature"},
		"too short":       {ota.FOTAOrder{Signature: good[1:], PublicKey: text}, "esp32fota_signature"},
		"too long":        {ota.FOTAOrder{Signature: append(slices.Clone(good), 0), PublicKey: text}, "esp32fota_signature"},
		"none":            {ota.FOTAOrder{PublicKey: text}, "esp32fota_signature"},
		"no RSA":          {ota.FOTAOrder{Signature: good, PublicKey: ec}, "esp32fota_key"},
		"no key":          {ota.FOTAOrder{Signature: good, PublicKey: []byte("key")}, "esp32fota_key"},
		"no PEM of a key": {ota.FOTAOrder{Signature: good, PublicKey: []byte(strings.ReplaceAll(string(text), "PUBLIC", "PRIVATE"))}, "esp32fota_key"},
	} {
		if _, err := w.cat.SignForFOTA(t.Context(), start, "lamp", "1.0.0", c.order); codeOf(err) != string(fleet.Unprocessable)+" "+c.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := w.cat.SignForFOTA(t.Context(), start, "lamp", "9.9.9", ota.FOTAOrder{Signature: good, PublicKey: text}); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("no such release: %v", err)
	}
	for range 2 {
		rel, err := w.cat.SignForFOTA(t.Context(), start, "lamp", "1.0.0", ota.FOTAOrder{Signature: good, PublicKey: text, By: "ann"})
		if err != nil {
			t.Fatal(err)
		}
		if b, err := rel.FOTA.Bytes(); err != nil || string(b) != string(good) || rel.FOTA.By != "ann" {
			t.Errorf("%+v, %v", rel.FOTA, err)
		}
	}
	strange := ota.FOTAOrder{Signature: fotaSign(t, other, two), PublicKey: otherText, By: "ann"}
	if _, err := w.cat.SignForFOTA(t.Context(), start, "lamp", "1.1.0", strange); codeOf(err) != string(fleet.Conflict)+" esp32fota_other_key" {
		t.Errorf("another key than the product's: %v", err)
	}
	strange.NewKey = true
	if _, err := w.cat.SignForFOTA(t.Context(), start, "lamp", "1.1.0", strange); err != nil {
		t.Error(err)
	}
	for range 2 {
		rel, err := w.cat.UnsignForFOTA(t.Context(), start, "lamp", "1.1.0", "ann")
		if b, _ := rel.FOTA.Bytes(); err != nil || b != nil {
			t.Errorf("%+v, %v", rel.FOTA, err)
		}
	}
	// A release with a signature is the same release.
	if rel, err := w.publish(manifest("1.0.0", one), one); err != nil || rel.FOTA.By != "ann" {
		t.Errorf("%+v, %v", rel.FOTA, err)
	}
	got := strings.Join(w.audit(), "\n")
	if strings.Count(got, "firmware.esp32fota") != 2 || strings.Count(got, "firmware.unesp32fota") != 1 {
		t.Errorf("on record: %s", got)
	}
}
