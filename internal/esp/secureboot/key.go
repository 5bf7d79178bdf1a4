package secureboot

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"math/big"
	"slices"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// KeyDigest is the SHA-256 of a public key as it stands in a signature block: what is burnt into eFuses, what
// espsecure's digest-sbv2-public-key writes, and how muster names a key.
type KeyDigest [32]byte

// ParseKeyDigest reads the 64 hex digits of a digest.
func ParseKeyDigest(s string) (KeyDigest, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(KeyDigest{}) {
		return KeyDigest{}, fleet.Coded(fleet.Invalid, "esp_key_digest", "a key digest has 64 hex digits: espsecure digest-sbv2-public-key writes it as 32 bytes")
	}
	return KeyDigest(b), nil
}

// String returns the digest as 64 lower-case hex digits.
func (d KeyDigest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText implements encoding.TextMarshaler.
func (d KeyDigest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *KeyDigest) UnmarshalText(b []byte) error {
	got, err := ParseKeyDigest(string(b))
	if err == nil {
		*d = got
	}
	return err
}

// Key is a public key that Secure Boot v2 knows. The zero value is none.
type Key struct {
	scheme esp.Scheme
	rsa    *rsa.PublicKey
	ec     *ecdsa.PublicKey // P-256 and P-384
	p192   point
}

// Scheme returns what the key signs with.
func (k Key) Scheme() esp.Scheme { return k.scheme }

// Digest returns the key's name.
func (k Key) Digest() KeyDigest { return sha256.Sum256(k.material()) }

const (
	rsaBits  = 3072
	rsaBytes = rsaBits / 8
)

// KeyOf returns pub, an *rsa.PublicKey of 3072 bits or an *ecdsa.PublicKey on P-256 or P-384, as a Key. Anything else
// is an Unprocessable error.
func KeyOf(pub crypto.PublicKey) (Key, error) {
	switch p := pub.(type) {
	case *rsa.PublicKey:
		if p == nil || p.N == nil {
			return Key{}, badKey("an empty RSA key")
		}
		if p.N.BitLen() != rsaBits {
			return Key{}, badKey("an RSA key of %d bits: Secure Boot v2 takes 3072", p.N.BitLen())
		}
		if p.N.Bit(0) == 0 || p.E < 3 || p.E%2 == 0 || p.E > 1<<31-1 {
			return Key{}, badKey("this RSA key is not usable")
		}
		return Key{scheme: esp.RSA3072, rsa: p}, nil
	case *ecdsa.PublicKey:
		return ellipticKey(p)
	default:
		return Key{}, badKey("a key of type %T: Secure Boot v2 takes RSA-3072, ECDSA P-256 or P-384", pub)
	}
}

func ellipticKey(p *ecdsa.PublicKey) (Key, error) {
	if p == nil || p.Curve == nil {
		return Key{}, badKey("an empty ECDSA key")
	}
	k := Key{ec: p}
	switch p.Curve {
	case elliptic.P256():
		k.scheme = esp.ECDSAP256
	case elliptic.P384():
		k.scheme = esp.ECDSAP384
	default:
		return Key{}, badKey("an ECDSA key on %s: Secure Boot v2 takes P-256 or P-384", p.Curve.Params().Name)
	}
	if _, err := p.Bytes(); err != nil {
		return Key{}, badKey("this ECDSA key is not on its curve")
	}
	return k, nil
}

func badKey(format string, a ...any) error {
	return fleet.Coded(fleet.Unprocessable, "esp_key", format, a...)
}

var oidP192 = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 1}

// maxKeyDER is more than any public key of Secure Boot needs, in bytes.
const maxKeyDER = 4096

// ParseKey reads a public key in DER (SubjectPublicKeyInfo, RFC 5280 §4.1.2.7), P-192 among them, which muster verifies
// and does not sign with.
func ParseKey(der []byte) (Key, error) {
	if len(der) > maxKeyDER {
		return Key{}, badKey("a public key of %d bytes: this is no key of Secure Boot", len(der))
	}
	if k, ok := parseP192(der); ok {
		return k, nil
	}
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return Key{}, badKey("this is no public key in DER: export it with espsecure extract-public-key or openssl pkey -pubout")
	}
	return KeyOf(pub)
}

