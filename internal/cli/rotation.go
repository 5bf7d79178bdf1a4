package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) rotationCmd() *cobra.Command {
	c := group("rotation", "replace the CAs of the fleet, step by step", a.rotationStart(), a.rotationList(), a.rotationShow(), a.rotationRequests(), a.rotationImport(),
		a.rotationCertificates(), a.rotationAdvance(), a.rotationUndo("back", "have the CAs before sign again, while the new ones are active", a.takeBack),
		a.rotationUndo("cancel", "give a rotation up whose CAs signed nothing yet", a.cancelRotation))
	c.Long = `A rotation takes the fleet from one generation of CAs to the next, and never leaves a device behind that could not follow:

  requested    keys are made; their certificates are to come from the root's ceremony (only if the root's key is elsewhere)
  prepared     the new CAs are complete; nobody trusts or uses them
  distributed  broker, listeners and devices are brought to trust the new as well as the old
  active       the new CAs sign; what the old ones signed still holds
  retiring     nothing of the old ones is needed; devices are brought to trust them no more
  removed      nobody trusts the old ones any more

Each step is taken by muster rotation advance, which refuses while something stands against it and says what: devices by name,
doors by handshakes. See docs/certificates.md.`
	return c
}

func rotationID(text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 1 {
		return 0, usagef("%q is not the number of a rotation: muster rotation list shows them", text)
	}
	return n, nil
}

func (a *app) rotationStart() *cobra.Command {
	in := api.NewRotation{}
	c := &cobra.Command{
		Use: "start device-ca|server-ca|root", Short: "make the new CAs", Args: cobra.ExactArgs(1), ValidArgs: []string{"device-ca", "server-ca", "root"},
		Long: `Makes the keys of the new CAs, and their certificates if musterd has the key of the root. If the root is kept elsewhere, go on with
muster rotation requests. Nothing is trusted and nothing is signed by them yet.`,
		Example: "  muster rotation start device-ca\n  muster rotation start root --device-key 'pkcs11:…' --server-key 'pkcs11:…'",
	}
	c.Flags().StringVar(&in.DeviceKey, "device-key", "", "URI of a key in a key manager for the new device CA; otherwise an encrypted file is made")
	c.Flags().StringVar(&in.ServerKey, "server-key", "", "the same for the new server CA")
	return a.online(c, func(ctx context.Context, args []string) error {
		in.Kind = api.RotationKind(args[0])
		r, err := client.Read[api.Rotation](a.client.StartRotation(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			a.ui.printf("rotation %d of the %s is %s\n", r.ID, r.Kind, r.State)
			if r.State == api.RotationStateRequested {
				a.ui.note("have its requests signed by the root: muster rotation requests %d --out DIR", r.ID)
			} else {
				a.ui.note("have it trusted: muster rotation advance %d", r.ID)
			}
		})
	})
}

func (a *app) rotationList() *cobra.Command {
	return a.online(&cobra.Command{Use: "list", Short: "list all rotations", Args: cobra.NoArgs}, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.RotationList](a.client.ListRotations(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			if len(l.Items) == 0 {
				a.ui.printf("no CA was replaced yet: generation 0, of musterd init, signs\n")
				return
			}
			t := a.ui.table("ROTATION", "KIND", "FROM", "STATE", "SINCE", "BY")
			for _, r := range l.Items {
				last := r.Steps[len(r.Steps)-1]
				t.row(fmt.Sprint(r.ID), string(r.Kind), fmt.Sprint(r.From), string(r.State), a.ui.ago(last.At), last.By)
			}
			t.print()
		})
	})
}

func (a *app) rotationShow() *cobra.Command {
	return a.online(&cobra.Command{
		Use: "show ID", Short: "show a rotation, and what stands against its next step", Args: cobra.ExactArgs(1),
		Long: "Looks now, handshakes at every door included. Ends with 0 if the next step can be taken, or there is none; with 5 if something stands against it.",
	}, func(ctx context.Context, args []string) error {
		id, err := rotationID(args[0])
		if err != nil {
			return err
		}
		r, err := client.Read[api.Rotation](a.client.GetRotation(ctx, id))
		if err != nil {
			return err
		}
		if err := a.ui.show(r, func() { a.printRotation(r) }); err != nil {
			return err
		}
		if len(r.Blockers) > 0 {
			return &ending{err: fmt.Errorf("something stands against the next step"), code: exitConflict, quiet: true}
		}
		return nil
	})
}

