// Command rollout measures the rollout engine over stored fleets of growing size, on a real store that syncs every
// transaction to the disk: what a dry run of a rollout costs in time and memory, and what a rollout over simulated devices
// in this process costs from its creation to its end. It prints
//
//	ratio plan-100000 <value> aim 1     aim of 3 s / time of a dry run over that many stored devices
//	ratio plan-1000000 <value> aim 1    aim of 30 s / time
//	ratio plan-memory <value> aim 0.5   peak of the heap over the smaller fleet / over the larger one
//	ratio growth-grant <value> aim 1    n log n: what a grant may cost more over the largest fleet than over the smallest / what it costs
//	ratio growth-report <value> aim 1   the same for a report
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"muster/internal/dispatch"
	"muster/internal/downlink"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

const (
	oldImage = fleet.Hash("0000000000000000000000000000000000000000000000000000000000000000")
	newImage = fleet.Hash("1111111111111111111111111111111111111111111111111111111111111111")
	batch    = 256 // reports in one transaction, as musterd takes them from the broker
)

func main() {
	small := flag.Int("small", 10_000, "devices of the smallest fleet")
	middle := flag.Int("middle", 100_000, "devices of the fleet that is rolled out to the end")
	large := flag.Int("large", 1_000_000, "devices of the largest fleet, of which -part are rolled out; 0: leave it out")
	part := flag.Int("part", 20_000, "devices of the largest fleet that are rolled out")
	flag.Parse()
	if err := run(*small, *middle, *large, *part); err != nil {
		fmt.Fprintln(os.Stderr, "bench rollout:", err)
		os.Exit(1)
	}
}

// figures are what one fleet came to.
type figures struct {
	devices     int
	plan        time.Duration
	heap        uint64 // bytes above what was there before the dry run
	grant, each time.Duration
}

func run(small, middle, large, part int) error {
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var all []figures
	for _, size := range []struct{ devices, until int }{{small, small}, {middle, middle}, {large, part}} {
		if size.devices == 0 {
			continue
		}
		f, err := measure(filepath.Join(dir, fmt.Sprint(size.devices, ".db")), size.devices, size.until)
		if err != nil {
			return err
		}
		all = append(all, f)
	}
	aims := map[int]time.Duration{100_000: 3 * time.Second, 1_000_000: 30 * time.Second}
	for _, f := range all {
		if aim, ok := aims[f.devices]; ok {
			fmt.Printf("ratio plan-%d %.2f aim 1\n", f.devices, aim.Seconds()/f.plan.Seconds())
		}
	}
	first, last := all[0], all[len(all)-1]
	if len(all) > 1 {
		// Flat: the peak does not follow the fleet. The smallest fleet does not fill the pages that are kept.
		fmt.Printf("ratio plan-memory %.2f aim 0.5\n", float64(all[len(all)-2].heap)/float64(last.heap))
		allowed := math.Log(float64(last.devices)) / math.Log(float64(first.devices))
		fmt.Printf("ratio growth-grant %.2f aim 1\n", allowed*first.grant.Seconds()/last.grant.Seconds())
		fmt.Printf("ratio growth-report %.2f aim 1\n", allowed*first.each.Seconds()/last.each.Seconds())
	}
	return nil
}

// site is a store and the engine over it.
type site struct {
	db *bolt.DB
	d  *dispatch.Dispatcher
}

