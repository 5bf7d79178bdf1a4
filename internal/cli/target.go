package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) targetCmd() *cobra.Command {
	var in api.TargetQuestion
	c := &cobra.Command{
		Use: "target EXPRESSION", Short: "show which devices an expression chooses", Args: cobra.ExactArgs(1),
		Long: `Counts the devices that a target expression chooses now and shows some of them. The same expressions choose the devices of a
rollout (--where), of a list, and of a change of labels or groups. docs/operations.md lists the fields.`,
		Example: `  muster target 'labels.site == "berlin" && version_less(version, "1.4.0")' --product sensor`,
	}
	c.Flags().StringVar(&in.Product, "product", "", "only devices of this product")
	return a.online(c, func(ctx context.Context, args []string) error {
		in.Where = args[0]
		p, err := client.Read[api.TargetPreview](a.client.PreviewTarget(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(p, func() {
			a.ui.printf("%d of %d devices, %d connected\n", p.Count, p.Scanned, p.Online)
			a.sample(p.Sample, p.Count)
		})
	})
}

// sample shows the first ids of many.
func (a *app) sample(ids []string, of int) {
	for _, id := range ids {
		a.ui.printf("  %s\n", clean(id))
	}
	if more := of - len(ids); more > 0 && len(ids) > 0 {
		a.ui.printf("  and %d more\n", more)
	}
}

// change is what bulk changes have in common: who, and whether it is only a rehearsal.
type change struct {
	api.BulkUpdate
}

func (ch *change) flags(c *cobra.Command) {
	c.Flags().StringVar(&ch.Where, "where", "", "the devices that this target expression chooses, instead of ids")
	c.Flags().BoolVar(&ch.DryRun, "dry-run", false, "change nothing; say how many would be")
}

// apply changes the devices, in calls of bounded size where they are named.
func (a *app) apply(ctx context.Context, ch change, ids []string) error {
	if (ch.Where == "") == (len(ids) == 0) {
		return usagef("name the devices, or choose them by --where")
	}
	var total api.BulkReport
	for first := true; first || len(ids) > 0; first = false {
		batch := ids[:min(len(ids), importBatch)]
		ids = ids[len(batch):]
		ch.Devices = batch
		rep, err := client.Read[api.BulkReport](a.client.UpdateDevices(ctx, ch.BulkUpdate))
		if err != nil {
			return err
		}
		total.Count += rep.Count
		total.Changed += rep.Changed
		total.Sample = append(total.Sample, rep.Sample[:min(len(rep.Sample), 20-min(20, len(total.Sample)))]...)
	}
	return a.ui.show(total, func() {
		verb := "changed"
		if ch.DryRun {
			verb = "would change"
		}
		a.ui.printf("%s %d of %d devices\n", verb, total.Changed, total.Count)
		if ch.DryRun {
			a.sample(total.Sample, total.Count)
		}
	})
}

func (a *app) deviceLabel() *cobra.Command {
	var ch change
	c := &cobra.Command{
		Use: "label [ID]... key=value | key-...", Short: "set (key=value) or remove (key-) labels of devices", Args: cobra.MinimumNArgs(1),
		Example: "  muster device label sensor-0001 sensor-0002 site=hamburg spare-\n  muster device label --where 'hardware == \"rev-c\"' antenna=internal",
	}
	ch.flags(c)
	return a.online(c, func(ctx context.Context, args []string) error {
		var ids []string
		ch.Labels = map[string]*string{}
		for _, t := range args {
			if k, v, ok := strings.Cut(t, "="); ok && k != "" {
				ch.Labels[k] = &v
			} else if k, ok := strings.CutSuffix(t, "-"); ok && k != "" {
				ch.Labels[k] = nil
			} else {
				ids = append(ids, t)
			}
		}
		if len(ch.Labels) == 0 {
			return usagef("say what to change: key=value sets a label, key- removes it")
		}
		return a.apply(ctx, ch, ids)
	})
}

func (a *app) deviceGroup() *cobra.Command {
	do := func(verb, short string, set func(*change, string)) *cobra.Command {
		var ch change
		c := &cobra.Command{
			Use: verb + " GROUP [ID]...", Short: short, Args: cobra.MinimumNArgs(1),
			Example: fmt.Sprintf("  muster device group %s early sensor-0001 sensor-0002\n  muster device group %s early --where 'labels.site == \"berlin\"'", verb, verb),
		}
		ch.flags(c)
		return a.online(c, func(ctx context.Context, args []string) error {
			set(&ch, args[0])
			return a.apply(ctx, ch, args[1:])
		})
	}
	return group("group", "put devices into groups",
		do("add", "put devices into a group", func(ch *change, g string) { ch.Join = []string{g} }),
		do("remove", "take devices out of a group", func(ch *change, g string) { ch.Leave = []string{g} }))
}
