package wire

import "muster/internal/fleet"

// Assembler puts the slices of a CertPush together again: the device's side of SplitCert. The zero value is ready.
// Slices may come twice and in any order; a slice with another tag or count starts afresh.
type Assembler struct {
	tag   string
	parts [][]byte
	have  int
}

// Add takes a message of op CertPart. It returns the whole message once every slice is there.
func (a *Assembler) Add(p CertOrder) (whole CertOrder, done bool, err error) {
	if p.Op != CertPart || p.Count < 1 || p.Count > 999 || p.Index < 0 || p.Index >= p.Count || len(p.Data) == 0 {
		return CertOrder{}, false, fleet.Errorf(fleet.Invalid, "cert: not a usable slice")
	}
	if p.Tag != a.tag || len(a.parts) != p.Count {
		*a = Assembler{tag: p.Tag, parts: make([][]byte, p.Count)}
	}
	if a.parts[p.Index] == nil {
		a.have++
	}
	a.parts[p.Index] = p.Data
	if a.have < p.Count {
		return CertOrder{}, false, nil
	}
	var b []byte
	for _, d := range a.parts {
		b = append(b, d...)
	}
	*a = Assembler{}
	whole, err = DecodeCertOrder(b)
	if err == nil && whole.Op != CertPush {
		err = fleet.Errorf(fleet.Invalid, "cert: the slices hold no certificate")
	}
	return whole, err == nil, err
}
