package rotation_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rotation"
	"muster/internal/store/bolt"
	"muster/test/apirig"
)

// stage is a real store with a few devices, and CAs with knobs.
type stage struct {
	*apirig.Rig
	t  *testing.T
	at time.Time
	r  *rotation.Rotator
}

func open(t *testing.T, devices int) *stage {
	t.Helper()
	s := &stage{Rig: apirig.New(t), t: t, at: time.Now()}
	s.r = s.Config.Rotations.(*rotation.Rotator)
	s.Devices(t, devices, s.at)
	return s
}

// enrolled gives a device a certificate of generation 0, which it uses.
func (s *stage) enrolled(id fleet.DeviceID) fleet.Serial {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: string(id)}}, key)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.Enroll.Run(ctx) }()
	c, err := s.Enroll.Issue(s.t.Context(), s.at, id, csr, enroll.IssueOptions{By: "test"})
	cancel()
	<-ended
	if err != nil {
		s.t.Fatal(err)
	}
	s.tx(func(tx *bolt.Tx) error { return s.Enroll.Connected(tx, s.at, id, c.Serial) })
	return c.Serial
}

func (s *stage) tx(do func(*bolt.Tx) error) {
	s.t.Helper()
	if err := s.DB.Update(s.t.Context(), do); err != nil {
		s.t.Fatal(err)
	}
}

// trusts notes that a device said hello with a version of the bundle.
func (s *stage) trusts(id fleet.DeviceID, version int64) {
	s.t.Helper()
	s.tx(func(tx *bolt.Tx) error {
		st, err := tx.Status(id)
		if err != nil {
			return err
		}
		st.Device, st.Bundle = id, version
		return tx.PutStatus(st)
	})
}

