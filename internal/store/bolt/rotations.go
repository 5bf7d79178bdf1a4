package bolt

import (
	"bytes"

	"muster/internal/pki"
)

// Rotations returns all rotations of the CAs, oldest first.
func (tx *Tx) Rotations() ([]pki.Rotation, error) { return all[pki.Rotation](tx, bucketRotations, nil) }

// PutRotation stores a rotation.
func (tx *Tx) PutRotation(r pki.Rotation) error {
	return put(tx, bucketRotations, be64(uint64(r.ID)), r)
}

// checkTrust holds trust bundles and rotations to their order.
func checkTrust(tx *Tx, say func(string, ...any)) error {
	newest := int64(0)
	err := each(tx, bucketTrust, nil, func(k []byte, p pki.Published) (bool, error) {
		if !bytes.Equal(k, be64(uint64(p.Version))) || p.JWS == "" || p.At.IsZero() || p.Check() != nil {
			say("trust bundle %x: version, signature, time and roots do not fit together", k)
		}
		newest = p.Version
		return true, nil
	})
	if err != nil {
		return err
	}
	var before []pki.Rotation
	return each(tx, bucketRotations, nil, func(k []byte, r pki.Rotation) (bool, error) {
		n := len(before)
		signs, _ := pki.Standing(before)
		last := pki.RotationStep{}
		if len(r.Steps) > 0 {
			last = r.Steps[len(r.Steps)-1]
		}
		switch {
		case !bytes.Equal(k, be64(uint64(r.ID))) || r.ID != int64(n)+1 || !r.Kind.Valid():
			say("rotation %x: number and kind do not fit together", k)
		case n > 0 && before[n-1].State.Open():
			say("rotation %d began before rotation %d came to its end", r.ID, n)
		case r.From != signs:
			say("rotation %d begins from generation %d, but generation %d signed", r.ID, r.From, signs)
		case last.State != r.State || last.By == "" || last.At.IsZero():
			say("rotation %d is %s, and its last step is none to that", r.ID, r.State)
		case r.Bundle > newest:
			say("rotation %d waits for trust bundle %d, which was never published", r.ID, r.Bundle)
		}
		before = append(before, r)
		return true, nil
	})
}
