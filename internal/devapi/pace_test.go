package devapi

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/ota"
)

// recorder keeps when how many bytes came.
type recorder struct {
	http.ResponseWriter
	mu   *sync.Mutex
	when *[]arrival
	slow time.Duration // the device takes so long for a piece
}

type arrival struct {
	at time.Time
	n  int
}

func (r *recorder) Write(b []byte) (int, error) {
	time.Sleep(r.slow) // in a bubble: the device's own time
	r.mu.Lock()
	defer r.mu.Unlock()
	*r.when = append(*r.when, arrival{time.Now(), len(b)})
	return len(b), nil
}

// Whatever many devices do under a small budget, slow ones among them: over no interval is more sent than the budget and
// its burst allow, and each device gets its image.
func TestDownloadsKeepToTheByteBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const (
			perSecond = 40_000
			size      = 100_000
			devices   = 30
		)
		p := newPacer(0)
		grant := ota.Grant{Rollout: "r", BytesPerSecond: perSecond}
		var mu sync.Mutex
		var when []arrival
		var wg sync.WaitGroup
		sent := make([]int, devices)
		began := time.Now()
		rng := rand.New(rand.NewPCG(1, 2)) // seed 1, 2
		for i := range devices {
			slow := time.Duration(rng.IntN(3)) * 300 * time.Millisecond
			wg.Go(func() {
				for {
					d, again := p.enter(grant, size, time.Now())
					if again > 0 {
						s, err := strconv.Atoi(later(again))
						if err != nil || time.Duration(s)*time.Second < again-time.Second {
							t.Errorf("told to come back in %q s, the backlog is %v", later(again), again)
						}
						time.Sleep(time.Duration(s) * time.Second)
						continue
					}
					w := &guarded{ResponseWriter: &recorder{httptest.NewRecorder(), &mu, &when, slow}, ctx: t.Context(), d: d, granted: func() error { return nil }, checked: time.Now()}
					n, err := w.Write(bytes.Repeat([]byte{1}, size))
					if err != nil {
						t.Error(err)
					}
					sent[i] = n
					d.leave(time.Now())
					return
				}
			})
		}
		wg.Wait()
		took := time.Since(began)
		for i, n := range sent {
			if n != size {
				t.Errorf("device %d got %d bytes", i, n)
			}
		}
		if ideal := time.Duration(devices*size/perSecond) * time.Second; took < ideal-2*time.Second || took > 6*ideal {
			t.Errorf("took %v, the budget alone %v", took, ideal)
		}
		burst := newShare(perSecond).lim.Burst()
		for i := range when {
			total := 0
			for _, a := range when[i:] {
				total += a.n
				if most := int(perSecond*a.at.Sub(when[i].at).Seconds()) + burst + devices*maxPiece; total > most {
					t.Fatalf("%d bytes in %v, at most %d", total, a.at.Sub(when[i].at), most)
				}
			}
		}
		if n := p.backlog(time.Now()); n != 0 {
			t.Errorf("%d bytes are still promised", n)
		}
		time.Sleep(2 * forgetIdle)
		p.enter(ota.Grant{}, 1, time.Now())
		if len(p.by) != 0 {
			t.Error("the budget of a rollout that nobody downloads any more is kept")
		}
	})
}

// A client that goes away gives back what it was promised, and one that has begun is let in where a new one is not.
func TestAByteBudgetIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPacer(1000)
		first, again := p.enter(ota.Grant{}, 40_000, time.Now())
		if again != 0 {
			t.Fatal("the first one is sent away")
		}
		if _, again = p.enter(ota.Grant{}, 10, time.Now()); again < 30*time.Second {
			t.Errorf("with a backlog of 40 s: %v", again)
		}
		if d, again := p.enter(ota.Grant{Begun: true}, 10, time.Now()); again != 0 {
			t.Error("one that has begun is sent away")
		} else {
			d.leave(time.Now())
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w := &guarded{ResponseWriter: httptest.NewRecorder(), ctx: ctx, d: first, granted: func() error { return nil }, checked: time.Now()}
		if _, err := w.Write(make([]byte, 40_000)); err == nil {
			t.Error("wrote everything to a client that is gone")
		}
		first.leave(time.Now())
		if d, again := p.enter(ota.Grant{}, 10, time.Now()); again != 0 {
			t.Errorf("afterwards: %v", again)
		} else {
			d.leave(time.Now())
		}
		if p.backlog(time.Now()) != 0 || p.refused.Load() != 1 {
			t.Errorf("backlog %d, refused %d", p.backlog(time.Now()), p.refused.Load())
		}
	})
}

