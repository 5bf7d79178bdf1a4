package signing

import (
	"crypto"
	"encoding/pem"
	"os"
	"strings"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// SignTrust signs a trust bundle on the operator's own machine: the roots and cross-certificates (PEM) in files, with a
// version above the one in force. It returns the bundle as `muster trust publish` takes it.
func SignTrust(signer crypto.Signer, version int64, at time.Time, roots, cross []string) (string, error) {
	b := pki.Bundle{Version: version, Time: at.Unix()}
	for _, list := range []struct {
		files []string
		to    *[][]byte
	}{{roots, &b.Roots}, {cross, &b.Cross}} {
		for _, path := range list.files {
			ders, err := certificatesIn(path)
			if err != nil {
				return "", err
			}
			*list.to = append(*list.to, ders...)
		}
	}
	return pki.SignBundle(b, signer)
}

// certificatesIn reads every certificate of a PEM file.
func certificatesIn(path string) (out [][]byte, err error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, fileError(err, "read the certificates %s", path)
	}
	for len(strings.TrimSpace(string(rest))) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, fleet.Errorf(fleet.Invalid, "%s must hold certificates in PEM, and nothing else", path)
		}
		out = append(out, block.Bytes)
	}
	if len(out) == 0 {
		return nil, fleet.Errorf(fleet.Invalid, "%s holds no certificate", path)
	}
	return out, nil
}
