package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"

	"muster/internal/fleet"
)

// Limits of a file with certificates.
const (
	MaxChainPEM   = 64 << 10 // bytes
	MaxChainCerts = 8        // a chain has three; CVE-2026-32280 is about checking many
)

// CodeChain is the code of every error of ParseChainPEM.
const CodeChain = "certificates_malformed"

// ParseChainPEM reads one to MaxChainCerts certificates from PEM (RFC 7468 §5), with nothing but blank lines around them:
// a key, a header or a damaged block would be skipped by others in silence. The error is Invalid and holds none of the
// input.
func ParseChainPEM(text []byte) ([]*x509.Certificate, error) {
	if len(text) > MaxChainPEM {
		return nil, badChain("at most %d bytes", MaxChainPEM)
	}
	var out []*x509.Certificate
	blocks := bytes.Count(text, []byte("-----BEGIN "))
	for rest := bytes.TrimSpace(text); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, badChain("nothing but blocks -----BEGIN CERTIFICATE----- is allowed")
		}
		if len(out) == MaxChainCerts {
			return nil, badChain("at most %d certificates", MaxChainCerts)
		}
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 {
			return nil, badChain("block %d is damaged or has headers", len(out)+1)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, &fleet.Error{Kind: fleet.Invalid, Code: CodeChain, Msg: "a certificate cannot be read", Err: err}
		}
		out = append(out, c)
	}
	if len(out) == 0 || len(out) != blocks { // pem.Decode skips a damaged one
		return nil, badChain("there is no certificate, or a damaged one")
	}
	return out, nil
}

func badChain(format string, a ...any) error {
	return fleet.Coded(fleet.Invalid, CodeChain, "certificates in PEM: "+format, a...)
}
