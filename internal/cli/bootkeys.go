package cli

import (
	"context"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
	"muster/internal/esp/secureboot"
)

func (a *app) secureBootKeysCmd() *cobra.Command {
	add := a.online(&cobra.Command{
		Use: "add PRODUCT KEY.pem|DIGEST", Short: "register a key that signs the images of a product for Secure Boot", Args: cobra.ExactArgs(2),
		Long: `Registers a public key in PEM, or the 64 hex digits of its digest. From then on an image of the product is published only if a
registered key that is not revoked signed it.`,
	}, func(ctx context.Context, args []string) error {
		text := args[1]
		if _, err := secureboot.ParseKeyDigest(text); err != nil || exists(text) {
			raw, err := a.readInput(args[1], 4<<10)
			if err != nil {
				return err
			}
			text = string(raw)
		}
		k, err := client.Read[api.SecureBootKey](a.client.AddSecureBootKey(ctx, api.NewSecureBootKey{Product: args[0], Key: text}))
		if err != nil {
			return err
		}
		return a.ui.show(k, func() {
			a.ui.printf("registered Secure Boot key %s of %s\n", clean(k.Digest), clean(k.Product))
			a.ui.note("images of %s need the signature of a registered key from now on", clean(k.Product))
		})
	})
	var p api.ListSecureBootKeysParams
	list := &cobra.Command{Use: "list", Short: "list Secure Boot keys", Args: cobra.NoArgs}
	list.Flags().StringVar(&p.Product, "product", "", "only of this product")
	a.online(list, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.SecureBootKeyList](a.client.ListSecureBootKeys(ctx, &p))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			if len(l.Items) == 0 {
				a.ui.note("no Secure Boot keys: images need no signature")
				return
			}
			t := a.ui.table("PRODUCT", "DIGEST", "SCHEME", "STATE", "ADDED", "BY")
			for _, k := range l.Items {
				state := cell{"active", green}
				if k.Revoked {
					state = cell{"revoked", red}
				}
				t.row(k.Product, k.Digest, k.Scheme, state, a.ui.ago(k.AddedAt), k.AddedBy)
			}
			t.print()
		})
	})
	revoke := a.online(&cobra.Command{
		Use: "revoke PRODUCT DIGEST", Short: "take a Secure Boot key out of use for good", Args: cobra.ExactArgs(2),
		Long: "Images that this key alone signed are published no more. What is published stays, and no device is touched.",
	}, func(ctx context.Context, args []string) error {
		k, err := client.Read[api.SecureBootKey](a.client.RevokeSecureBootKey(ctx, args[0], args[1]))
		if err != nil {
			return err
		}
		return a.ui.show(k, func() { a.ui.printf("revoked Secure Boot key %s of %s\n", clean(k.Digest), clean(k.Product)) })
	})
	return group("secure-boot-keys", "the keys that sign images for Secure Boot", add, list, revoke)
}
