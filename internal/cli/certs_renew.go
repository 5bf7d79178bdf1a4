package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

// Exit codes of certs renew: fewer than elsewhere, so that cron and a systemd timer can act on them.
const (
	renewDone      = 0
	renewAttention = 1 // devices that cannot renew, or have not in time
	renewFailed    = 2 // the pass could not be made
)

// ending is an error that brings its exit code. quiet: what it has to say was said.
type ending struct {
	err   error
	code  int
	quiet bool
}

func (v *ending) Error() string { return v.err.Error() }
func (v *ending) Unwrap() error { return v.err }

// waitBatch is how many devices one question asks about, the most that REST takes.
const waitBatch = 1000

func (a *app) certsRenew() *cobra.Command {
	in := api.RenewalPass{}
	var wait bool
	var timeout, every time.Duration
	c := &cobra.Command{
		Use: "renew", Short: "one pass of renewals, for cron", Args: cobra.NoArgs,
		Long: `Asks devices to renew their certificate: those that are due, nearest end first. A device that was asked already is not
asked again, so this can run as often as you like. A device that is not connected hears of it when it comes.

With --over, nobody is asked now: each device gets a moment of its own within that time, at which the passes that follow
ask it. Use it to renew a fleet ahead of time without everybody coming at once.

Exit codes, for cron and systemd:
  0  everybody who is due was asked; with --wait, has renewed
  1  somebody needs attention: devices that cannot renew, that the limit left out, or, with --wait, that have not renewed
  2  the pass could not be made`,
		Example: "  muster certs renew --limit 500\n  muster certs renew --within 240h --wait --timeout 1h\n  muster certs renew --all --over 24h",
	}
	f := c.Flags()
	f.StringVar(&in.Within, "within", "", "those that end within this time instead, like 720h")
	f.BoolVar(&in.All, "all", false, "every device instead")
	f.StringVar(&in.Issuer, "issuer", "", "those whose certificate this CA signed instead, by its key identifier (muster rotation show)")
	f.StringSliceVar(&in.Devices, "device", nil, "these devices instead")
	f.IntVar(&in.Limit, "limit", 0, "at most this many; 0: no limit")
	f.BoolVar(&in.DryRun, "dry-run", false, "ask nobody, say who would be asked")
	f.StringVar(&in.Over, "over", "", "with --within, --all, --issuer or --device: spread the renewals over this time")
	f.BoolVar(&wait, "wait", false, "wait until those who were asked, now or before, have renewed")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "with --wait: how long")
	f.DurationVar(&every, "poll", 2*time.Second, "with --wait: how often to look")
	_ = f.MarkHidden("poll")
	c.MarkFlagsMutuallyExclusive("within", "all", "issuer", "device")
	c.MarkFlagsMutuallyExclusive("wait", "dry-run")
	c.MarkFlagsMutuallyExclusive("wait", "over")
	return a.online(c, func(ctx context.Context, _ []string) error {
		r, err := client.Read[api.RenewalReport](a.client.RenewCertificates(ctx, in))
		if err != nil {
			return &ending{err: err, code: renewFailed}
		}
		late := []string{}
		if wait {
			if late, err = a.awaitRenewals(ctx, r.Waiting, timeout, every); err != nil {
				return &ending{err: err, code: renewFailed}
			}
			r.Waiting = late
		}
		if err := a.ui.show(r, func() { a.printRenewals(r, wait) }); err != nil {
			return err
		}
		if len(r.Skipped) > 0 || r.More || len(late) > 0 {
			return &ending{err: fmt.Errorf("devices need attention"), code: renewAttention, quiet: true}
		}
		return nil
	})
}

