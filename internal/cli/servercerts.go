package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) serverCertsCmd() *cobra.Command {
	list := a.online(&cobra.Command{
		Use: "list", Short: "list the certificates by which muster and its broker prove themselves", Args: cobra.NoArgs,
		Long: `Lists them with what the broker was seen to serve at each of its ports. Those that muster's own CA issued are renewed after two
thirds of their life. One that is not served as its files say has the word "not" in the column PROVEN.`,
	}, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.ServerCertificateList](a.client.ListServerCertificates(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() { a.printServerCerts(l.Items) })
	})
	renew := a.online(&cobra.Command{
		Use: "renew NAME", Short: "renew one now, with a new key", Args: cobra.ExactArgs(1),
		Long: "The new certificate is served at once, and connections that stand are not touched. One of another CA is renewed there, not here.",
	}, func(ctx context.Context, args []string) error {
		s, err := client.Read[api.ServerCertificate](a.client.RenewServerCertificate(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(s, func() { a.printServerCerts([]api.ServerCertificate{s}) })
	})
	return group("server-certs", "the certificates by which muster and its broker prove themselves", list, renew)
}

func (a *app) printServerCerts(list []api.ServerCertificate) {
	t := a.ui.table("NAME", "WHERE", "SERIAL", "ISSUER", "ENDS IN", "RENEWS IN", "PROVEN")
	for _, s := range list {
		where, renews := cell{s.File, plain}, "not by muster"
		if s.File == "" {
			where = cell{"not on this machine", plain}
		}
		if !s.RenewsAt.IsZero() {
			renews = a.ui.left(s.RenewsAt)
		}
		ends := "-"
		if !s.NotAfter.IsZero() {
			ends = a.ui.left(s.NotAfter)
		}
		t.row(s.Name, where, s.Serial, s.Issuer, ends, renews, "")
		for _, d := range s.Doors {
			proven := cell{"yes", green}
			switch {
			case d.Error != "":
				proven = cell{"cannot be seen", yellow}
			case !d.Proven:
				proven = cell{"not", red}
			}
			ends := "-"
			if !d.NotAfter.IsZero() {
				ends = a.ui.left(d.NotAfter)
			}
			t.row("  "+d.Name, d.Address, d.Serial, "", ends, "", proven)
		}
	}
	t.print()
	for _, s := range list {
		if s.Refused != "" {
			a.ui.note("%s: the files are refused, the certificate before stays in use: %s", clean(s.Name), clean(s.Refused))
		}
		if s.Failed != "" {
			a.ui.note("%s: the last renewal failed: %s", clean(s.Name), clean(s.Failed))
		}
	}
}

func (a *app) expiriesCmd() *cobra.Command {
	return a.online(&cobra.Command{
		Use: "expiries", Short: "list everything that ends, the soonest first", Args: cobra.NoArgs,
		Long: `Lists CAs, server certificates in files and as the broker serves them, revocation lists, tokens and keys, with the share of their
life that is left. Alarms come at 50, 25 and 10 percent, and at the end.`,
	}, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.ExpiryList](a.client.ListExpiries(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(l, func() { a.printExpiries(l) })
	})
}

func (a *app) printExpiries(l api.ExpiryList) {
	t := a.ui.table("KIND", "NAME", "ENDS", "IN", "LEFT", "ALARM", "RENEWS IN")
	for _, e := range l.Items {
		renews := "-"
		if !e.RenewsAt.IsZero() {
			renews = a.ui.left(e.RenewsAt)
		}
		alarm := cell{string(e.Alarm), plain}
		switch e.Alarm {
		case api.ExpiryAlarmN25:
			alarm.shade = yellow
		case api.ExpiryAlarmN10, api.ExpiryAlarmEnded:
			alarm.shade = red
		}
		t.row(e.Kind, e.Name, e.NotAfter.UTC().Format("2006-01-02"), a.ui.left(e.NotAfter), fmt.Sprintf("%d %%", e.LeftPercent), alarm, renews)
	}
	t.print()
	for _, e := range l.Items {
		if e.Alarm == api.ExpiryAlarmN10 || e.Alarm == api.ExpiryAlarmEnded {
			a.ui.note("%s %s: %s", clean(e.Kind), clean(e.Name), clean(e.Fix))
		}
	}
	if l.Incomplete != "" {
		a.ui.note("not everything could be listed: %s", clean(strings.TrimSpace(l.Incomplete)))
	}
}
