package access_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

var day = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func open(t *testing.T) *access.Access {
	t.Helper()
	db := storetest.Open(t)
	return access.New(access.Config{
		Update: func(ctx context.Context, f func(access.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(access.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
	})
}

// noStore fails the test when anything reaches the store.
func noStore(t *testing.T) *access.Access {
	f := func(context.Context, func(access.Tx) error) error {
		t.Error("the store was asked")
		return errors.New("asked")
	}
	return access.New(access.Config{Update: f, View: f})
}

func TestATokenWorksUntilItExpires(t *testing.T) {
	a := open(t)
	secret, tok, err := a.Create(t.Context(), day, "ci", access.Operator, time.Hour, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(secret, access.Prefix) || len(secret) != 47 {
		t.Errorf("secret has %d bytes", len(secret))
	}
	if strings.Contains(fmt.Sprintf("%+v", tok), secret[len(access.Prefix):]) {
		t.Error("the stored token holds its secret")
	}
	p, err := a.Authenticate(t.Context(), day.Add(time.Hour-1), "192.0.2.1", secret)
	if err != nil || p.Name != "ci" || p.Role != access.Operator || p.CreatedBy != "alice" {
		t.Errorf("before its end: %+v, %v", p, err)
	}
	if _, err := a.Authenticate(t.Context(), day.Add(time.Hour), "192.0.2.1", secret); !fleet.Is(err, fleet.Unauthorized) {
		t.Errorf("at its end: %v", err)
	}
}

func TestADeletedTokenStopsAtOnce(t *testing.T) {
	a := open(t)
	secret, _, err := a.Create(t.Context(), day, "ci", access.Viewer, 0, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Authenticate(t.Context(), day.AddDate(50, 0, 0), "", secret); err != nil {
		t.Errorf("a token without an end: %v", err)
	}
	if err := a.Delete(t.Context(), day, "ci", "alice"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Authenticate(t.Context(), day, "", secret); !fleet.Is(err, fleet.Unauthorized) {
		t.Errorf("after it was deleted: %v", err)
	}
	if err := a.Delete(t.Context(), day, "ci", "alice"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

func TestWhatCannotBeATokenNeverReachesTheStore(t *testing.T) {
	good := access.Prefix + strings.Repeat("A", 43)
	for _, s := range []string{
		"", "mst_", "x", good[:46], good + "A", "MST_" + good[4:], good[:46] + "=", good[:46] + "+", good[:46] + "\n",
		good[:46] + "B", // bits that no 32 bytes have
		strings.Repeat("A", 1<<20),
	} {
		if _, err := noStore(t).Authenticate(t.Context(), day, "192.0.2.1", s); !fleet.Is(err, fleet.Unauthorized) {
			t.Errorf("%.20q: %v", s, err)
		}
	}
}

func TestAFloodOfFailuresIsHeldOffAndHurtsNobodyElse(t *testing.T) {
	a := open(t)
	secret, _, err := a.Create(t.Context(), day, "ci", access.Viewer, 0, "alice")
	if err != nil {
		t.Fatal(err)
	}
	wrong := access.Prefix + strings.Repeat("A", 43)
	var first fleet.Kind
	n := 0
	for range 1000 {
		_, err := a.Authenticate(t.Context(), day, "192.0.2.1", wrong)
		if first = fleet.KindOf(err); first != fleet.Unauthorized {
			break
		}
		n++
	}
	if first != fleet.TooMany || n != 20 {
		t.Errorf("after %d failures: %s", n, first)
	}
	if _, err := a.Authenticate(t.Context(), day, "192.0.2.1", secret); err != nil {
		t.Errorf("a good token from the same address: %v", err)
	}
	if _, err := a.Authenticate(t.Context(), day, "192.0.2.2", wrong); !fleet.Is(err, fleet.Unauthorized) {
		t.Errorf("another address: %v", err)
	}
	if _, err := a.Authenticate(t.Context(), day.Add(4*time.Second), "192.0.2.1", wrong); !fleet.Is(err, fleet.Unauthorized) {
		t.Errorf("the same address a little later: %v", err)
	}
}

func TestTheMemoryOfFailuresIsBounded(t *testing.T) {
	a := open(t)
	for i := range 20_000 {
		if _, err := a.Authenticate(t.Context(), day, fmt.Sprint(i), "x"); !fleet.Is(err, fleet.Unauthorized) {
			t.Fatalf("address %d: %v", i, err)
		}
	}
	if n := a.RememberedPeers(); n > 4096 {
		t.Errorf("%d addresses are remembered", n)
	}
}

func TestBadTokensAreRefused(t *testing.T) {
	a := open(t)
	for name, c := range map[string]struct {
		name string
		role access.Role
		ttl  time.Duration
	}{
		"empty name":  {"", access.Viewer, 0},
		"upper case":  {"CI", access.Viewer, 0},
		"muster":      {"muster", access.Viewer, 0},
		"device":      {"device-7", access.Viewer, 0},
		"no role":     {"ci", "", 0},
		"wrong role":  {"ci", "root", 0},
		"ttl too low": {"ci", access.Viewer, time.Second},
		"ttl < 0":     {"ci", access.Viewer, -time.Hour},
		"ttl too big": {"ci", access.Viewer, 100 * 365 * 24 * time.Hour},
	} {
		if s, _, err := a.Create(t.Context(), day, c.name, c.role, c.ttl, "alice"); !fleet.Is(err, fleet.Invalid) || s != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := a.Create(t.Context(), day, "ci", access.Viewer, 0, "alice"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Create(t.Context(), day, "ci", access.Viewer, 0, "alice"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("the same name twice: %v", err)
	}
}

func TestThereIsAlwaysAnAdmin(t *testing.T) {
	a := open(t)
	secret, _, err := a.Bootstrap(t.Context(), day)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := a.Authenticate(t.Context(), day, "", secret); err != nil || p.Role != access.Admin {
		t.Errorf("the first token: %+v, %v", p, err)
	}
	if _, _, err := a.Bootstrap(t.Context(), day); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("bootstrap twice: %v", err)
	}
	if err := a.Delete(t.Context(), day, access.BootstrapName, "admin"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("deleting the last admin: %v", err)
	}
	// One that expires is no admin any more, so it neither keeps the other deletable nor blocks a new start.
	if _, _, err := a.Create(t.Context(), day, "bob", access.Admin, time.Hour, "admin"); err != nil {
		t.Fatal(err)
	}
	if err := a.Delete(t.Context(), day.Add(2*time.Hour), access.BootstrapName, "bob"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("deleting the last admin that works: %v", err)
	}
	if err := a.Delete(t.Context(), day, access.BootstrapName, "bob"); err != nil {
		t.Errorf("deleting one of two admins: %v", err)
	}
	if _, _, err := a.Bootstrap(t.Context(), day.Add(2*time.Hour)); err != nil {
		t.Errorf("bootstrap after the last admin expired: %v", err)
	}
}

func TestTheTrailIsReadNewestFirst(t *testing.T) {
	a := open(t)
	for i := range 5 {
		if err := a.Record(t.Context(), access.Entry{At: day, Who: "alice", What: "test", On: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	var before uint64
	for {
		es, err := a.Audit(t.Context(), before, 2)
		if err != nil {
			t.Fatal(err)
		}
		if len(es) == 0 {
			break
		}
		for _, e := range es {
			got = append(got, e.On)
		}
		before = es[len(es)-1].Seq
	}
	if s := strings.Join(got, ""); s != "43210" {
		t.Errorf("order %q", s)
	}
	if es, err := a.Audit(t.Context(), 1000, 1); err != nil || len(es) != 1 || es[0].On != "4" {
		t.Errorf("before a number that does not exist: %v, %v", es, err)
	}
}

func TestRoles(t *testing.T) {
	for _, c := range []struct {
		have, need access.Role
		may        bool
	}{
		{access.Viewer, access.Viewer, true}, {access.Viewer, access.Operator, false}, {access.Viewer, access.Admin, false},
		{access.Operator, access.Viewer, true}, {access.Operator, access.Operator, true}, {access.Operator, access.Admin, false},
		{access.Admin, access.Admin, true}, {access.Admin, access.Viewer, true},
		{"", "", false}, {access.Admin, "", false}, {access.Admin, "root", false}, {"", access.Viewer, false}, {"root", access.Viewer, false},
	} {
		if got := c.have.May(c.need); got != c.may {
			t.Errorf("%q may do what takes %q: %v", c.have, c.need, got)
		}
	}
}
