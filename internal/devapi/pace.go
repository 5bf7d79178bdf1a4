package devapi

import (
	"context"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"muster/internal/fleet"
	"muster/internal/ota"
)

// Bounds of the byte budget.
const (
	maxPiece   = 16 << 10         // bytes that are written at once under a budget
	minPiece   = 1 << 10          // bytes
	maxBacklog = 30 * time.Second // of bytes promised to others; a download that would have to wait longer is sent away
	resumeMore = 4                // a download that has begun may wait so many times longer
	maxAway    = 15 * time.Minute // nobody is sent away for longer, its jitter apart
	forgetIdle = time.Minute      // a budget that nobody used for so long is full again, and is forgotten
)

// pacer keeps downloads within the byte budgets of the server and of each rollout.
type pacer struct {
	all     *share // nil: no budget for the server
	refused atomic.Uint64

	mu sync.Mutex
	by map[fleet.RolloutID]*share // guarded by mu
}

// share is one budget and the downloads that keep to it.
type share struct {
	per   int64 // bytes per second
	lim   *rate.Limiter
	piece int

	under map[*download]bool // under way; guarded by pacer.mu
	used  time.Time          // guarded by pacer.mu
}

func newShare(per int64) *share {
	piece := int(min(max(per/4, minPiece), maxPiece))
	return &share{
		per: per, lim: rate.NewLimiter(rate.Limit(per), max(piece, int(min(per/2, 1<<30)))), piece: piece, under: map[*download]bool{},
	}
}

// backlog returns the bytes that the downloads under way will want within maxBacklog, judged by how fast they took what they
// got: a device on a slow line must not keep others out of a budget that it does not use.
func (s *share) backlog(at time.Time) (n int64) {
	for d := range s.under {
		n += d.wants(at)
	}
	return n
}

// newPacer returns a pacer with a budget for the whole server, in bytes per second; 0: none.
func newPacer(per int64) *pacer {
	p := &pacer{by: map[fleet.RolloutID]*share{}}
	if per > 0 {
		p.all = newShare(per)
	}
	return p
}

// download is one response under the budgets that it has to keep to.
type download struct {
	p      *pacer
	shares []*share
	piece  int
	began  time.Time

	size int64
	sent atomic.Int64
	idle atomic.Int64 // nanoseconds that it waited for a budget: not the device's fault
}

// newcomer is how long a download is taken to want all of its bytes at once.
const newcomer = 5 * time.Second

// wants returns how many bytes d will take within maxBacklog.
func (d *download) wants(at time.Time) int64 {
	left := max(d.size-d.sent.Load(), 0)
	took := at.Sub(d.began) - time.Duration(d.idle.Load())
	if at.Sub(d.began) < newcomer || took <= 0 {
		return left
	}
	return min(left, int64(float64(d.sent.Load()+int64(d.piece))/took.Seconds()*maxBacklog.Seconds()))
}

// enter promises n bytes to a download. A nil download keeps to no budget. With a backlog that is too long it is refused:
// again is when it should be tried again. What has no body (HEAD, 304, 416) costs nothing and is never refused.
func (p *pacer) enter(g ota.Grant, n int64, at time.Time) (d *download, again time.Duration) {
	if n == 0 {
		return nil, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, s := range p.by {
		if len(s.under) == 0 && at.Sub(s.used) > forgetIdle {
			delete(p.by, name)
		}
	}
	d = &download{p: p, size: n, piece: maxPiece, began: at}
	if p.all != nil {
		d.shares = append(d.shares, p.all)
	}
	if g.BytesPerSecond > 0 {
		s := p.by[g.Rollout]
		if s == nil || s.per != g.BytesPerSecond {
			s = newShare(g.BytesPerSecond)
			p.by[g.Rollout] = s
		}
		d.shares = append(d.shares, s)
	}
	if len(d.shares) == 0 {
		return nil, 0
	}
	limit := maxBacklog
	if g.Begun {
		limit *= resumeMore
	}
	for _, s := range d.shares {
		if w := time.Duration(float64(s.backlog(at)) / float64(s.per) * float64(time.Second)); w > limit {
			again = max(again, w)
		}
	}
	if again > 0 {
		p.refused.Add(1)
		return nil, min(again, maxAway)
	}
	for _, s := range d.shares {
		s.under[d] = true
		s.used = at
		d.piece = min(d.piece, s.piece)
	}
	return d, 0
}

// leave gives back what was promised and not sent.
func (d *download) leave(at time.Time) {
	d.p.mu.Lock()
	defer d.p.mu.Unlock()
	for _, s := range d.shares {
		delete(s.under, d)
		s.used = at
	}
}

// take waits until n bytes, at most a piece, may be sent. The wait begins when the device has taken what came before, so a
// slow device holds nothing that others could use.
func (d *download) take(ctx context.Context, n int) error {
	began := time.Now()
	for _, s := range d.shares {
		if err := s.lim.WaitN(ctx, n); err != nil {
			return err
		}
	}
	d.idle.Add(int64(time.Since(began)))
	d.sent.Add(int64(n))
	return nil
}

// backlog returns the bytes that are promised and not sent, over all budgets.
func (p *pacer) backlog(at time.Time) (n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all != nil {
		return p.all.backlog(at)
	}
	for _, s := range p.by {
		n += s.backlog(at)
	}
	return n
}

// recheck is how often the grant of a download under way is looked up again.
const recheck = 2 * time.Second

// guarded writes a body in pieces, each when the budgets allow it, for as long as the grant holds.
type guarded struct {
	http.ResponseWriter
	ctx     context.Context
	d       *download // nil: no budget
	granted func() error
	checked time.Time
}

func (w *guarded) Write(b []byte) (done int, err error) {
	for len(b) > 0 {
		if now := time.Now(); now.Sub(w.checked) >= recheck {
			if err := w.granted(); err != nil {
				return done, err
			}
			w.checked = now
		}
		piece := b
		if w.d != nil {
			piece = b[:min(w.d.piece, len(b))]
			if err := w.d.take(w.ctx, len(piece)); err != nil {
				return done, err
			}
		}
		n, err := w.ResponseWriter.Write(piece)
		done += n
		if err != nil {
			return done, err
		}
		b = b[n:]
	}
	return done, nil
}

// announced returns how many bytes a GET of size bytes will be answered with, as far as can be told before: 0 if it has
// the image already, the rest of it behind a Range.
func announced(r *http.Request, tag string, size int64) int64 {
	if r.Method != http.MethodGet || strings.Contains(r.Header.Get("If-None-Match"), tag) {
		return 0
	}
	spec, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if !ok || oneRange(r.Header.Get("Range")) == ignored {
		return size
	}
	first, last, _ := strings.Cut(strings.TrimSpace(spec), "-")
	from, err1 := strconv.ParseInt(first, 10, 64)
	to, err2 := strconv.ParseInt(last, 10, 64)
	switch {
	case err1 != nil && err2 != nil:
		return 0
	case err1 != nil: // the last bytes
		return min(to, size)
	case err2 != nil:
		to = size - 1
	}
	return max(min(to, size-1)-from+1, 0)
}

// later is what a device that is sent away is told, in seconds: after the backlog, and spread over as long again, so that
// those that were sent away together do not come back together.
func later(backlog time.Duration) string {
	return strconv.Itoa(int((backlog + rand.N(backlog+time.Second)) / time.Second))
}
