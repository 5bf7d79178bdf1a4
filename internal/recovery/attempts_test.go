package recovery

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
)

// trail is an audit trail in memory that can be out of order.
type trail struct {
	mu    sync.Mutex
	lines []access.Entry
	err   error
}

func (t *trail) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
}

func (t *trail) Audit(e access.Entry) error {
	t.lines = append(t.lines, e)
	return nil
}

func (t *trail) update(_ context.Context, f func(AuditTx) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	return f(t)
}

// take returns what was written since the last call, as "who details".
func (t *trail) take() (out []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.lines {
		out = append(out, e.On+" "+e.Details)
	}
	t.lines = nil
	return out
}

func TestAttemptsAreCoalesced(t *testing.T) {
	tr := &trail{}
	a := NewAttempts(tr.update)
	at := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	flush := func(after time.Duration, all bool) []string {
		t.Helper()
		if err := a.Flush(t.Context(), at.Add(after), all); err != nil {
			t.Fatal(err)
		}
		return tr.take()
	}
	knock := func(after time.Duration, id fleet.DeviceID, why string) {
		a.Note(Attempt{At: at.Add(after), Device: id, Door: "8444", Why: why, Peer: "192.0.2.7:5"})
	}
	if a.Due() || len(flush(0, true)) != 0 {
		t.Error("something to write, and nobody knocked")
	}
	knock(0, "lamp-1", "disabled")
	if !a.Due() {
		t.Error("a first attempt is not due")
	}
	if got := flush(time.Second, false); len(got) != 1 || got[0] != "lamp-1 disabled at 8444, from 192.0.2.7:5" {
		t.Errorf("the first: %q", got)
	}
	for i := range 40 {
		knock(time.Duration(i)*time.Minute, "lamp-1", "disabled")
	}
	if a.Due() || len(flush(59*time.Minute, false)) != 0 {
		t.Error("repeats are written one by one")
	}
	if got := flush(time.Hour, false); len(got) != 1 || !strings.HasSuffix(got[0], ", 40 times since 2030-01-01T00:00:00Z") {
		t.Errorf("the sum: %q", got)
	}
	if got := flush(3*time.Hour, true); len(got) != 0 {
		t.Errorf("written twice: %q", got)
	}
	knock(4*time.Hour, "lamp-1", "disabled")
	knock(4*time.Hour, "lamp-1", "recovery-off")
	if got := flush(4*time.Hour, false); len(got) != 2 {
		t.Errorf("another window, two reasons: %q", got)
	}
}

// Names are free to whoever can reach the port: however many are made up, the trail grows by a bounded number of lines.
func TestStrangersCannotFillTheTrail(t *testing.T) {
	tr := &trail{}
	a := NewAttempts(tr.update)
	at := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 100_000 {
		a.Note(Attempt{At: at, Device: fleet.DeviceID(fmt.Sprint("made-up-", i)), Door: "8884", Why: Strange})
	}
	for i := range 1000 {
		a.Note(Attempt{At: at, Device: fleet.DeviceID(fmt.Sprint("lamp-", i)), Door: "8884", Why: "disabled"})
	}
	if err := a.Flush(t.Context(), at, true); err != nil {
		t.Fatal(err)
	}
	total, strangers := 0, 0
	for _, e := range tr.lines {
		n := 1
		if _, text, many := strings.Cut(e.Details, ", "); many {
			if _, err := fmt.Sscanf(text, "%d times", &n); err != nil {
				t.Fatalf("%q: %v", e.Details, err)
			}
		}
		total += n
		if strings.HasPrefix(e.On, "made-up") {
			strangers++
		}
	}
	if total != 101_000 {
		t.Errorf("%d attempts are told of", total)
	}
	if strangers != maxStrangers || len(tr.lines) > maxKnocks+2 {
		t.Errorf("%d lines, %d strangers by name", len(tr.lines), strangers)
	}
	if len(a.knocks) != 0 || a.strangers != 0 {
		t.Errorf("%d remembered, %d strangers", len(a.knocks), a.strangers)
	}
}

func TestAttemptsOutliveAStoreThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &trail{}
		tr.fail(errors.New("full"))
		a := NewAttempts(tr.update)
		a.Note(Attempt{At: time.Now(), Device: "lamp-1", Door: "8884", Why: "disabled"})
		ctx, cancel := context.WithCancel(t.Context())
		var failures atomic.Int32
		done := make(chan error)
		go func() { done <- a.Run(ctx, func(error) { failures.Add(1) }) }()
		time.Sleep(90*time.Second + time.Second/2) // between two looks
		synctest.Wait()
		if got := tr.take(); failures.Load() == 0 || len(got) != 0 {
			t.Errorf("%d failures, written %q", failures.Load(), got)
		}
		tr.fail(nil)
		time.Sleep(90*time.Second + time.Second/2) // between two looks
		synctest.Wait()
		if got := tr.take(); len(got) != 1 {
			t.Errorf("written %q", got)
		}
		a.Note(Attempt{At: time.Now(), Device: "lamp-1", Door: "8884", Why: "disabled"})
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := tr.take(); len(got) != 1 {
			t.Errorf("at the end %q", got)
		}
	})
}
