package downlink_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

// broker is the far end: it keeps what it confirmed and can be down.
type broker struct {
	mu   sync.Mutex
	down bool
	got  []string
}

func (b *broker) setDown(down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.down = down
}

func (b *broker) said() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.got)
}

func (b *broker) Publish(_ context.Context, vhost string, ms []downlink.Message) []error {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]error, len(ms))
	for i, m := range ms {
		if b.down {
			out[i] = errors.New("connection lost")
			continue
		}
		b.got = append(b.got, fmt.Sprintf("%s %s %s", vhost, m.Device, m.Payload))
	}
	return out
}

type world struct {
	db   *bolt.DB
	b    broker
	pump *downlink.Pump
	fail map[fleet.DeviceID]error // what composing for a device returns
}

func newWorld(t *testing.T) *world {
	w := &world{db: storetest.Open(t), fail: map[fleet.DeviceID]error{}}
	compose := func(_ context.Context, _ time.Time, e downlink.Entry) ([]downlink.Message, error) {
		if e.Ref == "pointless" {
			return nil, nil
		}
		if err := w.fail[e.Device]; err != nil {
			return nil, err
		}
		return []downlink.Message{
			{Device: e.Device, Word: wire.DownCmd, Payload: []byte(e.Ref + "/1")},
			{Device: e.Device, Word: wire.DownCmd, Payload: []byte(e.Ref + "/2")},
		}, nil
	}
	w.pump = downlink.New(downlink.Config{
		Update: func(ctx context.Context, f func(downlink.Tx) error) error {
			return w.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(downlink.Tx) error) error {
			return w.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Publish: &w.b, Compose: map[downlink.Kind]downlink.Composer{downlink.Cmd: compose}, Log: slog.New(slog.DiscardHandler),
	})
	return w
}

func (w *world) put(t *testing.T, es ...downlink.Entry) {
	t.Helper()
	if err := w.db.Update(t.Context(), func(tx *bolt.Tx) error {
		for _, e := range es {
			if e.At.IsZero() {
				e.At = time.Now()
			}
			if e.Kind == "" {
				e.Kind, e.Vhost = downlink.Cmd, "devices"
			}
			if err := tx.Enqueue(e); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func (w *world) left(t *testing.T) (n int) {
	t.Helper()
	if err := w.db.View(t.Context(), func(tx *bolt.Tx) error {
		es, err := tx.Outbox(0)
		n = len(es)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestTheSameWordIsSaidOnceAndOldOrPointlessOnesNotAtAll(t *testing.T) {
	w := newWorld(t)
	w.put(t,
		downlink.Entry{Device: "d1", Ref: "a"}, downlink.Entry{Device: "d2", Ref: "a"}, downlink.Entry{Device: "d1", Ref: "a"},
		downlink.Entry{Device: "d3", Ref: "pointless"},
		downlink.Entry{Device: "d4", Ref: "old", At: time.Now().Add(-time.Hour)},
		downlink.Entry{Device: "d5", Kind: "odd", Vhost: "devices"},
	)
	if err := w.pump.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"devices d2 a/1", "devices d2 a/2", "devices d1 a/1", "devices d1 a/2"}; !slices.Equal(w.b.said(), want) {
		t.Errorf("said %q", w.b.said())
	}
	if n := w.left(t); n != 0 {
		t.Errorf("%d entries left", n)
	}
	if sent, lost := w.pump.Counts(); sent != 4 || lost != 1 {
		t.Errorf("counted %d sent, %d given up", sent, lost)
	}
}

// One entry that cannot be composed now stays; those behind it go.
func TestAnEntryThatFailsDoesNotHoldUpTheOthers(t *testing.T) {
	w := newWorld(t)
	for i := range 600 { // more than one batch
		w.put(t, downlink.Entry{Device: fleet.DeviceID(fmt.Sprint("d", i)), Ref: "a"})
	}
	w.fail["d0"] = fleet.Errorf(fleet.Unavailable, "later")
	w.fail["d1"] = fleet.Errorf(fleet.Unprocessable, "buffer too small")
	if err := w.pump.Drain(t.Context()); !fleet.Is(err, fleet.Unavailable) {
		t.Fatalf("got %v", err)
	}
	if n := w.left(t); n != 1 || len(w.b.said()) != 2*598 {
		t.Errorf("%d left, %d said", n, len(w.b.said()))
	}
}

// While the broker is away nothing is lost and nothing spins; when it is back, everything is said.
func TestAnOutageOfTheBrokerDelaysAndLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.b.setDown(true)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- w.pump.Run(ctx) }()
		w.put(t, downlink.Entry{Device: "d1", Ref: "a"})
		w.pump.Kick()
		time.Sleep(5 * time.Minute)
		if w.left(t) != 1 || len(w.b.said()) != 0 {
			t.Errorf("%d left, said %q", w.left(t), w.b.said())
		}
		w.b.setDown(false)
		time.Sleep(maxPause)
		if w.left(t) != 0 || len(w.b.said()) != 2 {
			t.Errorf("%d left, said %q", w.left(t), w.b.said())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

const maxPause = 31 * time.Second
