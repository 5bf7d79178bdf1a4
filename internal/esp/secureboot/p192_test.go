package secureboot

import (
	"crypto/sha256"
	"math/big"
	"testing"
)

// The vector of RFC 6979, A.2.3, SHA-256, "sample".
func TestP192(t *testing.T) {
	q := point{number("ac2c77f529f91689fea0ea5efec7f210d8eea0b9e047ed56"), number("3bc723e57670bd4887ebc732c523063d0a7c957bc97c1c43")}
	r, s := number("4b0b8ce98a92866a2820e20aa6b75b56382e0f9bfd5ecb55"), number("ccdb006926ea9565cbadc840829d8c384e06de1f1e381b85")
	digest := sha256.Sum256([]byte("sample"))
	if !onP192(q) || !onP192(p192.g) || !verifyP192(q, digest[:], r, s) {
		t.Fatal("a right signature is refused")
	}
	if got := multiply(p192.g, number("6fab034934e4c0fc9ae67f5b5659a9d7d1fefd187ee09fd4")); got.x.Cmp(q.x) != 0 || got.y.Cmp(q.y) != 0 {
		t.Errorf("the public key is (%x, %x)", got.x, got.y)
	}
	if got := multiply(p192.g, p192.n); got.x != nil {
		t.Errorf("n times the generator is (%x, %x)", got.x, got.y)
	}
	one := big.NewInt(1)
	other := sha256.Sum256([]byte("test"))
	if verifyP192(q, other[:], r, s) {
		t.Error("it signs another message")
	}
	for name, rs := range map[string][2]*big.Int{
		"r is zero": {new(big.Int), s}, "s is zero": {r, new(big.Int)}, "r is n": {p192.n, s}, "s is n": {r, p192.n},
		"r is another": {new(big.Int).Add(r, one), s}, "s is another": {r, new(big.Int).Add(s, one)}, "r is negative": {big.NewInt(-1), s},
	} {
		if verifyP192(q, digest[:], rs[0], rs[1]) {
			t.Error(name)
		}
	}
	if onP192(point{q.x, one}) || onP192(point{new(big.Int).Add(q.x, p192.p), q.y}) || onP192(point{new(big.Int), new(big.Int)}) {
		t.Error("a point that is not on the curve passes")
	}
}
