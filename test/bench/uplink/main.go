// Command uplink measures reports per second from the queue to the committed store, against a consumer of the same queue
// that only acknowledges, in turns on one real RabbitMQ. The store syncs every transaction to the disk. It prints the line
//
//	ratio uplink-reports <value> aim 0.5
//
// where value is the median over the rounds of ours / baseline.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"muster/internal/broker"
	"muster/internal/broker/brokerconf"
	"muster/internal/brokerauth"
	"muster/internal/fleet"
	"muster/internal/inventory"
	"muster/internal/store/bolt"
	"muster/internal/uplink"
	"muster/internal/wire"
	"muster/test/world"
)

func main() {
	reports := flag.Int("reports", 30_000, "reports in the queue in each measurement")
	devices := flag.Int("devices", 500, "devices that sent them")
	rounds := flag.Int("rounds", 5, "rounds; each measures both consumers, in alternating order")
	flag.Parse()
	if err := run(*reports, *devices, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench uplink:", err)
		os.Exit(1)
	}
}

func run(reports, devices, rounds int) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	w, err := world.Start(ctx, world.Options{Dir: dir, Say: func(s string) { fmt.Println(s) }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop(context.Background())) }()
	// musterd has declared the queue and answered the broker's probe; from here on the queue is ours.
	if err := w.StopMusterd(ctx); err != nil {
		return err
	}
	b := &bench{w: w, reports: reports, devices: devices}
	if err := b.open(ctx, filepath.Join(dir, "bench.db")); err != nil {
		return err
	}
	defer b.db.Close()
	var ratios, ours, base []float64
	for round := range rounds {
		var o, a float64
		for turn := range 2 {
			if (round+turn)%2 == 0 {
				o, err = b.measure(ctx, b.store)
			} else {
				a, err = b.measure(ctx, func(context.Context, []broker.Message) error { return nil })
			}
			if err != nil {
				return err
			}
		}
		ratios, ours, base = append(ratios, o/a), append(ours, o), append(base, a)
		fmt.Printf("  round %d: stored %.0f/s, only acknowledged %.0f/s, ratio %.2f\n", round+1, o, a, o/a)
	}
	fmt.Printf("  median: stored %.0f/s, only acknowledged %.0f/s\n", median(ours), median(base))
	fmt.Printf("ratio uplink-reports %.2f aim 0.5\n", median(ratios))
	return nil
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

type bench struct {
	w                *world.World
	reports, devices int
	db               *bolt.DB
	intake           *uplink.Intake[*bolt.Tx]
}

func (b *bench) device(i int) fleet.DeviceID {
	return fleet.DeviceID(fmt.Sprintf("bench-%04d", i%b.devices))
}

// open makes a store with the devices, and the intake that musterd has for state reports.
func (b *bench) open(ctx context.Context, path string) (err error) {
	if b.db, err = bolt.Open(path, bolt.Options{}); err != nil {
		return err
	}
	inv := inventory.New(inventory.Config{})
	index := brokerauth.NewIndex()
	b.db.WatchCredentials(index.Put)
	b.intake = uplink.New(b.db.Update, uplink.Handlers[*bolt.Tx]{
		Admitted: func(_ *bolt.Tx, id fleet.DeviceID) (bool, string, error) {
			ok, why := index.Heard(id)
			return ok, why, nil
		},
		State: func(tx *bolt.Tx, at time.Time, id fleet.DeviceID, doc []byte) error {
			return inv.State(tx, at, id, doc)
		},
		Quarantine: (*bolt.Tx).Quarantine,
	}, func() {}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	return b.db.Update(ctx, func(tx *bolt.Tx) error {
		for i := range b.devices {
			if err := tx.PutDevice(fleet.Device{ID: b.device(i), Product: "bench"}); err != nil {
				return err
			}
		}
		return nil
	})
}

// store is what musterd does with a batch.
func (b *bench) store(ctx context.Context, ms []broker.Message) error {
	batch := make([]uplink.Message, len(ms))
	for i, m := range ms {
		batch[i] = uplink.Message{Vhost: m.Vhost, Key: m.Key, Body: m.Body, At: m.At}
	}
	return b.intake.Store(ctx, batch)
}

func (b *bench) broker() (broker.Config, error) {
	password, err := b.w.Config.Secret(b.w.Config.Broker.PasswordFile)
	return broker.Config{
		Address: b.w.Config.Broker.AMQPS, User: brokerconf.UserMuster, Password: password, TLS: &tls.Config{RootCAs: b.w.Trust},
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})), MinPause: 50 * time.Millisecond,
	}, err
}

// measure fills the queue, drains it with handle, and returns the messages a second from the first batch on.
func (b *bench) measure(ctx context.Context, handle func(context.Context, []broker.Message) error) (float64, error) {
	conf, err := b.broker()
	if err != nil {
		return 0, err
	}
	if err := b.fill(ctx, conf); err != nil {
		return 0, err
	}
	var began, ended time.Time
	var first, n int
	done := make(chan struct{})
	c := broker.NewConsumer(conf, wire.VhostDevices, broker.Subscription{
		Queue: wire.QueueUp, MaxBatch: b.w.Config.Uplink.Batch, Linger: b.w.Config.Uplink.Linger,
		Handle: func(ctx context.Context, ms []broker.Message) error {
			if err := handle(ctx, ms); err != nil {
				return err
			}
			if n += len(ms); began.IsZero() {
				began, first = time.Now(), n
			}
			if n >= b.reports && ended.IsZero() {
				ended = time.Now()
				close(done)
			}
			return nil
		},
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() { _ = c.Run(ctx) })
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		err = fmt.Errorf("%d of %d reports in two minutes", n, b.reports)
	}
	cancel()
	running.Wait()
	return float64(n-first) / ended.Sub(began).Seconds(), err
}

// fill publishes the reports with confirms.
func (b *bench) fill(ctx context.Context, conf broker.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := broker.NewPublisher(conf, wire.VhostDevices)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() { _ = p.Run(ctx) })
	for !p.Connected() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	for sent := 0; sent < b.reports; {
		var outs []broker.Out
		for ; len(outs) < 1000 && sent < b.reports; sent++ {
			body := fmt.Sprintf(`{"temp":%d,"rssi":-%d,"uptime":%d,"mode":"auto","note":%q}`, sent%40, sent%90, sent, strings.Repeat("x", 32))
			outs = append(outs, broker.Out{Key: "d." + string(b.device(sent)) + ".up.state", Body: []byte(body)})
		}
		if err := errors.Join(p.Publish(ctx, outs)...); err != nil {
			return err
		}
	}
	return nil
}
