package secureboot_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
)

func TestPolicy(t *testing.T) {
	a, b, c := public(t, "rsa3072_a").Digest(), public(t, "rsa3072_b").Digest(), public(t, "rsa3072_c").Digest()
	half := a
	clear(half[16:])
	slots := func(ks ...secureboot.KeyDigest) (all []secureboot.Slot) {
		for _, k := range ks {
			all = append(all, secureboot.Slot{Key: k})
		}
		return all
	}
	revoked := func(k secureboot.KeyDigest) secureboot.Slot { return secureboot.Slot{Key: k, Revoked: true} }
	esp32, s3, c61 := chip(t, "esp32"), chip(t, "esp32s3"), chip(t, "esp32c61")
	short := s3
	short.DigestBytes = 16
	plain := padded(t)
	ab := inspect(t, sign(t, plain, false, "rsa3072_a", "rsa3072_b"))
	tests := []struct {
		name   string
		rep    *secureboot.Report
		policy secureboot.Policy
		key    secureboot.KeyDigest
		code   string
	}{
		{"the first key", ab, secureboot.Policy{Chip: s3, Keys: slots(a)}, a, ""},
		{"the second key", ab, secureboot.Policy{Chip: s3, Keys: slots(c, b)}, b, ""},
		{"the second key on an ESP32", ab, secureboot.Policy{Chip: esp32, Keys: slots(b)}, a, "esp_key_unknown"},
		{"the first key on an ESP32", ab, secureboot.Policy{Chip: esp32, Keys: slots(a)}, a, ""},
		{"the second key without hardware", ab, secureboot.Policy{FirstBlock: true, Keys: slots(b)}, a, "esp_key_unknown"},
		{"no key", ab, secureboot.Policy{Chip: s3}, a, "esp_key_unknown"},
		{"another key", ab, secureboot.Policy{Chip: s3, Keys: slots(c)}, a, "esp_key_unknown"},
		{"a revoked key", ab, secureboot.Policy{Chip: s3, Keys: []secureboot.Slot{revoked(a)}}, a, "esp_key_revoked"},
		{"revoked and registered too", ab, secureboot.Policy{Chip: s3, Keys: []secureboot.Slot{{Key: a}, revoked(a)}}, a, "esp_key_revoked"},
		{"one revoked, one not", ab, secureboot.Policy{Chip: s3, Keys: []secureboot.Slot{revoked(a), {Key: b}}}, b, ""},
		{"a chip that knows only ECDSA", ab, secureboot.Policy{Chip: c61, Keys: slots(a)}, a, "esp_signature_scheme"},
		{"half of the digest on a chip that burns all", ab, secureboot.Policy{Chip: s3, Keys: slots(half)}, a, "esp_key_unknown"},
		{"half of it on a chip that burns half", ab, secureboot.Policy{Chip: short, Keys: slots(half)}, a, ""},
		{"no signature", inspect(t, plain), secureboot.Policy{Chip: s3, Keys: slots(a)}, a, "esp_unsigned"},
		{"a signature that is not of its key", inspect(t, golden(t, "negative/sig_other_key.bin")), secureboot.Policy{Keys: slots(a, b)}, a, "esp_signature_bad"},
	}
	for _, tt := range tests {
		got, err := tt.rep.Check(tt.policy)
		if tt.code == "" && (err != nil || got.Key != tt.key) {
			t.Errorf("%s: %s, %v", tt.name, got.Key, err)
		}
		if tt.code != "" && (code(err) != tt.code || !fleet.Is(err, fleet.Unprocessable)) {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.code)
		}
	}
}

func chip(t *testing.T, name string) esp.Chip {
	t.Helper()
	c, ok := esp.ChipByName(name)
	if !ok {
		t.Fatal(name)
	}
	return c
}

