package pki

import (
	"fmt"
	"slices"
	"time"

	"muster/internal/fleet"
)

// Rotation takes a fleet from one generation of its CAs to the next by overlap: trust is brought out first, signing moves
// second, and what was before is retired last. Each step is on record and waits for what devices and doors show (DESIGN §7,
// pki.md §1.7).
type Rotation struct {
	ID    int64         `json:"id"` // also the number of the generation that it brings; 0 is what musterd init made
	Kind  RotationKind  `json:"kind"`
	From  int64         `json:"from"` // the generation that signed before
	State RotationState `json:"state"`
	// Bundle is the version of the trust bundle that devices must have before the next step; 0: it asks for none.
	Bundle int64          `json:"bundle,omitempty"`
	Steps  []RotationStep `json:"steps"`
}

// RotationKind says which CAs are new.
type RotationKind string

// Kinds of rotations.
const (
	RotateDeviceCA RotationKind = "device-ca" // the intermediate that signs device certificates
	RotateServerCA RotationKind = "server-ca" // the one that signs certificates of broker and listeners
	RotateRoot     RotationKind = "root"      // the root, with both intermediates
)

// Valid reports whether k is a kind.
func (k RotationKind) Valid() bool {
	return k == RotateDeviceCA || k == RotateServerCA || k == RotateRoot
}

// Devices reports whether devices need certificates of a new issuer.
func (k RotationKind) Devices() bool { return k != RotateServerCA }

// Servers reports whether servers need certificates of a new issuer.
func (k RotationKind) Servers() bool { return k != RotateDeviceCA }

// RotationState is where a rotation stands. The zero RotationState is invalid on purpose.
type RotationState string

// States of a rotation.
const (
	RotationRequested   RotationState = "requested"   // keys are made; their certificates are to come from the root's ceremony
	RotationPrepared    RotationState = "prepared"    // the new CAs are complete; nobody trusts or uses them
	RotationDistributed RotationState = "distributed" // broker, listeners and devices are brought to trust the new as well as the old
	RotationActive      RotationState = "active"      // the new CAs sign; what the old ones signed still holds
	RotationRetiring    RotationState = "retiring"    // nothing of the old ones is needed; devices are brought to trust them no more
	RotationRemoved     RotationState = "removed"     // nobody trusts the old ones any more
	RotationCancelled   RotationState = "cancelled"   // given up before the new CAs signed anything
)

// rotations is every way of a rotation; TestRotationStates holds it as approved text. From active there is one back, for
// clients that turn out not to get along with the new chain: both are trusted then.
var rotations = map[RotationState][]RotationState{
	RotationRequested:   {RotationPrepared, RotationCancelled},
	RotationPrepared:    {RotationDistributed, RotationCancelled},
	RotationDistributed: {RotationActive, RotationCancelled},
	RotationActive:      {RotationRetiring, RotationDistributed},
	RotationRetiring:    {RotationRemoved},
	RotationRemoved:     {},
	RotationCancelled:   {},
}

// CanGo reports whether a rotation in state s may become to.
func (s RotationState) CanGo(to RotationState) bool { return slices.Contains(rotations[s], to) }

// Next returns the state that a rotation in s is to reach next; empty if it has ended.
func (s RotationState) Next() RotationState {
	if to := rotations[s]; len(to) > 0 {
		return to[0]
	}
	return ""
}

// Open reports whether a rotation in state s has not ended.
func (s RotationState) Open() bool { return len(rotations[s]) > 0 }

// RotationStep is the record of one step.
type RotationStep struct {
	State RotationState `json:"state"`
	At    time.Time     `json:"at"`
	By    string        `json:"by"`
	// Forced holds what stood against the step, in words, and Why it was taken all the same.
	Forced []string `json:"forced,omitempty"`
	Why    string   `json:"why,omitempty"`
	Before []Proof  `json:"before,omitempty"` // handshakes on which it was decided
	After  []Proof  `json:"after,omitempty"`  // and those when it was done
}

