package pki

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

const aDay = 24 * time.Hour

// every returns the beginnings of sessions that came so far apart, the last one at end.
func every(gap time.Duration, n int, end time.Time) []time.Time {
	out := make([]time.Time, n)
	for i := range n {
		out[i] = end.Add(-time.Duration(n-1-i) * gap)
	}
	return out
}

func TestForecast(t *testing.T) {
	c := Certificate{Device: "d1", NotBefore: day0, IntendedAt: day0, NotAfter: day0.Add(90 * aDay)} // window from day 60
	on := func(d int) time.Time { return day0.Add(time.Duration(d) * aDay) }
	for _, tc := range []struct {
		name string
		at   time.Time
		h    Habit
		want Outlook
		says string
	}{
		{"connected, new", on(1), Habit{Online: true, LastSeen: on(1)}, Renews, ""},
		{"connected, asked an hour ago", on(70), Habit{Online: true, LastSeen: on(70), Asked: on(70).Add(-time.Hour)}, Renews, ""},
		{"connected, asked for days", on(70), Habit{Online: true, LastSeen: on(70), Asked: on(66)}, AtRisk, "asked to renew for 4 days"},
		{"connected, asked for weeks, nearly out", on(85), Habit{Online: true, LastSeen: on(85), Asked: on(66)}, WillLockOut, "sends no request"},
		{"connected, but used to be away for long", on(50), Habit{Online: true, LastSeen: on(50), Sessions: []time.Time{on(1), on(41)}}, AtRisk, "away for 40 days before"},
		{"away as always", on(50), Habit{LastSeen: on(49), Sessions: every(aDay, 20, on(49))}, Renews, ""},
		{"away for a month, as always", on(50), Habit{LastSeen: on(35), Sessions: every(31*aDay, 3, on(35))}, AtRisk, "once between"},
		{"away for longer than ever", on(50), Habit{LastSeen: on(40), Sessions: every(aDay, 20, on(40))}, WillLockOut, "far longer than ever before (24 hours)"},
		{"one session, then gone", on(20), Habit{LastSeen: on(2), Sessions: []time.Time{on(2)}}, WillLockOut, "one session"},
		{"one session, days ago", on(5), Habit{LastSeen: on(2), Sessions: []time.Time{on(2)}}, Renews, ""},
		{"never seen", on(1), Habit{}, WillLockOut, "never connected"},
		{"ended", on(90), Habit{Online: true, LastSeen: on(90)}, LockedOut, "ended on 2030-04-01"},
	} {
		p := Forecast(tc.at, c, tc.h)
		if p.Outlook != tc.want || !strings.Contains(p.Why, tc.says) || (p.Why == "") != (tc.want == Renews) || !p.At.Equal(c.NotAfter) {
			t.Errorf("%s: %s, %q", tc.name, p.Outlook, p.Why)
		}
	}
}

// A certificate that holds longer never makes the outlook worse, and nothing that a device did makes Forecast fail.
func TestForecastOfALongerLifeIsNoWorse(t *testing.T) {
	rank := map[Outlook]int{Renews: 0, AtRisk: 1, WillLockOut: 2, LockedOut: 3}
	rapid.Check(t, func(t *rapid.T) {
		hours := func(what string, most int) time.Duration {
			return time.Duration(rapid.IntRange(0, most).Draw(t, what)) * time.Hour
		}
		at := day0.Add(hours("at", 200*24))
		h := Habit{Online: rapid.Bool().Draw(t, "online")}
		seen := day0
		for range rapid.IntRange(0, 6).Draw(t, "sessions") {
			if seen = seen.Add(hours("gap", 60*24)); !seen.After(at) {
				h.Sessions = append(h.Sessions, seen)
				h.LastSeen = seen
			}
		}
		life := hours("life", 180*24) + time.Hour
		short := Certificate{Device: "d1", NotBefore: day0, IntendedAt: day0, NotAfter: day0.Add(life)}
		long := short
		long.NotAfter = long.NotAfter.Add(hours("more", 180*24))
		a, b := Forecast(at, short, h), Forecast(at, long, h)
		if rank[b.Outlook] > rank[a.Outlook] {
			t.Fatalf("%s with %s, %s with more", a.Outlook, life, b.Outlook)
		}
		if h.Survives(at, life) && !h.Survives(at, life+time.Hour) {
			t.Fatal("a longer lifetime loses the device")
		}
	})
}

func TestSuggestedWindow(t *testing.T) {
	c := Certificate{Device: "d1", NotBefore: day0, IntendedAt: day0, NotAfter: day0.Add(100 * aDay)}
	at := day0.Add(10 * aDay)
	c.Suggested = c.Suggest(at, 2*aDay)
	if w := c.Window(); !w.Start.Equal(at) || !w.End.Equal(at.Add(2*aDay)) {
		t.Errorf("window %v", w)
	}
	if due := RenewAt(c, c.Device); due.Before(at) || due.After(at.Add(2*aDay)) || c.Due(due.Add(-1)) || !c.Due(due) {
		t.Errorf("due %s", due)
	}
	if w := c.Suggest(at, 200*aDay); !w.End.Equal(day0.Add(95 * aDay)) {
		t.Errorf("a window over the certificate's end: %v", w)
	}
	if w := c.Suggest(day0.Add(99*aDay), aDay); !w.End.Equal(w.Start) {
		t.Errorf("no time left: %v", w)
	}
}

func TestTermsAreChecked(t *testing.T) {
	for _, tc := range []struct {
		t  Terms
		ok bool
	}{
		{Terms{90 * aDay, aDay}, true}, {Terms{aDay, 0}, true}, {Terms{time.Second, time.Second}, true},
		{Terms{0, 0}, false}, {Terms{aDay, -1}, false}, {Terms{aDay, 2 * aDay}, false}, {Terms{100 * 365 * aDay, 0}, false},
	} {
		if err := tc.t.Check(); (err == nil) != tc.ok || err != nil && !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%+v: %v", tc.t, err)
		}
	}
	if (Impact{Devices: 200, Lost: 2}).Over(0.01) || !(Impact{Devices: 200, Lost: 3}).Over(0.01) || (Impact{}).Over(0) {
		t.Error("the share")
	}
}
