package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) certsRevoke() *cobra.Command {
	in := api.NewRevocation{}
	var reason, device string
	c := &cobra.Command{
		Use: "revoke SERIAL | revoke --device ID", Short: "revoke a certificate for good", Args: cobra.MaximumNArgs(1),
		Long: `Revokes a certificate, closes the connections that use it, looks again whether one came back, and tells how long each step
took, and whether the device was refused since. With --device, those certificates of the device that let it in.

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
	a.printEvidence(evidence{
		connections: r.Connections, storedAfter: r.StoredAfter, closedAfter: r.ClosedAfter, verifiedAfter: r.VerifiedAfter, clean: r.Clean, detail: r.Detail,
		storedAt: r.StoredAt, closedAt: r.ClosedAt, endedAt: r.EndedAt, refusedAt: r.RefusedAt, refusedWhy: r.RefusedWhy, lastLook: r.LastLook,
	})
}
