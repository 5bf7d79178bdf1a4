package cli

import (
	"strings"
	"testing"

	"muster/internal/fleet"
)

func TestCACertificate(t *testing.T) {
	golden(t, "ca-cert", false, func(u *ui) {
		(&app{ui: u}).printCACert(caCert{
			Subject: "acme devices 1\x1b[31m", Issuer: "acme root 1", Serial: "4f00", KeySHA256: fleet.Hash(strings.Repeat("ab", 32)), NotBefore: now, NotAfter: now.AddDate(5, 0, 0), File: "device-ca.crt",
		})
	})
}
