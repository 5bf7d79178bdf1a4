package simdev

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"slices"
	"time"

	"muster/internal/fleet"
)

// What a device's flash holds. A and B of a pair are never written in the same step.
const (
	recFactory  = "factory"  // twin of factoryRecord; written last of all when a device is made
	recTrust    = "trust"    // [][]byte, roots
	recTrustKey = "trustkey" // by which newer bundles are checked, SubjectPublicKeyInfo
	recBundle   = "bundle"   // twin of bundleRecord
	recCert     = "cert"     // .a and .b: certSlot
	recPending  = "pending"  // a key for which there is no certificate yet, PKCS #8
	recUse      = "use"      // twin of useRecord
	recPassword = "password" // .a and .b: passwordSlot
	recClock    = "clock"    // twin of the newest server time seen, Unix seconds
	recImage    = "image"    // .a and .b: firmware
	recBoot     = "boot"     // twin of bootRecord
	recFuse     = "fuse"     // twin of the secure version that the eFuses count; never falls
)

// side is one of a pair.
type side string

const (
	sideA side = ".a"
	sideB side = ".b"
)

func (s side) other() side {
	if s == sideA {
		return sideB
	}
	return sideA
}

type factoryRecord struct {
	Endpoints Endpoints `json:"endpoints"`
}

type certSlot struct {
	Key   []byte   `json:"key"`
	Chain [][]byte `json:"chain"`
}

// useRecord says which certificate is tried first: the one that worked last, or a new one that has not been tried yet. It
// orders attempts; nothing is lost with it.
type useRecord struct {
	Cert   side `json:"cert"`
	Proven bool `json:"proven"`
}

type passwordSlot struct {
	Password string `json:"password"`
	Seq      uint64 `json:"seq"`
}

// bootRecord is what a bootloader with rollback keeps (ESP-IDF: otadata).
type bootRecord struct {
	Active  side            `json:"active"`
	Verify  bool            `json:"verify"`            // the image in Active must still prove itself
	Boots   int             `json:"boots"`             // of it since it was selected
	Job     fleet.RolloutID `json:"job,omitempty"`     // that brought it
	Dark    bool            `json:"dark,omitzero"`     // the fault of that name: this image never connects
	Failed  fleet.Hash      `json:"failed,omitempty"`  // the image that was rolled back last: it is not taken again
	Undone  fleet.RolloutID `json:"undone,omitempty"`  // a job whose rollback has not been reported yet
	Because string          `json:"because,omitempty"` // why it was rolled back
}

// memory is what a device knows: a typed view of its flash.
type memory struct {
	r       records
	factory twin[factoryRecord]
	use     twin[useRecord]
	clock   twin[int64]
	boot    twin[bootRecord]
	fuse    twin[uint32]
	bundle  twin[bundleRecord]
}

func newMemory(f Flash) memory {
	r := records{f}
	return memory{r, twin[factoryRecord]{r, recFactory}, twin[useRecord]{r, recUse}, twin[int64]{r, recClock}, twin[bootRecord]{r, recBoot}, twin[uint32]{r, recFuse}, twin[bundleRecord]{r, recBundle}}
}

// make gives a new device what it is made with, once: a device that has been made keeps what it has learnt since. It may
// be cut off anywhere and called again.
func (m memory) make(c Credentials, image []byte) (Endpoints, error) {
	made, seq, err := m.factory.read()
	if err != nil || seq > 0 {
		return made.Endpoints, err
	}
	if err := save(m.r, recTrust, c.Trust); err != nil {
		return Endpoints{}, err
	}
	if len(c.TrustKey) > 0 {
		if err := save(m.r, recTrustKey, c.TrustKey); err != nil {
			return Endpoints{}, err
		}
	}
	if len(c.Key) > 0 {
		if err := save(m.r, recCert+string(sideA), certSlot{c.Key, c.Chain}); err != nil {
			return Endpoints{}, err
		}
	}
	if c.Password != "" {
		if err := save(m.r, recPassword+string(sideA), passwordSlot{c.Password, 1}); err != nil {
			return Endpoints{}, err
		}
	}
	if err := m.r.put(recImage+string(sideA), image); err != nil {
		return Endpoints{}, err
	}
	return c.Endpoints, m.factory.write(factoryRecord{c.Endpoints})
}

// roots returns what the device was made to trust.
func (m memory) roots() (*x509.CertPool, error) {
	var ders [][]byte
	if _, err := load(m.r, recTrust, &ders); err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "trust bundle")
		}
		pool.AddCert(c)
	}
	return pool, nil
}

