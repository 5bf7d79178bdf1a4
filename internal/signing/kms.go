package signing

import (
	"context"
	"crypto"
	"strings"

	"go.step.sm/crypto/kms"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"

	"muster/internal/ca/keystore"
	"muster/internal/fleet"
)

// managed are the schemes of key managers (go.step.sm/crypto/kms). Which of them a program knows is decided when it is built:
// keystore.Kinds.
var managed = []string{"softkms", "pkcs11", "awskms", "cloudkms", "azurekms"}

// inManager reports whether ref is the URI of a key rather than the name of a file.
func inManager(ref string) bool {
	scheme, _, ok := strings.Cut(ref, ":")
	for _, m := range managed {
		if ok && strings.EqualFold(scheme, m) {
			return true
		}
	}
	return false
}

// fileOf returns the path in a softkms URI: that key manager is a file. Empty for every other.
func fileOf(ref string) string {
	u, err := uri.ParseWithScheme("softkms", ref)
	if err != nil {
		return ""
	}
	if p := u.Get("path"); p != "" {
		return p
	}
	return u.Opaque
}

// openManaged returns the key that a URI names. It never leaves its manager, whose session ends with the program. PINs and
// secrets of the URI are in no error.
func openManaged(ref, what string) (crypto.Signer, error) {
	if err := keystore.Check(ref); err != nil {
		return nil, err
	}
	name := keystore.Show(ref)
	m, err := kms.New(context.Background(), apiv1.Options{URI: ref})
	if err != nil {
		return nil, fleet.Errorf(fleet.Invalid, "the key manager of the %s %s does not open: %s", what, name, keystore.Show(err.Error()))
	}
	s, err := m.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: ref})
	if err != nil {
		_ = m.Close() // the first error says more
		return nil, fleet.Errorf(fleet.NotFound, "the key manager has no %s %s: %s", what, name, keystore.Show(err.Error()))
	}
	return s, nil
}
