package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) deviceCmd() *cobra.Command {
	return group("device", "who belongs to the fleet",
		a.deviceAdd(), a.deviceList(), a.deviceShow(), a.deviceEnroll(), a.deviceCredentials(),
		a.deviceDisable(), a.deviceEnable(), a.deviceRemove(),
		a.deviceLabels(), a.deviceLabel(), a.deviceGroup(), a.devicePassword(), a.deviceEnrolPassword(), a.deviceWhy(), a.devicePardon(), a.deviceDecryptNVS())
}

func (a *app) deviceAdd() *cobra.Command {
	var in api.NewDevice
	var labels []string
	var from string
	var update bool
	c := &cobra.Command{
		Use: "add ID --product NAME | add --from FILE.csv", Short: "register devices", Args: cobra.MaximumNArgs(1),
		Long: `Registers one device, or those of a CSV file. The file's first line names its columns: id, product, hardware, and
groups (with ; between), and label:KEY for labels; only id and product are needed. A device that is registered already with the
same description stays as it is, so a file may be added again. With --update, one with another description gets what its line
names; an empty cell changes nothing.`,
		Example: "  muster device add sensor-0001 --product sensor --label site=berlin\n  muster device add --from fleet.csv",
	}
	f := c.Flags()
	f.StringVar(&in.Product, "product", "", "product line: devices that can run the same firmware")
	f.StringVar(&in.Hardware, "hardware", "", "board revision, in your own words")
	f.StringArrayVar(&labels, "label", nil, "key=value; may be repeated")
	f.StringArrayVar(&in.Groups, "group", nil, "group that it is in; may be repeated")
	f.StringVar(&from, "from", "", "CSV file, or - for standard input")
	f.BoolVar(&update, "update", false, "with --from: give devices that exist the hardware, labels and groups that their line names")
	return a.online(c, func(ctx context.Context, args []string) error {
		if from != "" {
			if len(args) > 0 || in.Product != "" || in.Hardware != "" || len(labels)+len(in.Groups) > 0 {
				return usagef("with --from, the file says everything")
			}
			return a.importDevices(ctx, from, update)
		}
		if update {
			return usagef("--update goes with --from; change one device with muster device label and muster device group")
		}
		if len(args) == 0 || in.Product == "" {
			return usagef("an id and --product are needed, or --from")
		}
		var err error
		in.ID = args[0]
		if in.Labels, err = parseLabels(labels); err != nil {
			return err
		}
		d, err := client.Read[api.Device](a.client.CreateDevice(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(d, func() { a.ui.printf("added %s\n", d.ID) })
	})
}

func parseLabels(terms []string) (api.Labels, error) {
	out := api.Labels{}
	for _, t := range terms {
		k, v, ok := strings.Cut(t, "=")
		if !ok || k == "" {
			return nil, usagef("write a label as key=value")
		}
		out[k] = v
	}
	return out, nil
}

func (a *app) deviceList() *cobra.Command {
	p := api.ListDevicesParams{}
	var online, offline bool
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "list devices", Args: cobra.NoArgs,
		Example: "  muster device list --product sensor --label site=berlin --offline",
	}
	f := c.Flags()
	f.StringVar(&p.Product, "product", "", "only of this product")
	f.StringArrayVar(&p.Label, "label", nil, "only with this label, key=value; may be repeated")
	f.StringVar(&p.Group, "group", "", "only of this group")
	f.StringVar(&p.Where, "where", "", "only those that this target expression chooses (see muster target)")
	f.BoolVar(&online, "online", false, "only those that are connected")
	f.BoolVar(&offline, "offline", false, "only those that are not connected")
	f.StringVarP(&p.Q, "query", "q", "", "only those whose id holds this text")
	f.IntVar(&limit, "limit", 0, "at most this many; 0: all")
	c.MarkFlagsMutuallyExclusive("online", "offline")
	return a.online(c, func(ctx context.Context, _ []string) error {
		if online || offline {
			p.Online = &online
		}
		ds, err := a.devices(ctx, p, limit)
		if err != nil {
			return err
		}
		return a.ui.show(ds, func() { a.printDevices(ds) })
	})
}

// devices reads the pages of a list, at most limit items if limit is positive.
func (a *app) devices(ctx context.Context, p api.ListDevicesParams, limit int) ([]api.Device, error) {
	p.Limit = 500
	return take(limit, func(cursor string) ([]api.Device, string, error) {
		p.Cursor = cursor
		l, err := client.Read[api.DeviceList](a.client.ListDevices(ctx, &p))
		return l.Items, l.NextCursor, err
	})
}

// take reads a paged list, at most limit items if limit is positive.
func take[T any](limit int, fetch func(cursor string) ([]T, string, error)) ([]T, error) {
	out := []T{}
	for v, err := range client.Items(fetch) {
		if err != nil {
			return nil, err
		}
		if out = append(out, v); len(out) == limit {
			break
		}
	}
	return out, nil
}

func (a *app) printDevices(ds []api.Device) {
	if len(ds) == 0 {
		a.ui.note("no devices")
		return
	}
	t := a.ui.table("ID", "PRODUCT", "STATE", "VERSION", "SEEN", "LABELS")
	for _, d := range ds {
		t.row(d.ID, d.Product, deviceState(d), d.Status.Version, a.ui.ago(d.Status.LastSeen), labelText(d.Labels))
	}
	t.print()
}

func deviceState(d api.Device) cell {
	state := "offline"
	switch {
	case d.Disabled:
		state = "disabled"
	case d.Status.Online && d.Status.Vhost == "fallback":
		return cell{"fallback", yellow}
	case d.Status.Online:
		state = "online"
	case d.Current == "" && d.Next == "":
		state = "no certificate"
	}
	return cell{state, stateShade(state)}
}

func labelText(l api.Labels) string {
	var out []string
	for _, k := range sortedKeys(l) {
		out = append(out, k+"="+l[k])
	}
	return strings.Join(out, ",")
}

func (a *app) deviceShow() *cobra.Command {
	c := &cobra.Command{Use: "show ID", Short: "show a device and what it last said", Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		d, err := client.Read[api.Device](a.client.GetDevice(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(d, func() { a.printDevice(d) })
	})
}

func (a *app) printDevice(d api.Device) {
	s := d.Status
	seen := ""
	if !s.LastSeen.IsZero() {
		seen = text(s.LastSeen) + " (" + a.ui.ago(s.LastSeen) + ")"
	}
	next := ""
	if d.Next != "" {
		next = d.Next + " (it has not connected with it yet)"
	}
	secure := ""
	if s.SecureVersion > 0 {
		secure = fmt.Sprint(s.SecureVersion)
	}
	a.ui.facts("id", d.ID, "product", d.Product, "hardware", first(d.Hardware, s.Hardware), "labels", labelText(d.Labels), "groups", strings.Join(d.Groups, ", "), "state", deviceState(d),
		"added", d.CreatedAt, "certificate", d.Current, "next", next, "asked to renew", d.RenewSince, "fallback passwords", fmt.Sprint(d.FallbackPasswords),
		"fallback closed", d.RecoveryOff, "seen", seen, "connected", s.ConnectedAt, "lost", s.LostAt, "from", s.Peer,
		"version", s.Version, "image", s.Image, "chip", s.Chip, "secure version", secure, "boot", s.Boot, "reported", string(s.State))
}

func (a *app) deviceEnable() *cobra.Command {
	c := &cobra.Command{Use: "enable ID...", Short: "let a disabled device in again", Args: cobra.MinimumNArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		out := []api.Device{}
		for _, id := range args {
			d, err := client.Read[api.Device](a.client.EnableDevice(ctx, id))
			if err != nil {
				return fmt.Errorf("%s: %w", clean(id), err)
			}
			out = append(out, d)
		}
		return a.ui.show(out, func() {
			for _, d := range out {
				a.ui.printf("enabled %s\n", d.ID)
			}
		})
	})
}

func (a *app) deviceLabels() *cobra.Command {
	c := &cobra.Command{
		Use: "labels ID [key=value | key-]...", Short: "show or change the labels of a device", Args: cobra.MinimumNArgs(1),
		Example: "  muster device labels sensor-0001 site=hamburg spare-",
	}
	return a.online(c, func(ctx context.Context, args []string) error {
		d, err := client.Read[api.Device](a.client.GetDevice(ctx, args[0]))
		if err != nil {
			return err
		}
		if len(args) > 1 {
			patch := api.DevicePatch{Labels: map[string]*string{}}
			for _, t := range args[1:] {
				if k, v, ok := strings.Cut(t, "="); ok && k != "" {
					patch.Labels[k] = &v
				} else if k, ok := strings.CutSuffix(t, "-"); ok && k != "" {
					patch.Labels[k] = nil
				} else {
					return usagef("write key=value to set a label, key- to remove one")
				}
			}
			etag := fmt.Sprintf("%q", fmt.Sprint(d.Rev))
			if d, err = client.Read[api.Device](a.client.UpdateDevice(ctx, args[0], &api.UpdateDeviceParams{IfMatch: etag}, patch)); err != nil {
				return err
			}
		}
		return a.ui.show(d.Labels, func() {
			for _, k := range sortedKeys(d.Labels) {
				a.ui.printf("%s=%s\n", clean(k), clean(d.Labels[k]))
			}
		})
	})
}

func (a *app) devicePassword() *cobra.Command {
	c := &cobra.Command{
		Use: "password ID", Short: "make a new fallback password; the old ones stop working", Args: cobra.ExactArgs(1),
		Long: "Makes a new fallback password and prints it, this once. The passwords that the device had do not work any more.",
	}
	return a.online(c, func(ctx context.Context, args []string) error {
		p, err := client.Read[api.FallbackPassword](a.client.NewFallbackPassword(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(p, func() { a.ui.printf("%s\n", clean(p.Password)) })
	})
}
