package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

// errBlocked ends device why with exit code 1: what it has to say was said.
var errBlocked = errors.New("something keeps the device from updating or connecting")

func (a *app) deviceWhy() *cobra.Command {
	c := &cobra.Command{
		Use: "why ID", Short: "say why a device is not updating, or not connecting", Args: cobra.ExactArgs(1),
		Long: `Says in ordered sentences why a device is not updating, or not connecting: first what concerns the device itself, then what
each rollout of its product has for it. The exit code is 1 if one of them keeps it from updating or connecting, else 0.`,
	}
	return a.online(c, func(ctx context.Context, args []string) error {
		w, err := client.Read[api.Why](a.client.WhyDevice(ctx, args[0]))
		if err != nil {
			return err
		}
		if err := a.ui.show(w, func() { a.printWhy(w) }); err != nil || !w.Blocked {
			return err
		}
		return errBlocked
	})
}

// printWhy marks what blocks; the words alone tell it too, in a pipe.
func (a *app) printWhy(w api.Why) {
	for _, r := range w.Reasons {
		mark, c := "  ", plain
		if r.Blocking {
			mark, c = "✗ ", red
		}
		a.ui.printf("%s%s\n", a.ui.paint(mark, c), clean(r.Text))
	}
}

func (a *app) devicePardon() *cobra.Command {
	c := &cobra.Command{
		Use: "pardon ID", Short: "let a device out of the penalty box", Args: cobra.ExactArgs(1),
		Long: "A device that fails again and again is left alone by all rollouts for a while. This ends that at once.",
	}
	return a.online(c, func(ctx context.Context, args []string) error {
		d, err := client.Read[api.Device](a.client.PardonDevice(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(d, func() { a.ui.printf("pardoned %s\n", d.ID) })
	})
}
