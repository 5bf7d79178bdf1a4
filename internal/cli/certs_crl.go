package cli

import (
	"context"
	"encoding/pem"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) certsCRL() *cobra.Command {
	var issuer, out string
	var sign, der bool
	c := &cobra.Command{
		Use: "crl", Short: "show, fetch or sign the revocation lists", Args: cobra.NoArgs,
		Long: `Shows the newest revocation list of each issuer (RFC 5280). musterd signs one a day and after each revocation. Anybody may
fetch them from the ops listener, /crl/<issuer>.crl, and ask about single certificates there by OCSP, /ocsp.`,
		Example: "  muster certs crl --issuer 3f2a… --out devices.crl --der",
	}
	f := c.Flags()
	f.StringVar(&issuer, "issuer", "", "key id of the CA, as the list without it shows")
	f.StringVar(&out, "out", "", "with --issuer: write the list to this file, PEM")
	f.BoolVar(&der, "der", false, "with --out: DER instead")
	f.BoolVar(&sign, "sign-now", false, "with --issuer: sign a new one first")
	return a.online(c, func(ctx context.Context, _ []string) error {
		if issuer == "" {
			if sign || out != "" || der {
				return usagef("--sign-now, --out and --der go with --issuer")
			}
			l, err := client.Read[api.RevocationLists](a.client.ListRevocationLists(ctx))
			if err != nil {
				return err
			}
			return a.ui.show(l.Items, func() {
				t := a.ui.table("ISSUER", "CA", "NUMBER", "ENTRIES", "SIGNED", "HOLDS UNTIL")
				for _, i := range l.Items {
					t.row(i.Issuer, i.Name, fmt.Sprint(i.Number), fmt.Sprint(i.Entries), a.ui.ago(i.At), text(i.Next))
				}
				t.print()
			})
		}
		var l api.RevocationList
		var err error
		if sign {
			l, err = client.Read[api.RevocationList](a.client.SignRevocationList(ctx, issuer))
		} else {
			l, err = client.Read[api.RevocationList](a.client.GetRevocationList(ctx, issuer))
		}
		if err != nil {
			return err
		}
		if out != "" {
			content := []byte(l.PEM)
			if block, _ := pem.Decode(content); der && block != nil {
				content = block.Bytes
			}
			if err := os.WriteFile(out, content, 0o644); err != nil {
				return err
			}
		}
		return a.ui.show(l, func() {
			a.ui.facts("issuer", l.Issuer, "ca", l.Name, "number", fmt.Sprint(l.Number), "entries", fmt.Sprint(l.Entries), "signed", l.At, "holds until", l.Next, "path", l.Path, "file", out)
		})
	})
}
