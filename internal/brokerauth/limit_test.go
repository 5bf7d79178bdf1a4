package brokerauth

import (
	"fmt"
	"testing"
	"time"

	"muster/internal/fleet"
)

func TestLimiterRefills(t *testing.T) {
	l := NewLimiter(Limits{DeviceLogins: Rate{Burst: 3, Every: 10 * time.Second}})
	at := l.start.Add(time.Hour)
	for i := range 3 {
		if !l.Login("dev1", at) {
			t.Fatalf("login %d of a burst of 3 was refused", i)
		}
	}
	if l.Login("dev1", at) {
		t.Error("a fourth login at once passed")
	}
	if l.Login("dev1", at.Add(9*time.Second)) {
		t.Error("passed a second before the budget has refilled by one")
	}
	if !l.Login("dev1", at.Add(10*time.Second)) {
		t.Error("refused when the budget has refilled by one")
	}
	if l.Login("dev1", at.Add(10*time.Second)) {
		t.Error("refused attempts refilled the budget")
	}
	for i := range 3 {
		if !l.Login("dev1", at.Add(time.Hour)) {
			t.Errorf("login %d after a long pause was refused", i)
		}
	}
	if l.Login("dev1", at.Add(time.Hour)) {
		t.Error("a long pause gave more than a burst")
	}
}

func TestLimiterGuessingLocksNobodyOut(t *testing.T) {
	l := NewLimiter(Limits{})
	at := l.start
	for i := range 100_000 {
		l.Failure("dev1", at.Add(time.Duration(i)*time.Millisecond))
	}
	if !l.Login("dev1", at.Add(100*time.Second)) || !l.Login("dev2", at.Add(100*time.Second)) {
		t.Error("wrong passwords used up the budget of right ones")
	}
}

func TestLimiterOneDeviceDoesNotUseUpEveryones(t *testing.T) {
	l := NewLimiter(Limits{DeviceLogins: PerMinute(2), Logins: Rate{Burst: 4, Every: time.Hour}})
	at := l.start
	for range 100 {
		l.Login("loop", at)
	}
	if !l.Login("dev2", at) || !l.Login("dev3", at) {
		t.Error("a device in a loop used up the budget of all")
	}
	if l.Login("dev4", at) {
		t.Error("the budget of all did not end")
	}
}

func TestLimiterMemoryIsBounded(t *testing.T) {
	const limit = 1000
	l := NewLimiter(Limits{MaxDevices: limit, Logins: Rate{Burst: 1 << 20, Every: time.Microsecond}})
	at := l.start
	for i := range 10 * limit {
		if !l.Login(fleet.DeviceID(fmt.Sprint("dev", i)), at) {
			t.Fatalf("device %d was refused its first login", i)
		}
		if n := len(l.deviceLogins.young) + len(l.deviceLogins.old); n > 2*limit {
			t.Fatalf("%d budgets are remembered, the bound is %d", n, 2*limit)
		}
	}
	if len(l.deviceFailures.young) != 0 {
		t.Error("logins were counted as failures")
	}
}

// TestLimiterForgetsOnlyFullBudgets turns the generations over while a device stays at its limit.
func TestLimiterForgetsOnlyFullBudgets(t *testing.T) {
	l := NewLimiter(Limits{DeviceLogins: Rate{Burst: 2, Every: 10 * time.Second}})
	passed := 0
	for s := range 600 { // ten minutes; a generation lives 20 seconds
		at := l.start.Add(time.Duration(s) * time.Second)
		if l.Login("loop", at) {
			passed++
		}
		l.Login(fleet.DeviceID(fmt.Sprint("dev", s)), at)
	}
	if want := 600/10 + 1; passed != want {
		t.Errorf("%d logins passed in ten minutes, want %d", passed, want)
	}
}