// A device on a slow line does not keep others out of a budget that it leaves unused, and what has no body is never refused.
func TestASlowDeviceKeepsNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPacer(40_000)
		var mu sync.Mutex
		var when []arrival
		slow, _ := p.enter(ota.Grant{}, 1_500_000, time.Now())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			// 16 KiB in 32 s: 512 bytes a second.
			w := &guarded{ResponseWriter: &recorder{httptest.NewRecorder(), &mu, &when, 20 * time.Second}, ctx: ctx, d: slow, granted: func() error { return nil }, checked: time.Now()}
			_, _ = w.Write(make([]byte, 1_500_000))
		}()
		if d, again := p.enter(ota.Grant{}, 0, time.Now()); d != nil || again != 0 {
			t.Errorf("a request without a body: %v", again)
		}
		time.Sleep(time.Minute)
		d, again := p.enter(ota.Grant{}, 300_000, time.Now())
		if again != 0 {
			t.Fatalf("sent away for %v by one slow device", again)
		}
		d.leave(time.Now())
		cancel()
		<-done
		slow.leave(time.Now())
	})
}

// A grant that is taken back ends the download that is under way.
func TestADownloadEndsWithItsGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPacer(10_000)
		d, _ := p.enter(ota.Grant{}, 100_000, time.Now())
		began := time.Now()
		gone := errors.New("gone")
		w := &guarded{ResponseWriter: httptest.NewRecorder(), ctx: t.Context(), d: d, checked: began, granted: func() error {
			if time.Since(began) > 4*time.Second {
				return gone
			}
			return nil
		}}
		n, err := w.Write(make([]byte, 100_000))
		if !errors.Is(err, gone) || n < 30_000 || n > 80_000 {
			t.Errorf("%d bytes, %v", n, err)
		}
		d.leave(time.Now())
	})
}

func TestAnnounced(t *testing.T) {
	for name, row := range map[string]struct {
		method, ranges, match string
		want                  int64
	}{
		"all":              {want: 1000},
		"head":             {method: http.MethodHead},
		"has it":           {match: `"tag"`},
		"the rest":         {ranges: "bytes=400-", want: 600},
		"a part":           {ranges: "bytes=400-499", want: 100},
		"beyond the end":   {ranges: "bytes=400-4999", want: 600},
		"the last":         {ranges: "bytes=-100", want: 100},
		"behind the end":   {ranges: "bytes=1000-"},
		"several":          {ranges: "bytes=0-1,5-6", want: 1000},
		"another unit":     {ranges: "items=0-1", want: 1000},
		"nonsense":         {ranges: "bytes=x"},
		"the last of none": {ranges: "bytes=-0"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/fw/x", nil)
		if row.method != "" {
			r.Method = row.method
		}
		if row.ranges != "" {
			r.Header.Set("Range", row.ranges)
		}
		if row.match != "" {
			r.Header.Set("If-None-Match", row.match)
		}
		if got := announced(r, `"tag"`, 1000); got != row.want {
			t.Errorf("%s: %d, want %d", name, got, row.want)
		}
	}
}

// Over the wire: who would have to wait too long is told when to come back, before any byte.
func TestADownloadBeyondTheBudgetIsSentAway(t *testing.T) {
	w := start(t, nil)
	w.mu.Lock()
	w.perSecond = 4096
	w.mu.Unlock()
	busy, _ := w.api.pace.enter(ota.Grant{Rollout: "r", BytesPerSecond: 4096}, 4096*60, time.Now())
	defer func() { busy.leave(time.Now()) }()
	resp, _ := w.do(w.client(w.cert), http.MethodGet, w.path())
	after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || resp.StatusCode != http.StatusServiceUnavailable || after < 30 || after > 122 {
		t.Errorf("%s, Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
	}
	if got := resp.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("%s", got)
	}
	if _, refused := w.api.Budget(); refused != 1 {
		t.Errorf("%d refused", refused)
	}
}
