package image_test

import (
	"bytes"
	"crypto/sha256"
	"testing"

	"muster/internal/esp/image"
)

func BenchmarkParse(b *testing.B) {
	file := build(b, 0, func(_ *image.Header, _ *image.AppDesc, p *image.Part) {
		p.Data = bytes.Repeat([]byte{0xA5, 1, 2, 3}, 1536<<8)
	})
	b.Run("sha256", func(b *testing.B) {
		b.SetBytes(int64(len(file)))
		for b.Loop() {
			sha256.Sum256(file)
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.SetBytes(int64(len(file)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := image.Parse(bytes.NewReader(file), image.App); err != nil {
				b.Fatal(err)
			}
		}
	})
}
