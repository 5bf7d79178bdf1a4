package cli

import (
	"context"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) recoveryCmd() *cobra.Command {
	var all bool
	list := &cobra.Command{Use: "list", Short: "list locked-out devices that ask for a certificate with a new key", Args: cobra.NoArgs}
	list.Flags().BoolVar(&all, "all", false, "those that were decided, too")
	a.online(list, func(ctx context.Context, _ []string) error {
		p := api.ListRecoveryRequestsParams{Limit: 500, State: api.RecoveryStateWaiting}
		if all {
			p.State = ""
		}
		rs, err := take(0, func(cursor string) ([]api.RecoveryRequest, string, error) {
			p.Cursor = cursor
			l, err := client.Read[api.RecoveryRequestList](a.client.ListRecoveryRequests(ctx, &p))
			return l.Items, l.NextCursor, err
		})
		if err != nil {
			return err
		}
		return a.ui.show(rs, func() {
			if len(rs) == 0 {
				a.ui.note("no requests are waiting")
				return
			}
			t := a.ui.table("ID", "DEVICE", "STATE", "BY WAY OF", "ASKED", "KEY SHA256", "DECIDED BY")
			for _, r := range rs {
				t.row(r.ID, r.Device, cell{string(r.State), stateShade(string(r.State))}, string(r.Via), a.ui.ago(r.AskedAt), r.KeySHA256, r.By)
			}
			t.print()
		})
	})
	approve := a.online(&cobra.Command{
		Use: "approve ID", Short: "give the device a certificate for its new key", Args: cobra.ExactArgs(1),
		Long: "Approves a request. Compare the key's SHA-256 with what the device shows, if it can show it: whoever has the fallback password can ask.",
	}, func(ctx context.Context, args []string) error {
		r, err := client.Read[api.RecoveryRequest](a.client.ApproveRecoveryRequest(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() { a.ui.printf("approved %s of %s\n", clean(r.ID), clean(r.Device)) })
	})
	deny := a.online(&cobra.Command{Use: "deny ID", Short: "refuse the new key", Args: cobra.ExactArgs(1)}, func(ctx context.Context, args []string) error {
		r, err := client.Read[api.RecoveryRequest](a.client.DenyRecoveryRequest(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() { a.ui.printf("denied %s of %s\n", clean(r.ID), clean(r.Device)) })
	})
	return group("recovery", "locked-out devices", list, approve, deny, a.repairCmd())
}

// repairCmd orders firmware for devices that cannot come to the front with the one that they run.
func (a *app) repairCmd() *cobra.Command {
	var cancel bool
	cmd := &cobra.Command{
		Use: "firmware [DEVICE VERSION | DEVICE --cancel]", Short: "bring a good release to a device whose image cannot do mutual TLS",
		Long: `Orders a release for a device that is on the fallback: it is offered at the device's next hello there, and fetched from port 8444 with
the fallback password. The order is over when the device is back at the front. Without arguments it lists the orders that are not.

Devices at the front are updated by rollouts. Devices that run the image of a rollout that was rolled back to a release get that one
without an order.`,
		Args: cobra.MaximumNArgs(2),
	}
	cmd.Flags().BoolVar(&cancel, "cancel", false, "take the order back")
	return a.online(cmd, func(ctx context.Context, args []string) error {
		switch {
		case len(args) == 0 && !cancel:
			return a.listRepairs(ctx)
		case len(args) == 1 && cancel:
			if err := client.Done(a.client.CancelRepair(ctx, args[0])); err != nil {
				return err
			}
			return a.ui.show(map[string]string{"cancelled": args[0]}, func() { a.ui.printf("nothing is ordered for %s any more\n", clean(args[0])) })
		case len(args) == 2 && !cancel:
			r, err := client.Read[api.Repair](a.client.RepairDevice(ctx, args[0], api.NewRepair{Version: args[1]}))
			if err != nil {
				return err
			}
			return a.ui.show(r, func() {
				a.ui.printf("%s gets %s at its next hello on the fallback\n", clean(r.Device), clean(r.Version))
			})
		}
		return usagef("name a device and a version, a device with --cancel, or nothing to list the orders")
	})
}

func (a *app) listRepairs(ctx context.Context) error {
	rs, err := take(0, func(cursor string) ([]api.Repair, string, error) {
		l, err := client.Read[api.RepairList](a.client.ListRepairs(ctx, &api.ListRepairsParams{Limit: 500, Cursor: cursor}))
		return l.Items, l.NextCursor, err
	})
	if err != nil {
		return err
	}
	return a.ui.show(rs, func() {
		if len(rs) == 0 {
			a.ui.note("no device is to get firmware over the fallback")
			return
		}
		t := a.ui.table("DEVICE", "VERSION", "ORDERED", "BY", "OFFERED", "TIMES")
		for _, r := range rs {
			offered := "not yet"
			if !r.Offered.IsZero() {
				offered = a.ui.ago(r.Offered)
			}
			t.row(r.Device, r.Version, a.ui.ago(r.At), r.By, offered, r.Offers)
		}
		t.print()
	})
}
