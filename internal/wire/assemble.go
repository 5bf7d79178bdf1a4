package wire

import (
	"crypto/sha256"
	"encoding/hex"

	"muster/internal/fleet"
)

// Assembler puts the slices of a CertPush together again: the device's side of SplitCert. The zero value is ready.
// Slices may come twice and in any order; a slice with another tag or count starts afresh. It holds at most MaxPayload
// bytes.
type Assembler struct {
	tag   string
	parts [][]byte
	have  int
	size  int
}

// Add takes a message of op CertPart. It returns the whole message once every slice is there and their digest agrees with
// the tag. After an Invalid error the slices that came so far are forgotten.
func (a *Assembler) Add(p CertOrder) (whole CertOrder, done bool, err error) {
	if p.Op != CertPart || !p.usableSlice() {
		return CertOrder{}, false, fleet.Errorf(fleet.Invalid, "cert: not a usable slice")
	}
	if p.Tag != a.tag || len(a.parts) != p.Count {
		*a = Assembler{tag: p.Tag, parts: make([][]byte, p.Count)}
	}
	if a.parts[p.Index] == nil {
		a.have++
	}
	a.size += len(p.Data) - len(a.parts[p.Index])
	a.parts[p.Index] = p.Data
	if a.size > MaxPayload {
		*a = Assembler{}
		return CertOrder{}, false, fleet.Errorf(fleet.Invalid, "cert: the slices hold more than %d bytes", MaxPayload)
	}
	if a.have < p.Count {
		return CertOrder{}, false, nil
	}
	b := make([]byte, 0, a.size)
	for _, d := range a.parts {
		b = append(b, d...)
	}
	*a = Assembler{}
	if tagOf(b) != p.Tag {
		return CertOrder{}, false, fleet.Errorf(fleet.Invalid, "cert: the slices are not those of one message")
	}
	whole, err = DecodeCertOrder(b)
	if err == nil && whole.Op != CertPush {
		whole, err = CertOrder{}, fleet.Errorf(fleet.Invalid, "cert: the slices hold no certificate")
	}
	return whole, err == nil, err
}

// usableSlice reports whether the members of a CertPart are there and within their limits.
func (o CertOrder) usableSlice() bool {
	return len(o.Tag) == tagLen && o.Count >= 1 && o.Count <= MaxSlices && o.Index >= 0 && o.Index < o.Count && len(o.Data) > 0
}

const tagLen = 8

// tagOf names the whole message that slices belong to.
func tagOf(whole []byte) string {
	sum := sha256.Sum256(whole)
	return hex.EncodeToString(sum[:tagLen/2])
}