func open(path string) (*site, error) {
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		return nil, err
	}
	s := &site{db: db}
	s.d = dispatch.New(dispatch.Config{
		Update: func(ctx context.Context, f func(dispatch.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(dispatch.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		PresenceKnown: func() bool { return true }, Committed: func() {}, Log: slog.New(slog.DiscardHandler),
	})
	return s, nil
}

func id(i int) fleet.DeviceID { return fleet.DeviceID(fmt.Sprintf("d%07d", i)) }

// settle stores n devices that run the old image and are connected.
func (s *site) settle(ctx context.Context, n int) error {
	now := time.Now()
	for from := 0; from < n; from += 20_000 {
		err := s.db.Update(ctx, func(tx *bolt.Tx) error {
			for i := from; i < min(from+20_000, n); i++ {
				dev := fleet.Device{ID: id(i), Product: "lamp", Hardware: "rev-c", CreatedAt: now, Labels: map[string]string{"site": fmt.Sprint("site-", i%500), "ring": fmt.Sprint(i % 10)}}
				if err := tx.PutDevice(dev); err != nil {
					return err
				}
				st := fleet.Status{Device: dev.ID, Online: true, Vhost: wire.VhostDevices, ConnectedAt: now, LastSeen: now, HelloAt: now, Version: "1.0.0", Image: oldImage, Chip: "esp32s3"}
				if err := tx.PutStatus(st); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return s.db.Update(ctx, func(tx *bolt.Tx) error {
		return tx.PutRelease(firmware.Release{Manifest: firmware.Manifest{Product: "lamp", Version: "1.1.0", Size: 1 << 20, SHA256: newImage, ImageHash: newImage, Chip: "esp32s3"}})
	})
}

func measure(path string, devices, until int) (figures, error) {
	ctx := context.Background()
	f := figures{devices: devices}
	s, err := open(path)
	if err != nil {
		return f, err
	}
	defer s.db.Close()
	began := time.Now()
	if err := s.settle(ctx, devices); err != nil {
		return f, err
	}
	fmt.Printf("%d devices stored in %v\n", devices, time.Since(began).Round(time.Millisecond))

	spec := dispatch.Spec{
		ID: "bench", Product: "lamp", Version: "1.1.0", Where: `labels.ring != "x" && version != ""`,
		Plan: rollout.Plan{
			Stages:      []rollout.Stage{{Count: 100}, {Percent: 10}, {Percent: 100}},
			MaxInFlight: 5000, MaxFailures: 100, DeviceTimeout: 24 * time.Hour,
		},
	}
	var preview dispatch.Preview
	f.heap, err = peak(func() (err error) {
		began = time.Now()
		preview, err = s.d.Plan(ctx, time.Now(), spec, "bench")
		f.plan = time.Since(began)
		return err
	})
	if err != nil {
		return f, err
	}
	if preview.Targets != devices {
		return f, fmt.Errorf("the dry run found %d of %d devices", preview.Targets, devices)
	}
	fmt.Printf("%d devices: dry run in %v, heap %+.1f MiB\n", devices, f.plan.Round(time.Millisecond), float64(f.heap)/(1<<20))

	began = time.Now()
	r, err := s.d.Create(ctx, time.Now(), spec, "bench")
	if err != nil {
		return f, err
	}
	for r.Filling {
		if _, err := s.d.Pass(ctx, time.Now); err != nil {
			return f, err
		}
		if r, err = s.d.Get(ctx, spec.ID); err != nil {
			return f, err
		}
	}
	fmt.Printf("%d devices: created and filled in %v\n", devices, time.Since(began).Round(time.Millisecond))
	return f, s.drive(ctx, spec.ID, until, &f)
}

// drive lets a rollout run with devices that are online and well, until so many have succeeded.
func (s *site) drive(ctx context.Context, name fleet.RolloutID, until int, f *figures) error {
	if _, err := s.d.Start(ctx, time.Now(), name, "bench"); err != nil {
		return err
	}
	began := time.Now()
	var granting, reporting time.Duration
	grants, reports := 0, 0
	for {
		at := time.Now()
		if _, err := s.d.Pass(ctx, time.Now); err != nil {
			return err
		}
		granting += time.Since(at)
		told, err := s.outbox(ctx)
		if err != nil {
			return err
		}
		grants += len(told)
		at = time.Now()
		n, err := s.update(ctx, name, told)
		if err != nil {
			return err
		}
		reporting += time.Since(at)
		reports += n
		r, err := s.d.Get(ctx, name)
		if err != nil {
			return err
		}
		if r.State == rollout.Completed || r.Total.Succeeded >= until && until < r.Targets {
			break
		}
		if len(told) == 0 && r.State != rollout.Running {
			return fmt.Errorf("%s: %s", r.State, r.Reason)
		}
	}
	f.grant, f.each = granting/time.Duration(grants), reporting/time.Duration(reports)
	fmt.Printf("%d devices: %d rolled out in %v; %.0f grants/s (%v each), %v a report (%d reports)\n", f.devices, grants, time.Since(began).Round(time.Millisecond),
		float64(grants)/granting.Seconds(), f.grant.Round(time.Microsecond), f.each.Round(time.Microsecond), reports)
	return nil
}

// outbox takes out who was offered the release.
func (s *site) outbox(ctx context.Context) (told []fleet.DeviceID, err error) {
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		es, err := tx.Outbox(0)
		if err != nil {
			return err
		}
		seqs := make([]uint64, 0, len(es))
		for _, e := range es {
			if e.Kind == downlink.OTA {
				told = append(told, e.Device)
			}
			seqs = append(seqs, e.Seq)
		}
		return tx.DropOutbox(seqs)
	})
	return told, err
}

// update lets devices report three steps and come back with the new image; it returns how many messages that were.
func (s *site) update(ctx context.Context, name fleet.RolloutID, told []fleet.DeviceID) (int, error) {
	type message struct {
		dev  fleet.DeviceID
		step wire.OTAStep // empty: hello
	}
	var ms []message
	for _, step := range []wire.OTAStep{wire.StepAccepted, wire.StepDownloading, wire.StepInstalled, ""} {
		for _, d := range told {
			ms = append(ms, message{d, step})
		}
	}
	for from := 0; from < len(ms); from += batch {
		err := s.db.Update(ctx, func(tx *bolt.Tx) error {
			for _, m := range ms[from:min(from+batch, len(ms))] {
				at := time.Now()
				if m.step != "" {
					if err := s.d.Report(tx, at, m.dev, wire.OTAReport{Job: name, Step: m.step}); err != nil {
						return err
					}
					continue
				}
				st, err := tx.Status(m.dev)
				if err != nil {
					return err
				}
				st.Image, st.Version, st.HelloAt, st.LastSeen = newImage, "1.1.0", at, at
				if err := tx.PutStatus(st); err != nil {
					return err
				}
				if err := s.d.Hello(tx, at, wire.VhostDevices, m.dev, wire.Hello{Version: "1.1.0", Image: newImage}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return len(ms), nil
}

// peak returns how far the heap grew at most while f ran. It samples, so it is a lower bound.
func peak(f func() error) (uint64, error) {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	base := m.HeapAlloc
	stop, done := make(chan struct{}), make(chan uint64)
	go func() {
		var most uint64
		t := time.NewTicker(20 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-stop:
				done <- most
				return
			case <-t.C:
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				most = max(most, m.HeapAlloc)
			}
		}
	}()
	err := f()
	close(stop)
	most := <-done
	return max(most, base+1) - base, err
}
