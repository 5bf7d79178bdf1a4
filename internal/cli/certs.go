package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) certsCmd() *cobra.Command {
	return group("certs", "what lets a device in", a.certsList(), a.certsShow(), a.certsStatus(), a.certsRenew(), a.certsRevoke())
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

// horizons are the days by which certs status sorts.
var horizons = []struct {
	name   string
	within time.Duration
}{{"ended", 0}, {"1 day", 24 * time.Hour}, {"7 days", 7 * 24 * time.Hour}, {"30 days", 30 * 24 * time.Hour}, {"90 days", 90 * 24 * time.Hour}}

func (a *app) certsStatus() *cobra.Command {
	c := &cobra.Command{
		Use: "status", Short: "count certificates by the time they have left", Args: cobra.NoArgs,
		Long: "Counts the certificates in use that end soon, each in the shortest time that it fits. A count of 500 means that there may be more.",
	}
	return a.online(c, func(ctx context.Context, _ []string) error {
		type line struct {
			Within string `json:"within"`
			Count  int    `json:"count"`
			More   bool   `json:"more,omitempty"`
			First  string `json:"first,omitempty"`
		}
		var lines []line
		seen := 0
		for _, h := range horizons {
			within := max(h.within, time.Second)
			l, err := client.Read[api.CertificateList](a.client.ListCertificates(ctx, &api.ListCertificatesParams{Within: within.String(), Limit: 500}))
			if err != nil {
				return err
			}
			ln := line{Within: h.name, Count: len(l.Items) - seen, More: l.More}
			if len(l.Items) > seen {
				ln.First = l.Items[seen].Device
			}
			seen = len(l.Items)
			lines = append(lines, ln)
			if l.More {
				break
			}
		}
		return a.ui.show(lines, func() {
			t := a.ui.table("ENDS WITHIN", "CERTIFICATES", "SOONEST")
			for i, l := range lines {
				n, shade := fmt.Sprint(l.Count), plain
				if l.More {
					n += " or more"
				}
				if i < 3 && l.Count > 0 {
					shade = yellow
				}
				t.row(l.Within, cell{n, shade}, l.First)
			}
			t.print()
		})
	})
}

func (a *app) certsRenew() *cobra.Command {
	in := api.RenewalPass{}
	c := &cobra.Command{
		Use: "renew", Short: "one pass of renewals, for cron", Args: cobra.NoArgs,
		Long: `Asks devices to renew their certificate: those that are due, nearest end first. A device that was asked already is not
asked again, so this can run as often as you like. A device that is not connected hears of it when it comes.`,
		Example: "  muster certs renew --limit 500\n  muster certs renew --all --dry-run",
	}
	f := c.Flags()
	f.StringVar(&in.Within, "within", "", "those that end within this time instead, like 720h")
	f.BoolVar(&in.All, "all", false, "every device instead")
	f.StringSliceVar(&in.Devices, "device", nil, "these devices instead")
	f.IntVar(&in.Limit, "limit", 0, "at most this many; 0: as musterd is configured")
	f.BoolVar(&in.DryRun, "dry-run", false, "ask nobody, say who would be asked")
	c.MarkFlagsMutuallyExclusive("within", "all", "device")
	return a.online(c, func(ctx context.Context, _ []string) error {
		r, err := client.Read[api.RenewalReport](a.client.RenewCertificates(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() { a.printRenewals(r) })
	})
}

func (a *app) printRenewals(r api.RenewalReport) {
	verb := "asked"
	if r.DryRun {
		verb = "would ask"
	}
	a.ui.printf("due %d, %s %d (%d not connected), asked before %d\n", r.Due, verb, len(r.Asked), r.Offline, r.Already)
	for i, d := range r.Asked {
		if i == 10 {
			a.ui.note("  and %d others; --output json names them all", len(r.Asked)-i)
			break
		}
		a.ui.printf("  %s\n", clean(d))
	}
	if len(r.Skipped) > 0 {
		t := a.ui.table("PASSED OVER", "WHY")
		for _, s := range r.Skipped {
			t.row(s.Device, s.Why)
		}
		t.print()
	}
	if r.More {
		a.ui.note("the limit left some out: run again, or raise --limit")
	}
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
	a.ui.facts("  connections", fmt.Sprint(r.Connections), "  refused after", r.StoredAfter, "  closed after", r.ClosedAfter, "  found gone after", r.VerifiedAfter)
}
