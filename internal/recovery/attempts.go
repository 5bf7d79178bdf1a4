package recovery

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
)

// Attempt is a knock at a door that stayed shut: of a device that is unknown, disabled or revoked, or of somebody who says to
// be one.
type Attempt struct {
	At     time.Time
	Device fleet.DeviceID // as it said; not proven
	Door   string         // devices, fallback, 8444: a word for people
	Why    string         // one of a closed set of words
	Peer   string         // its address; may be empty
}

// Bounds of what Attempts writes: whoever can knock must not be able to fill the audit trail.
const (
	attemptWindow = time.Hour // within which the same knocks are one line, after the first
	maxKnocks     = 256       // different ones in a window; what is more is counted in one line
	maxStrangers  = 32        // of them by names that no device has
)

// Strange is the Why of a device that is not registered.
const Strange = "unknown-device"

// Attempts puts refused attempts on record: the first of a kind at once, how many more there were when its hour is over. Its
// memory is bounded. Its methods are safe for concurrent use.
type Attempts struct {
	update func(context.Context, func(AuditTx) error) error

	mu        sync.Mutex
	knocks    map[knock]*counted // guarded by mu
	strangers int                // guarded by mu; among them
	fresh     bool               // guarded by mu; there is something to write
}

// AuditTx is what Attempts needs of the store.
type AuditTx interface{ Audit(access.Entry) error }

// knock is what counts as the same attempt. The zero Device is everybody who did not fit.
type knock struct {
	device    fleet.DeviceID
	door, why string
}

// counted is how often one came in its window.
type counted struct {
	first, last time.Time
	peer        string // of the newest
	n, written  int
}

// NewAttempts returns an empty record.
func NewAttempts(update func(context.Context, func(AuditTx) error) error) *Attempts {
	return &Attempts{update: update, knocks: map[knock]*counted{}}
}

// Note counts an attempt. It writes nothing and waits for no store.
func (a *Attempts) Note(t Attempt) {
	a.mu.Lock()
	defer a.mu.Unlock()
	k := knock{t.Device, t.Door, t.Why}
	c := a.knocks[k]
	if c == nil && (len(a.knocks) >= maxKnocks || t.Why == Strange && a.strangers >= maxStrangers) {
		k.device = ""
		c = a.knocks[k]
	}
	if c == nil {
		c = &counted{first: t.At}
		a.knocks[k] = c
		a.fresh = true
		if t.Why == Strange {
			a.strangers++
		}
	}
	c.n++
	c.last, c.peer = t.At, t.Peer
}

// Flush writes what is due at time at: each first attempt, and the sums of windows that are over; with all, those of the
// others, too. After an error the same is due again. It must not be called twice at the same time.
func (a *Attempts) Flush(ctx context.Context, at time.Time, all bool) error {
	lines := a.due(at, all)
	if len(lines) > 0 {
		err := a.update(ctx, func(tx AuditTx) error {
			for _, l := range lines {
				if err := tx.Audit(l.entry); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, l := range lines {
		a.knocks[l.k].written += l.n
	}
	for k, c := range a.knocks {
		if c.written == c.n && (all || at.Sub(c.first) >= attemptWindow) {
			delete(a.knocks, k)
			if k.why == Strange {
				a.strangers--
			}
		}
	}
	return nil
}

// line is n attempts that go into the trail as one entry.
type line struct {
	k     knock
	n     int
	entry access.Entry
}

// due returns what Flush writes, sorted.
func (a *Attempts) due(at time.Time, all bool) (lines []line) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fresh = false
	for k, c := range a.knocks {
		if over := all || at.Sub(c.first) >= attemptWindow; c.written == 0 || over && c.n > c.written {
			n := c.n - c.written
			lines = append(lines, line{k, n, c.entry(at, k, n)})
		}
	}
	slices.SortFunc(lines, func(x, y line) int {
		return cmp.Or(cmp.Compare(x.k.device, y.k.device), cmp.Compare(x.k.door, y.k.door), cmp.Compare(x.k.why, y.k.why))
	})
	return lines
}

// Due reports whether somebody knocked who had not before in its window.
func (a *Attempts) Due() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fresh
}

func (c *counted) entry(at time.Time, k knock, n int) access.Entry {
	who, on := "device:"+string(k.device), string(k.device)
	if k.device == "" {
		who, on = "devices", ""
	}
	text := fmt.Sprintf("%s at %s", k.why, k.door)
	if c.peer != "" {
		text += ", from " + c.peer
	}
	if n > 1 {
		text += fmt.Sprintf(", %d times since %s", n, c.first.UTC().Format(time.RFC3339))
	}
	return access.Entry{At: at, Who: who, What: "door.refused", On: on, Details: text}
}

// Run flushes until ctx ends, and then once more. It returns nil.
func (a *Attempts) Run(ctx context.Context, failed func(error)) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	looked := time.Now()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := a.Flush(last, time.Now(), true); err != nil {
				failed(err)
			}
			return nil
		case now := <-tick.C:
			if !a.Due() && now.Sub(looked) < time.Minute {
				continue
			}
			looked = now
			if err := a.Flush(ctx, now, false); err != nil && ctx.Err() == nil {
				failed(err)
			}
		}
	}
}
