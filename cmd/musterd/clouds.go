//go:build !nocloud

package main

// Key managers of clouds, for pki.device_key and pki.server_key. They make musterd a fifth larger; -tags nocloud leaves
// them out. PKCS #11 needs cgo and has a build of its own: make pkcs11.
import (
	_ "go.step.sm/crypto/kms/awskms"
	_ "go.step.sm/crypto/kms/azurekms"
	_ "go.step.sm/crypto/kms/cloudkms"
)
