package enroll

import (
	"context"
	"slices"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Refusal is a login that the broker was told to refuse.
type Refusal struct {
	At     time.Time
	Serial fleet.Serial // of the certificate; empty: a password
	Why    string       // in words
}

// Evidence says what became of a device's connections after it, or one of its certificates, was shut out. Durations count
// from the call.
type Evidence struct {
	Live     int           // sessions that were known to be open
	Stored   time.Duration // until new connections were refused
	Closed   time.Duration // until live ones were told to close; zero if the broker could not be reached
	Verified time.Duration // until a later look found none; zero if there was none before ctx ended
	Attempts int           // rounds of closing
	Clean    bool          // none was found; if not, Run goes on trying
	Detail   string        // what stands in the way, if not Clean

	StoredAt time.Time
	ClosedAt time.Time // zero as Closed
	EndedAt  time.Time // when the broker said that the session ended; zero if it said nothing, or there was none
	Refused  Refusal   // the first login that was refused after StoredAt; zero if none was tried while the call lasted
	LastLook time.Time // when Run looks a last time; zero if it did, or if it is not Clean
}

// exclusion is what a caller of shutOut knows.
type exclusion struct {
	device  fleet.DeviceID
	serial  fleet.Serial // of the one certificate that is shut out; empty: the whole device
	live    int
	at      time.Time // of the call
	start   time.Time // the moment of the clock that at stands for
	stored  time.Duration
	refused func() []Refusal
}

// shutOut closes the connections of a device whose exclusion was just stored, until two looks find none or ctx ends. What
// is left to do then is stored and done by Run.
func (e *Enroller) shutOut(ctx context.Context, x exclusion) (Evidence, error) {
	out := Evidence{Live: x.live, Stored: x.stored, StoredAt: x.at.Add(x.stored)}
	list, mine, err := e.claimClosings(ctx, func(c pki.Closing) bool { return c.Device == x.device && c.Open() })
	if err != nil {
		return out, err
	}
	defer func() {
		e.releaseClosings(mine)
		kick(e.toClose) // whatever is left
	}()
	done := e.settle(ctx, x.at, x.start, list) // those that Run is closing, too: whoever asked waits for the proof
	out.Attempts, out.Detail = done.attempts, done.detail
	if !done.closedAt.IsZero() {
		out.ClosedAt, out.Closed = done.closedAt, done.closedAt.Sub(x.at)
	}
	if done.clean {
		out.Clean, out.Detail = true, ""
		out.Verified = time.Since(x.start)
	}
	return out, e.observe(context.WithoutCancel(ctx), x, &out)
}

// observe adds what others saw: the broker's word about the session, refused logins, and when the last look is.
func (e *Enroller) observe(ctx context.Context, x exclusion, out *Evidence) error {
	for _, r := range x.refused() {
		if !r.At.Before(out.StoredAt) && (x.serial == "" || r.Serial == x.serial) {
			out.Refused = r
			break
		}
	}
	return e.c.View(ctx, func(tx Tx) error {
		st, err := tx.Status(x.device)
		if err != nil {
			return err
		}
		if x.live > 0 && !st.Online && !st.LostAt.Before(x.at.Truncate(time.Second)) { // the broker's clock may be one of seconds
			out.EndedAt = st.LostAt
		}
		all, err := tx.Closings()
		if err != nil || !out.Clean {
			return err
		}
		for _, c := range slices.DeleteFunc(all, func(c pki.Closing) bool { return c.Device != x.device }) {
			if c.LastLook.After(out.LastLook) {
				out.LastLook = c.LastLook
			}
		}
		return nil
	})
}