func (s *stage) start(kind pki.RotationKind) pki.Rotation {
	s.t.Helper()
	r, err := s.r.Start(s.t.Context(), s.at, kind, rotation.Keys{}, "anna")
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// advance takes a step that nothing stands against.
func (s *stage) advance(id int64, want pki.RotationState) rotation.View {
	s.t.Helper()
	v, err := s.r.Advance(s.t.Context(), s.at, id, false, "", "anna")
	if err != nil {
		s.t.Fatalf("to %s: %v", want, err)
	}
	if v.State != want {
		s.t.Fatalf("%s, want %s", v.State, want)
	}
	return v
}

func coded(err error, code string) bool {
	e, ok := errors.AsType[*fleet.Error](err)
	return ok && e.Code == code
}

// gated asks for a step that something stands against, and returns the words.
func (s *stage) gated(id int64) string {
	s.t.Helper()
	_, err := s.r.Advance(s.t.Context(), s.at, id, false, "", "anna")
	if !fleet.Is(err, fleet.Conflict) || !coded(err, rotation.CodeGated) {
		s.t.Fatalf("%v, want %s", err, rotation.CodeGated)
	}
	return err.Error()
}

func (s *stage) standing(signs int64, trusted ...int64) {
	s.t.Helper()
	got, also := s.Authorities.Standing()
	if got != signs || !slices.Equal(also, trusted) {
		s.t.Errorf("%d signs, %v are trusted; want %d, %v", got, also, signs, trusted)
	}
}

func (s *stage) trail() (out []string) {
	s.t.Helper()
	list, err := s.Access.Audit(s.t.Context(), 0, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range slices.Backward(list) {
		if strings.HasPrefix(e.What, "rotation.") {
			out = append(out, e.Who+" "+e.What+" "+e.On)
		}
	}
	return out
}

// The device CA goes when nobody has a certificate of it any more: the device that still has is named, and is let back in
// over the fallback if an operator does not wait for it.
func TestTheDeviceCAIsReplacedOnceNobodyNeedsTheOldOne(t *testing.T) {
	s := open(t, 3)
	serial := s.enrolled("d001")
	id := s.start(pki.RotateDeviceCA).ID
	s.standing(0, 0)
	s.advance(id, pki.RotationDistributed)
	s.standing(0, 0, 1)
	v := s.advance(id, pki.RotationActive)
	s.standing(1, 1, 0)
	if after := v.Steps[len(v.Steps)-1].After; len(after) != 4 || !after[0].OK() || !after[1].OK() || after[0].Client == after[1].Client {
		t.Errorf("not proven with a client of each generation: %v", after)
	}
	old, err := s.Authorities.Generation(0)
	if err != nil {
		t.Fatal(err)
	}
	if words := s.gated(id); !strings.Contains(words, "1 devices") || !strings.Contains(words, "d001") || !strings.Contains(words, "--issuer "+string(pki.IssuerIDOf(old.Device))) {
		t.Errorf("%q does not say who holds what back, and what to do", words)
	}
	r, err := s.Enroll.RenewPass(t.Context(), s.at, enroll.RenewOptions{Issuer: pki.IssuerIDOf(old.Device)})
	if err != nil || len(r.Asked) != 1 || r.Asked[0] != "d001" {
		t.Errorf("renewal of the old issuer's devices: %+v, %v", r, err)
	}
	if _, err := s.r.Advance(t.Context(), s.at, id, true, "", "anna"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("forced without a reason: %v", err)
	}
	v, err = s.r.Advance(t.Context(), s.at, id, true, "it lies in the workshop", "anna")
	if err != nil || v.State != pki.RotationRetiring {
		t.Fatal(v.State, err)
	}
	if last := v.Steps[len(v.Steps)-1]; last.Why == "" || len(last.Forced) != 1 || !strings.Contains(last.Forced[0], "d001") {
		t.Errorf("%+v", last)
	}
	v = s.advance(id, pki.RotationRemoved)
	s.standing(1, 1)
	refused := slices.ContainsFunc(v.Steps[len(v.Steps)-1].After, func(p pki.Proof) bool { return p.Client == 0 && p.Refused != "" })
	if !refused {
		t.Errorf("nothing shows that a client of the old generation is refused: %v", v.Steps[len(v.Steps)-1].After)
	}
	c, err := s.Enroll.Certificate(t.Context(), serial)
	if err != nil || c.State != pki.Revoked || c.Untrusted() {
		t.Errorf("what is left of the old CA: %s, %v", c.State, err)
	}
	var dev fleet.Device
	s.tx(func(tx *bolt.Tx) (err error) { dev, err = tx.Device("d001"); return err })
	if dev.RecoveryOff != "" {
		t.Error("the fallback is closed to a device that only came too late")
	}
	if problems, err := s.DB.Check(t.Context()); err != nil || len(problems) != 0 {
		t.Errorf("the store: %v, %v", problems, err)
	}
	want := []string{"anna rotation.start 1", "anna rotation.distributed 1", "anna rotation.active 1", "anna rotation.retiring 1", "anna rotation.removed 1"}
	if got := s.trail(); !slices.Equal(got, want) {
		t.Errorf("on record: %q", got)
	}
	if _, err := s.r.Advance(t.Context(), s.at, id, false, "", "anna"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("beyond the end: %v", err)
	}
}

// A new root is trusted by every device before anything stands under it, and the old one is taken away last.
func TestANewRootWaitsForEveryDevice(t *testing.T) {
	s := open(t, 3)
	id := s.start(pki.RotateRoot).ID
	v := s.advance(id, pki.RotationDistributed)
	both := v.Bundle
	if b, err := s.Config.TrustBundles.Current(t.Context()); err != nil || b.Version != both || len(b.Roots) != 4 {
		t.Fatalf("bundle %+v, %v", b, err)
	}
	s.trusts("d000", both)
	s.trusts("d002", both)
	if words := s.gated(id); !strings.Contains(words, "1 devices have not taken trust bundle") || !strings.Contains(words, "d001") {
		t.Errorf("%q does not name the straggler", words)
	}
	s.trusts("d001", both)
	s.advance(id, pki.RotationActive)
	v = s.advance(id, pki.RotationRetiring)
	if b, err := s.Config.TrustBundles.Current(t.Context()); err != nil || b.Version != v.Bundle || v.Bundle <= both || len(b.Roots) != 2 {
		t.Fatalf("bundle %+v, %v", b, err)
	}
	if words := s.gated(id); !strings.Contains(words, "3 devices") {
		t.Errorf("%q", words)
	}
	for n := range 3 {
		s.trusts(fleet.DeviceID(fmt.Sprintf("d%03d", n)), v.Bundle)
	}
	s.advance(id, pki.RotationRemoved)
	s.standing(1, 1)
	if next := s.start(pki.RotateServerCA); next.ID != 2 || next.From != 1 {
		t.Errorf("%+v", next)
	}
}

// A door that does not let clients of the new CA in, or goes on to show a certificate of the old one, is named.
func TestADoorThatDoesNotFollowHoldsTheStep(t *testing.T) {
	s := open(t, 0)
	id := s.start(pki.RotateRoot).ID
	s.advance(id, pki.RotationDistributed)
	s.Authorities.Refuse[1] = "tls: unknown certificate authority"
	if words := s.gated(id); !strings.Contains(words, "mqtt: client of generation 1") || !strings.Contains(words, "unknown certificate authority") {
		t.Error(words)
	}
	delete(s.Authorities.Refuse, 1)
	s.Authorities.KeyGone = errors.New("the key of the device CA cannot sign")
	if words := s.gated(id); !strings.Contains(words, "cannot sign") {
		t.Error(words)
	}
	s.Authorities.KeyGone = nil
	s.Authorities.Stale = true
	s.advance(id, pki.RotationActive)
	if words := s.gated(id); !strings.Contains(words, "mqtt shows a certificate that is not of the new server CA") || strings.Contains(words, "shop") {
		t.Error(words)
	}
	v, err := s.r.Back(t.Context(), s.at, id, "old clients do not get along with it", "anna")
	if err != nil || v.State != pki.RotationDistributed {
		t.Fatal(v.State, err)
	}
	s.standing(0, 0, 1)
	v, err = s.r.Cancel(t.Context(), s.at, id, "later", "anna")
	if err != nil || v.State != pki.RotationCancelled {
		t.Fatal(v.State, err)
	}
	s.standing(0, 0)
	old, _ := s.Authorities.Generation(0)
	if b, err := s.Config.TrustBundles.Current(t.Context()); err != nil || len(b.Roots) != 2 || string(b.Roots[0]) != string(old.Root.Raw) {
		t.Errorf("devices are not brought back to what they trusted: %v", err)
	}
}

func TestARootThatIsKeptElsewhere(t *testing.T) {
	s := open(t, 0)
	s.Authorities.Offline = true
	r := s.start(pki.RotateDeviceCA)
	if r.State != pki.RotationRequested {
		t.Fatal(r.State)
	}
	if words := s.gated(r.ID); !strings.Contains(words, "muster rotation requests") {
		t.Error(words)
	}
	if list, err := s.r.Requests(t.Context(), r.ID); err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
	if _, _, _, err := s.r.Certificates(t.Context(), r.ID); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("certificates before there are any: %v", err)
	}
	old, _ := s.Authorities.Generation(0)
	if _, err := s.r.Import(t.Context(), s.at, r.ID, []*x509.Certificate{old.Root}, "anna"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a certificate for nobody: %v", err)
	}
	r, err := s.r.Import(t.Context(), s.at, r.ID, s.Authorities.Certificates(r.ID), "anna")
	if err != nil || r.State != pki.RotationPrepared {
		t.Fatal(r.State, err)
	}
	if _, err := s.r.Import(t.Context(), s.at, r.ID, s.Authorities.Certificates(r.ID), "anna"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("a second time: %v", err)
	}
	if g, roots, _, err := s.r.Certificates(t.Context(), r.ID); err != nil || len(roots) != 2 || g.Device == nil {
		t.Errorf("%v", err)
	}
	s.advance(r.ID, pki.RotationDistributed)
}

func TestOneRotationAtATime(t *testing.T) {
	s := open(t, 0)
	if _, err := s.r.Start(t.Context(), s.at, "moon", rotation.Keys{}, "anna"); !fleet.Is(err, fleet.Invalid) {
		t.Error(err)
	}
	if _, err := s.r.Start(t.Context(), s.at, pki.RotateDeviceCA, rotation.Keys{Device: "pkcs11:"}, "anna"); !fleet.Is(err, fleet.Unavailable) {
		t.Error(err)
	}
	r := s.start(pki.RotateDeviceCA)
	if _, err := s.r.Start(t.Context(), s.at, pki.RotateRoot, rotation.Keys{}, "anna"); !coded(err, rotation.CodeOpen) {
		t.Error(err)
	}
	if _, err := s.r.Back(t.Context(), s.at, r.ID, "", "anna"); !fleet.Is(err, fleet.Conflict) {
		t.Error(err)
	}
	if _, err := s.r.Show(t.Context(), 9); !fleet.Is(err, fleet.NotFound) {
		t.Error(err)
	}
	if _, err := s.r.Cancel(t.Context(), s.at, r.ID, "", "anna"); err != nil {
		t.Fatal(err)
	}
	if r := s.start(pki.RotateServerCA); r.ID != 2 || r.From != 0 {
		t.Errorf("%+v", r)
	}
}

// What is on record is done, if not now then later: a step whose doing fails is not taken twice, and Run makes up for it.
func TestAStepThatCouldNotBeDoneIsMadeUpFor(t *testing.T) {
	s := open(t, 0)
	id := s.start(pki.RotateDeviceCA).ID
	s.Authorities.Broken = errors.New("disk full")
	if _, err := s.r.Advance(t.Context(), s.at, id, false, "", "anna"); !fleet.Is(err, fleet.Unavailable) {
		t.Fatal(err)
	}
	s.standing(0, 0)
	if v, err := s.r.Show(t.Context(), id); err != nil || v.State != pki.RotationDistributed || len(v.Blockers) == 0 {
		t.Fatalf("%s, %v, %v", v.State, v.Blockers, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := s.r.Run(ctx, func(err error) {
		if cancel(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Error(err)
	}
	s.standing(0, 0, 1)
	s.advance(id, pki.RotationActive)
}

// A step that cannot be stored is not done.
func TestAStepThatCannotBeStoredIsNotTaken(t *testing.T) {
	s := open(t, 0)
	id := s.start(pki.RotateDeviceCA).ID
	r := rotation.New(rotation.Config{
		View: apirig.Use[rotation.Tx](s.DB.View), Authorities: s.Authorities, Trust: apirig.TrustOfDevices{}, Log: s.Config.Log,
		Update: func(context.Context, func(rotation.Tx) error) error {
			return fleet.Errorf(fleet.Unavailable, "disk full")
		},
	})
	if _, err := r.Advance(t.Context(), s.at, id, false, "", "anna"); !fleet.Is(err, fleet.Unavailable) {
		t.Fatal(err)
	}
	s.standing(0, 0)
	if list, err := r.List(t.Context()); err != nil || list[0].State != pki.RotationPrepared || s.Authorities.Applied != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}
