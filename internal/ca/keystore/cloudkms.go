//go:build cloudkms

package keystore

import _ "go.step.sm/crypto/kms/cloudkms" // registers itself
