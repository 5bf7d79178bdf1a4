package access

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"muster/internal/fleet"
)

// Bounds of what is put on record about logins. A bearer token has no sessions: a login is the first use of a token from
// an address in a while.
const (
	LoginEvery   = 12 * time.Hour   // the same token from the same address is one login for so long
	loginPairs   = 4096             // tokens with addresses that are remembered
	loginBurst   = 20               // logins of a token from new addresses that get a line each, and forbidden calls,
	loginRefill  = time.Minute      // and one more each
	refusedFirst = time.Minute      // after a first refused login, until they are put on record together;
	refusedMax   = 15 * time.Minute // doubled while they go on, up to this
	refusedKinds = 64               // addresses and reasons that are counted one by one
	refusedNamed = 8                // of them that a line names
	maxFrom      = 64               // bytes of an address that are kept
)

// loginPair is a token, by the hash of its secret, and an address.
type loginPair struct {
	token fleet.Hash
	from  string
}

// logins remembers which logins are on record, and counts those that were refused.
type logins struct {
	pace      *limiter // lines about logins of a token
	forbidden *limiter // and about what its role did not allow

	mu      sync.Mutex
	seen    map[loginPair]time.Time // until when it is one login
	skipped map[fleet.Hash]int      // logins of a token that got no line of their own

	refused map[string]int // by reason and address
	others  int            // refused ones beyond refusedKinds
	since   time.Time      // of the first that is not on record
	due     time.Time      // when they will be
	every   time.Duration
}

func newLogins() *logins {
	return &logins{
		pace: newLimiter(loginBurst, loginRefill, loginPairs), forbidden: newLimiter(loginBurst, loginRefill, loginPairs),
		seen: map[loginPair]time.Time{}, skipped: map[fleet.Hash]int{}, refused: map[string]int{}, every: refusedFirst,
	}
}

// isNew reports whether the use of a token from an address is a login that is not on record, and notes that it will be.
// skipped are the logins of the token that got no line since its last.
func (l *logins) isNew(at time.Time, token fleet.Hash, from string) (yes bool, skipped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := loginPair{token, from}
	if until, ok := l.seen[p]; ok && at.Before(until) {
		return false, 0
	}
	l.remember(at, p)
	if !l.pace.allow(at, string(token)) {
		if _, ok := l.skipped[token]; ok || len(l.skipped) < loginPairs {
			l.skipped[token]++
		}
		return false, 0
	}
	skipped = l.skipped[token]
	delete(l.skipped, token)
	return true, skipped
}

// failed takes back that a login is on record.
func (l *logins) failed(token fleet.Hash, from string, skipped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.seen, loginPair{token, from})
	if skipped > 0 {
		l.skipped[token] += skipped
	}
}

// remember keeps p within bounds: those that are over go, and if that makes no room, all. The caller holds mu.
func (l *logins) remember(at time.Time, p loginPair) {
	if len(l.seen) >= loginPairs {
		maps.DeleteFunc(l.seen, func(_ loginPair, until time.Time) bool { return !at.Before(until) })
		if len(l.seen) >= loginPairs {
			clear(l.seen)
		}
	}
	l.seen[p] = at.Add(LoginEvery)
}

// refuse counts a refused login.
func (l *logins) refuse(at time.Time, from, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.refused) == 0 {
		if at.Sub(l.due) > 2*l.every { // it was quiet for a while
			l.every = refusedFirst
		}
		l.since, l.due = at, at.Add(l.every)
	}
	key := why + " from " + short(from)
	if _, ok := l.refused[key]; !ok && len(l.refused) >= refusedKinds {
		l.others++
		return
	}
	l.refused[key]++
}

// takeRefused returns a line about the refused logins since the last one, if one is due; force means now. Nothing is
// forgotten until dropRefused.
func (l *logins) takeRefused(at time.Time, force bool) (Entry, map[string]int, int, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.refused) == 0 || !force && at.Before(l.due) {
		return Entry{}, nil, 0, false
	}
	counts := maps.Clone(l.refused)
	keys := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), strings.Compare(a, b))
	})
	total, rest := l.others, l.others
	var named []string
	for i, k := range keys {
		total += counts[k]
		if i < refusedNamed {
			named = append(named, fmt.Sprintf("%s ×%d", k, counts[k]))
		} else {
			rest += counts[k]
		}
	}
	text := fmt.Sprintf("%d since %s: %s", total, l.since.UTC().Format(time.RFC3339), strings.Join(named, ", "))
	if rest > 0 {
		text += fmt.Sprintf(", others ×%d", rest)
	}
	return Entry{At: at, Who: Muster, What: "login.refused", Details: text}, counts, l.others, true
}

// dropRefused forgets what is on record now.
func (l *logins) dropRefused(at time.Time, counts map[string]int, others int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k, n := range counts {
		if l.refused[k] -= n; l.refused[k] <= 0 {
			delete(l.refused, k)
		}
	}
	l.others -= others
	l.every = min(2*l.every, refusedMax)
	l.since, l.due = at, at.Add(l.every)
}

func short(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxFrom)], "\uFFFD")
}

// login puts a login on record if it is new. A failure is left for the next call to repair: whoever reads meanwhile
// changes nothing, since no change commits without its own line.
func (a *Access) login(ctx context.Context, at time.Time, from string, t Token) {
	from = short(from)
	yes, skipped := a.logins.isNew(at, t.SHA256, from)
	if !yes {
		return
	}
	text := "role " + string(t.Role)
	if from != "" {
		text += " from " + from
	}
	if skipped > 0 {
		text += fmt.Sprintf(", and %d more from other addresses before", skipped)
	}
	if a.Record(ctx, Entry{At: at, Who: t.Name, What: "login", Details: text}) != nil {
		a.logins.failed(t.SHA256, from, skipped)
	}
}

// Forbid puts on record, as e, that a token was used from an address for what its role does not allow. A token gets only
// so many lines; the others are counted with the refused logins, so that nobody fills the trail, or drowns what another
// token tried.
func (a *Access) Forbid(ctx context.Context, from string, e Entry) error {
	if !a.logins.forbidden.allow(e.At, e.Who) {
		a.logins.refuse(e.At, from, "role of token "+e.Who+" too low")
		return nil
	}
	return a.Record(ctx, e)
}

// RecordRefused puts the logins on record that were refused since the last time, in one line, if that is due; all means
// now. It is to be called now and then, and at the end: Run does.
func (a *Access) RecordRefused(ctx context.Context, at time.Time, all bool) error {
	e, counts, others, ok := a.logins.takeRefused(at, all)
	if !ok {
		return nil
	}
	if err := a.Record(ctx, e); err != nil {
		return err
	}
	a.logins.dropRefused(at, counts, others)
	return nil
}

// Run puts refused logins on record until ctx ends.
func (a *Access) Run(ctx context.Context) error {
	tick := time.NewTicker(refusedFirst / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := a.RecordRefused(ctx, time.Now(), false); err != nil && ctx.Err() == nil {
				return err
			}
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			return cmp.Or(a.RecordRefused(last, time.Now(), true), ctx.Err())
		}
	}
}
