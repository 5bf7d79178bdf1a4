package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"muster/internal/simdev"
)

func main() {
	devices := flag.Int("devices", 2000, "devices")
	outage := flag.Duration("outage", 5*time.Minute, "how long the auth backend is away")
	spread := flag.Duration("spread", 30*time.Second, "the devices connect within it, before")
	binary := flag.String("musterd", "", "musterd program; in this process if left out")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *devices, *outage, *spread, *binary); err != nil {
		fmt.Fprintln(os.Stderr, "stampede:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, devices int, outage, spread time.Duration, binary string) error {
	dir, err := os.MkdirTemp("", "muster-stampede-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	timing := simdev.DefaultTiming() // what a device in the field should use
	timing.Spread = spread
	began := time.Now()
	r, err := Run(ctx, Options{
		Dir: dir + "/world", Binary: binary, Devices: devices, Outage: outage, Timing: timing,
		Say: func(s string) { fmt.Printf("%6s %s\n", time.Since(began).Round(time.Second), s) },
	})
	if err != nil {
		return err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	fmt.Printf("\noutage                  %s\nmemory of the devices   %d MiB\n", outage, m.Sys>>20)
	r.Print(os.Stdout, timing.BackoffCap)
	return r.Check(timing.BackoffCap)
}
