package uplink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"time"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Message is what came from a device by way of the broker. Key and Body are bytes that the device chose, except that the
// broker let it write only below its own id.
type Message struct {
	Vhost string
	Key   string // routing key
	Body  []byte
	At    time.Time // when muster received it
	Dead  string    // not empty: it comes from the dead-letter queue, and why
}

// Handlers are the use cases that a message may concern, each a part of the transaction T. An error of kind Invalid puts
// the message into quarantine; any other one makes the whole batch come again.
type Handlers[T any] struct {
	// Admitted reports whether the device's words count: it exists and is not disabled. why is for the quarantine.
	Admitted func(tx T, id fleet.DeviceID) (ok bool, why string, err error)

	Hello func(tx T, at time.Time, vhost string, id fleet.DeviceID, h wire.Hello) error
	State func(tx T, at time.Time, id fleet.DeviceID, doc []byte) error
	OTA   func(tx T, at time.Time, id fleet.DeviceID, r wire.OTAReport) error
	Cert  func(tx T, at time.Time, vhost string, id fleet.DeviceID, r wire.CertReport) error

	Quarantine func(tx T, q Quarantined) error
}

// Intake stores batches of messages. T is the store's transaction.
type Intake[T any] struct {
	update    func(context.Context, func(T) error) error
	handle    Handlers[T]
	committed func()
	log       *slog.Logger

	stored, quarantined atomic.Uint64
}

// New returns an Intake. update runs a function in one transaction; committed, which must not block, is called after
// each commit.
func New[T any](update func(context.Context, func(T) error) error, h Handlers[T], committed func(), log *slog.Logger) *Intake[T] {
	return &Intake[T]{update: update, handle: h, committed: committed, log: log}
}

// Counts returns how many messages were stored and how many were quarantined since the start.
func (in *Intake[T]) Counts() (stored, quarantined uint64) {
	return in.stored.Load(), in.quarantined.Load()
}

// Store handles a batch in one transaction. It returns nil once all of it is committed, handled or quarantined: then, and
// only then, the batch may be acknowledged. It may be called again with messages that were stored already.
func (in *Intake[T]) Store(ctx context.Context, batch []Message) error {
	// A message that turns out bad may have written half of what it meant, so the transaction is thrown away and the
	// batch is run again with that message set aside. Each round sets at least one aside.
	bad := map[int]fault{}
	for {
		var found int
		var why fault
		err := in.update(ctx, func(tx T) error {
			found = -1
			for i, m := range batch {
				if f, isBad := bad[i]; isBad {
					if err := in.handle.Quarantine(tx, entry(m, f)); err != nil {
						return err
					}
					continue
				}
				f, err := in.one(tx, m)
				if err != nil {
					return err
				}
				if f.reason != "" {
					found, why = i, f
					return errSetAside
				}
			}
			return nil
		})
		switch {
		case err == nil:
			in.stored.Add(uint64(len(batch) - len(bad)))
			in.quarantined.Add(uint64(len(bad)))
			in.committed()
			return nil
		case errors.Is(err, errSetAside):
			bad[found] = why
			in.log.Warn("message quarantined", "vhost", batch[found].Vhost, "key", printable(batch[found].Key), "reason", why.reason)
		default:
			return err
		}
	}
}

// errSetAside rolls a batch back that holds a message for the quarantine.
var errSetAside = errors.New("uplink: a message was set aside")

// fault says why a message goes into quarantine; the zero fault says that it does not.
type fault struct{ reason, details string }

// one handles a message. Its error is one that the store or a use case may get over.
func (in *Intake[T]) one(tx T, m Message) (f fault, err error) {
	defer func() {
		if p := recover(); p != nil {
			in.log.Error("handler panicked", "key", printable(m.Key), "panic", p, "stack", string(debug.Stack()))
			f, err = fault{"muster failed on it: please report this", fmt.Sprint(p)}, nil
		}
	}()
	if m.Dead != "" {
		return fault{"dead letter", m.Dead}, nil
	}
	id, word, err := wire.ParseUpKey(m.Key)
	if err != nil {
		return invalid(err)
	}
	ok, why, err := in.handle.Admitted(tx, id)
	if err != nil {
		return invalid(err)
	}
	if !ok {
		return fault{reason: why}, nil
	}
	return invalid(in.dispatch(tx, m, id, word))
}

func (in *Intake[T]) dispatch(tx T, m Message, id fleet.DeviceID, word wire.Up) error {
	switch word {
	case wire.UpHello:
		h, err := wire.DecodeHello(m.Body)
		if err != nil {
			return err
		}
		return in.handle.Hello(tx, m.At, m.Vhost, id, h)
	case wire.UpCert:
		r, err := wire.DecodeCert(m.Body)
		if err != nil {
			return err
		}
		return in.handle.Cert(tx, m.At, m.Vhost, id, r)
	}
	// The broker lets nothing else in on the fallback; should it ever, nothing else is believed.
	if m.Vhost != wire.VhostDevices {
		return fleet.Errorf(fleet.Invalid, "only hello and cert are read on the fallback")
	}
	switch word {
	case wire.UpState:
		doc, err := wire.DecodeState(m.Body)
		if err != nil {
			return err
		}
		return in.handle.State(tx, m.At, id, doc)
	case wire.UpOTA:
		r, err := wire.DecodeOTA(m.Body)
		if err != nil {
			return err
		}
		return in.handle.OTA(tx, m.At, id, r)
	}
	return fleet.Errorf(fleet.Invalid, "topic: muster does not read this word")
}

// invalid turns an Invalid error into a fault and passes any other.
func invalid(err error) (fault, error) {
	if !fleet.Is(err, fleet.Invalid) {
		return fault{}, err
	}
	e, _ := errors.AsType[*fleet.Error](err)
	f := fault{reason: e.Msg}
	if e.Err != nil {
		f.details = e.Err.Error()
	}
	return f, nil
}

// entry returns what is kept of a bad message.
func entry(m Message, f fault) Quarantined {
	return Quarantined{
		At: m.At, Vhost: m.Vhost, Key: printable(m.Key), Body: m.Body[:min(len(m.Body), MaxQuarantinedBody)], Size: len(m.Body),
		Reason: f.reason, Details: cut(f.details, 512),
	}
}

// printable escapes what a device chose and cuts it.
func printable(s string) string {
	q := strconv.QuoteToASCII(cut(s, 256))
	return q[1 : len(q)-1]
}

func cut(s string, n int) string { return s[:min(len(s), n)] }
