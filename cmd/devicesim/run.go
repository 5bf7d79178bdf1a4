package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"muster/internal/fleet"
	"muster/internal/simdev"
)

// options of `devicesim run`.
type options struct {
	credentials string
	state       string
	telemetry   time.Duration
	spread      time.Duration
	duration    time.Duration
	faults      []string
	firmware    string
	hardware    string
	chip        string
	revision    int
	fuse        uint32
	quick       bool
	quiet       bool
	output      string
	seed        uint64
}

func runCommand() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use: "run", Short: "run one device or many until Ctrl-C", Args: cobra.NoArgs,
		Long: "Run the device of a credentials folder, as `muster device credentials` writes it, or those of all the\ncredentials folders in a folder. A line is printed for each event.\n\nFaults, for all devices or, with DEVICE: before it, for one:\n" + simdev.FaultHelp(),
		Example: "  devicesim run --credentials ./fleet --state ./fleet-state --telemetry-every 10s\n" +
			"  devicesim run --credentials ./fleet --quick --fault dev-07:boot-loop=on --fault drop=2m",
		RunE: func(c *cobra.Command, _ []string) error {
			return runDevices(c.Context(), o, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.credentials, "credentials", "", "credentials folder of a device, or a folder of such folders (needed)")
	f.StringVar(&o.state, "state", "", "folder for what the devices' flash holds; without it they forget all at the end")
	f.DurationVar(&o.telemetry, "telemetry-every", time.Minute, "interval of telemetry; 0 for none")
	f.DurationVar(&o.spread, "spread", 0, "the devices start at random within it")
	f.DurationVar(&o.duration, "for", 0, "end after it; 0 for never")
	f.StringArrayVar(&o.faults, "fault", nil, "[DEVICE:]NAME=VALUE, see above; may be repeated")
	f.StringVar(&o.firmware, "firmware", "", "`FILE` with the image that new devices are made with (see devicesim image)")
	f.StringVar(&o.hardware, "hardware", "", "board revision that the devices report")
	f.StringVar(&o.chip, "chip", "", "chip that the devices report, such as esp32s3")
	f.IntVar(&o.revision, "chip-revision", 0, "silicon revision times 100 that the devices report, such as 301 for v3.1")
	f.Uint32Var(&o.fuse, "secure-version", 0, "what the eFuses of new devices count to (anti-rollback)")
	f.BoolVar(&o.quick, "quick", false, "back-off, reboots and patience in fast motion")
	f.BoolVar(&o.quiet, "quiet", false, "leave out telemetry")
	f.StringVar(&o.output, "output", "human", "human or json (a line of JSON for each event)")
	f.Uint64Var(&o.seed, "seed", 0, "of all that the devices do at random, keys excepted; 0 picks one and prints it")
	if err := c.MarkFlagRequired("credentials"); err != nil {
		panic(err) // the flag is above
	}
	return c
}

func runDevices(ctx context.Context, o options, stdout, stderr io.Writer) error {
	if o.seed == 0 {
		o.seed = uint64(time.Now().UnixNano())
	}
	all, err := loadAll(o.credentials)
	if err != nil {
		return err
	}
	faults, err := parseFaults(o.faults, all)
	if err != nil {
		return err
	}
	lines, err := newPrinter(o, all, stdout)
	if err != nil {
		return err
	}
	var devices []*simdev.Device
	for _, c := range all {
		d, err := o.device(c, faults, lines.event)
		if err != nil {
			return fmt.Errorf("%s: %w", c.Endpoints.Device, err)
		}
		devices = append(devices, d)
	}
	if o.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.duration)
		defer cancel()
	}
	fmt.Fprintf(stderr, "%d devices, seed %d; Ctrl-C ends\n", len(devices), o.seed)
	err = simdev.RunAll(ctx, devices)
	summary(stderr, devices)
	return errors.Join(err, lines.failed())
}

// device makes one of the devices.
func (o options) device(c simdev.Credentials, faults map[fleet.DeviceID]simdev.Faults, event func(simdev.Event)) (*simdev.Device, error) {
	cfg := simdev.Config{
		Credentials: c, Hardware: o.hardware, Chip: o.chip, Revision: o.revision, SecureVersion: o.fuse, Faults: faults[c.Endpoints.Device], Seed: o.seed, OnEvent: event, Timing: simdev.DefaultTiming(),
	}
	if o.quick {
		cfg.Timing = simdev.QuickTiming()
	}
	cfg.Timing.Spread = o.spread
	cfg.Timing.TelemetryEvery = o.telemetry
	if o.telemetry <= 0 {
		cfg.Timing.TelemetryEvery = -1
	}
	if o.firmware != "" {
		b, err := os.ReadFile(o.firmware)
		if err != nil {
			return nil, err
		}
		cfg.Firmware = b
	}
	if o.state != "" {
		f, err := simdev.NewDirFlash(filepath.Join(o.state, string(c.Endpoints.Device)))
		if err != nil {
			return nil, err
		}
		cfg.Flash = f
	}
	return simdev.New(cfg)
}

