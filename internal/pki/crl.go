package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"math/big"
	"time"

	"muster/internal/fleet"
)

// IssuerID names a CA by its key: the hex of its subject key identifier.
type IssuerID string

// Issuer is a CA certificate with its key.
type Issuer struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// ID returns the name of i.
func (i Issuer) ID() IssuerID { return IssuerIDOf(i.Cert) }

// IssuerIDOf returns the name of a CA.
func IssuerIDOf(c *x509.Certificate) IssuerID { return IssuerID(hex.EncodeToString(c.SubjectKeyId)) }

// Issued reports whether i signed c, by the intermediate that was stored with it.
func (i Issuer) Issued(c Certificate) bool {
	return len(c.Chain) > 1 && bytes.Equal(c.Chain[1], i.Cert.Raw)
}

// List is a certificate revocation list as muster keeps it (RFC 5280 §5).
type List struct {
	Issuer  IssuerID  `json:"issuer"`
	Number  int64     `json:"number"` // grows with every list of its issuer; the second at which it was signed, or more
	DER     []byte    `json:"der"`
	At      time.Time `json:"at"`   // thisUpdate
	Next    time.Time `json:"next"` // nextUpdate
	Entries int       `json:"entries"`
}

// SignList signs the list of an issuer: revoked are its own certificates that are revoked, number follows that of the list
// before. There is no delta and no distribution point: the list is whole (RFC 5280 §5.2.5, pki.md §1.4). The list ends with
// its issuer at the latest.
func (i Issuer) SignList(at time.Time, holds time.Duration, number int64, revoked []Certificate) (List, error) {
	at = at.UTC().Truncate(time.Second)
	l := List{Issuer: i.ID(), Number: number, At: at, Next: at.Add(holds), Entries: len(revoked)}
	if l.Next.After(i.Cert.NotAfter) {
		l.Next = i.Cert.NotAfter.UTC()
	}
	if !l.Next.After(at) {
		return l, fleet.Errorf(fleet.Unavailable, "the CA %q ended on %s and signs no list any more", i.Cert.Subject.CommonName, i.Cert.NotAfter.Format(time.DateOnly))
	}
	t := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: at, NextUpdate: l.Next}
	for _, c := range revoked {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: c.Serial.Big(), RevocationTime: c.RevokedAt.UTC().Truncate(time.Second), ReasonCode: c.Reason, // 0 is left out
		})
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, i.Cert, i.Key)
	if err != nil {
		return l, fleet.Wrap(fleet.Unavailable, err, "the list of the CA %q could not be signed", i.Cert.Subject.CommonName)
	}
	l.DER = der
	return l, nil
}

// OnList reports whether a revoked certificate stands on a list: until it has stood on one that was signed after its end
// (RFC 5280 §3.3). before is thisUpdate of the list before; zero if there was none.
func (c Certificate) OnList(before time.Time) bool {
	return c.State == Revoked && !c.NotAfter.Before(before)
}
