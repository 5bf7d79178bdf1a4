// Command esp measures what muster does to ESP32 images against the bare cost of the hash or the cipher over the same bytes,
// in turns in one process, on an image of 1.5 MiB. It prints
//
//	ratio esp-verify-rsa <value> aim 0.67    SHA-256 / reading, checking and verifying an image signed by RSA-3072
//	ratio esp-verify-p256 <value> aim 0.67   the same with ECDSA P-256
//	ratio esp-xts <value> aim 0.5            crypto/aes block by block / XTS-AES-128 as the chips do it
//	ratio esp-nvs <value> aim 0.5            crypto/aes over the partition / an encrypted NVS partition of a device
//
// Values are medians over the rounds.
package main

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"slices"
	"time"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/esp/image"
	"muster/internal/esp/nvs"
	"muster/internal/esp/secureboot"
)

const (
	size    = 3 << 19 // bytes of an application
	nvsSize = 0x6000
)

func main() {
	rounds := flag.Int("rounds", 21, "rounds; each measures everything once")
	flag.Parse()
	if err := run(*rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench esp:", err)
		os.Exit(1)
	}
}

func run(rounds int) error {
	big, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		return err
	}
	small, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	var all []pair
	for _, k := range []struct {
		name string
		key  crypto.Signer
	}{{"esp-verify-rsa", big}, {"esp-verify-p256", small}} {
		file, trust, err := signed(k.key)
		if err != nil {
			return err
		}
		all = append(all, pair{name: k.name, aim: "0.67", what: "parse and verify", bare: func() error { sha256.Sum256(file); return nil }, ours: func() error { return verify(file, trust) }})
	}
	xts, err := encryption()
	if err != nil {
		return err
	}
	partition, err := partitions()
	if err != nil {
		return err
	}
	all = append(all, xts, partition)
	for i := range all {
		if err := all[i].measure(rounds); err != nil {
			return fmt.Errorf("%s: %w", all[i].name, err)
		}
	}
	return nil
}

// pair is a measure and its baseline.
type pair struct {
	name, aim, what string
	bare, ours      func() error
}

func (p pair) measure(rounds int) error {
	var bare, ours []time.Duration
	for range rounds {
		for _, m := range []struct {
			f  func() error
			to *[]time.Duration
		}{{p.bare, &bare}, {p.ours, &ours}} {
			began := time.Now()
			if err := m.f(); err != nil {
				return err
			}
			*m.to = append(*m.to, time.Since(began))
		}
	}
	b, o := median(bare), median(ours)
	fmt.Printf("  %s: %s, bare %s\n", p.what, o.Round(time.Microsecond), b.Round(time.Microsecond))
	fmt.Printf("ratio %s %.2f aim %s\n", p.name, b.Seconds()/o.Seconds(), p.aim)
	return nil
}

func median(ds []time.Duration) time.Duration {
	slices.Sort(ds)
	return ds[len(ds)/2]
}

// signed returns an application of about 1.5 MiB, signed by key, and the policy that trusts that key alone.
func signed(key crypto.Signer) ([]byte, secureboot.Policy, error) {
	desc, err := image.AppDesc{Version: "1.0.0", ProjectName: "sensor"}.Bytes()
	if err != nil {
		return nil, secureboot.Policy{}, err
	}
	data := make([]byte, size)
	_, _ = rand.Read(data)
	copy(data, desc)
	parts := []image.Part{{Load: 0x3FFB0000, Data: data}}
	var plain, out bytes.Buffer
	if err := image.Write(&plain, image.NewHeader(9), append(parts, image.SecurePad(parts))); err != nil {
		return nil, secureboot.Policy{}, err
	}
	s, err := secureboot.Start(bytes.NewReader(plain.Bytes()), int64(plain.Len()), false)
	if err != nil {
		return nil, secureboot.Policy{}, err
	}
	if err := s.Sign(rand.Reader, key); err != nil {
		return nil, secureboot.Policy{}, err
	}
	if _, err := s.WriteTo(&out); err != nil {
		return nil, secureboot.Policy{}, err
	}
	k, err := secureboot.KeyOf(key.Public())
	if err != nil {
		return nil, secureboot.Policy{}, err
	}
	return out.Bytes(), secureboot.Policy{Keys: []secureboot.Slot{{Key: k.Digest()}}}, nil
}

func verify(file []byte, trust secureboot.Policy) error {
	img, err := image.Parse(bytes.NewReader(file), image.App)
	if err != nil {
		return err
	}
	rep, err := secureboot.Inspect(bytes.NewReader(file), img)
	if err != nil {
		return err
	}
	_, err = rep.Check(trust)
	return err
}

// blocks is crypto/aes over data, block by block.
func blocks(keySize int, data []byte) (func() error, error) {
	c, err := aes.NewCipher(make([]byte, keySize))
	if err != nil {
		return nil, err
	}
	return func() error {
		for off := 0; off < len(data); off += aes.BlockSize {
			c.Encrypt(data[off:off+aes.BlockSize], data[off:off+aes.BlockSize])
		}
		return nil
	}, nil
}

func encryption() (pair, error) {
	key, err := flashcrypt.GenerateKey(esp.CipherXTS128, rand.Reader)
	if err != nil {
		return pair{}, err
	}
	c, err := flashcrypt.New(esp.CipherXTS128, key)
	if err != nil {
		return pair{}, err
	}
	src, dst := make([]byte, size), make([]byte, size)
	bare, err := blocks(16, make([]byte, size))
	return pair{name: "esp-xts", aim: "0.5", what: "encrypt for the flash", bare: bare, ours: func() error { return c.Encrypt(dst, src, 0x10000) }}, err
}

func partitions() (pair, error) {
	keys, err := nvs.GenerateKeys(rand.Reader)
	if err != nil {
		return pair{}, err
	}
	entries := []nvs.Entry{
		nvs.NewString("muster", "id", "sensor-000001"), nvs.NewString("muster", "mqtt", "mqtt.example.com:8883"), nvs.NewString("muster", "https", "ota.example.com:8443"),
		nvs.NewString("muster", "fallback", "0123456789abcdef0123456789abcdef0123456789a"), nvs.NewBlob("muster", "cert", make([]byte, 1300)),
		nvs.NewBlob("muster", "key", make([]byte, 240)), nvs.NewBlob("muster", "trust", make([]byte, 1100)), nvs.NewString("wifi", "ssid", "factory"), nvs.NewString("wifi", "psk", "correct horse battery"),
	}
	bare, err := blocks(32, make([]byte, nvsSize))
	return pair{name: "esp-nvs", aim: "0.5", what: "NVS partition of a device, encrypted", bare: bare, ours: func() error {
		_, err := nvs.Encode(entries, nvs.Options{Size: nvsSize, Keys: &keys})
		return err
	}}, err
}
