package pki

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

var rotationStates = []RotationState{RotationRequested, RotationPrepared, RotationDistributed, RotationActive, RotationRetiring, RotationRemoved, RotationCancelled}

// The text is approved by hand: a change of it is a change of how a fleet's CAs are replaced.
func TestRotationStates(t *testing.T) {
	var b strings.Builder
	for _, s := range rotationStates {
		fmt.Fprintf(&b, "%-11s ->", s)
		for _, to := range rotations[s] {
			fmt.Fprintf(&b, " %s", to)
		}
		b.WriteString("\n")
	}
	want, err := os.ReadFile("testdata/rotation.txt")
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("the ways of a rotation changed; got\n%s\nwant\n%s", b.String(), want)
	}
	if len(rotations) != len(rotationStates) {
		t.Errorf("%d states have a row, want %d", len(rotations), len(rotationStates))
	}
}

// Whatever is done in whatever order: who signs is trusted, and is the newest that was made active and not taken back.
func TestStanding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []Rotation
		signs := int64(0)
		for range rapid.IntRange(0, 20).Draw(t, "steps") {
			if len(list) == 0 || !list[len(list)-1].State.Open() {
				list = append(list, Rotation{ID: int64(len(list)) + 1, From: signs, State: RotationRequested})
			}
			r := &list[len(list)-1]
			to := rapid.SampledFrom(rotationStates).Draw(t, "to")
			was := r.State
			err := r.Become(to, RotationStep{At: day0, By: "ops"})
			if ok := slices.Contains(rotations[was], to); ok != (err == nil) || err != nil && (!fleet.Is(err, fleet.Conflict) || r.State != was) {
				t.Fatalf("%s to %s: %v", was, to, err)
			}
			switch {
			case err != nil:
			case to == RotationActive:
				signs = r.ID
			case to == RotationDistributed:
				signs = r.From
			}
			now, trusted := Standing(list)
			if now != signs || trusted[0] != signs || len(trusted) > 2 {
				t.Fatalf("%+v: generation %d signs and %v are trusted, want %d", list, now, trusted, signs)
			}
			overlap := r.State == RotationDistributed || r.State == RotationActive || r.State == RotationRetiring
			if overlap != (len(trusted) == 2) || overlap && (!slices.Contains(trusted, r.ID) || !slices.Contains(trusted, r.From)) {
				t.Fatalf("%s: %v are trusted", r.State, trusted)
			}
		}
	})
}

func TestRotationGates(t *testing.T) {
	good := []Proof{{Door: "mqtt", Client: 0}, {Door: "mqtt", Client: 1}}
	bad := []Proof{good[0], {Door: "mqtt", Client: 1, Refused: "bad certificate"}}
	for _, c := range []struct {
		name  string
		r     Rotation
		f     RotationFacts
		wants []string // each is part of one blocker
	}{
		{"no certificates", Rotation{State: RotationRequested}, RotationFacts{}, []string{"muster rotation import"}},
		{"prepared", Rotation{State: RotationPrepared}, RotationFacts{}, nil},
		{"all took it", Rotation{Kind: RotateRoot, State: RotationDistributed, Bundle: 2}, RotationFacts{Proofs: good}, nil},
		{"some did not", Rotation{Kind: RotateRoot, State: RotationDistributed, Bundle: 2}, RotationFacts{Proofs: good, Lacking: 12, Named: strings.Fields("a b c d e f g h i j k l")},
			[]string{"12 devices have not taken trust bundle 2: a, b, c, d, e, f, g, h, i, j, …"}},
		{"no bundle is asked for", Rotation{Kind: RotateDeviceCA, State: RotationDistributed}, RotationFacts{Proofs: good, Lacking: 12}, nil},
		{"a door does not believe the new", Rotation{Kind: RotateDeviceCA, State: RotationDistributed}, RotationFacts{Proofs: bad}, []string{"mqtt: client of generation 1, roots of generation 0: refused: bad certificate"}},
		{"a door shows what nobody believes", Rotation{Kind: RotateRoot, State: RotationDistributed}, RotationFacts{Proofs: []Proof{{Door: "mqtt", Unverified: "unknown authority"}}}, []string{"unknown authority"}},
		{"no door was tried", Rotation{Kind: RotateDeviceCA, State: RotationDistributed}, RotationFacts{}, []string{"no door was tried"}},
		{"a key is away", Rotation{Kind: RotateDeviceCA, State: RotationDistributed}, RotationFacts{Proofs: good, Keys: errors.New("the key of the device CA cannot sign")}, []string{"cannot sign"}},
		{"old certificates", Rotation{Kind: RotateDeviceCA, State: RotationActive}, RotationFacts{Proofs: good, Old: 1, OldIDs: []string{"pump-7"}}, []string{"1 devices connect with certificates of the old device CA: pump-7."}},
		{"old certificates of devices do not matter", Rotation{Kind: RotateServerCA, State: RotationActive}, RotationFacts{Proofs: good, Old: 1}, nil},
		{"old server certificates", Rotation{Kind: RotateServerCA, State: RotationActive}, RotationFacts{Proofs: good, Served: []string{"mqtt still shows one of the old"}}, []string{"mqtt still shows"}},
		{"everything at once", Rotation{Kind: RotateRoot, State: RotationActive}, RotationFacts{Proofs: bad, Old: 1, Served: []string{"x"}}, []string{"old device CA", "x", "bad certificate"}},
		{"retiring", Rotation{Kind: RotateRoot, State: RotationRetiring, Bundle: 3}, RotationFacts{Lacking: 1, Named: []string{"a"}}, []string{"trust bundle 3: a"}},
		{"all let go", Rotation{Kind: RotateRoot, State: RotationRetiring, Bundle: 3}, RotationFacts{}, nil},
		{"over", Rotation{State: RotationRemoved}, RotationFacts{}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := c.r.Blockers(c.f)
			if len(got) != len(c.wants) {
				t.Fatalf("%q, want %d", got, len(c.wants))
			}
			for i, w := range c.wants {
				if !strings.Contains(got[i], w) {
					t.Errorf("%q, want %q in it", got[i], w)
				}
			}
		})
	}
}
