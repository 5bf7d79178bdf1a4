package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) certsCmd() *cobra.Command {
	return group("certs", "what lets a device in", a.certsList(), a.certsShow(), a.certsStatus(), a.certsForecast(), a.certsRenew(), a.certsPolicy(), a.certsRevoke(), a.certsCRL())
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

func (a *app) certsRevoke() *cobra.Command {
	in := api.NewRevocation{}
	var reason, device string
	c := &cobra.Command{
		Use: "revoke SERIAL | revoke --device ID", Short: "revoke a certificate for good", Args: cobra.MaximumNArgs(1),
		Long: `Revokes a certificate, closes the connections that use it, looks again whether one came back, and tells how long each step
took. With --device, those certificates of the device that let it in.

Reasons: unspecified, key-compromise, affiliation-changed, superseded, cessation-of-operation, privilege-withdrawn.`,
	}
	c.Flags().StringVar(&reason, "reason", "unspecified", "why (RFC 5280)")
	c.Flags().StringVar(&device, "device", "", "the certificates of this device")
	_ = c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions([]string{"unspecified", "key-compromise", "affiliation-changed", "superseded", "cessation-of-operation", "privilege-withdrawn"}, cobra.ShellCompDirectiveNoFileComp))
	return a.online(c, func(ctx context.Context, args []string) error {
		if (len(args) == 1) == (device != "") {
			return usagef("name a serial, or a device with --device")
		}
		in.Reason = api.RevocationReason(reason)
		if device != "" {
			l, err := client.Read[api.CertificateList](a.client.ListDeviceCertificates(ctx, device))
			if err != nil {
				return err
			}
			for _, c := range l.Items {
				if c.State == api.CertificateStateActive || c.State == api.CertificateStateIssued || c.State == api.CertificateStateIntended {
					args = append(args, c.Serial)
				}
			}
			if len(args) == 0 {
				a.ui.note("%s has no certificate that lets it in", clean(device))
			}
		}
		reports := []api.RevocationReport{}
		for _, serial := range args {
			r, err := client.Read[api.RevocationReport](a.client.RevokeCertificate(ctx, serial, in))
			if err != nil {
				return err
			}
			reports = append(reports, r)
		}
		if err := a.ui.show(reports, func() {
			for _, r := range reports {
				a.printRevocation(r)
			}
		}); err != nil {
			return err
		}
		for _, r := range reports {
			if !r.Clean {
				return fmt.Errorf("%s is revoked, but a connection may still be open: %s", r.Certificate.Serial, r.Detail)
			}
		}
		return nil
	})
}

func (a *app) printRevocation(r api.RevocationReport) {
	a.ui.printf("revoked %s of %s\n", r.Certificate.Serial, clean(r.Certificate.Device))
	a.ui.facts("  connections", fmt.Sprint(r.Connections), "  refused after", r.StoredAfter, "  closed after", r.ClosedAfter, "  found gone after", r.VerifiedAfter,
		"  stored", r.StoredAt, "  closed", r.ClosedAt, "  first refused", r.RefusedAt, "  refused because", r.RefusedWhy)
	if r.RefusedAt.IsZero() && !r.StoredAt.IsZero() {
		a.ui.printf("  it has not tried to connect since\n")
	}
}
