package bolt

import (
	"bytes"

	json "github.com/go-json-experiment/json/v1"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// CertificatesAfter returns up to limit certificates in the order of their serials, from the first one after after on.
func (tx *Tx) CertificatesAfter(after fleet.Serial, limit int) ([]pki.Certificate, error) {
	var out []pki.Certificate
	c := tx.b.Bucket(bucketCerts).Cursor()
	k, raw := c.Seek([]byte(after))
	if k != nil && bytes.Equal(k, []byte(after)) {
		k, raw = c.Next()
	}
	for ; k != nil && len(out) < limit; k, raw = c.Next() {
		var cert pki.Certificate
		if err := json.Unmarshal(raw, &cert); err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	return out, nil
}

// MassRevocation returns the newest order to revoke all certificates of an issuer; ok is false if there was none.
func (tx *Tx) MassRevocation(id pki.IssuerID) (m pki.MassRevocation, ok bool, err error) {
	return get[pki.MassRevocation](tx, bucketMassRevocations, []byte(id))
}

// PutMassRevocation stores m, in place of an older one of the same issuer.
func (tx *Tx) PutMassRevocation(m pki.MassRevocation) error {
	return put(tx, bucketMassRevocations, []byte(m.Issuer), m)
}

// MassRevocations returns all of them, in the order of the issuers.
func (tx *Tx) MassRevocations() ([]pki.MassRevocation, error) {
	return all[pki.MassRevocation](tx, bucketMassRevocations, nil)
}

// checkLists holds revocation lists and mass revocations to their issuers.
func checkLists(tx *Tx, say func(string, ...any)) error {
	err := each(tx, bucketLists, nil, func(k []byte, l pki.List) (bool, error) {
		if string(k) != string(l.Issuer) || l.Number < 1 || len(l.DER) == 0 || !l.At.Before(l.Next) {
			say("revocation list %q: issuer, number, content and times do not fit together", k)
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	return each(tx, bucketMassRevocations, nil, func(k []byte, m pki.MassRevocation) (bool, error) {
		if string(k) != string(m.Issuer) || m.By == "" || m.Since.IsZero() || m.Done() && (m.After != "" || m.Found != 0) {
			say("mass revocation %q: issuer, operator, times and progress do not fit together", k)
		}
		return true, nil
	})
}
