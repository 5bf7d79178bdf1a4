package cli

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
	"muster/internal/signing"
)

func (a *app) trustCmd() *cobra.Command {
	return group("trust", "the trust bundle: the roots that devices believe", a.trustShow(), a.trustStatus(), a.trustSign(), a.trustPublish())
}

func (a *app) trustShow() *cobra.Command {
	var asPEM, signed bool
	c := &cobra.Command{Use: "show", Short: "show the trust bundle in force", Args: cobra.NoArgs}
	c.Flags().BoolVar(&asPEM, "pem", false, "print its roots")
	c.Flags().BoolVar(&signed, "signed", false, "print it as devices get it")
	c.MarkFlagsMutuallyExclusive("pem", "signed")
	return a.online(c, func(ctx context.Context, _ []string) error {
		b, err := client.Read[api.TrustBundle](a.client.GetTrustBundle(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(b, func() {
			switch {
			case asPEM:
				a.ui.printf("%s", b.RootsPEM)
			case signed:
				a.ui.printf("%s\n", b.Signed)
			default:
				a.printBundle(b)
			}
		})
	})
}

func (a *app) printBundle(b api.TrustBundle) {
	by := b.By
	if by == "" {
		by = "muster"
	}
	a.ui.facts("version", fmt.Sprint(b.Version), "roots", fmt.Sprint(strings.Count(b.RootsPEM, "BEGIN")), "cross-certificates", fmt.Sprint(strings.Count(b.CrossPEM, "BEGIN")),
		"published", b.PublishedAt, "by", by, "bytes", fmt.Sprint(len(b.Signed)))
}

func (a *app) trustStatus() *cobra.Command {
	p := api.ListTrustDevicesParams{}
	c := &cobra.Command{
		Use: "status", Short: "say who trusts what, and who does not have the newest bundle yet", Args: cobra.NoArgs,
		Long: `Counts devices by the version of the bundle that they said hello with, and names those without the newest, not seen for
longest first. Version 0 are the roots that a device was made with. Retire a root only when nobody needs it any more.`,
	}
	c.Flags().IntVar(&p.Limit, "limit", 20, "name at most this many")
	return a.online(c, func(ctx context.Context, _ []string) error {
		s, err := client.Read[api.TrustSpread](a.client.ListTrustDevices(ctx, &p))
		if err != nil {
			return err
		}
		return a.ui.show(s, func() {
			a.ui.printf("version %d is trusted by %d of %d devices\n", s.Version, s.Acked, s.Devices)
			for _, v := range s.Versions {
				if v.Version != s.Version {
					a.ui.printf("  version %d: %s\n", v.Version, many(v.Devices, "device"))
				}
			}
			if len(s.Stragglers) == 0 {
				return
			}
			t := a.ui.table("WITHOUT IT", "HAS", "LAST SEEN", "CONNECTED")
			for _, d := range s.Stragglers {
				seen, online := "never", "no"
				if !d.LastSeen.IsZero() {
					seen = a.ui.ago(d.LastSeen)
				}
				if d.Online {
					online = "yes"
				}
				t.row(d.Device, fmt.Sprint(d.Version), seen, online)
			}
			t.print()
			if s.More {
				a.ui.note("there are more: raise --limit")
			}
		})
	})
}

func (a *app) trustSign() *cobra.Command {
	var key, pass, out string
	var version int64
	var roots, cross []string
	c := &cobra.Command{
		Use: "sign --key FILE --version N --root FILE...", Short: "sign a trust bundle where its key is (offline)", Args: cobra.NoArgs,
		Long: `Signs a trust bundle with the trust key (trust.key of musterd's pki folder), which is best kept off musterd's machine. The
version must be above the one in force (muster trust show). Bring the result to muster trust publish.`,
		Example: "  muster trust sign --key trust.key --passphrase-file p --version 2 --root root.crt --root new-root.crt --cross new-by-old.crt --out bundle.jws",
	}
	f := c.Flags()
	f.StringVar(&key, "key", "", "the trust key, PEM")
	f.StringVar(&pass, "passphrase-file", "", "its passphrase, or - for standard input")
	f.Int64Var(&version, "version", 0, "of the bundle, above the one in force")
	f.StringArrayVar(&roots, "root", nil, "file with root certificates, PEM, the one in use first; may be repeated")
	f.StringArrayVar(&cross, "cross", nil, "file with cross-certificates, PEM; may be repeated")
	f.StringVar(&out, "out", "", "file for the bundle; empty: standard output")
	for _, name := range []string{"key", "version", "root"} {
		_ = c.MarkFlagRequired(name)
	}
	c.RunE = func(*cobra.Command, []string) error {
		signer, err := signing.LoadKey(key, func() ([]byte, error) { return a.passphrase(pass) })
		if err != nil {
			return err
		}
		text, err := signing.SignTrust(signer, version, a.ui.now(), roots, cross)
		if err != nil {
			return err
		}
		if out == "" {
			a.ui.printf("%s\n", text)
			return nil
		}
		if err := os.WriteFile(out, []byte(text+"\n"), 0o644); err != nil {
			return err
		}
		a.ui.note("signed version %d into %s: muster trust publish --signed %s", version, out, out)
		return nil
	}
	return c
}

func (a *app) trustPublish() *cobra.Command {
	var signed string
	var roots, cross []string
	var force bool
	c := &cobra.Command{
		Use: "publish --signed FILE | publish --root FILE...", Short: "bring a new trust bundle to every device", Args: cobra.NoArgs,
		Long: `Publishes a trust bundle: one that was signed by muster trust sign, or roots that musterd signs, if it has the key. Devices
take it if its signature holds and its version is above theirs. A bundle that holds no root in use is refused: devices that take
it could not reach muster any more.`,
	}
	f := c.Flags()
	f.StringVar(&signed, "signed", "", "file with a signed bundle, or - for standard input")
	f.StringArrayVar(&roots, "root", nil, "file with root certificates, PEM, the one in use first; may be repeated")
	f.StringArrayVar(&cross, "cross", nil, "with --root: file with cross-certificates, PEM; may be repeated")
	f.BoolVar(&force, "force", false, "even if no root of it is in use")
	c.MarkFlagsOneRequired("signed", "root")
	c.MarkFlagsMutuallyExclusive("signed", "root")
	c.MarkFlagsMutuallyExclusive("signed", "cross")
	return a.online(c, func(ctx context.Context, _ []string) error {
		in := api.NewTrustBundle{Force: force}
		var err error
		for _, part := range []struct {
			files []string
			to    *string
		}{{roots, &in.RootsPEM}, {cross, &in.CrossPEM}} {
			for _, path := range part.files {
				raw, err := a.readInput(path, 64<<10)
				if err != nil {
					return err
				}
				*part.to += strings.TrimRight(string(raw), "\n") + "\n"
			}
		}
		if signed != "" {
			raw, readErr := a.readInput(signed, 64<<10)
			if err = readErr; err != nil {
				return err
			}
			in.Signed = strings.TrimSpace(string(raw))
		}
		b, err := client.Read[api.TrustBundle](a.client.PublishTrustBundle(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(b, func() {
			a.printBundle(b)
			a.ui.note("muster trust status says who has it")
		})
	})
}