// awaitRenewals waits until the devices have renewed, and returns those that had not when the time was up.
func (a *app) awaitRenewals(ctx context.Context, devices []string, timeout, every time.Duration) ([]string, error) {
	limit, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	all := len(devices)
	for len(devices) > 0 {
		select {
		case <-limit.Done():
			return devices, ctx.Err() // nil if it was the time, and not the operator
		case <-time.After(every):
		}
		left := []string{}
		for batch := range slices.Chunk(devices, waitBatch) {
			r, err := client.Read[api.RenewalReport](a.client.RenewCertificates(ctx, api.RenewalPass{Devices: batch, DryRun: true}))
			if err != nil {
				return nil, err
			}
			left = append(left, r.Waiting...)
		}
		if len(left) < len(devices) {
			a.ui.note("%d of %d have renewed", all-len(left), all)
		}
		devices = left
	}
	return devices, nil
}

func (a *app) printRenewals(r api.RenewalReport, waited bool) {
	verb := "asked"
	if r.DryRun {
		verb = "would ask"
	}
	a.ui.printf("due %d, %s %d (%d not connected), asked before %d\n", r.Due, verb, len(r.Asked), r.Offline, r.Already)
	if r.Spread > 0 {
		a.ui.printf("%d devices have a moment of their own\n", r.Spread)
	}
	a.some(r.Asked)
	if len(r.Skipped) > 0 {
		t := a.ui.table("PASSED OVER", "WHY")
		for _, s := range r.Skipped {
			t.row(s.Device, s.Why)
		}
		t.print()
	}
	if waited && len(r.Waiting) > 0 {
		a.ui.printf("%d have not renewed in time:\n", len(r.Waiting))
		a.some(r.Waiting)
	}
	if r.More {
		a.ui.note("the limit left some out: run again, or raise --limit")
	}
}

// some prints the first of a list.
func (a *app) some(devices []string) {
	for i, d := range devices {
		if i == 10 {
			a.ui.note("  and %d others; --output json names them all", len(devices)-i)
			return
		}
		a.ui.printf("  %s\n", clean(d))
	}
}

