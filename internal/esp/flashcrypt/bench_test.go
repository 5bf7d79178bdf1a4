package flashcrypt

import (
	"crypto/aes"
	"testing"
	"time"

	"muster/internal/esp"
)

const benchSize = 3 << 19 // 1.5 MiB, an application of usual size

// blocks is the bare cost: crypto/aes over the same bytes, one block at a time, with a key of the same length.
func blocks(b *testing.B, keySize int, data []byte) {
	c, err := aes.NewCipher(make([]byte, keySize))
	if err != nil {
		b.Fatal(err)
	}
	for off := 0; off < len(data); off += aes.BlockSize {
		c.Encrypt(data[off:off+aes.BlockSize], data[off:off+aes.BlockSize])
	}
}

// BenchmarkEncrypt measures an application in each cipher. The metric x-aes is its throughput as a share of that of
// crypto/aes, measured in the same run; the aim for XTS is 0.5 or more.
func BenchmarkEncrypt(b *testing.B) {
	for _, v := range []struct {
		kind   esp.Cipher
		aesKey int
	}{{esp.CipherXTS128, 16}, {esp.CipherXTS256, 32}, {esp.CipherESP32, 32}} {
		b.Run(string(v.kind), func(b *testing.B) {
			c := must(b, v.kind, make([]byte, KeySizes(v.kind)[0]))
			src, dst := make([]byte, benchSize), make([]byte, benchSize)
			b.SetBytes(benchSize)
			b.ReportAllocs()
			var bare time.Duration
			for b.Loop() {
				if err := c.Encrypt(dst, src, 0x10000); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				start := time.Now()
				blocks(b, v.aesKey, dst)
				bare += time.Since(start)
				b.StartTimer()
			}
			b.ReportMetric(bare.Seconds()/b.Elapsed().Seconds(), "x-aes")
		})
	}
}
