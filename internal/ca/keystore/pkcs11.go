//go:build pkcs11 && cgo

package keystore

import (
	"crypto/elliptic"
	"errors"
	"strconv"

	"github.com/ThalesGroup/crypto11"
	"go.step.sm/crypto/kms/apiv1"
	_ "go.step.sm/crypto/kms/pkcs11" // registers itself
	"go.step.sm/crypto/kms/uri"
)

func init() { create["pkcs11"] = createInToken }

// createInToken makes a key in a PKCS #11 token. The key manager's own CreateKey cannot: it takes the answer of crypto11
// 1.6 that there is no such key yet for a failure (go.step.sm/crypto v0.87.0).
func createInToken(ref string) (name string, err error) {
	u, err := uri.ParseWithScheme("pkcs11", ref)
	if err != nil {
		return "", err
	}
	id, label := u.GetEncoded("id"), []byte(u.Get("object"))
	if len(id) == 0 || len(label) == 0 {
		return "", errors.New("a new key needs an id and an object: pkcs11:token=muster;id=01;object=device-ca?pin-source=/path/to/pin")
	}
	c := crypto11.Config{Path: u.Get("module-path"), TokenLabel: u.Get("token"), TokenSerial: u.Get("serial"), Pin: u.Pin()}
	if c.Path == "" {
		c.Path = "p11-kit-proxy.so"
	}
	if s := u.Get("slot-id"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			return "", errors.New("slot-id is no number")
		}
		c.SlotNumber = &n
	}
	token, err := crypto11.Configure(&c)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	there, err := token.FindKeyPairs(id, label)
	if err != nil {
		return "", err
	}
	if len(there) > 0 {
		return "", apiv1.AlreadyExistsError{Message: "it is in the token"}
	}
	_, err = token.GenerateECDSAKeyPairWithLabel(id, label, elliptic.P256())
	return ref, err
}
