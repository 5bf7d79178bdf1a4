// Package rotation replaces the CAs of a fleet by overlap: trust is brought out first, signing moves second, the old is
// retired last. Every step is on record before it is done, waits for what devices and doors show, and says who is in the way
// (DESIGN §7, pki.md §1.7).
package rotation

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// Tx is what rotation needs of the store.
type Tx interface {
	// Rotations returns all rotations, oldest first.
	Rotations() ([]pki.Rotation, error)
	PutRotation(pki.Rotation) error
	Audit(access.Entry) error
}

// Keys name keys of the new CAs in a key manager, by URI; an empty one is made as a file.
type Keys struct{ Device, Server string }

// Request is a certificate request of a new CA, for the root's ceremony.
type Request struct {
	Profile string // device-ca or server-ca
	PEM     string
	KeyHash fleet.Hash // to be compared where it is signed
}

// Generation is what there is to see of one generation of CAs.
type Generation struct {
	Root, Spare    *x509.Certificate
	Cross          *x509.Certificate // nil if there is none
	Device, Server *x509.Certificate
}

// Authorities keep the CAs' keys and certificates, and do what the records say.
type Authorities interface {
	// Prepare makes the keys of generation r.ID, and its certificates if the root's key is here, which ready says.
	Prepare(ctx context.Context, at time.Time, r pki.Rotation, keys Keys) (ready bool, err error)
	Requests(r pki.Rotation) ([]Request, error)
	// Import gives the generation certificates that were signed elsewhere.
	Import(at time.Time, r pki.Rotation, certs []*x509.Certificate) error
	// Generation reads the certificates of a complete one.
	Generation(n int64) (Generation, error)
	// Apply has musterd, its listeners and the broker sign with and trust what the records say. It is idempotent, and is
	// also called at each start.
	Apply(ctx context.Context, list []pki.Rotation) error
	// Check has each key of a generation sign something.
	Check(n int64) error
	// Prove makes handshakes at every door with a client of each generation, each of which checks what the door shows by the
	// roots of generation roots.
	Prove(ctx context.Context, clients []int64, roots int64) []pki.Proof
}

// Trust brings the trust bundle to devices. It is trust.Publisher, seen from here.
type Trust interface {
	// Roots returns what the newest bundle holds, and its version.
	Roots(ctx context.Context) (version int64, roots, cross [][]byte, err error)
	// Publish signs and publishes a bundle.
	Publish(ctx context.Context, at time.Time, roots, cross []*x509.Certificate, by string) (version int64, err error)
	// Lacking counts the devices without the newest bundle and names some, those not seen for longest first.
	Lacking(ctx context.Context, limit int) (n int, named []string, err error)
}

// Config of a Rotator. All fields are needed.
type Config struct {
	Update      func(context.Context, func(Tx) error) error
	View        func(context.Context, func(Tx) error) error
	Authorities Authorities
	Trust       Trust
	// Holders counts the devices whose certificate in use is of an issuer, and names some.
	Holders func(ctx context.Context, issuer pki.IssuerID, limit int) (n int, named []string, err error)
	// Retire ends what still holds of a device CA that nobody trusts from now on. It is idempotent.
	Retire func(ctx context.Context, at time.Time, issuer pki.IssuerID, by string) error
	Log    *slog.Logger
	// Follow is how long doors may take to do what a step brings, before what they do goes on record; 0: they are asked once.
	Follow time.Duration
}

// Codes of refusals.
const (
	CodeGated = "rotation_gated" // Conflict: something stands against the step, and the text says what
	CodeOpen  = "rotation_open"  // Conflict: another rotation is under way
)

// maxNamed is how many devices are named at most.
const maxNamed = 100

// Rotator is the use case. Its methods are safe for concurrent use.
type Rotator struct {
	c  Config
	mu sync.Mutex // one step at a time

	looking sync.Mutex // handshakes for one look at a time, however many ask
}

// New returns a Rotator. It starts nothing.
func New(c Config) *Rotator { return &Rotator{c: c} }

// View is a rotation and what stands against its next step.
type View struct {
	pki.Rotation
	Next     pki.RotationState // empty: it has ended
	Blockers []string          // in words; empty: the next step can be taken
	Facts    pki.RotationFacts
}

