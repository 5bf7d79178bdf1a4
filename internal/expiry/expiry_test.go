package expiry_test

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/expiry"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func item(name string, life time.Duration) expiry.Item {
	return expiry.Item{Name: name, Kind: "server", NotBefore: start, NotAfter: start.Add(life)}
}

func TestLevels(t *testing.T) {
	i := item("devices", 100*time.Hour)
	for hours, want := range map[int]expiry.Level{
		-5: expiry.Fine, 0: expiry.Fine, 49: expiry.Fine, 50: expiry.Half, 74: expiry.Half, 75: expiry.Quarter, 89: expiry.Quarter,
		90: expiry.Tenth, 99: expiry.Tenth, 100: expiry.Ended, 500: expiry.Ended,
	} {
		if got := i.Level(start.Add(time.Duration(hours) * time.Hour)); got != want {
			t.Errorf("after %d of 100 hours: %s, want %s", hours, got, want)
		}
	}
	if got := (expiry.Item{NotBefore: start, NotAfter: start}).Level(start); got != expiry.Ended {
		t.Errorf("a life of nothing: %s", got)
	}
}

// Each level is said once, the last ones daily, whatever the steps of the clock; and after a renewal from the start again.
func TestNoticesComeOnceForEachLevelAndDailyAtTheEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w expiry.Watch
		i := item("ops", 1000*time.Hour)
		seen := map[expiry.Level]int{}
		var lastUrgent time.Time
		at := start
		for at.Before(start.Add(1100 * time.Hour)) {
			for _, n := range w.Notices(at, []expiry.Item{i}) {
				if n.Level != i.Level(at) {
					t.Fatalf("notice of level %s at %s", n.Level, i.Level(at))
				}
				if seen[n.Level] > 0 && (n.Level < expiry.Tenth || at.Sub(lastUrgent) < 24*time.Hour) {
					t.Fatalf("level %s again after %s", n.Level, at.Sub(lastUrgent))
				}
				seen[n.Level]++
				lastUrgent = at
			}
			if i.Level(at) > expiry.Fine && seen[i.Level(at)] == 0 {
				t.Fatalf("level %s was not said", i.Level(at))
			}
			if i.Level(at) >= expiry.Tenth && at.Sub(lastUrgent) >= 24*time.Hour {
				t.Fatalf("nothing was said for %s", at.Sub(lastUrgent))
			}
			at = at.Add(time.Duration(rapid.IntRange(1, 60*48).Draw(t, "minutes")) * time.Minute)
		}
		i.NotBefore, i.NotAfter = at, at.Add(1000*time.Hour)
		if ns := w.Notices(at, []expiry.Item{i}); len(ns) != 0 {
			t.Fatalf("renewed, and yet %v", ns)
		}
		if ns := w.Notices(at.Add(600*time.Hour), []expiry.Item{i}); len(ns) != 1 || ns[0].Level != expiry.Half {
			t.Fatalf("half of the new life: %v", ns)
		}
	})
}

func TestSummary(t *testing.T) {
	root, token := item("root", 1000*time.Hour), item("cron", 10*time.Hour)
	root.Stops, root.Kind, root.Fix = true, "root", "rotate it"
	token.Kind = "token"
	for hours, want := range map[int][2]bool{1: {false, false}, 9: {false, true}, 20: {false, true}, 950: {false, true}, 1001: {true, true}} {
		fault, remark := expiry.Summary(start.Add(time.Duration(hours)*time.Hour), []expiry.Item{root, token})
		if got := [2]bool{fault != "", remark != ""}; got != want {
			t.Errorf("after %d hours: fault %q, remark %q", hours, fault, remark)
		}
		if fault != "" && (!strings.Contains(fault, "root root ended") || !strings.Contains(fault, "rotate it") || strings.Contains(fault, "cron")) {
			t.Errorf("fault %q", fault)
		}
	}
}

func TestSort(t *testing.T) {
	items := []expiry.Item{item("b", 2), item("a", 2), item("c", 1)}
	expiry.Sort(items)
	if items[0].Name != "c" || items[1].Name != "a" || items[2].Name != "b" {
		t.Errorf("%v", items)
	}
}
