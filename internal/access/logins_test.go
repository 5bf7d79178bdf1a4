package access_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

// lines returns the entries of a kind, oldest first.
func lines(t *testing.T, a *access.Access, what string) (out []access.Entry) {
	t.Helper()
	es, err := a.Audit(context.Background(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := len(es) - 1; i >= 0; i-- {
		if es[i].What == what {
			out = append(out, es[i])
		}
	}
	return out
}

func token(t *testing.T, a *access.Access, name string, role access.Role) string {
	t.Helper()
	secret, _, err := a.Create(context.Background(), day, name, role, 0, "alice")
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

func use(t *testing.T, a *access.Access, at time.Time, from, secret string) {
	t.Helper()
	if _, err := a.Authenticate(context.Background(), at, from, secret); err != nil {
		t.Fatal(err)
	}
}

// A login is the first use of a token from an address in a while; whoever polls is no new one each time.
func TestLoginsAreOnRecordOnce(t *testing.T) {
	a := open(t)
	ci, ops := token(t, a, "ci", access.Viewer), token(t, a, "ops", access.Operator)
	for i := range 100 {
		use(t, a, day.Add(time.Duration(i)*time.Minute), "192.0.2.1", ci)
	}
	use(t, a, day, "192.0.2.2", ci)
	use(t, a, day, "192.0.2.1", ops)
	use(t, a, day.Add(access.LoginEvery), "192.0.2.1", ci)
	var got []string
	for _, e := range lines(t, a, "login") {
		got = append(got, e.Who+": "+e.Details)
		if strings.Contains(e.Details, ci[4:]) {
			t.Error("the secret is on record")
		}
	}
	want := []string{"ci: role viewer from 192.0.2.1", "ci: role viewer from 192.0.2.2", "ops: role operator from 192.0.2.1", "ci: role viewer from 192.0.2.1"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %q", got)
	}
}

// A token that comes from everywhere gets so many lines, and then one that says how many there were.
func TestATokenFromEverywhereCannotFillTheTrail(t *testing.T) {
	a := open(t)
	ci, ops := token(t, a, "ci", access.Viewer), token(t, a, "ops", access.Viewer)
	for i := range 5000 {
		use(t, a, day, fmt.Sprint("10.0.", i/256, ".", i%256), ci)
	}
	if n := len(lines(t, a, "login")); n != 20 {
		t.Errorf("%d lines", n)
	}
	use(t, a, day, "192.0.2.1", ops)
	if es := lines(t, a, "login"); es[len(es)-1].Who != "ops" {
		t.Error("another token's login was drowned")
	}
	use(t, a, day.Add(time.Minute), "192.0.2.9", ci)
	if es := lines(t, a, "login"); !strings.Contains(es[len(es)-1].Details, "and 4980 more from other addresses before") {
		t.Errorf("%+v", es[len(es)-1])
	}
}

// Refused logins are counted by reason and address, and put on record together.
func TestRefusedLoginsAreOnRecord(t *testing.T) {
	a := open(t)
	old, _, err := a.Create(t.Context(), day, "old", access.Viewer, time.Hour, "alice")
	if err != nil {
		t.Fatal(err)
	}
	wrong := access.Prefix + strings.Repeat("A", 43)
	now := day.Add(2 * time.Hour)
	for i, secret := range []string{wrong, wrong, old, "", "hello\n"} {
		if _, err := a.Authenticate(t.Context(), now.Add(time.Duration(i)*time.Second), "192.0.2.1", secret); !fleet.Is(err, fleet.Unauthorized) {
			t.Errorf("%q: %v", secret, err)
		}
	}
	record := func(at time.Time, all bool, want int) []access.Entry {
		t.Helper()
		if err := a.RecordRefused(t.Context(), at, all); err != nil {
			t.Fatal(err)
		}
		es := lines(t, a, "login.refused")
		if len(es) != want {
			t.Fatalf("%d lines, want %d", len(es), want)
		}
		return es
	}
	record(now.Add(59*time.Second), false, 0)
	got := record(now.Add(time.Minute), false, 1)[0]
	want := "5 since 2030-01-01T02:00:00Z: unknown token from 192.0.2.1 ×2, expired token old from 192.0.2.1 ×1, no token from 192.0.2.1 ×1, no well-formed token from 192.0.2.1 ×1"
	if got.Who != access.Muster || got.Details != want || strings.Contains(got.Details, "AAAA") {
		t.Errorf("%+v", got)
	}
	record(now.Add(time.Hour), true, 1) // nothing new

	// A flood from everywhere: one line each time, at longer intervals, whose length has an end.
	for i := range 20_000 {
		_, _ = a.Authenticate(t.Context(), now.Add(2*time.Hour), fmt.Sprint("host-", i, strings.Repeat("x", 1000)), "x")
	}
	record(now.Add(2*time.Hour+time.Minute), true, 2)
	es := record(now.Add(3*time.Hour), true, 2)
	if d := es[1].Details; !strings.HasPrefix(d, "20000 since") || !strings.Contains(d, "others ×") || len(d) > 1500 {
		t.Errorf("%d bytes: %s", len(d), d)
	}
}

// What a role does not allow is on record, for so many calls of a token; the others are counted.
func TestForbiddenCallsAreBounded(t *testing.T) {
	a := open(t)
	for range 100 {
		if err := a.Forbid(t.Context(), "192.0.2.1", access.Entry{At: day, Who: "ci", What: "refused.removeDevice", On: "d1"}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(lines(t, a, "refused.removeDevice")); n != 20 {
		t.Errorf("%d lines", n)
	}
	if err := a.RecordRefused(t.Context(), day.Add(time.Hour), true); err != nil {
		t.Fatal(err)
	}
	if es := lines(t, a, "login.refused"); len(es) != 1 || !strings.Contains(es[0].Details, "role of token ci too low from 192.0.2.1 ×80") {
		t.Errorf("%+v", es)
	}
}

// A store that fails for a while: the operator gets in, and the next call puts the login on record.
func TestALoginThatCouldNotBeRecordedIsRecordedLater(t *testing.T) {
	db := storetest.Open(t)
	var broken error
	a := access.New(access.Config{
		Update: func(ctx context.Context, f func(access.Tx) error) error {
			if broken != nil {
				return broken
			}
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(access.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
	})
	ci := token(t, a, "ci", access.Viewer)
	_, _ = a.Authenticate(t.Context(), day, "192.0.2.7", "x")
	broken = errors.New("disk full")
	use(t, a, day, "192.0.2.1", ci)
	if err := a.RecordRefused(t.Context(), day.Add(time.Hour), true); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	broken = nil
	if n := len(lines(t, a, "login")); n != 0 {
		t.Fatalf("%d lines", n)
	}
	use(t, a, day.Add(time.Minute), "192.0.2.1", ci)
	if n := len(lines(t, a, "login")); n != 1 {
		t.Errorf("%d lines", n)
	}
	if err := a.RecordRefused(t.Context(), day.Add(time.Hour), true); err != nil || len(lines(t, a, "login.refused")) != 1 {
		t.Errorf("the refused one was forgotten: %v", err)
	}
}

func TestRefusedLoginsAreRecordedByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		_, _ = a.Authenticate(ctx, time.Now(), "192.0.2.1", "x")
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := len(lines(t, a, "login.refused")); n != 1 {
			t.Errorf("%d lines after two minutes", n)
		}
		_, _ = a.Authenticate(ctx, time.Now(), "192.0.2.1", "x")
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if n := len(lines(t, a, "login.refused")); n != 2 {
			t.Errorf("%d lines at the end", n)
		}
	})
}