// List returns all rotations, oldest first.
func (r *Rotator) List(ctx context.Context) (list []pki.Rotation, err error) {
	err = r.c.View(ctx, func(tx Tx) error { list, err = tx.Rotations(); return err })
	return list, err
}

func (r *Rotator) one(ctx context.Context, id int64) (pki.Rotation, error) {
	list, err := r.List(ctx)
	if err != nil {
		return pki.Rotation{}, err
	}
	i := slices.IndexFunc(list, func(r pki.Rotation) bool { return r.ID == id })
	if i < 0 {
		return pki.Rotation{}, fleet.Errorf(fleet.NotFound, "there is no rotation %d", id)
	}
	return list[i], nil
}

// Show returns a rotation and looks what stands against its next step, handshakes included. It returns a NotFound error if
// there is none of that number.
func (r *Rotator) Show(ctx context.Context, id int64) (View, error) {
	rot, err := r.one(ctx, id)
	if err != nil {
		return View{}, err
	}
	return r.look(ctx, rot)
}

func (r *Rotator) look(ctx context.Context, rot pki.Rotation) (View, error) {
	r.looking.Lock()
	defer r.looking.Unlock()
	f, err := r.facts(ctx, rot)
	if err != nil {
		return View{}, err
	}
	return View{Rotation: rot, Next: rot.State.Next(), Blockers: rot.Blockers(f), Facts: f}, nil
}

// facts gathers what the gates of rot's next step look at.
func (r *Rotator) facts(ctx context.Context, rot pki.Rotation) (f pki.RotationFacts, err error) {
	switch rot.State {
	case pki.RotationDistributed, pki.RotationActive, pki.RotationRetiring:
	default:
		return f, nil
	}
	if f.Trust, _, _, err = r.c.Trust.Roots(ctx); err != nil {
		return f, err
	}
	if rot.Bundle > 0 {
		if f.Lacking, f.Named, err = r.c.Trust.Lacking(ctx, maxNamed); err != nil {
			return f, err
		}
	}
	switch rot.State {
	case pki.RotationDistributed:
		f.Proofs = r.c.Authorities.Prove(ctx, []int64{rot.From, rot.ID}, rot.From)
		f.Keys = r.c.Authorities.Check(rot.ID)
	case pki.RotationActive:
		f.Proofs = r.c.Authorities.Prove(ctx, []int64{rot.From, rot.ID}, rot.ID)
		if err := r.leftovers(ctx, rot, &f); err != nil {
			return f, err
		}
	}
	return f, nil
}

// leftovers finds what still stands on the CAs before.
func (r *Rotator) leftovers(ctx context.Context, rot pki.Rotation, f *pki.RotationFacts) error {
	before, err := r.c.Authorities.Generation(rot.From)
	if err != nil {
		return err
	}
	if rot.Kind.Devices() {
		f.OldCA = pki.IssuerIDOf(before.Device)
		if f.Old, f.OldIDs, err = r.c.Holders(ctx, f.OldCA, maxNamed); err != nil {
			return err
		}
	}
	if !rot.Kind.Servers() {
		return nil
	}
	now, err := r.c.Authorities.Generation(rot.ID)
	if err != nil {
		return err
	}
	issuer := string(pki.IssuerIDOf(now.Server))
	for _, p := range f.Proofs {
		words := fmt.Sprintf("%s shows a certificate that is not of the new server CA: muster server-certs list says why", p.Door)
		if p.Refused == "" && !p.Foreign && p.Issuer != issuer && !slices.Contains(f.Served, words) {
			f.Served = append(f.Served, words)
		}
	}
	return nil
}

