package bolt

import (
	"time"

	bbolt "go.etcd.io/bbolt"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// RevokedCertificates returns up to limit revoked certificates that end at or after from and stand after a key of the
// index, soonest end first, and the key of the last one: pass it to go on.
func (tx *Tx) RevokedCertificates(from time.Time, after []byte, limit int) (list []pki.Certificate, last []byte, err error) {
	c := tx.b.Bucket(bucketCertsRevoked).Cursor()
	k, serial := c.Seek(beTime(from))
	if after != nil {
		if k, serial = c.Seek(after); string(k) == string(after) {
			k, serial = c.Next()
		}
	}
	for ; k != nil && len(list) < limit; k, serial = c.Next() {
		cert, err := tx.Certificate(fleet.Serial(serial))
		if err != nil {
			return nil, nil, err
		}
		list, last = append(list, cert), append([]byte(nil), k...)
	}
	return list, last, nil
}

// RevocationList returns the newest list of an issuer; ok is false if there is none.
func (tx *Tx) RevocationList(id pki.IssuerID) (l pki.List, ok bool, err error) {
	return get[pki.List](tx, bucketLists, []byte(id))
}

// PutRevocationList stores the newest list of an issuer. Numbers grow.
func (tx *Tx) PutRevocationList(l pki.List) error {
	have, ok, err := tx.RevocationList(l.Issuer)
	if err != nil {
		return err
	}
	if ok && l.Number <= have.Number {
		return fleet.Errorf(fleet.Conflict, "the list of issuer %s has number %d already", l.Issuer, have.Number)
	}
	return put(tx, bucketLists, []byte(l.Issuer), l)
}

// fillCertsRevoked makes the index of revoked certificates of a store that was written before there was one.
func fillCertsRevoked(b *bbolt.Tx) error {
	tx := &Tx{b: b}
	return each(tx, bucketCerts, nil, func(_ []byte, c pki.Certificate) (bool, error) {
		return true, tx.reindex(bucketCertsRevoked, nil, certIndex(c)[certRevoked], []byte(c.Serial))
	})
}
