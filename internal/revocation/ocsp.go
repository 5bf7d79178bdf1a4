package revocation

import (
	"bytes"
	"context"
	"crypto"
	_ "crypto/sha1" // RFC 5019 clients name certificates by it; nothing is signed with it
	"crypto/x509/pkix"
	"encoding/asn1"
	"time"

	"golang.org/x/crypto/ocsp"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// MaxRequest is the longest OCSP request that is read, in bytes.
const MaxRequest = 8 << 10

// fresh is how long an answer holds: a client may keep it so long.
const fresh = time.Hour

// Answer returns the answer to an OCSP request (RFC 6960, DER): good for a certificate that muster issued and did not
// revoke, revoked, or unknown. It is signed by the issuer itself: a delegate would be one more key to keep and to renew.
// What cannot be answered gets one of the unsigned answers of RFC 6960 §2.3, which is no error.
func (l *Lists) Answer(ctx context.Context, at time.Time, request []byte) []byte {
	if len(request) > MaxRequest {
		return ocsp.MalformedRequestErrorResponse
	}
	req, err := ocsp.ParseRequest(request)
	if err != nil || req.SerialNumber == nil || req.SerialNumber.Sign() <= 0 || req.SerialNumber.BitLen() > 160 {
		return ocsp.MalformedRequestErrorResponse
	}
	issuer, ok := l.issuerOf(req)
	if !ok {
		return ocsp.UnauthorizedErrorResponse
	}
	at = at.UTC().Truncate(time.Second)
	t := ocsp.Response{Status: ocsp.Unknown, SerialNumber: req.SerialNumber, ThisUpdate: at, NextUpdate: at.Add(fresh), IssuerHash: req.HashAlgorithm}
	var c pki.Certificate
	err = l.c.View(ctx, func(tx Tx) (err error) { c, err = tx.Certificate(fleet.SerialOf(req.SerialNumber)); return err })
	switch {
	case fleet.Is(err, fleet.NotFound), err == nil && !issuer.Issued(c):
	case err != nil:
		return ocsp.TryLaterErrorResponse
	case c.State == pki.Revoked:
		t.Status, t.RevokedAt, t.RevocationReason = ocsp.Revoked, c.RevokedAt.UTC().Truncate(time.Second), c.Reason
	default:
		t.Status = ocsp.Good
	}
	der, err := ocsp.CreateResponse(issuer.Cert, issuer.Cert, t, issuer.Key)
	if err != nil {
		l.c.Log.Error("an OCSP answer could not be signed", "error", err)
		return ocsp.InternalErrorErrorResponse
	}
	return der
}

// issuerOf finds the issuer that a request names by the hashes of its name and key.
func (l *Lists) issuerOf(req *ocsp.Request) (pki.Issuer, bool) {
	if !req.HashAlgorithm.Available() {
		return pki.Issuer{}, false
	}
	for _, i := range l.c.Issuers() {
		key, err := publicKeyBits(i.Cert.RawSubjectPublicKeyInfo)
		if err == nil && bytes.Equal(hashOf(req.HashAlgorithm, i.Cert.RawSubject), req.IssuerNameHash) && bytes.Equal(hashOf(req.HashAlgorithm, key), req.IssuerKeyHash) {
			return i, true
		}
	}
	return pki.Issuer{}, false
}

func hashOf(h crypto.Hash, b []byte) []byte {
	w := h.New()
	w.Write(b)
	return w.Sum(nil)
}

// publicKeyBits returns the key of a SubjectPublicKeyInfo without its wrapping (RFC 6960 §4.1.1, issuerKeyHash).
func publicKeyBits(spki []byte) ([]byte, error) {
	var v struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	_, err := asn1.Unmarshal(spki, &v)
	return v.Key.RightAlign(), err
}