// Start begins a rotation: it makes the keys of the new CAs, and their certificates where the root's key is here. Otherwise
// the rotation waits for Import. Errors: Invalid for a kind or a key, Conflict with CodeOpen if another one is under way.
func (r *Rotator) Start(ctx context.Context, at time.Time, kind pki.RotationKind, keys Keys, by string) (pki.Rotation, error) {
	if !kind.Valid() {
		return pki.Rotation{}, fleet.Errorf(fleet.Invalid, "kind: use %s, %s or %s", pki.RotateDeviceCA, pki.RotateServerCA, pki.RotateRoot)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	list, err := r.List(ctx)
	if err != nil {
		return pki.Rotation{}, err
	}
	rot := pki.Rotation{ID: 1, Kind: kind, State: pki.RotationRequested, Steps: []pki.RotationStep{{State: pki.RotationRequested, At: at, By: by}}}
	if n := len(list); n > 0 {
		last := list[n-1]
		if last.State.Open() {
			return pki.Rotation{}, fleet.Coded(fleet.Conflict, CodeOpen, "rotation %d is %s: bring it to its end first, or cancel it", last.ID, last.State)
		}
		rot.ID = last.ID + 1
	}
	rot.From, _ = pki.Standing(list)
	// The keys come before the record: a rotation on record always has them.
	ready, err := r.c.Authorities.Prepare(ctx, at, rot, keys)
	if err != nil {
		return pki.Rotation{}, err
	}
	if ready {
		if err := rot.Become(pki.RotationPrepared, pki.RotationStep{At: at, By: by}); err != nil {
			return pki.Rotation{}, err
		}
	}
	return rot, r.put(ctx, at, rot, "rotation.start", by, fmt.Sprintf("%s, from generation %d: %s", kind, rot.From, rot.State))
}

func (r *Rotator) put(ctx context.Context, at time.Time, rot pki.Rotation, what, by, details string) error {
	return r.c.Update(ctx, func(tx Tx) error {
		if err := tx.PutRotation(rot); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: what, On: fmt.Sprint(rot.ID), Details: details})
	})
}

// Requests returns what the root's ceremony has to sign for a rotation.
func (r *Rotator) Requests(ctx context.Context, id int64) ([]Request, error) {
	rot, err := r.one(ctx, id)
	if err != nil {
		return nil, err
	}
	return r.c.Authorities.Requests(rot)
}

// Import brings the certificates of the new CAs. Errors: NotFound, Invalid for the certificates, Conflict if the rotation has
// them already.
func (r *Rotator) Import(ctx context.Context, at time.Time, id int64, certs []*x509.Certificate, by string) (pki.Rotation, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rot, err := r.one(ctx, id)
	if err != nil {
		return rot, err
	}
	if err := rot.Become(pki.RotationPrepared, pki.RotationStep{At: at, By: by}); err != nil {
		return rot, err
	}
	if err := r.c.Authorities.Import(at, rot, certs); err != nil {
		return rot, err
	}
	return rot, r.put(ctx, at, rot, "rotation.import", by, fmt.Sprintf("%d certificates", len(certs)))
}

