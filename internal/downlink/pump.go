package downlink

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Tx is what the pump needs of the store.
type Tx interface {
	OutboxAfter(seq uint64, limit int) ([]Entry, error)
	DropOutbox(seqs []uint64) error
}

// Message is a composed payload for one topic of a device.
type Message struct {
	Device  fleet.DeviceID
	Word    wire.Down
	Payload []byte
}

// Publisher brings messages to the broker. It returns one error per message, nil for those the broker confirmed.
type Publisher interface {
	Publish(ctx context.Context, vhost string, ms []Message) []error
}

// Composer says what an entry means now. No messages and no error: it has become pointless. An Unprocessable error, which
// says that the device cannot receive it, ends the entry too; after any other one it is tried again.
type Composer func(ctx context.Context, at time.Time, e Entry) ([]Message, error)

// Config of a Pump. All fields are needed.
type Config struct {
	Update  func(context.Context, func(Tx) error) error
	View    func(context.Context, func(Tx) error) error
	Publish Publisher
	Compose map[Kind]Composer
	Log     *slog.Logger
}

// Bounds of the pump.
const (
	batchSize = 256
	// maxAge is how long an entry is worth sending: a device that connects later says hello and is told afresh.
	maxAge   = 15 * time.Minute
	minPause = 200 * time.Millisecond // after a failure; doubled up to maxPause, with jitter
	maxPause = 30 * time.Second
)

// Pump empties the outbox. Run it once.
type Pump struct {
	c    Config
	kick chan struct{} // capacity 1: the outbox may not be empty
	sent atomic.Uint64
	lost atomic.Uint64
}

// New returns a Pump.
func New(c Config) *Pump { return &Pump{c: c, kick: make(chan struct{}, 1)} }

// Kick tells the pump that there may be something to send. It never blocks.
func (p *Pump) Kick() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Counts returns how many messages the broker confirmed, and how many entries were given up because the device cannot
// receive them.
func (p *Pump) Counts() (sent, givenUp uint64) { return p.sent.Load(), p.lost.Load() }

// Run sends until ctx ends. What was left behind by a crash is sent first.
func (p *Pump) Run(ctx context.Context) error {
	pause := time.Duration(0)
	for {
		if err := p.Drain(ctx); err != nil && ctx.Err() == nil {
			pause = min(max(2*pause, minPause), maxPause)
			p.c.Log.Warn("messages to devices are delayed", "error", err, "again_in", pause)
			if !sleep(ctx, pause/2+rand.N(pause/2)) {
				return nil
			}
			continue
		}
		pause = 0
		select {
		case <-ctx.Done():
			return nil
		case <-p.kick:
		}
	}
}

// sleep returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Drain sends every entry of the outbox once. It returns the first failure after having tried them all, so one entry
// that cannot be composed does not hold up the others.
func (p *Pump) Drain(ctx context.Context) error {
	var after uint64
	var failed error
	for ctx.Err() == nil {
		var batch []Entry
		err := p.c.View(ctx, func(tx Tx) (err error) {
			batch, err = tx.OutboxAfter(after, batchSize)
			return err
		})
		if err != nil {
			return err
		}
		if len(batch) == 0 {
			return failed
		}
		after = batch[len(batch)-1].Seq
		done, err := p.send(ctx, batch)
		if err != nil && failed == nil {
			failed = err
		}
		if len(done) == 0 {
			continue
		}
		if err := p.c.Update(ctx, func(tx Tx) error { return tx.DropOutbox(done) }); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// same says which entries tell a device the same thing: the last of them is enough.
type same struct {
	device fleet.DeviceID
	vhost  string
	kind   Kind
	ref    string
}

// send composes and publishes a batch. It returns the numbers of the entries that are over, and the first failure.
func (p *Pump) send(ctx context.Context, batch []Entry) (done []uint64, failed error) {
	last := map[same]uint64{}
	for _, e := range batch {
		last[same{e.Device, e.Vhost, e.Kind, e.Ref}] = e.Seq
	}
	now := time.Now()
	byVhost := map[string][]Message{}
	owner := map[string][]uint64{} // entry of each message in byVhost
	left := map[uint64]int{}       // messages of an entry that are not confirmed yet
	for _, e := range batch {
		if last[same{e.Device, e.Vhost, e.Kind, e.Ref}] != e.Seq || now.Sub(e.At) > maxAge {
			done = append(done, e.Seq)
			continue
		}
		ms, err := p.compose(ctx, now, e)
		switch {
		case fleet.Is(err, fleet.Unprocessable), fleet.Is(err, fleet.NotFound):
			p.lost.Add(1)
			p.c.Log.Warn("message to a device given up", "device", e.Device, "kind", e.Kind, "error", err)
			done = append(done, e.Seq)
			continue
		case err != nil:
			if failed == nil {
				failed = err
			}
			continue
		case len(ms) == 0:
			done = append(done, e.Seq)
			continue
		}
		left[e.Seq] = len(ms)
		for _, m := range ms {
			byVhost[e.Vhost] = append(byVhost[e.Vhost], m)
			owner[e.Vhost] = append(owner[e.Vhost], e.Seq)
		}
	}
	for vhost, ms := range byVhost {
		for i, err := range p.c.Publish.Publish(ctx, vhost, ms) {
			if err != nil {
				if failed == nil {
					failed = err
				}
				continue
			}
			p.sent.Add(1)
			seq := owner[vhost][i]
			if left[seq]--; left[seq] == 0 {
				done = append(done, seq)
			}
		}
	}
	return done, failed
}

func (p *Pump) compose(ctx context.Context, at time.Time, e Entry) ([]Message, error) {
	c := p.c.Compose[e.Kind]
	if c == nil {
		return nil, fleet.Errorf(fleet.Unprocessable, "outbox entry of unknown kind %q", e.Kind)
	}
	return c(ctx, at, e)
}
