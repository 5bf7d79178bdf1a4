package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) certsRevoke() *cobra.Command {
	in := api.NewRevocation{}
	var reason, device, issuer string
	var drill, yes bool
	c := &cobra.Command{
		Use: "revoke SERIAL | revoke --device ID | revoke --issuer KEYID --drill|--yes", Short: "revoke a certificate for good", Args: cobra.MaximumNArgs(1),
		Long: `Revokes a certificate, closes the connections that use it, looks again whether one came back, and tells how long each step
took, and whether the device was refused since. With --device, those certificates of the device that let it in.

With --issuer, every certificate of a CA that holds: for an intermediate that is not to be trusted any more. musterd does it in the
background and goes on after a restart; this waits and shows how far it is. --drill does all of it but the commits, and says how
many certificates it would be and how long it would take at least. muster certs crl shows the key ids of the issuers.

Reasons: unspecified, key-compromise, affiliation-changed, superseded, cessation-of-operation, privilege-withdrawn.`,
	}
	c.Flags().StringVar(&reason, "reason", "unspecified", "why (RFC 5280)")
	c.Flags().StringVar(&device, "device", "", "the certificates of this device")
	c.Flags().StringVar(&issuer, "issuer", "", "all certificates of the CA with this key id")
	c.Flags().BoolVar(&drill, "drill", false, "with --issuer: change nothing, say what it would be")
	c.Flags().BoolVar(&yes, "yes", false, "with --issuer: do it; there is no way back")
	c.MarkFlagsMutuallyExclusive("drill", "yes")
	c.MarkFlagsMutuallyExclusive("device", "issuer")
	_ = c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions([]string{"unspecified", "key-compromise", "affiliation-changed", "superseded", "cessation-of-operation", "privilege-withdrawn"}, cobra.ShellCompDirectiveNoFileComp))
	return a.online(c, func(ctx context.Context, args []string) error {
		in.Reason = api.RevocationReason(reason)
		if issuer != "" {
			if len(args) > 0 || drill == yes {
				return usagef("--issuer goes with --drill to try it, or with --yes to do it, and names all there is to revoke")
			}
			return a.revokeIssuer(ctx, issuer, api.NewMassRevocation{Reason: in.Reason, Drill: drill})
		}
		if (len(args) == 1) == (device != "") || drill || yes {
			return usagef("name a serial, or a device with --device, or an issuer with --issuer")
		}
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

// massEvery is how often a mass revocation is asked how far it is.
const massEvery = 500 * time.Millisecond

// revokeIssuer orders a mass revocation, or a drill of one, and waits until it is done.
func (a *app) revokeIssuer(ctx context.Context, issuer string, in api.NewMassRevocation) error {
	m, err := client.Read[api.MassRevocation](a.client.RevokeIssuer(ctx, issuer, in))
	if err != nil {
		return err
	}
	bar := a.ui.meter("revoking", int64(m.Total), func(n int64) string { return fmt.Sprint(n) })
	for m.State == api.MassRevocationStateRunning {
		bar.set(int64(min(m.Revoked, m.Total)))
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d certificates are revoked; musterd goes on: %w", m.Revoked, m.Total, ctx.Err())
		case <-time.After(massEvery):
		}
		next, err := client.Read[api.MassRevocation](a.client.GetMassRevocation(ctx, issuer))
		if err != nil {
			return fmt.Errorf("%d of %d certificates are revoked; musterd goes on if it can: %w", m.Revoked, m.Total, err)
		}
		m = next
	}
	bar.end()
	return a.ui.show(m, func() { a.printMass(m) })
}

func (a *app) printMass(m api.MassRevocation) {
	if m.State == api.MassRevocationStateDrill {
		a.ui.printf("a drill: nothing was changed\n")
		a.ui.facts("  issuer", m.Issuer, "  would be revoked", fmt.Sprint(m.Total), "  would be closed", fmt.Sprint(m.Connections), "  the drill took", m.Took, "  takes at least", m.Estimate)
		return
	}
	a.ui.printf("revoked %d certificates of issuer %s\n", m.Revoked, clean(m.Issuer))
	a.ui.facts("  connections", fmt.Sprint(m.Connections), "  still looked for", fmt.Sprint(m.Closing), "  ordered", m.Since, "  done", m.DoneAt, "  took", m.Took)
}