// identities returns the certificate slots that can be used.
func (m memory) identities() (map[side]identity, error) {
	out := map[side]identity{}
	for _, s := range []side{sideA, sideB} {
		var slot certSlot
		ok, err := load(m.r, recCert+string(s), &slot)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		if id, err := slot.open(); err == nil {
			out[s] = id
		}
	}
	return out, nil
}

// preferred returns the slots in the order in which they are tried: the one in use, then the newer one.
func (m memory) preferred(ids map[side]identity) ([]side, error) {
	use, _, err := m.use.read()
	if err != nil {
		return nil, err
	}
	var order []side
	for s := range ids {
		order = append(order, s)
	}
	slices.SortFunc(order, func(a, b side) int {
		if use.Cert == a || use.Cert == b {
			return cmp.Compare(b2i(use.Cert == b), b2i(use.Cert == a))
		}
		return cmp.Or(ids[b].leaf.NotBefore.Compare(ids[a].leaf.NotBefore), cmp.Compare(a, b))
	})
	return order, nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// spare returns the slot that a new certificate for key may overwrite: never the one in use, which is empty on the
// fallback; there an empty one is best, then one with another key than the certificate's, so that a torn write cannot
// lose the key that muster knows; then the older one.
func spare(ids map[side]identity, inUse side, key *ecdsa.PrivateKey) side {
	if inUse != "" {
		return inUse.other()
	}
	a, hasA := ids[sideA]
	b, hasB := ids[sideB]
	switch {
	case !hasA:
		return sideA
	case !hasB:
		return sideB
	case a.key.Equal(key) && !b.key.Equal(key):
		return sideB
	case b.key.Equal(key) && !a.key.Equal(key):
		return sideA
	case a.leaf.NotBefore.After(b.leaf.NotBefore):
		return sideB
	}
	return sideA
}

// passwords returns the fallback passwords that the device holds, newest first.
func (m memory) passwords() ([]passwordAt, error) {
	var out []passwordAt
	for _, s := range []side{sideA, sideB} {
		var p passwordSlot
		ok, err := load(m.r, recPassword+string(s), &p)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, passwordAt{p, s})
		}
	}
	slices.SortFunc(out, func(a, b passwordAt) int { return cmp.Compare(b.Seq, a.Seq) })
	return out, nil
}

type passwordAt struct {
	passwordSlot
	at side
}

// addPassword keeps a new password beside the one that opened this session, which works until the new one is proven.
func (m memory) addPassword(pw string, opened side) error {
	have, err := m.passwords()
	if err != nil {
		return err
	}
	seq := uint64(1)
	for _, p := range have {
		if p.Password == pw {
			return nil
		}
		seq = max(seq, p.Seq+1)
	}
	return save(m.r, recPassword+string(opened.other()), passwordSlot{pw, seq})
}

// pendingKey returns the key for which a certificate is asked: the one that was made before, if no slot holds it yet, or
// a new one that it stores first. So asking twice asks for the same.
func (m memory) pendingKey(ids map[side]identity) (*ecdsa.PrivateKey, error) {
	der, err := m.r.get(recPending)
	if err != nil {
		return nil, err
	}
	if key, err := parseKey(der); err == nil && !holdsKey(ids, key) {
		return key, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, err
	}
	return key, m.r.put(recPending, der)
}

func holdsKey(ids map[side]identity, key *ecdsa.PrivateKey) bool {
	for _, id := range ids {
		if id.key.Equal(key) {
			return true
		}
	}
	return false
}

// keyFor returns the device's key that the certificate is for, nil if it has none.
func (m memory) keyFor(leaf *x509.Certificate, ids map[side]identity) (*ecdsa.PrivateKey, error) {
	der, err := m.r.get(recPending)
	if err != nil {
		return nil, err
	}
	pub, _ := leaf.PublicKey.(*ecdsa.PublicKey)
	if pub == nil {
		return nil, nil
	}
	if key, err := parseKey(der); err == nil && pub.Equal(key.Public()) {
		return key, nil
	}
	for _, id := range ids {
		if pub.Equal(id.key.Public()) {
			return id.key, nil
		}
	}
	return nil, nil
}

// forgetKeys wipes every key and certificate: what a device does whose secure storage failed.
func (m memory) forgetKeys() error {
	for _, name := range []string{recCert + string(sideA), recCert + string(sideB), recPending} {
		if err := m.r.flash.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

// bound is the earliest that it can be now: what the server said last, and the begin of the device's own certificates.
func (m memory) bound(ids map[side]identity) (time.Time, error) {
	sec, _, err := m.clock.read()
	if err != nil {
		return time.Time{}, err
	}
	t := time.Unix(sec, 0)
	for _, id := range ids {
		if id.leaf.NotBefore.After(t) {
			t = id.leaf.NotBefore
		}
	}
	return t, nil
}
