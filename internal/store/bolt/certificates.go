package bolt

import (
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Certificate returns the certificate with that serial, or a NotFound error.
func (tx *Tx) Certificate(s fleet.Serial) (pki.Certificate, error) {
	return must[pki.Certificate](tx, bucketCerts, []byte(s), "certificate")
}

// PutCertificate stores c and its place in the indexes. A serial never changes its device or its key.
func (tx *Tx) PutCertificate(c pki.Certificate) error {
	old, ok, err := get[pki.Certificate](tx, bucketCerts, []byte(c.Serial))
	if err != nil {
		return err
	}
	if ok && (old.Device != c.Device || old.KeyHash != c.KeyHash) {
		return fleet.Errorf(fleet.Conflict, "serial %s belongs to another device or key", c.Serial)
	}
	var was [][][]byte
	if ok {
		was = certIndex(old)
	} else {
		was = make([][][]byte, len(certIndexes))
	}
	now := certIndex(c)
	for i, bucket := range certIndexes {
		if err := tx.reindex(bucket, was[i], now[i], []byte(c.Serial)); err != nil {
			return err
		}
	}
	tx.touched[c.Device] = true
	return put(tx, bucketCerts, []byte(c.Serial), c)
}

// certIndexes are the indexes of certificates, in the order of what certIndex returns. Their values are serials.
var certIndexes = [][]byte{bucketCertsByDevice, bucketCertsByKey, bucketCertsByEnd, bucketCertsIntended, bucketCertsReplaced, bucketCertsDue, bucketCertsRevoked}

// Places of two of them.
const certDue, certRevoked = 5, 6

// certIndex returns the keys under which c stands in each of certIndexes.
func certIndex(c pki.Certificate) [][][]byte {
	serial := []byte(c.Serial)
	byDevice := [][]byte{join(text(c.Device), beTime(c.IntendedAt), serial)}
	byKey := [][]byte{join(text(c.KeyHash), serial)}
	var byEnd, intended, replaced, due, revoked [][]byte
	switch c.State {
	case pki.Issued, pki.Active, pki.Superseded:
		byEnd = [][]byte{join(beTime(c.NotAfter), serial)}
	case pki.Intended:
		intended = [][]byte{join(beTime(c.IntendedAt), serial)}
	}
	if c.State == pki.Superseded {
		replaced = [][]byte{join(beTime(c.SupersededAt), serial)}
	}
	if c.State.Live() {
		due = [][]byte{join(beTime(pki.RenewAt(c, c.Device)), serial)}
	}
	if c.State == pki.Revoked && len(c.Chain) > 0 { // an intent that was revoked exists nowhere
		revoked = [][]byte{join(beTime(c.NotAfter), serial)}
	}
	return [][][]byte{byDevice, byKey, byEnd, intended, replaced, due, revoked}
}

// certificatesIn returns the certificates that an index names, until stop returns true for a key.
func (tx *Tx) certificatesIn(index, prefix []byte, limit int, stop func(key []byte) bool) ([]pki.Certificate, error) {
	var out []pki.Certificate
	err := eachKey(tx, index, prefix, nil, func(k []byte) (bool, error) {
		if limit > 0 && len(out) == limit || stop != nil && stop(k) {
			return false, nil
		}
		c, err := tx.Certificate(fleet.Serial(tx.b.Bucket(index).Get(k)))
		if err != nil {
			return false, err
		}
		out = append(out, c)
		return true, nil
	})
	return out, err
}

// CertificatesOf returns all certificates of a device, oldest intent first.
func (tx *Tx) CertificatesOf(id fleet.DeviceID) ([]pki.Certificate, error) {
	return tx.certificatesIn(bucketCertsByDevice, text(id), 0, nil)
}

// CertificatesByKey returns the certificates, of whatever device, for the public key with that hash.
func (tx *Tx) CertificatesByKey(h fleet.Hash) ([]pki.Certificate, error) {
	return tx.certificatesIn(bucketCertsByKey, text(h), 0, nil)
}

// IntendedCertificates returns up to limit certificates that are not signed yet, oldest first.
func (tx *Tx) IntendedCertificates(limit int) ([]pki.Certificate, error) {
	return tx.certificatesIn(bucketCertsIntended, nil, limit, nil)
}

// CertificatesEnding returns up to limit issued, active and superseded certificates that end before before, soonest first.
func (tx *Tx) CertificatesEnding(before time.Time, limit int) ([]pki.Certificate, error) {
	end := beTime(before)
	return tx.certificatesIn(bucketCertsByEnd, nil, limit, func(k []byte) bool { return string(k[:8]) >= string(end) })
}

// CertificatesDue returns up to limit issued and active certificates that are due for renewal at time at, those first that
// are due for longest.
func (tx *Tx) CertificatesDue(at time.Time, limit int) ([]pki.Certificate, error) {
	end := beTime(at)
	return tx.certificatesIn(bucketCertsDue, nil, limit, func(k []byte) bool { return string(k[:8]) > string(end) })
}

// SupersededCertificates returns up to limit superseded certificates that were replaced before before, oldest first.
func (tx *Tx) SupersededCertificates(before time.Time, limit int) ([]pki.Certificate, error) {
	end := beTime(before)
	return tx.certificatesIn(bucketCertsReplaced, nil, limit, func(k []byte) bool { return string(k[:8]) >= string(end) })
}

var keyCertPolicy = []byte("certificate-policy")

// CertificatePolicy returns the stored policy; ok is false in a store that has none yet.
func (tx *Tx) CertificatePolicy() (p pki.Policy, ok bool, err error) {
	return get[pki.Policy](tx, bucketMeta, keyCertPolicy)
}

// PutCertificatePolicy stores p.
func (tx *Tx) PutCertificatePolicy(p pki.Policy) error { return put(tx, bucketMeta, keyCertPolicy, p) }

// Request returns the certificate request with that id, or a NotFound error.
func (tx *Tx) Request(id string) (pki.Request, error) {
	return must[pki.Request](tx, bucketRequests, []byte(id), "request")
}

// PutRequest stores r.
func (tx *Tx) PutRequest(r pki.Request) error { return put(tx, bucketRequests, []byte(r.ID), r) }

// Requests returns all certificate requests, decided ones included, in id order.
func (tx *Tx) Requests() ([]pki.Request, error) { return all[pki.Request](tx, bucketRequests, nil) }

// DropRequest removes a request; one that is gone already does not matter.
func (tx *Tx) DropRequest(id string) error { return tx.b.Bucket(bucketRequests).Delete([]byte(id)) }

// PutClosing stores c, in place of an older one for the same user.
func (tx *Tx) PutClosing(c pki.Closing) error { return put(tx, bucketClosings, []byte(c.User), c) }

// Closings returns every promise to close a user's connections that is not kept yet, in the order of the users' names.
func (tx *Tx) Closings() ([]pki.Closing, error) { return all[pki.Closing](tx, bucketClosings, nil) }

// DropClosing removes the promise for user; one that is gone already does not matter.
func (tx *Tx) DropClosing(user string) error { return tx.b.Bucket(bucketClosings).Delete([]byte(user)) }

// Enrolment returns the enrolment password of a device, used or not; false if it has none.
func (tx *Tx) Enrolment(id fleet.DeviceID) (pki.Enrolment, bool, error) {
	return get[pki.Enrolment](tx, bucketEnrolments, []byte(id))
}

// PutEnrolment stores e, in place of an older one of the same device.
func (tx *Tx) PutEnrolment(e pki.Enrolment) error {
	return put(tx, bucketEnrolments, []byte(e.Device), e)
}

// DropEnrolment removes the enrolment password of a device; one that is gone already does not matter.
func (tx *Tx) DropEnrolment(id fleet.DeviceID) error {
	return tx.b.Bucket(bucketEnrolments).Delete([]byte(id))
}

// BlockedKey returns the entry of a key that gets no certificate; false if it is not blocked.
func (tx *Tx) BlockedKey(h fleet.Hash) (pki.BlockedKey, bool, error) {
	return get[pki.BlockedKey](tx, bucketBlocked, []byte(h))
}

// PutBlockedKey stores k.
func (tx *Tx) PutBlockedKey(k pki.BlockedKey) error {
	return put(tx, bucketBlocked, []byte(k.SHA256), k)
}

// DropBlockedKey removes the entry of a key; one that is gone already does not matter.
func (tx *Tx) DropBlockedKey(h fleet.Hash) error { return tx.b.Bucket(bucketBlocked).Delete([]byte(h)) }

// BlockedKeys returns all of them, in order of their hashes.
func (tx *Tx) BlockedKeys() ([]pki.BlockedKey, error) {
	return all[pki.BlockedKey](tx, bucketBlocked, nil)
}

// all returns the records of bucket whose key has prefix.
func all[T any](tx *Tx, bucket, prefix []byte) ([]T, error) {
	var out []T
	err := each(tx, bucket, prefix, func(_ []byte, v T) (bool, error) {
		out = append(out, v)
		return true, nil
	})
	return out, err
}
