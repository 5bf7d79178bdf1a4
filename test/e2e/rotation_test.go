package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/test/world"
)

// The device CA, and then the root with both intermediates, are replaced under a fleet that stays connected, on the real
// broker: no step before devices and doors have shown that they follow; the one that is away is named, and finds its way back.
func TestTheCAsAreReplacedUnderTheFleet(t *testing.T) {
	t.Parallel()
	w, err := world.Start(context.Background(), world.Options{Dir: filepath.Join(t.TempDir(), "rotating"), Set: append(slices.Clone(settings), "broker.probe=false"), Say: say})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	s := newScene(t, w, "rotating")
	ids := s.add(3)
	away := ids[2]
	flash := map[fleet.DeviceID]*simdev.MemFlash{} // a device that is switched off keeps what it has
	on := func(ids ...fleet.DeviceID) {
		t.Helper()
		mark := s.devs.Mark()
		for _, id := range ids {
			if flash[id] == nil {
				flash[id] = &simdev.MemFlash{}
			}
			s.run(id, func(c *simdev.Config) { c.Flash = flash[id] })
		}
		s.awaitAll("hello answered", ids, func(id fleet.DeviceID) bool { return s.did(mark, id, simdev.Answered) > 0 })
	}
	on(ids[:2]...)
	s.greet(away) // it was there once

	// The device CA. The root's key still lies here: musterd signs by itself.
	if r := read[api.Rotation](s, "rotation", "start", "device-ca"); r.State != api.RotationStatePrepared {
		t.Fatalf("%+v", r)
	}
	s.step(1, api.RotationStateDistributed)
	r := s.step(1, api.RotationStateActive)
	for _, generation := range []int64{0, 1} {
		if !slices.ContainsFunc(r.Steps[len(r.Steps)-1].After, func(p api.Proof) bool {
			return p.Door == "broker-mqtt" && p.Client != nil && *p.Client == generation && p.Ok
		}) {
			t.Errorf("no handshake of generation %d is on record: %+v", generation, r.Steps[len(r.Steps)-1].After)
		}
	}
	r = s.held(1)
	if r.Holders.Count != 3 || r.OldIssuer == "" || !slices.Contains(r.Holders.Devices, string(away)) {
		t.Errorf("who has a certificate of the old CA: %+v of %s", r.Holders, r.OldIssuer)
	}
	old := map[fleet.DeviceID]fleet.Serial{}
	for _, id := range ids[:2] {
		old[id] = s.devs.Get(id).Snapshot().Serial
	}
	s.muster("certs", "renew", "--issuer", r.OldIssuer)
	s.awaitAll("connected with one of the new CA", ids[:2], func(id fleet.DeviceID) bool { return s.inFrontBy(id, old[id]) })
	s.await("only the one that is away is left", func() bool { return s.held(1).Holders.Count == 1 })
	on(away) // it comes back, and hears that it should renew
	s.await("nobody is left", func() bool { return len(s.rotation(1).Blockers) == 0 })
	s.step(1, api.RotationStateRetiring)
	s.step(1, api.RotationStateRemoved)
	s.wantRefused(ids[0], s.front(ids[0], s.kit(ids[0]))) // with a certificate of the CA that is removed

	// The root. musterd was restarted in between: what signs and what is trusted is on record.
	s.devs.Stop()
	s.devs = world.NewDevices()
	if err := errors.Join(w.StopMusterd(s.ctx), w.StartMusterd(s.ctx)); err != nil {
		t.Fatal(err)
	}
	on(ids[:2]...)
	s.muster("rotation", "start", "root")
	r = s.step(2, api.RotationStateDistributed)
	s.awaitAll("trusts both roots", ids[:2], func(id fleet.DeviceID) bool { return s.device(id).Status.Trust == r.Bundle })
	r = s.held(2)
	if r.Lacking.Count != 1 || r.Lacking.Devices[0] != string(away) {
		t.Errorf("stragglers: %+v", r.Lacking)
	}
	if out, err := w.Muster(s.ctx, "rotation", "advance", "2"); err == nil || !strings.Contains(err.Error(), string(away)) {
		t.Errorf("a step that leaves a device behind: %v\n%s", err, out)
	}
	on(away)
	s.await("the straggler trusts both roots", func() bool { return s.device(away).Status.Trust == r.Bundle })
	for _, id := range ids {
		old[id] = s.devs.Get(id).Snapshot().Serial
	}
	s.await("nothing stands against it", func() bool { return len(s.rotation(2).Blockers) == 0 })
	r = s.step(2, api.RotationStateActive)
	for _, p := range r.Steps[len(r.Steps)-1].After {
		if !p.Ok || p.Roots != 2 {
			t.Errorf("%s", p.Words)
		}
	}
	// Every door shows a certificate that stands under the new root alone, to a client that muster did not write.
	var certs api.RotationCertificates
	if err := json.Unmarshal([]byte(s.muster("rotation", "certificates", "2", "--output", "json")), &certs); err != nil {
		t.Fatal(err)
	}
	roots := s.write("new-roots.pem", []byte(certs.RootsPEM))
	c := w.Config
	for _, address := range []string{c.Public.MQTT, c.Public.FallbackMQTT, c.Broker.AMQPS, c.Public.HTTPS, c.Public.RecoveryHTTPS, strings.TrimPrefix(w.URL, "https://")} {
		if out, code := s.command("openssl", "s_client", "-connect", address, "-servername", "localhost", "-CAfile", roots, "-verify_return_error", "-brief"); !strings.Contains(out, "Verification: OK") {
			t.Errorf("%s does not stand under the new root (%d): %s", address, code, out)
		}
	}
	s.muster("certs", "renew", "--issuer", s.held(2).OldIssuer)
	s.awaitAll("connected with one under the new root", ids, func(id fleet.DeviceID) bool { return s.inFrontBy(id, old[id]) })
	s.await("nobody is left", func() bool { return len(s.rotation(2).Blockers) == 0 })
	r = s.step(2, api.RotationStateRetiring)
	s.awaitAll("trusts the new roots alone", ids, func(id fleet.DeviceID) bool { return s.device(id).Status.Trust == r.Bundle })
	r = s.step(2, api.RotationStateRemoved)
	if !slices.ContainsFunc(r.Steps[len(r.Steps)-1].After, func(p api.Proof) bool { return p.Door == "broker-mqtt" && *p.Client == 1 && !p.Ok }) {
		t.Errorf("nothing on record shows that the old generation is refused: %+v", r.Steps[len(r.Steps)-1].After)
	}
	for _, id := range ids {
		if n := s.did(0, id, simdev.FallbackTaken); n > 0 {
			t.Errorf("%s was locked out and took the fallback", id)
		}
	}
	trail := s.muster("audit", "--limit", "0")
	for _, step := range []string{"start", "distributed", "active", "retiring", "removed"} {
		if got := strings.Count(trail, "rotation."+step); got != 2 {
			t.Errorf("rotation.%s is on record %d times", step, got)
		}
	}
}

// step takes a step that nothing stands against.
func (s *scene) step(id int, want api.RotationState) api.Rotation {
	s.Helper()
	r := read[api.Rotation](s, "rotation", "advance", fmt.Sprint(id))
	if r.State != want {
		s.Fatalf("rotation %d is %s, want %s", id, r.State, want)
	}
	return r
}

// rotation returns a rotation as it is now.
func (s *scene) rotation(id int) (r api.Rotation) {
	s.Helper()
	out, err := s.w.Muster(s.ctx, "rotation", "show", fmt.Sprint(id), "--output", "json")
	if json.Unmarshal([]byte(out), &r) != nil {
		s.Fatalf("%v\n%s", err, out)
	}
	return r
}

// held returns a rotation against whose next step something stands.
func (s *scene) held(id int) api.Rotation {
	s.Helper()
	r := s.rotation(id)
	if len(r.Blockers) == 0 {
		s.Errorf("nothing holds rotation %d in state %s", id, r.State)
	}
	return r
}
