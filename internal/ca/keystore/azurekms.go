//go:build azurekms

package keystore

import _ "go.step.sm/crypto/kms/azurekms" // registers itself