func (a *app) printRotation(r api.Rotation) {
	a.ui.facts("rotation", fmt.Sprint(r.ID), "of", string(r.Kind), "from generation", fmt.Sprint(r.From), "state", string(r.State), "trust bundle", bundleOf(r))
	t := a.ui.table("STEP", "WHEN", "BY", "WHY", "HANDSHAKES")
	for _, s := range r.Steps {
		why := s.Why
		if len(s.Forced) > 0 {
			why = "forced: " + why
		}
		t.row(s.State, a.ui.ago(s.At), s.By, why, proofTally(append(s.Before, s.After...)))
	}
	t.print()
	for _, s := range r.Steps {
		for _, f := range s.Forced {
			a.ui.printf("%s was forced against: %s\n", s.State, clean(f))
		}
	}
	if len(r.Proofs) > 0 {
		a.ui.printf("handshakes now\n")
		for _, p := range r.Proofs {
			shade := plain
			if !p.Ok {
				shade = red
			}
			a.ui.printf("  %s\n", a.ui.paint(clean(p.Words), shade))
		}
	}
	switch {
	case r.Next == "":
		a.ui.printf("it has come to its end\n")
	case len(r.Blockers) > 0:
		a.ui.printf("against %s stands\n", r.Next)
		for _, b := range r.Blockers {
			a.ui.printf("  %s\n", clean(b))
		}
	default:
		a.ui.printf("nothing stands against %s: muster rotation advance %d\n", r.Next, r.ID)
	}
}

func bundleOf(r api.Rotation) string {
	if r.Bundle == 0 {
		return ""
	}
	return fmt.Sprintf("version %d, missing on %s", r.Bundle, many(r.Lacking.Count, "device"))
}

func proofTally(list []api.Proof) string {
	good := 0
	for _, p := range list {
		if p.Ok {
			good++
		}
	}
	if len(list) == 0 {
		return ""
	}
	return fmt.Sprintf("%d of %d good", good, len(list))
}

func (a *app) rotationRequests() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use: "requests ID", Short: "get the certificate requests that the root has to sign", Args: cobra.ExactArgs(1),
		Long: `Prints them, or writes them into a folder. Bring them to where the root's key is and sign each with muster ca root sign; compare the
hash of the key there with the one that is shown here.`,
		Example: "  muster rotation requests 1 --out to-the-root/",
	}
	c.Flags().StringVar(&out, "out", "", "folder for device-ca.csr and server-ca.csr")
	return a.online(c, func(ctx context.Context, args []string) error {
		id, err := rotationID(args[0])
		if err != nil {
			return err
		}
		l, err := client.Read[api.RotationRequestList](a.client.ListRotationRequests(ctx, id))
		if err != nil {
			return err
		}
		if out != "" {
			if err := os.MkdirAll(out, 0o755); err != nil {
				return err
			}
			for _, q := range l.Items {
				if err := os.WriteFile(filepath.Join(out, filepath.Base(q.Profile)+".csr"), []byte(q.CSRPEM), 0o644); err != nil {
					return err
				}
			}
		}
		return a.ui.show(l.Items, func() {
			for _, q := range l.Items {
				if out == "" {
					a.ui.printf("%s", q.CSRPEM)
				}
				a.ui.note("%s: sha256 of its key %s", q.Profile, q.KeySHA256)
			}
		})
	})
}