// loadAll reads the credentials folder dir, or every one in it.
func loadAll(dir string) ([]simdev.Credentials, error) {
	if _, err := os.Stat(filepath.Join(dir, simdev.EndpointsFile)); err == nil {
		c, err := simdev.LoadCredentials(dir)
		return []simdev.Credentials{c}, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []simdev.Credentials
	seen := map[fleet.DeviceID]string{}
	for _, e := range entries {
		sub := filepath.Join(dir, e.Name())
		if _, err := os.Stat(filepath.Join(sub, simdev.EndpointsFile)); err != nil {
			continue
		}
		c, err := simdev.LoadCredentials(sub)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", sub, err)
		}
		if other, twice := seen[c.Endpoints.Device]; twice {
			return nil, fmt.Errorf("%s and %s are the same device", other, sub)
		}
		seen[c.Endpoints.Device] = sub
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s holds no %s, and neither do its folders: make them with `muster device credentials`", dir, simdev.EndpointsFile)
	}
	return all, nil
}

// parseFaults returns the faults of each device.
func parseFaults(texts []string, all []simdev.Credentials) (map[fleet.DeviceID]simdev.Faults, error) {
	out := map[fleet.DeviceID]simdev.Faults{}
	for _, c := range all {
		out[c.Endpoints.Device] = simdev.Faults{}
	}
	for _, text := range texts {
		name, _, _ := strings.Cut(text, "=")
		only, rest, one := strings.Cut(name, ":")
		fault := text
		if one {
			if _, known := out[fleet.DeviceID(only)]; !known {
				return nil, fmt.Errorf("--fault %s: no credentials of a device %q are here", text, only)
			}
			fault = rest + text[len(name):]
		}
		for id, f := range out {
			if one && string(id) != only {
				continue
			}
			if err := f.Set(fault); err != nil {
				return nil, fmt.Errorf("--fault %s: %w", text, err)
			}
			out[id] = f
		}
	}
	return out, nil
}

// printer writes events, one line each, from many goroutines.
type printer struct {
	mu    sync.Mutex
	w     io.Writer
	json  bool
	quiet bool
	width int // of the longest device id
	err   error
}

func newPrinter(o options, all []simdev.Credentials, w io.Writer) (*printer, error) {
	if o.output != "human" && o.output != "json" {
		return nil, fmt.Errorf("--output: use human or json")
	}
	p := &printer{w: w, json: o.output == "json", quiet: o.quiet}
	for _, c := range all {
		p.width = max(p.width, len(c.Endpoints.Device))
	}
	return p, nil
}

func (p *printer) event(e simdev.Event) {
	if p.quiet && e.Kind == simdev.SentTelemetry {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return
	}
	if p.json {
		p.err = json.NewEncoder(p.w).Encode(e)
		return
	}
	_, p.err = fmt.Fprintf(p.w, "%s  %-*s  %-14s  %s\n", e.At.Format("15:04:05.000"), p.width, e.Device, e.Kind, e.Detail)
}

// failed returns the first error of writing.
func (p *printer) failed() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// summary says in a few lines what the devices did.
func summary(w io.Writer, devices []*simdev.Device) {
	var sum simdev.Counts
	for _, d := range devices {
		c := d.Counts()
		sum.Connects += c.Connects
		sum.Refusals += c.Refusals
		sum.Unreachable += c.Unreachable
		sum.Telemetry += c.Telemetry
		sum.Downloaded += c.Downloaded
		sum.Rollbacks += c.Rollbacks
		sum.CertsStored += c.CertsStored
		sum.Fallbacks += c.Fallbacks
		sum.LongestGapMS = max(sum.LongestGapMS, c.LongestGapMS)
	}
	fmt.Fprintf(w, "%d devices: %d sessions, %d times refused, %d times unreachable, %d visits to the fallback, longest gap %s\n",
		len(devices), sum.Connects, sum.Refusals, sum.Unreachable, sum.Fallbacks, time.Duration(sum.LongestGapMS)*time.Millisecond)
	fmt.Fprintf(w, "%d telemetry messages acknowledged, %d images downloaded, %d rolled back, %d certificates stored\n",
		sum.Telemetry, sum.Downloaded, sum.Rollbacks, sum.CertsStored)
}
