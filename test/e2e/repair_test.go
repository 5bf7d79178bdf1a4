package e2e

import (
	"path/filepath"
	"slices"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// An update cannot do mutual TLS. The device is locked out at the front, and an operator sends it a good image by the side.
func TestFaultyImageIsRepairedOverTheFallback(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "mangled")
	ids := s.add(2)
	s.runAll(ids, nil)
	id, neighbour := ids[0], ids[1]
	s.release("2.0.0", simdev.NoMTLS, 20_000)
	good := s.release("2.0.1", simdev.Good, 300_000)
	if _, err := s.w.Muster(s.ctx, "recovery", "firmware", string(id), "2.0.1"); err == nil {
		t.Error("ordered for a device at the front")
	}
	r := read[api.Rollout](s, "rollout", "create", s.product+"-200", "--product", s.product, "--version", "2.0.0",
		"--stage", "1,hold", "--stage", "100%", "--start")
	s.await("one of them on the fallback", func() bool {
		return slices.ContainsFunc(ids, func(id fleet.DeviceID) bool { return s.did(0, id, simdev.FallbackTaken) > 0 })
	})
	if s.did(0, id, simdev.FallbackTaken) == 0 {
		id, neighbour = neighbour, id
	}
	s.await("its hello on the fallback", func() bool { return s.device(id).Status.Vhost == "fallback" })
	password := s.file(s.kit(id), simdev.PasswordFile)
	path := "/fw/" + read[api.Release](s, "firmware", "show", s.product, "2.0.1").SHA256[:16]
	if got := s.curl(filepath.Join(s.dir, "early"), s.w.Config.Public.RecoveryHTTPS, path, "--user", string(id)+":"+password); got != "404" && got != "401" {
		t.Errorf("8444 gives the image to a device that nothing is ordered for: %s", got)
	}
	mark := s.devs.Mark()
	s.muster("recovery", "firmware", string(id), "2.0.1")
	s.await("back at the front with the good image", func() bool {
		d := s.device(id).Status
		return s.inFrontBy(id, "") && s.devs.Get(id).Snapshot().Version == "2.0.1" && d.Vhost == "devices" && d.Image == string(good)
	})
	if n := s.did(mark, neighbour, simdev.Offered) + s.did(mark, neighbour, simdev.Disconnected); n != 0 {
		t.Errorf("its neighbour was touched %d times", n)
	}
	s.await("the order is over", func() bool {
		return !slices.ContainsFunc(read[[]api.Repair](s, "recovery", "firmware"), func(r api.Repair) bool { return r.Device == string(id) })
	})
	if j := s.jobs(r.ID)[id]; j.State == api.JobStateSucceeded {
		t.Errorf("the rollout of the bad image counts as a success: %+v", j)
	}
	for _, what := range []string{"recovery.firmware", "recovery.firmware-over"} {
		if !s.audited(what, id) {
			t.Errorf("%s is not on record", what)
		}
	}
}

// A rollout that is rolled back takes back the locked-out ones, too.
func TestRollbackReachesTheFallback(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "backwards")
	id := s.add(1)[0]
	s.release("1.0.0", simdev.Good, 20_000)
	s.run(id, func(c *simdev.Config) {
		c.Firmware = simdev.MakeImage("0.9.0", simdev.Good, 20_000, 7)
		c.Faults.Buffer = 256
	})
	s.await("hello answered", func() bool { return s.did(0, id, simdev.Answered) > 0 })
	s.release("2.0.0", simdev.NoMTLS, 20_000)
	r := read[api.Rollout](s, "rollout", "create", s.product+"-2", "--product", s.product, "--version", "2.0.0",
		"--rollback-to", "1.0.0", "--verify-for", "0s", "--start")
	s.await("its hello on the fallback", func() bool {
		return s.did(0, id, simdev.FallbackTaken) > 0 && s.device(id).Status.Vhost == "fallback"
	})
	s.muster("rollout", "rollback", r.ID)
	s.await("back at the front with the release before", func() bool {
		return s.inFrontBy(id, "") && s.devs.Get(id).Snapshot().Version == "1.0.0"
	})
	s.awaitRollout(r.ID, api.RolloutStateRolledBack)
}

// audited reports whether the trail has a line of that kind about a device.
func (s *scene) audited(what string, id fleet.DeviceID) bool {
	s.Helper()
	return slices.ContainsFunc(read[[]api.AuditEntry](s, "audit", "--limit", "500"), func(e api.AuditEntry) bool { return e.What == what && e.On == string(id) })
}
