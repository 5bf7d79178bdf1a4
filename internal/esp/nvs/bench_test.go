package nvs

import (
	"bytes"
	"crypto/aes"
	"fmt"
	"testing"
)

// deviceEntries is what provisioning writes for one device.
func deviceEntries(b *testing.B, i int) []Entry {
	return []Entry{
		NewString("muster", "id", fmt.Sprintf("dev-%06d", i)),
		NewString("muster", "mqtt", "mqtts://mqtt.example.test:8883"),
		NewString("muster", "https", "https://ota.example.test:8443"),
		NewString("muster", "fallback", "9QkUz0mSvCwqXl1x"),
		NewString("muster", "cert", string(file(b, "device.pem"))),
		NewString("muster", "key", string(file(b, "device.key"))),
		NewBlob("muster", "trust", file(b, "ca_chain.pem")),
		NewString("wifi", "ssid", "factory"),
		NewString("wifi", "psk", "correct horse battery staple"),
		NewNumber("wifi", "channel", uint8(6)),
	}
}

// BenchmarkThousandDevices makes the NVS images of 1000 devices, each encrypted with its own keys, in 24 KiB.
func BenchmarkThousandDevices(b *testing.B) {
	entries := make([][]Entry, 1000)
	keys := make([]Keys, len(entries))
	for i := range entries {
		entries[i] = deviceEntries(b, i)
		keys[i], _ = GenerateKeys(bytes.NewReader(bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 32)))
	}
	b.SetBytes(int64(len(entries)) * 0x6000)
	b.ReportAllocs()
	for b.Loop() {
		for i, e := range entries {
			if _, err := Encode(e, Options{Size: 0x6000, Keys: &keys[i]}); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	benchEncode(b, nil)
}

func BenchmarkEncodeEncrypted(b *testing.B) {
	k, err := ParseKeys(file(b, "key_nvs_fixed.bin"))
	if err != nil {
		b.Fatal(err)
	}
	benchEncode(b, &k)
}

func benchEncode(b *testing.B, k *Keys) {
	entries := deviceEntries(b, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Encode(entries, Options{Size: 0x6000, Keys: k}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeEncrypted(b *testing.B) {
	k := partitionKeys(b, "nvs_keys_fixed.bin")
	image := file(b, "basic_enc_fixed.bin")
	b.SetBytes(int64(len(image)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Decode(image, k); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkBareAES is crypto/aes alone over the bytes of BenchmarkEncodeEncrypted's partition, to compare with.
func BenchmarkBareAES(b *testing.B) {
	c, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 0x6000)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		for off := 0; off < len(data); off += aes.BlockSize {
			c.Encrypt(data[off:off+aes.BlockSize], data[off:off+aes.BlockSize])
		}
	}
}
