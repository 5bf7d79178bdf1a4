package pki

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

var states = []State{Intended, Issued, Active, Superseded, Expired, Revoked}

var day0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// The text is approved by hand: a change of it is a change of what a certificate may become.
func TestTransitions(t *testing.T) {
	var b strings.Builder
	for _, s := range states {
		fmt.Fprintf(&b, "%-10s ->", s)
		for _, to := range next[s] {
			fmt.Fprintf(&b, " %s", to)
		}
		b.WriteString("\n")
	}
	want, err := os.ReadFile("testdata/transitions.txt")
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("the life of a certificate changed; got\n%s\nwant\n%s", b.String(), want)
	}
	if len(next) != len(states) {
		t.Errorf("%d states have a row, want %d", len(next), len(states))
	}
}

func TestWalks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Certificate{Serial: "1", State: Intended}
		at := day0
		revoked := false
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			at = at.Add(time.Hour)
			to := rapid.SampledFrom(states).Draw(t, "to")
			before := c
			err := c.Become(to, at)
			switch {
			case err != nil && !fleet.Is(err, fleet.Conflict):
				t.Fatalf("kind %s", fleet.KindOf(err))
			case err != nil && (c.State != before.State || c.RevokedAt != before.RevokedAt || c.ActiveAt != before.ActiveAt):
				t.Fatal("a refused step left traces")
			case err == nil && !slices.Contains(next[before.State], to):
				t.Fatalf("%s became %s", before.State, to)
			}
			if revoked && (c.State != Revoked || c.State.Live()) {
				t.Fatal("a revoked certificate came back to life")
			}
			revoked = revoked || c.State == Revoked
			if revoked == c.RevokedAt.IsZero() {
				t.Fatal("RevokedAt and the state disagree")
			}
		}
	})
}

func TestUntrusted(t *testing.T) {
	for _, c := range []struct {
		state  State
		reason int
		want   bool
	}{{Revoked, 0, true}, {Revoked, 1, true}, {Revoked, ReasonSuperseded, false}, {Superseded, 0, false}, {Expired, 0, false}, {Active, 0, false}} {
		if got := (Certificate{State: c.state, Reason: c.reason}).Untrusted(); got != c.want {
			t.Errorf("%s for reason %d: %v", c.state, c.reason, got)
		}
	}
}

func TestReasons(t *testing.T) {
	var got []int
	for n := -2; n < 20; n++ {
		if ReasonAllowed(n) {
			got = append(got, n)
		}
	}
	if !slices.Equal(got, []int{0, 1, 3, 4, 5, 9}) {
		t.Errorf("allowed reasons are %v", got)
	}
}
