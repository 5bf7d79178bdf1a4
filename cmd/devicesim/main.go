// Command devicesim runs simulated devices against a muster installation, over MQTT and HTTPS alone. It is a load, a
// demonstration and a reference for firmware at once; with --fault the devices misbehave.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"muster/internal/simdev"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// After the first signal the next one ends the program at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the program: 0 if all went well, 1 if not.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use: "devicesim", Short: "simulated devices for muster", Version: version,
		SilenceUsage: true, SilenceErrors: true,
	}
	root.AddCommand(runCommand(), imageCommand())
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(stderr, "error: %v\n", err)
		return 1
	}
	return 0
}

func imageCommand() *cobra.Command {
	var firmware simdev.Firmware
	var size int
	var seed uint64
	var file string
	c := &cobra.Command{
		Use: "image", Short: "write a firmware image for simulated devices", Args: cobra.NoArgs,
		Example: "  devicesim image --version 1.2.0 --behaviour boot-loop --size 1572864 -o app-1.2.0.bin",
		RunE: func(c *cobra.Command, _ []string) error {
			if size < 0 || size > simdev.MaxImage {
				return fmt.Errorf("--size: use 0 to %d bytes", simdev.MaxImage)
			}
			b, err := image(firmware, size, seed)
			if err != nil {
				return err
			}
			if file == "-" {
				_, err := c.OutOrStdout().Write(b)
				return err
			}
			return os.WriteFile(file, b, 0o644)
		},
	}
	f := c.Flags()
	f.StringVar(&firmware.Version, "version", "", "firmware version (needed)")
	f.StringVar(&firmware.Behaviour, "behaviour", simdev.Good, simdev.Behaviours)
	f.Uint32Var(&firmware.SecureVersion, "secure-version", 0, "a device whose eFuses count higher does not start the image")
	f.StringVar(&firmware.Needs, "needs", "", "a version: over an older one the image does not start (a floor)")
	f.IntVar(&size, "size", 64<<10, "bytes")
	f.Uint64Var(&seed, "seed", 1, "of the padding: another seed gives another image")
	f.StringVarP(&file, "output", "o", "", "file to write, - for standard output (needed)")
	for _, name := range []string{"version", "output"} {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is two lines above
		}
	}
	return c
}

// image checks what came from the command line before it makes an image of it.
func image(f simdev.Firmware, size int, seed uint64) ([]byte, error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	return f.Image(size, seed), nil
}