func parseP192(der []byte) (Key, bool) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	var curve asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(der, &info); err != nil || len(rest) > 0 {
		return Key{}, false
	}
	if _, err := asn1.Unmarshal(info.Algorithm.Parameters.FullBytes, &curve); err != nil || !curve.Equal(oidP192) {
		return Key{}, false
	}
	b := info.Key.RightAlign()
	if len(b) != 49 || b[0] != 4 {
		return Key{}, false
	}
	q := point{new(big.Int).SetBytes(b[1:25]), new(big.Int).SetBytes(b[25:])}
	return Key{scheme: esp.ECDSAP192, p192: q}, onP192(q)
}

// material returns the bytes of the key in a signature block: what the digest is of.
func (k Key) material() []byte {
	if k.scheme == esp.RSA3072 {
		return rsaMaterial(k.rsa)
	}
	c := curves[k.scheme]
	b := make([]byte, 1+2*c.field)
	b[0] = c.id
	x, y := k.coordinates()
	putLittle(b[1:1+c.bytes], x)
	putLittle(b[1+c.bytes:1+2*c.bytes], y)
	return b
}

// rsaMaterial returns n, e, 2^6144 mod n and −n⁻¹ mod 2³², all little-endian: what the RSA peripheral calculates with.
func rsaMaterial(k *rsa.PublicKey) []byte {
	b := make([]byte, 2*rsaBytes+8)
	putLittle(b[:rsaBytes], k.N.Bytes())
	binary.LittleEndian.PutUint32(b[rsaBytes:], uint32(k.E))
	rr := new(big.Int).Lsh(big.NewInt(1), 2*rsaBits)
	putLittle(b[rsaBytes+4:2*rsaBytes+4], rr.Mod(rr, k.N).Bytes())
	binary.LittleEndian.PutUint32(b[2*rsaBytes+4:], -inverse(binary.LittleEndian.Uint32(b)))
	return b
}

// inverse returns 1/n mod 2³² of an odd n: each step of Newton doubles the bits that are right, of which there are 3.
func inverse(n uint32) uint32 {
	x := n
	for range 4 {
		x *= 2 - n*x
	}
	return x
}

// coordinates returns the point of an elliptic key, big-endian.
func (k Key) coordinates() (x, y []byte) {
	if k.scheme == esp.ECDSAP192 {
		return k.p192.x.Bytes(), k.p192.y.Bytes()
	}
	b, _ := k.ec.Bytes() // ellipticKey saw that it is on its curve
	half := (len(b) - 1) / 2
	return b[1 : 1+half], b[1+half:]
}

// curve is how a curve stands in a block (esp32.md §2).
type curve struct {
	id    byte
	bytes int // of a coordinate
	field int // half of the room for a point or a signature
	sha   byte
	hash  int         // bytes of the digest
	fn    crypto.Hash // of the message
}

var curves = map[esp.Scheme]curve{
	esp.ECDSAP192: {id: 1, bytes: 24, field: 32, sha: 0, hash: 32, fn: crypto.SHA256},
	esp.ECDSAP256: {id: 2, bytes: 32, field: 32, sha: 0, hash: 32, fn: crypto.SHA256},
	esp.ECDSAP384: {id: 3, bytes: 48, field: 48, sha: 1, hash: 48, fn: crypto.SHA384},
}

// putLittle writes the big-endian number into dst, little-endian and filled with zeros.
func putLittle(dst, number []byte) {
	clear(dst)
	copy(dst, number)
	slices.Reverse(dst[:min(len(number), len(dst))])
}

// little returns the number that stands little-endian in b.
func little(b []byte) *big.Int {
	n := bytes.Clone(b)
	slices.Reverse(n)
	return new(big.Int).SetBytes(n)
}
