package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"math/big"

	"muster/internal/fleet"
)

// KeyPolicy says which public keys may get a certificate. The zero value allows EC P-256 and P-384.
type KeyPolicy struct {
	RSA     bool                  // allow RSA of 2048 to 4096 bits with exponent 65537 too
	Blocked func(fleet.Hash) bool // which keys (KeyHash) are known to the world; nil: none
}

// CheckKey returns an Unprocessable error if p does not allow the key in spki, a SubjectPublicKeyInfo in DER.
func (p KeyPolicy) CheckKey(spki []byte) error {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return &fleet.Error{Kind: fleet.Unprocessable, Code: CodeKey, Msg: "the public key cannot be read", Err: err}
	}
	return p.check(key, spki)
}

func (p KeyPolicy) check(key any, spki []byte) error {
	if p.Blocked != nil && p.Blocked(KeyHash(spki)) {
		return KeyKnown()
	}
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	case *rsa.PublicKey:
		if p.RSA {
			return checkRSA(k)
		}
	}
	if p.RSA {
		return refuseKey("use EC P-256 or P-384, or RSA of 2048 to 4096 bits")
	}
	return refuseKey("use EC P-256 or P-384")
}

// KeyKnown refuses a key whose private half is known to others.
func KeyKnown() error { return refuseKey("it is known to others: make a new one") }

func refuseKey(why string) error {
	return fleet.Coded(fleet.Unprocessable, CodeKey, "the public key is not allowed: %s", why)
}

// checkRSA follows Let's Encrypt's goodkey: size, exponent, and the weaknesses that can be seen in a modulus alone.
func checkRSA(k *rsa.PublicKey) error {
	switch n := k.N.BitLen(); {
	case n < 2048 || n > 4096 || n%8 != 0:
		return refuseKey("an RSA modulus must have 2048 to 4096 bits")
	case k.E != 65537:
		return refuseKey("the RSA exponent must be 65537")
	case hasSmallFactor(k.N):
		return refuseKey("the RSA modulus has a small factor: make a new key with a sound random generator")
	case isROCA(k.N):
		return refuseKey("it was made by a generator with the ROCA weakness (CVE-2017-15361): make a new one elsewhere")
	case isFermatWeak(k.N):
		return refuseKey("the two primes are too close to one another: make a new key")
	}
	return nil
}

// smallPrimes are the odd primes below 752.
var smallPrimes = func() (out []int64) {
next:
	for n := int64(3); n < 752; n += 2 {
		for _, p := range out {
			if n%p == 0 {
				continue next
			}
		}
		out = append(out, n)
	}
	return out
}()

// residue returns n mod p.
func residue(n *big.Int, p int64) int64 {
	return new(big.Int).Mod(n, big.NewInt(p)).Int64()
}

func hasSmallFactor(n *big.Int) bool {
	if n.Bit(0) == 0 {
		return true
	}
	for _, p := range smallPrimes {
		if residue(n, p) == 0 {
			return true
		}
	}
	return false
}

// isROCA reports whether n has the fingerprint of CVE-2017-15361: modulo each of the first odd primes up to 167 it is a
// power of 65537 (Nemec et al., "The Return of Coppersmith's Attack", §2). A sound modulus has it by chance once in 2^27.
func isROCA(n *big.Int) bool {
	for _, p := range smallPrimes {
		if p > 167 {
			break
		}
		want, power := residue(n, p), int64(1)
		found := false
		for range p - 1 {
			if power == want {
				found = true
				break
			}
			power = power * 65537 % p
		}
		if !found {
			return false
		}
	}
	return true
}

// fermatRounds is what boulder tries, too: enough for primes that share half of their bits and then some.
const fermatRounds = 110

// isFermatWeak reports whether Fermat's method factors n within a few rounds: its primes are close to one another
// (CVE-2022-26320).
func isFermatWeak(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	if new(big.Int).Mul(a, a).Cmp(n) == 0 {
		return true
	}
	one := big.NewInt(1)
	a.Add(a, one)
	for range fermatRounds {
		b2 := new(big.Int).Mul(a, a)
		b2.Sub(b2, n)
		b := new(big.Int).Sqrt(b2)
		if b.Mul(b, b).Cmp(b2) == 0 {
			return true
		}
		a.Add(a, one)
	}
	return false
}
