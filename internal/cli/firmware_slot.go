package cli

import (
	"context"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
	"muster/internal/esp/partition"
)

func (a *app) firmwareSlot() *cobra.Command {
	var bytes int64
	var table string
	var off, force bool
	c := &cobra.Command{
		Use: "slot [PRODUCT --partitions FILE | PRODUCT --bytes N | PRODUCT --off]", Short: "how large the OTA slots of a product are", Args: cobra.MaximumNArgs(1),
		Long: `Says how large the OTA slots of a product's devices are, from the partition table that they left the house with (CSV or binary).
A larger image of the product is refused at upload. Without a product, it lists what was said.`,
	}
	c.Flags().StringVar(&table, "partitions", "", "partition table of the devices")
	c.Flags().Int64Var(&bytes, "bytes", 0, "size of the smallest OTA slot")
	c.Flags().BoolVar(&force, "force", false, "also if a release is larger")
	c.Flags().BoolVar(&off, "off", false, "forget it: images may be of any size")
	c.MarkFlagsMutuallyExclusive("partitions", "bytes", "off")
	return a.online(c, func(ctx context.Context, args []string) error {
		says := table != "" || bytes != 0
		switch {
		case len(args) == 0 && (says || off):
			return usagef("which product?")
		case len(args) == 0:
			return a.listSlots(ctx)
		case off:
			if err := client.Done(a.client.ClearOTASlot(ctx, args[0])); err != nil {
				return err
			}
			a.ui.printf("images of %s may be of any size\n", clean(args[0]))
			return nil
		case !says:
			return usagef("give --partitions FILE, --bytes N or --off")
		case table != "":
			var err error
			if bytes, err = a.slotIn(table); err != nil {
				return err
			}
		}
		s, err := client.Read[api.OTASlot](a.client.SetOTASlot(ctx, args[0], api.NewOTASlot{Bytes: bytes, Force: force}))
		if err != nil {
			return err
		}
		return a.ui.show(s, func() { a.ui.printf("images of %s may have %d bytes\n", clean(s.Product), s.Bytes) })
	})
}

func (a *app) listSlots(ctx context.Context) error {
	l, err := client.Read[api.OTASlotList](a.client.ListOTASlots(ctx))
	if err != nil {
		return err
	}
	return a.ui.show(l.Items, func() {
		if len(l.Items) == 0 {
			a.ui.note("nobody said how large the OTA slots of a product are: images may be of any size")
			return
		}
		t := a.ui.table("PRODUCT", "BYTES", "SET", "BY")
		for _, s := range l.Items {
			t.row(s.Product, s.Bytes, a.ui.ago(s.SetAt), s.SetBy)
		}
		t.print()
	})
}

// slotIn returns the size of the smallest OTA slot of the partition table in a file.
func (a *app) slotIn(file string) (int64, error) {
	raw, err := a.readInput(file, 64<<10)
	if err != nil {
		return 0, err
	}
	t, err := partition.Parse(raw, partition.Layout{Table: partition.DefaultTable})
	if err != nil {
		return 0, err
	}
	if t.OTASize() == 0 {
		return 0, usagef("%s has no OTA slots: no update over the air is possible with it", file)
	}
	return int64(t.OTASize()), nil
}