// Advance takes the next step of a rotation, if nothing stands against it or force is set, which needs a reason why. Errors:
// NotFound, Conflict with CodeGated that names what stands against it; Conflict of package trust if the bundle has to be
// signed elsewhere; Unavailable if the step is on record and not all of it could be done: musterd tries again by itself.
func (r *Rotator) Advance(ctx context.Context, at time.Time, id int64, force bool, why, by string) (View, error) {
	if force && why == "" {
		return View{}, fleet.Errorf(fleet.Invalid, "why: say why the step is taken in spite of what stands against it")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	rot, err := r.one(ctx, id)
	if err != nil {
		return View{}, err
	}
	to := rot.State.Next()
	if to == "" {
		return View{}, fleet.Errorf(fleet.Conflict, "rotation %d is %s: that was its last step", id, rot.State)
	}
	v, err := r.look(ctx, rot)
	if err != nil {
		return View{}, err
	}
	if rot.State == pki.RotationRequested || len(v.Blockers) > 0 && !force {
		return View{}, gated(rot, to, v.Blockers)
	}
	step := pki.RotationStep{At: at, By: by, Before: v.Facts.Proofs}
	if len(v.Blockers) > 0 {
		step.Forced, step.Why = v.Blockers, why
	}
	return r.step(ctx, at, rot, to, step)
}

func gated(rot pki.Rotation, to pki.RotationState, blockers []string) error {
	words := ""
	for _, b := range blockers {
		words += "; " + b
	}
	return fleet.Coded(fleet.Conflict, CodeGated, "rotation %d cannot become %s%s", rot.ID, to, words)
}

// Back has the CAs before sign again, while nothing of them is retired yet: for clients that turn out not to get along with
// the new ones. Errors: NotFound, Conflict if it is not active.
func (r *Rotator) Back(ctx context.Context, at time.Time, id int64, why, by string) (View, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rot, err := r.one(ctx, id)
	if err != nil {
		return View{}, err
	}
	if rot.State != pki.RotationActive {
		return View{}, fleet.Errorf(fleet.Conflict, "rotation %d is %s: only an active one can be taken back", id, rot.State)
	}
	return r.step(ctx, at, rot, pki.RotationDistributed, pki.RotationStep{At: at, By: by, Why: why})
}

// Cancel gives a rotation up before its CAs signed anything. Devices are brought to trust what they trusted before. Errors:
// NotFound, Conflict if it is too late.
func (r *Rotator) Cancel(ctx context.Context, at time.Time, id int64, why, by string) (View, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rot, err := r.one(ctx, id)
	if err != nil {
		return View{}, err
	}
	if !rot.State.CanGo(pki.RotationCancelled) {
		return View{}, fleet.Errorf(fleet.Conflict, "rotation %d is %s and cannot be cancelled: an active one can be taken back", id, rot.State)
	}
	return r.step(ctx, at, rot, pki.RotationCancelled, pki.RotationStep{At: at, By: by, Why: why})
}

// step publishes what devices are to trust, records the state, and does it.
func (r *Rotator) step(ctx context.Context, at time.Time, rot pki.Rotation, to pki.RotationState, s pki.RotationStep) (View, error) {
	was := rot.State
	// The bundle comes first: should the rest fail, devices trust more than they need, or are asked again.
	bundle, err := r.publish(ctx, at, rot, to, s.By)
	if err != nil {
		return View{}, err
	}
	rot.Bundle = bundle
	if to == pki.RotationRemoved && rot.Kind.Devices() {
		before, err := r.c.Authorities.Generation(rot.From)
		if err != nil {
			return View{}, err
		}
		// Nothing is left to do of it, unless a step before was forced.
		if err := r.c.Retire(ctx, at, pki.IssuerIDOf(before.Device), s.By); err != nil {
			return View{}, err
		}
	}
	if err := rot.Become(to, s); err != nil {
		return View{}, err
	}
	details := string(was) + " → " + string(to)
	if s.Why != "" {
		details += ": " + s.Why
	}
	if n := len(s.Forced); n > 0 {
		details += fmt.Sprintf(" (forced, against %d objections)", n)
	}
	if err := r.put(ctx, at, rot, "rotation."+string(to), s.By, details); err != nil {
		return View{}, err
	}
	r.c.Log.Info("a rotation of CAs went a step", "rotation", rot.ID, "kind", rot.Kind, "from", was, "to", to, "by", s.By)
	list, err := r.List(ctx)
	if err != nil {
		return View{}, err
	}
	if err := r.c.Authorities.Apply(ctx, list); err != nil {
		return View{}, fleet.Wrap(fleet.Unavailable, err, "the step is on record, but not all of it is done: musterd tries again each minute, muster rotation show says how far it is")
	}
	if rot.Steps[len(rot.Steps)-1].After, err = r.followed(ctx, rot, list); err != nil {
		return View{}, err
	}
	if err := r.c.Update(ctx, func(tx Tx) error { return tx.PutRotation(rot) }); err != nil {
		return View{}, err
	}
	return r.look(ctx, rot)
}

// followed makes handshakes after a step until the doors do what it brings, or should have by now.
func (r *Rotator) followed(ctx context.Context, rot pki.Rotation, list []pki.Rotation) ([]pki.Proof, error) {
	signs, clients := pki.Standing(list)
	if rot.State == pki.RotationRemoved {
		clients = []int64{rot.ID, rot.From} // that the old one is refused is part of the record
	}
	g, err := r.c.Authorities.Generation(signs)
	if err != nil {
		return nil, err
	}
	issuer := string(pki.IssuerIDOf(g.Server))
	const pause = 500 * time.Millisecond
	for waited := time.Duration(0); ; waited += pause {
		proofs := r.c.Authorities.Prove(ctx, clients, signs)
		if waited >= r.c.Follow || !slices.ContainsFunc(proofs, func(p pki.Proof) bool { return behind(p, rot, issuer) }) {
			return proofs, nil
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return proofs, nil // the step is on record, and so is what was seen
		case <-t.C:
		}
	}
}

// behind reports whether a door does not do yet what rot's state brings.
func behind(p pki.Proof, rot pki.Rotation, issuer string) bool {
	if rot.State == pki.RotationRemoved && p.Client == rot.From {
		// By the root that stays, RabbitMQ still believes a device CA that is gone; the login is refused.
		return p.Refused == "" && rot.Kind == pki.RotateRoot
	}
	return !p.OK() || !p.Foreign && p.Issuer != issuer
}

// publish sees to it that the trust bundle in force is the one that state to asks for, and returns its version; 0 if rot
// needs none.
func (r *Rotator) publish(ctx context.Context, at time.Time, rot pki.Rotation, to pki.RotationState, by string) (int64, error) {
	if rot.Kind != pki.RotateRoot || to == pki.RotationPrepared || to == pki.RotationCancelled && rot.State != pki.RotationDistributed {
		return 0, nil
	}
	roots, cross, err := r.bundle(rot, to)
	if err != nil {
		return 0, err
	}
	version, have, haveCross, err := r.c.Trust.Roots(ctx)
	if err != nil {
		return 0, err
	}
	if same(have, roots) && same(haveCross, cross) {
		return version, nil
	}
	version, err = r.c.Trust.Publish(ctx, at, roots, cross, by)
	if e, ok := errors.AsType[*fleet.Error](err); ok && e.Kind == fleet.Conflict { // the trust key is kept offline
		with := *e
		with.Msg += fmt.Sprintf("; muster rotation certificates %d prints the roots that it must hold", rot.ID)
		return 0, &with
	}
	return version, err
}

// bundle returns what devices are to trust while a rotation is in state.
func (r *Rotator) bundle(rot pki.Rotation, state pki.RotationState) (roots, cross []*x509.Certificate, err error) {
	before, err := r.c.Authorities.Generation(rot.From)
	if err != nil {
		return nil, nil, err
	}
	if state == pki.RotationCancelled || state == pki.RotationRequested {
		return distinct(before.Root, before.Spare), nil, nil
	}
	now, err := r.c.Authorities.Generation(rot.ID)
	if err != nil {
		return nil, nil, err
	}
	if state == pki.RotationRetiring || state == pki.RotationRemoved {
		return distinct(now.Root, now.Spare), nil, nil
	}
	if now.Cross != nil {
		cross = append(cross, now.Cross)
	}
	return distinct(before.Root, now.Root, before.Spare, now.Spare), cross, nil
}

// Certificates returns the CAs that a rotation brings, and what devices must trust for its next step. Errors: NotFound, Conflict
// if it has no certificates yet.
func (r *Rotator) Certificates(ctx context.Context, id int64) (g Generation, roots, cross []*x509.Certificate, err error) {
	rot, err := r.one(ctx, id)
	if err != nil {
		return g, nil, nil, err
	}
	if rot.State == pki.RotationRequested || rot.State == pki.RotationCancelled {
		return g, nil, nil, fleet.Errorf(fleet.Conflict, "rotation %d is %s: it has no certificates", id, rot.State)
	}
	if g, err = r.c.Authorities.Generation(rot.ID); err != nil {
		return g, nil, nil, err
	}
	next := rot.State.Next()
	if next == "" {
		next = rot.State
	}
	roots, cross, err = r.bundle(rot, next)
	return g, roots, cross, err
}

func distinct(certs ...*x509.Certificate) (out []*x509.Certificate) {
	for _, c := range certs {
		if !slices.ContainsFunc(out, c.Equal) {
			out = append(out, c)
		}
	}
	return out
}

// same reports whether two sets of certificates are equal.
func same(have [][]byte, want []*x509.Certificate) bool {
	if len(have) != len(want) {
		return false
	}
	for _, w := range want {
		if !slices.ContainsFunc(have, func(der []byte) bool { return string(der) == string(w.Raw) }) {
			return false
		}
	}
	return true
}

// again is how long Run waits before it tries what failed once more.
const again = time.Minute

// Run does what the records say until ctx ends, should an Apply have failed. It reports how that went.
func (r *Rotator) Run(ctx context.Context, report func(error)) error {
	for {
		report(r.apply(ctx))
		t := time.NewTimer(again)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

func (r *Rotator) apply(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	list, err := r.List(ctx)
	if err != nil {
		return err
	}
	return r.c.Authorities.Apply(ctx, list)
}
