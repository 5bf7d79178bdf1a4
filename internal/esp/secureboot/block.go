package secureboot

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"hash/crc32"
	"math/big"

	"muster/internal/esp"
	"muster/internal/esp/image"
)

// Where the fields of a block are (esp32.md §2).
const (
	versionRSA   = 2
	versionECDSA = 3

	rsaDigestAt = 4
	rsaKeyAt    = 36
	rsaKeyEnd   = 812
	rsaSigAt    = 812
	crcAt       = 1196
	blockFiller = 16 // bytes after the CRC
)

// block is a signature block that is present: its magic and CRC are right.
type block struct {
	raw    []byte // image.BlockSize
	index  int
	scheme esp.Scheme // empty if fault is not
	name   KeyDigest  // of the key inside
	key    Key        // zero if fault is not empty
	digest []byte     // of the image, as the block says
	fault  string     // why nothing can be verified with it
}

// readSector returns the blocks that are present. b has image.SectorSize bytes.
func readSector(b []byte) []block {
	var all []block
	for i := range image.MaxBlocks {
		raw := b[i*image.BlockSize : (i+1)*image.BlockSize]
		if image.BlockPresent(raw) {
			all = append(all, readBlock(i, raw))
		}
	}
	return all
}

func readBlock(i int, raw []byte) block {
	b := block{index: i, raw: raw}
	switch raw[1] {
	case versionRSA:
		b.readRSA()
	case versionECDSA:
		b.readECDSA()
	default:
		b.fault = "it is of a version that is neither RSA (2) nor ECDSA (3)"
	}
	return b
}

func (b *block) readRSA() {
	b.scheme = esp.RSA3072
	b.digest = b.raw[rsaDigestAt:rsaKeyAt]
	b.name = sha256.Sum256(b.raw[rsaKeyAt:rsaKeyEnd])
	n := little(b.raw[rsaKeyAt : rsaKeyAt+rsaBytes])
	e := binary.LittleEndian.Uint32(b.raw[rsaKeyAt+rsaBytes:])
	if e > 1<<31-1 {
		b.fault = "its key's exponent is too large"
		return
	}
	key, err := KeyOf(&rsa.PublicKey{N: n, E: int(e)})
	if err != nil {
		b.fault = "its key is no RSA key of 3072 bits"
		return
	}
	if !bytes.Equal(key.material(), b.raw[rsaKeyAt:rsaKeyEnd]) {
		b.fault = "its precomputed numbers do not belong to its key"
		return
	}
	b.key = key
}

func (b *block) readECDSA() {
	sha := b.raw[2]
	var c curve
	for scheme, is := range curves {
		if is.sha == sha && b.raw[4+is.hash] == is.id {
			b.scheme, c = scheme, is
		}
	}
	if b.scheme == "" {
		b.fault = "its curve is none of P-192, P-256 and P-384"
		return
	}
	at := 4 + c.hash
	b.digest = b.raw[4:at]
	b.name = sha256.Sum256(b.raw[at : at+1+2*c.field])
	b.key = b.point(c, b.raw[at+1:])
	if b.fault == "" && !bytes.Equal(b.key.material(), b.raw[at:at+1+2*c.field]) {
		b.fault = "the bytes after its point are not zero"
	}
}

// point returns the key at the start of raw.
func (b *block) point(c curve, raw []byte) Key {
	x, y := little(raw[:c.bytes]), little(raw[c.bytes:2*c.bytes])
	key := Key{scheme: b.scheme}
	if b.scheme == esp.ECDSAP192 {
		key.p192 = point{x, y}
		if !onP192(key.p192) {
			b.fault = "its point is not on its curve"
		}
		return key
	}
	on := elliptic.P256()
	if b.scheme == esp.ECDSAP384 {
		on = elliptic.P384()
	}
	sec1 := make([]byte, 1+2*c.bytes)
	sec1[0] = 4
	x.FillBytes(sec1[1 : 1+c.bytes])
	y.FillBytes(sec1[1+c.bytes:])
	ec, err := ecdsa.ParseUncompressedPublicKey(on, sec1)
	if err != nil {
		b.fault = "its point is not on its curve"
	}
	key.ec = ec
	return key
}

// signature returns the signature in the form that verify takes: of RSA as in RFC 8017, of ECDSA r and s.
func (b *block) signature() (s signature) {
	if b.scheme == esp.RSA3072 {
		s.rsa = make([]byte, rsaBytes)
		little(b.raw[rsaSigAt : rsaSigAt+rsaBytes]).FillBytes(s.rsa)
		return s
	}
	c := curves[b.scheme]
	at := 4 + c.hash + 1 + 2*c.field
	s.r, s.s = little(b.raw[at:at+c.bytes]), little(b.raw[at+c.bytes:at+2*c.bytes])
	return s
}

// signature is of RSA-PSS, big-endian, or of ECDSA.
type signature struct {
	rsa  []byte
	r, s *big.Int
}

// maxDER is more than an ECDSA signature in DER needs, in bytes.
const maxDER = 256

// readSignature reads what a signer gave: RSA's 384 bytes; ECDSA's as DER (RFC 3279 §2.2.3) or r and s side by side.
func readSignature(scheme esp.Scheme, b []byte) (s signature, ok bool) {
	if scheme == esp.RSA3072 {
		return signature{rsa: b}, len(b) == rsaBytes
	}
	if len(b) > maxDER {
		return signature{}, false
	}
	var rs struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(b, &rs); err == nil && len(rest) == 0 {
		return signature{r: rs.R, s: rs.S}, true
	}
	n := curves[scheme].bytes
	if len(b) != 2*n {
		return signature{}, false
	}
	return signature{r: new(big.Int).SetBytes(b[:n]), s: new(big.Int).SetBytes(b[n:])}, true
}

// pss is RSASSA-PSS with SHA-256, MGF1 with SHA-256 and 32 bytes of salt.
var pss = &rsa.PSSOptions{SaltLength: 32, Hash: crypto.SHA256}

// verify reports whether s is the key's signature of digest.
func (k Key) verify(digest []byte, s signature) bool {
	switch {
	case k.scheme == esp.RSA3072:
		return rsa.VerifyPSS(k.rsa, crypto.SHA256, digest, s.rsa, pss) == nil
	case s.r.Sign() < 0 || s.s.Sign() < 0:
		return false
	case k.scheme == esp.ECDSAP192:
		return verifyP192(k.p192, digest, s.r, s.s)
	default:
		return ecdsa.Verify(k.ec, digest, s.r, s.s)
	}
}

// newBlock returns a block. digest is of the image, s a signature that was verified.
func newBlock(k Key, digest []byte, s signature) []byte {
	b := make([]byte, image.BlockSize)
	b[0] = 0xE7
	if k.scheme == esp.RSA3072 {
		b[1] = versionRSA
		copy(b[rsaDigestAt:], digest)
		copy(b[rsaKeyAt:], k.material())
		putLittle(b[rsaSigAt:rsaSigAt+rsaBytes], s.rsa)
	} else {
		c := curves[k.scheme]
		b[1], b[2] = versionECDSA, c.sha
		at := 4 + copy(b[4:], digest)
		at += copy(b[at:], k.material())
		putLittle(b[at:at+c.bytes], s.r.Bytes())
		putLittle(b[at+c.bytes:at+2*c.bytes], s.s.Bytes())
	}
	binary.LittleEndian.PutUint32(b[crcAt:], crc32.ChecksumIEEE(b[:crcAt]))
	return b
}