// A good signature does not make up for a bad one beside it: some chips burn the key of the bad one.
func TestBadBlockBesideAGoodOne(t *testing.T) {
	plain := padded(t)
	good := sign(t, plain, false, "rsa3072_a", "rsa3072_b")
	trust := secureboot.Policy{Keys: []secureboot.Slot{{Key: public(t, "rsa3072_a").Digest()}}}
	at := func(i, off int) int { return len(plain) + i*image.BlockSize + off }
	tests := []struct {
		name   string
		change func(b []byte)
		crc    bool
		code   string
	}{
		{"another image", func(b []byte) { b[at(1, 4)] ^= 1 }, true, "esp_signature_image"},
		{"another signature", func(b []byte) { b[at(1, 900)] ^= 1 }, true, "esp_signature_bad"},
		{"another modulus", func(b []byte) { b[at(1, 40)] ^= 1 }, true, "esp_signature_malformed"},
		{"an even modulus", func(b []byte) { b[at(1, 36)] &^= 1 }, true, "esp_signature_malformed"},
		{"a modulus of zero", func(b []byte) { clear(b[at(1, 36):at(1, 420)]) }, true, "esp_signature_malformed"},
		{"an exponent of zero", func(b []byte) { clear(b[at(1, 420):at(1, 424)]) }, true, "esp_signature_malformed"},
		{"a huge exponent", func(b []byte) { b[at(1, 423)] = 0xFF }, true, "esp_signature_malformed"},
		{"other constants", func(b []byte) { b[at(1, 424)] ^= 1 }, true, "esp_signature_malformed"},
		{"another version", func(b []byte) { b[at(1, 1)] = 4 }, true, "esp_signature_malformed"},
		{"no curve", func(b []byte) { b[at(1, 1)], b[at(1, 36)] = 3, 9 }, true, "esp_signature_malformed"},
		{"no point", func(b []byte) { b[at(1, 1)], b[at(1, 36)] = 3, 2 }, true, "esp_signature_malformed"},
		{"no point of P-192", func(b []byte) { b[at(1, 1)], b[at(1, 36)] = 3, 1 }, true, "esp_signature_malformed"},
		{"a damaged second block", func(b []byte) { b[at(1, 900)] ^= 1 }, false, ""},
		{"a damaged first block", func(b []byte) { b[at(0, 900)] ^= 1 }, false, "esp_key_unknown"},
	}
	for _, tt := range tests {
		b := bytes.Clone(good)
		tt.change(b)
		if tt.crc {
			binary.LittleEndian.PutUint32(b[at(1, 1196):], crc32.ChecksumIEEE(b[at(1, 0):at(1, 1196)]))
		}
		_, err := inspect(t, b).Check(trust)
		if tt.code == "" && err != nil || tt.code != "" && code(err) != tt.code {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.code)
		}
	}
	gap := bytes.Clone(good)
	gap[at(0, 900)] ^= 1
	if rep := inspect(t, gap); !rep.Findings.Has("esp_signature_gap") || len(rep.Blocks) != 1 || rep.Blocks[0].Index != 1 {
		t.Errorf("%+v, %v", rep.Blocks, rep.Findings)
	}
	filler := bytes.Clone(good)
	filler[at(2, 100)] = 0
	if rep := inspect(t, filler); !rep.Findings.Has("esp_signature_filler") || rep.Err() != nil {
		t.Errorf("%v", rep.Findings)
	}
	mixed := bytes.Clone(good)
	copy(mixed[at(1, 0):], sign(t, plain, false, "ecdsa256")[len(plain):len(plain)+image.BlockSize])
	if rep := inspect(t, mixed); !rep.Findings.Has("esp_signature_mixed") || rep.Err() == nil {
		t.Errorf("%v", rep.Findings)
	}
}

func TestKeyDigestText(t *testing.T) {
	d := public(t, "rsa3072_a").Digest()
	var back secureboot.KeyDigest
	text, err := d.MarshalText()
	if err != nil || back.UnmarshalText(text) != nil || back != d {
		t.Errorf("%s, %v", text, err)
	}
	for _, s := range []string{"", "00", string(text) + "00", string(text[:63]) + "g"} {
		if _, err := secureboot.ParseKeyDigest(s); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}
