// Package expiry is the alarm table of everything that ends: CAs, server certificates, revocation lists, tokens, keys. It
// says how much of its life each thing has left and which alarms that raises: at a half, a quarter and a tenth of the life,
// and at the end (pki.md §1.7 row 9).
package expiry

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Item is something that ends.
type Item struct {
	Name      string // unique within its kind: devices, device-ca, …
	Kind      string // root, intermediate, server, served, client, crl, token, …
	NotBefore time.Time
	NotAfter  time.Time
	Renews    time.Time // when it is renewed by itself; zero: somebody has to
	Fix       string    // what to do, one sentence
	Stops     bool      // its end stops devices or operators: /readyz says 503 once it has come
}

// Left returns how much of i's life is left at that time, 0 to 1.
func (i Item) Left(at time.Time) float64 {
	life := i.NotAfter.Sub(i.NotBefore)
	left := i.NotAfter.Sub(at)
	switch {
	case left <= 0 || life <= 0:
		return 0
	case left >= life:
		return 1
	}
	return float64(left) / float64(life)
}

// Level is how urgent an end is.
type Level int

// Levels by the share of life that is left. Tenth and Ended want somebody now.
const (
	Fine    Level = iota
	Half          // at most 50 %
	Quarter       // at most 25 %
	Tenth         // at most 10 %
	Ended
)

// Levels are those that raise an alarm.
var Levels = []Level{Half, Quarter, Tenth, Ended}

// String returns fine, 50, 25, 10 or ended: the label of the metric.
func (l Level) String() string {
	if l < Fine || l > Ended {
		return fmt.Sprintf("level %d", int(l))
	}
	return [...]string{"fine", "50", "25", "10", "ended"}[l]
}

// Level returns the alarm of i at that time.
func (i Item) Level(at time.Time) Level {
	if !at.Before(i.NotAfter) {
		return Ended
	}
	switch left := i.Left(at); {
	case left <= .10:
		return Tenth
	case left <= .25:
		return Quarter
	case left <= .50:
		return Half
	}
	return Fine
}

// Sort orders items by their end, soonest first.
func Sort(items []Item) {
	slices.SortStableFunc(items, func(a, b Item) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), strings.Compare(a.Kind, b.Kind), strings.Compare(a.Name, b.Name))
	})
}

// Notice is an alarm that should be written to the log.
type Notice struct {
	Item
	Level Level
}

// again is how often an alarm of the last levels is repeated.
const again = 24 * time.Hour

// Watch remembers which alarms were given: each level once, the last two daily. An item that was renewed, which its new
// end tells, begins anew. The zero value is ready. It is not safe for concurrent use.
type Watch struct{ given map[[2]string]given }

type given struct {
	notAfter time.Time
	level    Level
	at       time.Time
}

// Notices returns the alarms that are due at that time, the most urgent first. Items that are gone are forgotten.
func (w *Watch) Notices(at time.Time, items []Item) []Notice {
	next := make(map[[2]string]given, len(items))
	var out []Notice
	for _, i := range items {
		key := [2]string{i.Kind, i.Name}
		level := i.Level(at)
		was, known := w.given[key]
		if !known || !was.notAfter.Equal(i.NotAfter) {
			was = given{notAfter: i.NotAfter}
		}
		if level > was.level || level >= Tenth && at.Sub(was.at) >= again {
			out = append(out, Notice{i, level})
			was.level, was.at = level, at
		}
		next[key] = was
	}
	w.given = next
	slices.SortStableFunc(out, func(a, b Notice) int { return cmp.Or(int(b.Level-a.Level), a.NotAfter.Compare(b.NotAfter)) })
	return out
}

// Summary says in words what is urgent at that time: what has ended and stops the service, as a fault, and what else has at
// most a tenth of its life left, as a remark. Either is empty if there is nothing.
func Summary(at time.Time, items []Item) (fault, remark string) {
	var faults, remarks []string
	for _, i := range items {
		level := i.Level(at)
		if level < Tenth {
			continue
		}
		words := fmt.Sprintf("%s %s ends %s", i.Kind, i.Name, i.NotAfter.UTC().Format("2006-01-02 15:04"))
		if level == Ended {
			words = fmt.Sprintf("%s %s ended %s", i.Kind, i.Name, i.NotAfter.UTC().Format("2006-01-02 15:04"))
		}
		if i.Fix != "" {
			words += ": " + i.Fix
		}
		if level == Ended && i.Stops {
			faults = append(faults, words)
		} else {
			remarks = append(remarks, words)
		}
	}
	return strings.Join(faults, "; "), strings.Join(remarks, "; ")
}
