package bolt

import (
	"muster/internal/fleet"
	"muster/internal/pki"
)

// TrustBundle returns the trust bundle of a version, 0 for the newest; ok is false if there is none.
func (tx *Tx) TrustBundle(version int64) (p pki.Published, ok bool, err error) {
	if version > 0 {
		return get[pki.Published](tx, bucketTrust, be64(uint64(version)))
	}
	k, _ := tx.b.Bucket(bucketTrust).Cursor().Last()
	if k == nil {
		return pki.Published{}, false, nil
	}
	return get[pki.Published](tx, bucketTrust, k)
}

// PutTrustBundle stores a bundle with a version above all that are stored. A stored one never changes.
func (tx *Tx) PutTrustBundle(p pki.Published) error {
	have, ok, err := tx.TrustBundle(0)
	if err != nil {
		return err
	}
	if ok && !p.Follows(have.Version) {
		return fleet.Coded(fleet.Conflict, pki.CodeBundleOld, "trust bundle %d is not above %d", p.Version, have.Version)
	}
	return put(tx, bucketTrust, be64(uint64(p.Version)), p)
}
