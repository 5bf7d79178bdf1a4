package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"muster/api"
	"muster/internal/client"
)

// outAtOnce is how many devices are shut out at a time: each call waits for the proof.
const outAtOnce = 8

func (a *app) deviceDisable() *cobra.Command {
	c := &cobra.Command{
		Use: "disable ID...", Short: "refuse a device at every door", Args: cobra.MinimumNArgs(1),
		Long: `Refuses a device at every door until it is enabled again, closes its connections, looks again whether one came back, and
tells how long each step took, and whether it was refused since.`,
	}
	return a.online(c, func(ctx context.Context, args []string) error {
		return a.shutOut(ctx, "disabled", args, func(ctx context.Context, id string) (api.ShutOut, error) {
			return client.Read[api.ShutOut](a.client.DisableDevice(ctx, id))
		})
	})
}

func (a *app) deviceRemove() *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "remove ID...", Short: "take a device out of the fleet", Args: cobra.MinimumNArgs(1),
		Long: `Revokes the certificates of a device, closes its connections, looks again whether one came back, and forgets the device. The
records of its certificates stay: revocation lists need them, and no other device gets its keys. To keep a device out for a while,
disable it.`,
	}
	c.Flags().BoolVar(&yes, "yes", false, "do it: there is no way back")
	return a.online(c, func(ctx context.Context, args []string) error {
		if !yes {
			return usagef("this cannot be undone: say --yes, or use muster device disable")
		}
		return a.shutOut(ctx, "removed", args, func(ctx context.Context, id string) (api.ShutOut, error) {
			return client.Read[api.ShutOut](a.client.RemoveDevice(ctx, id))
		})
	})
}

// shutOut does one call for each device, some at a time, and prints the answers in order.
func (a *app) shutOut(ctx context.Context, done string, ids []string, call func(context.Context, string) (api.ShutOut, error)) error {
	out := make([]api.ShutOut, len(ids))
	errs := make([]error, len(ids))
	var g errgroup.Group
	g.SetLimit(outAtOnce)
	for i, id := range ids {
		g.Go(func() error {
			out[i], errs[i] = call(ctx, id)
			return errs[i]
		})
	}
	failed := g.Wait()
	reports := []api.ShutOut{}
	for i, r := range out {
		if errs[i] == nil {
			reports = append(reports, r)
		}
	}
	if err := a.ui.show(reports, func() {
		for _, r := range reports {
			a.ui.printf("%s %s\n", done, clean(r.Device))
			a.printEvidence(evidence{
				connections: r.Connections, storedAfter: r.StoredAfter, closedAfter: r.ClosedAfter, verifiedAfter: r.VerifiedAfter, clean: r.Clean, detail: r.Detail,
				storedAt: r.StoredAt, closedAt: r.ClosedAt, endedAt: r.EndedAt, refusedAt: r.RefusedAt, refusedWhy: r.RefusedWhy, lastLook: r.LastLook,
			})
		}
	}); err != nil {
		return err
	}
	if failed != nil {
		for i, err := range errs {
			if err != nil {
				return fmt.Errorf("%s: %w", clean(ids[i]), err)
			}
		}
	}
	var open []string
	for _, r := range reports {
		if !r.Clean {
			open = append(open, fmt.Sprintf("%s (%s)", clean(r.Device), clean(r.Detail)))
		}
	}
	if len(open) > 0 {
		return fmt.Errorf("%s, but a connection may still be open: %s", done, strings.Join(open, ", "))
	}
	return nil
}

// evidence is what became of the connections of whoever was shut out.
type evidence struct {
	connections                             int
	storedAfter, closedAfter, verifiedAfter string
	clean                                   bool
	detail                                  string

	storedAt, closedAt, endedAt, refusedAt, lastLook time.Time
	refusedWhy                                       string
}

func (a *app) printEvidence(e evidence) {
	exact := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format("2006-01-02T15:04:05.000Z")
	}
	refused := "nobody tried to connect again while this was watched"
	if !e.refusedAt.IsZero() {
		refused = exact(e.refusedAt) + ", " + clean(e.refusedWhy)
	}
	a.ui.facts("  connections", fmt.Sprint(e.connections), "  refused after", e.storedAfter, "  closed after", e.closedAfter, "  found gone after", e.verifiedAfter,
		"  stored", exact(e.storedAt), "  closed", exact(e.closedAt), "  ended (broker)", exact(e.endedAt), "  first refused", refused, "  last look", e.lastLook)
}
