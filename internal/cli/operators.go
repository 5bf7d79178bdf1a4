package cli

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) tokenCmd() *cobra.Command {
	in := api.NewToken{}
	var role, out string
	create := &cobra.Command{
		Use: "create NAME --role ROLE", Short: "make a token; its secret is shown this once", Args: cobra.ExactArgs(1),
		Long: "Makes a token. viewer reads, operator changes devices, certificates, releases and rollouts, admin also tokens and signing keys.",
	}
	create.Flags().StringVar(&role, "role", "", "viewer, operator or admin")
	create.Flags().StringVar(&in.ExpiresIn, "expires-in", "2160h", "how long it works, like 720h, or never")
	create.Flags().StringVar(&out, "out", "", "write the secret to this file, which must not exist, instead of printing it")
	_ = create.MarkFlagRequired("role")
	_ = create.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"viewer", "operator", "admin"}, cobra.ShellCompDirectiveNoFileComp))
	a.online(create, func(ctx context.Context, args []string) error {
		in.Name, in.Role = args[0], api.Role(role)
		if out != "" && exists(out) {
			return usagef("%s exists already", out)
		}
		t, err := client.Read[api.CreatedToken](a.client.CreateToken(ctx, in))
		if err != nil {
			return err
		}
		if out != "" {
			if err := replaceFile(out, []byte(t.Secret+"\n"), 0o600); err != nil {
				return fmt.Errorf("token %s was made, but its secret could not be kept; delete it: %w", clean(t.Token.Name), err)
			}
			t.Secret = ""
		}
		return a.ui.show(t, func() {
			if out != "" {
				a.ui.printf("wrote token %s to %s\n", clean(t.Token.Name), out)
				return
			}
			a.ui.printf("%s\n", clean(t.Secret))
			a.ui.note("this is the only time that it is shown")
		})
	})
	list := a.online(&cobra.Command{Use: "list", Short: "list tokens", Args: cobra.NoArgs}, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.TokenList](a.client.ListTokens(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			t := a.ui.table("NAME", "ROLE", "LEFT", "MADE", "BY")
			for _, k := range l.Items {
				left := cell{text: "for ever"}
				if !k.ExpiresAt.IsZero() {
					if left.text = a.ui.left(k.ExpiresAt); left.text == "over" {
						left.shade = red
					}
				}
				t.row(k.Name, string(k.Role), left, a.ui.ago(k.CreatedAt), k.CreatedBy)
			}
			t.print()
		})
	})
	del := a.online(&cobra.Command{Use: "delete NAME", Short: "delete a token; it stops working at once", Args: cobra.ExactArgs(1)}, func(ctx context.Context, args []string) error {
		if err := client.Done(a.client.DeleteToken(ctx, args[0])); err != nil {
			return err
		}
		return a.ui.show(map[string]string{"deleted": args[0]}, func() { a.ui.printf("deleted token %s\n", clean(args[0])) })
	})
	return group("token", "who may use the API", create, list, del)
}

func (a *app) quarantineCmd() *cobra.Command {
	var limit int
	list := &cobra.Command{Use: "list", Short: "list messages that could not be handled, oldest first", Args: cobra.NoArgs}
	list.Flags().IntVar(&limit, "limit", 100, "at most this many; 0: all")
	a.online(list, func(ctx context.Context, _ []string) error {
		qs, err := take(limit, func(cursor string) ([]api.Quarantined, string, error) {
			l, err := client.Read[api.QuarantineList](a.client.ListQuarantine(ctx, &api.ListQuarantineParams{Limit: 500, Cursor: cursor}))
			return l.Items, l.NextCursor, err
		})
		if err != nil {
			return err
		}
		return a.ui.show(qs, func() {
			if len(qs) == 0 {
				a.ui.note("nothing is in quarantine")
				return
			}
			t := a.ui.table("NUMBER", "WHEN", "VHOST", "KEY", "BYTES", "REASON", "DETAILS")
			for _, q := range qs {
				t.row(q.Seq, a.ui.ago(q.At), q.Vhost, q.Key, q.Size, q.Reason, q.Details)
			}
			t.print()
		})
	})
	show := a.online(&cobra.Command{Use: "show NUMBER", Short: "show one with the start of its body", Args: cobra.ExactArgs(1)}, func(ctx context.Context, args []string) error {
		n, err := number(args[0])
		if err != nil {
			return err
		}
		q, err := client.Read[api.Quarantined](a.client.GetQuarantined(ctx, n))
		if err != nil {
			return err
		}
		return a.ui.show(q, func() {
			a.ui.facts("number", fmt.Sprint(q.Seq), "when", q.At, "vhost", q.Vhost, "key", q.Key, "bytes", fmt.Sprint(q.Size), "reason", q.Reason, "details", q.Details, "body", string(q.Body))
		})
	})
	drop := a.online(&cobra.Command{Use: "drop NUMBER...", Short: "remove messages", Args: cobra.MinimumNArgs(1)}, func(ctx context.Context, args []string) error {
		for _, arg := range args {
			n, err := number(arg)
			if err != nil {
				return err
			}
			if err := client.Done(a.client.DropQuarantined(ctx, n)); err != nil {
				return err
			}
		}
		return a.ui.show(map[string]int{"dropped": len(args)}, func() { a.ui.printf("dropped %d\n", len(args)) })
	})
	return group("quarantine", "messages that could not be handled", list, show, drop)
}

func number(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return 0, usagef("name a message by its number")
	}
	return n, nil
}