func (a *app) certsStatus() *cobra.Command {
	c := &cobra.Command{
		Use: "status", Short: "the fleet by the days that its certificates have left", Args: cobra.NoArgs,
		Long: "Counts devices, each by the newest certificate that lets it in, in the shortest time that it fits.",
	}
	return a.online(c, func(ctx context.Context, _ []string) error {
		s, err := client.Read[api.CertificateStatus](a.client.GetCertificateStatus(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(s, func() {
			t := a.ui.table("ENDS WITHIN", "DEVICES", "SOONEST")
			for _, h := range s.Horizons {
				within, shade := h.Within, plain
				switch d, err := time.ParseDuration(h.Within); {
				case h.Within == "ended" && h.Devices > 0:
					shade = red
				case err == nil:
					within = days(d)
					if d <= 7*24*time.Hour && h.Devices > 0 {
						shade = yellow
					}
				}
				t.row(within, cell{fmt.Sprint(h.Devices), shade}, h.First)
			}
			t.print()
			a.ui.printf("due for renewal %d, asked and waited for %d", s.Due, s.Asked)
			if !s.Oldest.IsZero() {
				a.ui.printf(", the first %s", a.ui.ago(s.Oldest))
			}
			a.ui.printf("\ndisabled or revoked %d, never enrolled %d\n", s.Barred, s.Without)
		})
	})
}

func days(d time.Duration) string {
	if n := int(d / (24 * time.Hour)); n != 1 {
		return fmt.Sprint(n, " days")
	}
	return "1 day"
}

func (a *app) certsForecast() *cobra.Command {
	p := api.ForecastCertificatesParams{}
	c := &cobra.Command{
		Use: "forecast", Short: "say which devices will be locked out, when, and why", Args: cobra.NoArgs,
		Long: `Joins the end of each device's certificate with its habit of being there, and says who will be locked out:

  locked-out   the certificate has ended
  locking-out  nothing says that it will come in time
  at-risk      it may miss its window

A device with a password for the fallback comes back by itself, if it can reach port 8884.`,
	}
	c.Flags().StringVar(&p.Within, "within", "", "lock-outs that come within this time, like 720h")
	c.Flags().IntVar(&p.Limit, "limit", 100, "at most this many, the worst and soonest first")
	return a.online(c, func(ctx context.Context, _ []string) error {
		f, err := client.Read[api.CertificateForecast](a.client.ForecastCertificates(ctx, &p))
		if err != nil {
			return err
		}
		return a.ui.show(f, func() {
			a.ui.printf("%d devices: %d renew, %d at risk, %d locking out, %d locked out\n", f.Devices, f.Renews, f.AtRisk, f.LockingOut, f.LockedOut)
			if len(f.Items) == 0 {
				return
			}
			t := a.ui.table("DEVICE", "OUTLOOK", "LOCKED OUT", "FALLBACK", "WHY")
			for _, d := range f.Items {
				shade := yellow
				if d.Outlook != "at-risk" {
					shade = red
				}
				fallback := "no"
				if d.Fallback {
					fallback = "yes"
				}
				t.row(d.Device, cell{string(d.Outlook), shade}, text(d.At), fallback, d.Why)
			}
			t.print()
			if f.More {
				a.ui.note("there are more: raise --limit, or shorten --within")
			}
		})
	})
}

func (a *app) certsPolicy() *cobra.Command {
	return group("policy", "how long certificates hold", a.certsPolicyShow(), a.certsPolicySet())
}

func (a *app) certsPolicyShow() *cobra.Command {
	c := &cobra.Command{Use: "show", Short: "show the policy in force", Args: cobra.NoArgs}
	return a.online(c, func(ctx context.Context, _ []string) error {
		p, err := client.Read[api.CertificatePolicy](a.client.GetCertificatePolicy(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(p, func() { a.printPolicy(p) })
	})
}

func (a *app) printPolicy(p api.CertificatePolicy) {
	by := p.By
	if by == "" {
		by = "the settings"
	}
	a.ui.facts("lifetime", p.Lifetime, "grace", p.Grace, "since", p.Since, "by", by, "settings say", "lifetime "+p.Settings.Lifetime+", grace "+p.Settings.Grace)
	if p.Why != "" {
		a.ui.note("refused, from the settings: lifetime %s, grace %s: %s", p.Refused.Lifetime, p.Refused.Grace, clean(p.Why))
		a.ui.note("muster certs policy set --lifetime %s --force does it anyway", p.Refused.Lifetime)
	}
}

func (a *app) certsPolicySet() *cobra.Command {
	in := api.NewCertificatePolicy{}
	c := &cobra.Command{
		Use: "set", Short: "change how long certificates hold", Args: cobra.NoArgs,
		Long: `Changes the lifetime of certificates that are issued from now on. Devices that are away for longer than a new lifetime gives
them time to renew would be locked out: if that is more than the share that the settings allow, the change is refused
unless you force it. Try it with --dry-run.`,
		Example: "  muster certs policy set --lifetime 720h --dry-run",
	}
	f := c.Flags()
	f.StringVar(&in.Lifetime, "lifetime", "", "of a device certificate, like 2160h")
	f.StringVar(&in.Grace, "grace", "", "from replaced to revoked, like 24h")
	f.BoolVar(&in.Force, "force", false, "even if it locks devices out")
	f.BoolVar(&in.DryRun, "dry-run", false, "change nothing, say what it would do")
	c.MarkFlagsOneRequired("lifetime", "grace")
	return a.online(c, func(ctx context.Context, _ []string) error {
		r, err := client.Read[api.CertificatePolicyReport](a.client.SetCertificatePolicy(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			a.printPolicy(r.Policy)
			a.ui.printf("%d of %d devices are away for so long at times that they would miss their renewal", r.Lost, r.Devices)
			if len(r.Sample) > 0 {
				a.ui.printf(": %s", clean(strings.Join(r.Sample, ", ")))
			}
			a.ui.printf("\n")
			switch {
			case r.DryRun && r.Refused:
				a.ui.note("dry run: nothing was changed, and without --force it would be refused")
			case r.DryRun:
				a.ui.note("dry run: nothing was changed")
			}
		})
	})
}
