package secureboot_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"testing"

	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
)

// bigFile returns an application of about 1.5 MiB, signed by the keys.
func bigFile(b *testing.B, names ...string) []byte {
	desc, err := image.AppDesc{Version: "1.0.0", ProjectName: "sensor"}.Bytes()
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 3<<19)
	if _, err := rand.Read(data); err != nil {
		b.Fatal(err)
	}
	copy(data, desc)
	parts := []image.Part{{Load: 0x3FFB0000, Data: data}}
	var out bytes.Buffer
	if err := image.Write(&out, image.NewHeader(9), append(parts, image.SecurePad(parts))); err != nil {
		b.Fatal(err)
	}
	return sign(b, out.Bytes(), false, names...)
}

// BenchmarkVerify compares reading, checking and verifying a signed image with the SHA-256 of the same bytes.
func BenchmarkVerify(b *testing.B) {
	for _, names := range [][]string{nil, {"rsa3072_a"}, {"rsa3072_a", "rsa3072_b", "rsa3072_c"}, {"ecdsa256"}, {"ecdsa384"}} {
		if names == nil {
			file := bigFile(b, "rsa3072_a")
			b.Run("sha256 alone", func(b *testing.B) {
				b.SetBytes(int64(len(file)))
				for b.Loop() {
					sha256.Sum256(file)
				}
			})
			continue
		}
		file := bigFile(b, names...)
		trust := secureboot.Policy{Keys: []secureboot.Slot{{Key: public(b, names[0]).Digest()}}}
		b.Run(names[0]+" of "+string(rune('0'+len(names))), func(b *testing.B) {
			b.SetBytes(int64(len(file)))
			for b.Loop() {
				img, err := image.Parse(bytes.NewReader(file), image.App)
				if err != nil {
					b.Fatal(err)
				}
				rep, err := secureboot.Inspect(bytes.NewReader(file), img)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := rep.Check(trust); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
