package secureboot

import "math/big"

// The standard library has no P-192, which the ESP32-C2 still signs with. Signatures are public, so verifying needs no
// constant time: this is textbook arithmetic over the curve of FIPS 186-4, D.1.2.1, and only ever verifies.

type point struct{ x, y *big.Int } // x nil: the point at infinity

var p192 = struct {
	p, n, b *big.Int
	g       point
}{
	p: number("fffffffffffffffffffffffffffffffeffffffffffffffff"),
	n: number("ffffffffffffffffffffffff99def836146bc9b1b4d22831"),
	b: number("64210519e59c80e70fa7e9ab72243049feb8deecc146b9b1"),
	g: point{
		number("188da80eb03090f67cbf20eb43a18800f4ff0afd82ff1012"),
		number("07192b95ffc8da78631011ed6b24cdd573f977a11e794811"),
	},
}

func number(hex string) *big.Int {
	n, _ := new(big.Int).SetString(hex, 16)
	return n
}

// onP192 reports whether q is a point of the curve: y² = x³ − 3x + b.
func onP192(q point) bool {
	p := p192.p
	if q.x.Sign() < 0 || q.y.Sign() < 0 || q.x.Cmp(p) >= 0 || q.y.Cmp(p) >= 0 {
		return false
	}
	right := new(big.Int).Mul(q.x, q.x)
	right.Sub(right, big.NewInt(3)).Mul(right, q.x).Add(right, p192.b).Mod(right, p)
	left := new(big.Int).Mul(q.y, q.y)
	return left.Mod(left, p).Cmp(right) == 0
}

// verifyP192 reports whether r and s are q's signature of digest (FIPS 186-4, 6.4). q must be on the curve.
func verifyP192(q point, digest []byte, r, s *big.Int) bool {
	n := p192.n
	if r.Sign() <= 0 || s.Sign() <= 0 || r.Cmp(n) >= 0 || s.Cmp(n) >= 0 {
		return false
	}
	e := new(big.Int).SetBytes(digest[:min(len(digest), 24)])
	w := new(big.Int).ModInverse(s, n)
	u1 := new(big.Int).Mul(e, w)
	u2 := new(big.Int).Mul(r, w)
	sum := add(multiply(p192.g, u1.Mod(u1, n)), multiply(q, u2.Mod(u2, n)))
	return sum.x != nil && new(big.Int).Mod(sum.x, n).Cmp(r) == 0
}

func multiply(q point, k *big.Int) point {
	var sum point
	for i := k.BitLen() - 1; i >= 0; i-- {
		sum = add(sum, sum)
		if k.Bit(i) == 1 {
			sum = add(sum, q)
		}
	}
	return sum
}

func add(a, b point) point {
	if a.x == nil {
		return b
	}
	if b.x == nil {
		return a
	}
	p := p192.p
	over, under := new(big.Int), new(big.Int) // of the slope
	if a.x.Cmp(b.x) == 0 {
		if under.Add(a.y, b.y).Mod(under, p).Sign() == 0 {
			return point{}
		}
		over.Mul(a.x, a.x).Sub(over, big.NewInt(1)).Mul(over, big.NewInt(3)) // 3x² − 3
	} else {
		over.Sub(b.y, a.y)
		under.Sub(b.x, a.x).Mod(under, p)
	}
	slope := over.Mul(over, under.ModInverse(under, p))
	slope.Mod(slope, p)
	x := new(big.Int).Mul(slope, slope)
	x.Sub(x, a.x).Sub(x, b.x).Mod(x, p)
	y := new(big.Int).Sub(a.x, x)
	y.Mul(y, slope).Sub(y, a.y).Mod(y, p)
	return point{x, y}
}
