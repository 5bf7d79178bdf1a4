package uplink_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/uplink"
	"muster/internal/wire"
)

var at = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// world is an intake over a real store whose handlers write what they got into the device's labels, so that a test sees
// what a transaction kept.
type world struct {
	db      *bolt.DB
	in      *uplink.Intake[*bolt.Tx]
	commits int
	fail    error // what the hello handler returns
}

func newWorld(t *testing.T) *world {
	w := &world{db: storetest.Open(t)}
	note := func(tx *bolt.Tx, id fleet.DeviceID, what string) error {
		d, err := tx.Device(id)
		if err != nil {
			return err
		}
		if d.Labels == nil {
			d.Labels = map[string]string{}
		}
		d.Labels[what] = fmt.Sprint(len(d.Labels))
		return tx.PutDevice(d)
	}
	h := uplink.Handlers[*bolt.Tx]{
		Admitted: func(tx *bolt.Tx, id fleet.DeviceID) (bool, string, error) {
			d, err := tx.Device(id)
			if fleet.Is(err, fleet.NotFound) {
				return false, "unknown device", nil
			}
			return !d.Disabled, "device is disabled", err
		},
		Hello: func(tx *bolt.Tx, _ time.Time, vhost string, id fleet.DeviceID, h wire.Hello) error {
			if err := note(tx, id, "hello "+vhost+" "+h.Version); err != nil {
				return err
			}
			if h.Version == "panic" {
				panic("boom")
			}
			if h.Version == "late" {
				return fleet.Errorf(fleet.Invalid, "found bad after a write")
			}
			return w.fail
		},
		State: func(tx *bolt.Tx, _ time.Time, id fleet.DeviceID, doc []byte) error {
			return note(tx, id, "state "+string(doc))
		},
		OTA: func(tx *bolt.Tx, _ time.Time, id fleet.DeviceID, r wire.OTAReport) error {
			return note(tx, id, "ota "+string(r.Step))
		},
		Cert: func(tx *bolt.Tx, _ time.Time, vhost string, id fleet.DeviceID, r wire.CertReport) error {
			return note(tx, id, "cert "+vhost+" "+string(r.Have))
		},
		Quarantine: (*bolt.Tx).Quarantine,
	}
	w.in = uplink.New(w.db.Update, h, func() { w.commits++ }, slog.New(slog.DiscardHandler))
	if err := w.db.Update(t.Context(), func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: "off", Disabled: true}); err != nil {
			return err
		}
		return tx.PutDevice(fleet.Device{ID: "d1"})
	}); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) kept(t *testing.T) (notes []string, reasons []string) {
	t.Helper()
	if err := w.db.View(t.Context(), func(tx *bolt.Tx) error {
		d, err := tx.Device("d1")
		if err != nil {
			return err
		}
		for k := range d.Labels {
			notes = append(notes, k)
		}
		qs, err := tx.Quarantined(0, 0)
		for _, q := range qs {
			reasons = append(reasons, q.Reason)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(notes)
	return notes, reasons
}

func hello(version string) []byte {
	return wire.Encode(wire.Hello{Version: version, Image: fleet.Hash(strings.Repeat("a", 64))})
}

func msg(key string, body []byte) uplink.Message {
	return uplink.Message{Vhost: wire.VhostDevices, Key: key, Body: body, At: at}
}

// One bad message neither stops the others of its batch nor leaves half of what it meant to write.
func TestABadMessageIsSetAsideAndItsNeighboursAreStored(t *testing.T) {
	w := newWorld(t)
	err := w.in.Store(t.Context(), []uplink.Message{
		msg("d.d1.up.hello", hello("1.0.0")),
		msg("d.d1.up.hello", hello("late")),
		msg("d.d1.up.hello", hello("panic")),
		msg("d.d1.up.state", []byte(`{"a":1}`)),
		msg("d.d1.up.state", []byte(`{"a":1,"a":2}`)),
		msg("d.d1.up.tm.x", []byte(`1`)),
		msg("d.D1.up.hello", hello("1.0.0")),
		msg("d.ghost.up.hello", hello("1.0.0")),
		msg("d.off.up.hello", hello("1.0.0")),
		msg("\x00\xff", nil),
		msg("d.d1.up.ota", []byte(`{"job":"r","step":"failed"}`)),
		{Vhost: wire.VhostFallback, Key: "d.d1.up.state", Body: []byte(`{}`), At: at},
		{Vhost: wire.VhostFallback, Key: "d.d1.up.cert", Body: []byte(`{"ok":"a1"}`), At: at},
		{Vhost: wire.VhostDevices, Key: "d.d1.up.hello", Body: hello("1"), At: at, Dead: "delivery_limit"},
	})
	if err != nil {
		t.Fatal(err)
	}
	notes, reasons := w.kept(t)
	if want := []string{"cert fallback a1", "hello devices 1.0.0", "ota failed", `state {"a":1}`}; !slices.Equal(notes, want) {
		t.Errorf("kept %q, want %q", notes, want)
	}
	if len(reasons) != 10 || w.commits != 1 {
		t.Errorf("%d quarantined (%q), %d commits", len(reasons), reasons, w.commits)
	}
	if stored, quarantined := w.in.Counts(); stored != 4 || quarantined != 10 {
		t.Errorf("counted %d and %d", stored, quarantined)
	}
	if r := strings.Join(reasons, "\n"); !strings.Contains(r, "unknown device") || !strings.Contains(r, "device is disabled") || !strings.Contains(r, "dead letter") {
		t.Errorf("reasons: %s", r)
	}
}

// While the store or a use case fails, nothing is kept and the batch must come again: it is not acknowledged.
func TestAFailureThatMayPassKeepsTheBatchInTheQueue(t *testing.T) {
	w := newWorld(t)
	w.fail = fleet.Errorf(fleet.Unavailable, "later")
	batch := []uplink.Message{msg("d.d1.up.state", []byte(`{"a":1}`)), msg("d.d1.up.hello", hello("1.0.0"))}
	if err := w.in.Store(t.Context(), batch); !fleet.Is(err, fleet.Unavailable) {
		t.Fatalf("got %v", err)
	}
	if notes, reasons := w.kept(t); len(notes) != 0 || len(reasons) != 0 || w.commits != 0 {
		t.Errorf("kept %q, quarantined %q, %d commits", notes, reasons, w.commits)
	}
	w.fail = nil
	if err := w.in.Store(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	if notes, _ := w.kept(t); len(notes) != 2 {
		t.Errorf("kept %q", notes)
	}
}

func TestAStoppedStoreIsAnErrorNotALoss(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	busy, leave, done := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		done <- w.db.Update(context.Background(), func(*bolt.Tx) error { close(busy); <-leave; return nil })
	}()
	<-busy
	err := w.in.Store(ctx, []uplink.Message{msg("d.d1.up.hello", hello("1"))})
	if !errors.Is(err, context.Canceled) || w.commits != 0 {
		t.Errorf("%v, %d commits", err, w.commits)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What a device chose is escaped and cut before it is kept or logged.
func TestTheQuarantineHoldsEscapedAndBoundedWords(t *testing.T) {
	w := newWorld(t)
	if err := w.in.Store(t.Context(), []uplink.Message{msg("\x1b[31m\n"+strings.Repeat("x", 1000), make([]byte, 60_000))}); err != nil {
		t.Fatal(err)
	}
	_ = w.db.View(t.Context(), func(tx *bolt.Tx) error {
		q, err := tx.QuarantinedOne(1)
		if err != nil || strings.ContainsAny(q.Key, "\x1b\n") || len(q.Key) > 300 || len(q.Body) != uplink.MaxQuarantinedBody || q.Size != 60_000 {
			t.Errorf("%q, %d of %d bytes, %v", q.Key, len(q.Body), q.Size, err)
		}
		return nil
	})
}