func (a *app) rotationImport() *cobra.Command {
	return a.online(&cobra.Command{
		Use: "import ID FILE...", Short: "bring the certificates that the root signed", Args: cobra.MinimumNArgs(2),
		Long: `Takes PEM files with the certificates of the new intermediates. For a new root also its own certificate, that of a new spare root,
and the cross-certificate by which the old root vouches for the new one (muster ca root cross-sign). Each is recognised by
what it is; nothing is taken over unless all of it fits together.`,
		Example: "  muster rotation import 1 device-ca.crt server-ca.crt",
	}, func(ctx context.Context, args []string) error {
		id, err := rotationID(args[0])
		if err != nil {
			return err
		}
		in := api.RotationImport{}
		for _, path := range args[1:] {
			raw, err := a.readInput(path, 32<<10)
			if err != nil {
				return err
			}
			in.PEM += strings.TrimRight(string(raw), "\n") + "\n"
		}
		r, err := client.Read[api.Rotation](a.client.ImportRotationCertificates(ctx, id, in))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			a.ui.printf("rotation %d is %s: muster rotation advance %d has it trusted\n", r.ID, r.State, r.ID)
		})
	})
}

func (a *app) rotationCertificates() *cobra.Command {
	return a.online(&cobra.Command{
		Use: "certificates ID", Short: "print the new CAs, and the roots that devices are to trust", Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, args []string) error {
		id, err := rotationID(args[0])
		if err != nil {
			return err
		}
		g, err := client.Read[api.RotationCertificates](a.client.GetRotationCertificates(ctx, id))
		if err != nil {
			return err
		}
		return a.ui.show(g, func() {
			a.ui.printf("# roots of the trust bundle for the next step\n%s", g.RootsPEM)
			if g.CrossPEM != "" {
				a.ui.printf("# cross-certificate\n%s", g.CrossPEM)
			}
			a.ui.printf("# new device CA\n%s# new server CA\n%s", g.DeviceCaPEM, g.ServerCaPEM)
		})
	})
}

func (a *app) rotationAdvance() *cobra.Command {
	in := api.RotationStepOrder{}
	c := &cobra.Command{
		Use: "advance ID", Short: "take the next step", Args: cobra.ExactArgs(1),
		Long: `Takes the next step if nothing stands against it, and shows the handshakes that prove it. With --force it is taken all the same:
devices that are named then may have to come back over the fallback. The reason is kept.`,
		Example: "  muster rotation advance 1\n  muster rotation advance 1 --force --why 'the three that are missing lie in the workshop'",
	}
	c.Flags().BoolVar(&in.Force, "force", false, "in spite of what stands against it")
	c.Flags().StringVar(&in.Why, "why", "", "a reason, for the record; required with --force")
	return a.online(c, func(ctx context.Context, args []string) error {
		id, err := rotationID(args[0])
		if err != nil {
			return err
		}
		if in.Force && in.Why == "" {
			return usagef("--force needs a reason: --why")
		}
		return a.stepped(client.Read[api.Rotation](a.client.AdvanceRotation(ctx, id, in)))
	})
}

func (a *app) rotationUndo(use, short string, do func(context.Context, int64, api.RotationStepOrder) (api.Rotation, error)) *cobra.Command {
	in := api.RotationStepOrder{}
	c := &cobra.Command{Use: use + " ID", Short: short, Args: cobra.ExactArgs(1)}
	c.Flags().StringVar(&in.Why, "why", "", "a reason, for the record")
	return a.online(c, func(ctx context.Context, args []string) error {
		id, err := rotationID(args[0])
		if err != nil {
			return err
		}
		return a.stepped(do(ctx, id, in))
	})
}

func (a *app) takeBack(ctx context.Context, id int64, in api.RotationStepOrder) (api.Rotation, error) {
	return client.Read[api.Rotation](a.client.TakeBackRotation(ctx, id, in))
}

func (a *app) cancelRotation(ctx context.Context, id int64, in api.RotationStepOrder) (api.Rotation, error) {
	return client.Read[api.Rotation](a.client.CancelRotation(ctx, id, in))
}

// stepped shows a rotation after a step, with its handshakes.
func (a *app) stepped(r api.Rotation, err error) error {
	if err != nil {
		return err
	}
	return a.ui.show(r, func() {
		a.ui.printf("rotation %d of the %s is %s\n", r.ID, r.Kind, r.State)
		for _, p := range r.Steps[len(r.Steps)-1].After {
			a.ui.printf("  %s\n", clean(p.Words))
		}
		for _, b := range r.Blockers {
			a.ui.printf("against %s stands: %s\n", r.Next, clean(b))
		}
	})
}
