package cli

import (
	"context"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) certsCmd() *cobra.Command {
	return group("certs", "what lets a device in", a.certsList(), a.certsShow(), a.certsStatus(), a.certsForecast(), a.certsRenew(), a.certsPolicy(), a.certsBlockKey(), a.certsUnblockKey(), a.certsBlockedKeys(), a.certsRevoke(), a.certsCRL())
}

func (a *app) certsList() *cobra.Command {
	p := api.ListCertificatesParams{}
	c := &cobra.Command{
		Use: "list [DEVICE]", Short: "list the certificates of a device, or those that end soon", Args: cobra.MaximumNArgs(1),
	}
	c.Flags().StringVar(&p.Within, "within", "720h", "without a device: those that end within this time")
	c.Flags().IntVar(&p.Limit, "limit", 500, "without a device: at most this many, the soonest first")
	return a.online(c, func(ctx context.Context, args []string) error {
		var l api.CertificateList
		var err error
		if len(args) == 1 {
			l, err = client.Read[api.CertificateList](a.client.ListDeviceCertificates(ctx, args[0]))
		} else {
			l, err = client.Read[api.CertificateList](a.client.ListCertificates(ctx, &p))
		}
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			if len(l.Items) == 0 {
				a.ui.note("no certificates")
				return
			}
			t := a.ui.table("SERIAL", "DEVICE", "STATE", "LEFT", "ENDS", "VIA")
			for _, c := range l.Items {
				t.row(c.Serial, c.Device, cell{string(c.State), stateShade(string(c.State))}, a.ui.left(c.NotAfter), text(c.NotAfter), c.Via)
			}
			t.print()
			if l.More {
				a.ui.note("there are more: raise --limit, or shorten --within")
			}
		})
	})
}

func (a *app) certsShow() *cobra.Command {
	var asPEM bool
	c := &cobra.Command{Use: "show SERIAL", Short: "show a certificate", Args: cobra.ExactArgs(1)}
	c.Flags().BoolVar(&asPEM, "pem", false, "print the certificate and its intermediate")
	return a.online(c, func(ctx context.Context, args []string) error {
		c, err := client.Read[api.Certificate](a.client.GetCertificate(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(c, func() {
			if asPEM {
				a.ui.printf("%s", c.Chain)
				return
			}
			a.ui.facts("serial", c.Serial, "device", c.Device, "state", cell{string(c.State), stateShade(string(c.State))}, "via", c.Via, "key sha256", c.KeySHA256,
				"not before", c.NotBefore, "not after", c.NotAfter, "left", a.ui.left(c.NotAfter), "issued", c.IssuedAt, "active", c.ActiveAt,
				"superseded", c.SupersededAt, "revoked", c.RevokedAt, "reason", string(c.Reason), "by", c.By)
		})
	})
}
