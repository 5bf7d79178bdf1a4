package cli

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (a *app) certsBlockKey() *cobra.Command {
	in := api.NewBlockedKey{}
	c := &cobra.Command{
		Use: "block-key HASH|FILE", Short: "see to it that a key that others know gets no certificate again", Args: cobra.ExactArgs(1),
		Long: `Blocks a public key for every device: by its SHA-256 (as muster certs show prints it), or by a PEM file with a certificate, a
request, a public key, or the leaked private key itself, which stays on this machine. Certificates that the key has stay in force until
they are revoked: the answer names them.`,
	}
	c.Flags().StringVar(&in.Why, "why", "", "for the record")
	return a.online(c, func(ctx context.Context, args []string) error {
		h, err := a.keyHash(args[0])
		if err != nil {
			return err
		}
		in.SHA256 = string(h)
		k, err := client.Read[api.BlockedKey](a.client.BlockKey(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(k, func() {
			a.ui.printf("blocked %s\n", k.SHA256)
			for _, c := range k.Certificates {
				if c.State != api.CertificateStateRevoked {
					a.ui.note("%s has certificate %s for it, %s: muster certs revoke %s --reason key-compromise", clean(c.Device), clean(c.Serial), clean(string(c.State)), clean(c.Serial))
				}
			}
		})
	})
}

func (a *app) certsUnblockKey() *cobra.Command {
	c := &cobra.Command{Use: "unblock-key HASH|FILE", Short: "take a key from the list that was blocked by mistake", Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		h, err := a.keyHash(args[0])
		if err != nil {
			return err
		}
		if err := client.Done(a.client.UnblockKey(ctx, string(h))); err != nil {
			return err
		}
		return a.ui.show(map[string]string{"sha256": string(h)}, func() { a.ui.printf("unblocked %s\n", h) })
	})
}

func (a *app) certsBlockedKeys() *cobra.Command {
	c := &cobra.Command{Use: "blocked-keys", Short: "list the keys that operators blocked", Args: cobra.NoArgs}
	return a.online(c, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.BlockedKeyList](a.client.ListBlockedKeys(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			if len(l.Items) == 0 {
				a.ui.note("no operator blocked a key")
				return
			}
			t := a.ui.table("KEY SHA256", "SINCE", "BY", "WHY")
			for _, k := range l.Items {
				t.row(k.SHA256, text(k.Since), k.By, k.Why)
			}
			t.print()
		})
	})
}

// keyHash returns the hash that s is, or that of the key in the file s.
func (a *app) keyHash(s string) (fleet.Hash, error) {
	if h, err := fleet.ParseHash(strings.ToLower(s)); err == nil && !exists(s) {
		return h, nil
	}
	raw, err := a.readInput(s, 64<<10)
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return "", usagef("%s is neither a hash of 64 hex digits nor PEM", clean(s))
	}
	spki, err := publicKeyIn(block)
	if err != nil {
		return "", usagef("no public key could be found in this %s: name its SHA-256", clean(block.Type))
	}
	return pki.KeyHash(spki), nil
}

// publicKeyIn returns the SubjectPublicKeyInfo of whatever PEM block holds a key.
func publicKeyIn(block *pem.Block) ([]byte, error) {
	var key any
	var err error
	switch block.Type {
	case "CERTIFICATE":
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		key = c.PublicKey
	case "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST":
		r, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return nil, err
		}
		key = r.PublicKey
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, err
	}
	if s, ok := key.(crypto.Signer); ok {
		key = s.Public()
	}
	return x509.MarshalPKIXPublicKey(key) // written anew: one key, one hash
}