// Proof is one handshake at a door: with a client certificate of one generation, believing the roots of one generation.
type Proof struct {
	Door       string    `json:"door"`
	Client     int64     `json:"client"`           // generation of the client's certificate; NoClient: it shows none
	Roots      int64     `json:"roots"`            // generation whose roots the client believes
	Issuer     string    `json:"issuer,omitempty"` // key identifier of the CA that signed what the door showed
	At         time.Time `json:"at"`
	Foreign    bool      `json:"foreign,omitempty"`    // what the door shows is of another CA than muster's: no rotation touches it
	Refused    string    `json:"refused,omitempty"`    // why it failed; empty: it did not
	Unverified string    `json:"unverified,omitempty"` // why the server's chain does not lead to the roots
}

// NoClient is the client of a door that asks for no certificate.
const NoClient = -1

// OK reports whether both sides believed each other.
func (p Proof) OK() bool { return p.Refused == "" && p.Unverified == "" }

// String is p for a person.
func (p Proof) String() string {
	words := fmt.Sprintf("%s: client of generation %d, roots of generation %d", p.Door, p.Client, p.Roots)
	if p.Client == NoClient {
		words = fmt.Sprintf("%s: roots of generation %d", p.Door, p.Roots)
	}
	switch {
	case p.Refused != "":
		return words + ": refused: " + p.Refused
	case p.Unverified != "":
		return words + ": " + p.Unverified
	}
	if p.Foreign {
		return words + ": good; its certificate is of another CA"
	}
	return words + ": good"
}

// Become moves r to state to, or returns a Conflict error if there is no such way.
func (r *Rotation) Become(to RotationState, s RotationStep) error {
	if !r.State.CanGo(to) {
		return fleet.Errorf(fleet.Conflict, "rotation %d is %s and cannot become %s", r.ID, r.State, to)
	}
	s.State = to
	r.State = to
	r.Steps = append(r.Steps, s)
	return nil
}

// Standing says what a fleet's rotations, in the order of their numbers, come to: which generation signs, and whose
// certificates and roots are trusted, the signing one first.
func Standing(list []Rotation) (signs int64, trusted []int64) {
	var also []int64
	for _, r := range list {
		switch r.State {
		case RotationDistributed:
			also = []int64{r.ID}
		case RotationActive, RotationRetiring:
			signs, also = r.ID, []int64{r.From}
		case RotationRemoved:
			signs, also = r.ID, nil
		}
	}
	return signs, append([]int64{signs}, also...)
}

// RotationFacts are what the gates of a rotation look at.
type RotationFacts struct {
	Trust   int64    // newest version of the trust bundle
	Lacking int      // devices that have not taken version Rotation.Bundle
	Named   []string // some of them, by name
	Proofs  []Proof
	Old     int      // devices whose certificate is of the old device CA
	OldIDs  []string // some of them
	OldCA   IssuerID // that CA
	// Served are the doors whose certificate is not of the new server CA, in words.
	Served []string
	Keys   error // why a key of the new CAs does not sign
}

// Blockers returns in words what stands against r's next step; nothing if it may be taken.
func (r Rotation) Blockers(f RotationFacts) (out []string) {
	say := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	switch r.State {
	case RotationRequested:
		say("the certificates of the new CAs are missing: have the requests signed (muster rotation requests), then muster rotation import")
	case RotationDistributed:
		r.acked(f, say)
		if f.Keys != nil {
			say("%v", f.Keys)
		}
		proven(f, say)
	case RotationActive:
		if f.Old > 0 && r.Kind.Devices() {
			say("%d devices connect with certificates of the old device CA: %s. They get new ones when they renew: muster certs renew --issuer %s", f.Old, list(f.OldIDs, f.Old), f.OldCA)
		}
		for _, s := range f.Served {
			say("%s", s)
		}
		proven(f, say)
	case RotationRetiring:
		r.acked(f, say)
	}
	return out
}

func (r Rotation) acked(f RotationFacts, say func(string, ...any)) {
	if r.Bundle > 0 && f.Lacking > 0 {
		say("%d devices have not taken trust bundle %d: %s", f.Lacking, r.Bundle, list(f.Named, f.Lacking))
	}
}

func proven(f RotationFacts, say func(string, ...any)) {
	if len(f.Proofs) == 0 {
		say("no door was tried")
	}
	for _, p := range f.Proofs {
		if !p.OK() {
			say("%s", p)
		}
	}
}

// list names some of n names.
func list(some []string, n int) string {
	const most = 10
	some = some[:min(len(some), most)]
	words := ""
	for i, s := range some {
		if i > 0 {
			words += ", "
		}
		words += s
	}
	if n > len(some) {
		words += ", …"
	}
	return words
}
