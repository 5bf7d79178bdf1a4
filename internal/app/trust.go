package app

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
)

// trustPEM returns the roots that devices should trust now: those of the newest bundle, or of the CA before there is one.
func (a *App) trustPEM(ctx context.Context) []byte {
	var ders [][]byte
	b, err := a.trust.Current(ctx)
	if err == nil {
		ders = b.Roots
	} else {
		ders = rawOf(a.cas.roots())
	}
	var out bytes.Buffer
	for _, der := range ders {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return out.Bytes()
}

func rawOf(certs []*x509.Certificate) (out [][]byte) {
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

// signedTrust returns the newest trust bundle as devices take it, nil if there is none.
func (a *App) signedTrust(ctx context.Context) []byte {
	b, err := a.trust.Current(ctx)
	if err != nil {
		return nil
	}
	return []byte(b.JWS)
}
