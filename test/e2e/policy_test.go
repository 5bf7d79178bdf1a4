package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// image makes a release of a simulated firmware, and returns the hash of its image.
func (s *scene) image(f simdev.Firmware, size int, flags ...string) fleet.Hash {
	s.Helper()
	s.release("0.0.1-keys", simdev.Good, 256) // makes the key
	image := s.write("image-"+f.Version, f.Image(size, 9))
	s.muster(append([]string{"firmware", "sign", image, "--key", s.dir + "/signing.key", "--product", s.product, "--version", f.Version}, flags...)...)
	s.muster("firmware", "upload", image)
	return fleet.Hash(read[api.Release](s, "firmware", "show", s.product, f.Version).ImageHash)
}

// start creates and starts a rollout with a plan of the given fields.
func (s *scene) start(id, version string, plan map[string]any, flags ...string) {
	s.Helper()
	if plan["verify_for"] == nil {
		plan["verify_for"] = "0s"
	}
	b, err := json.Marshal(plan)
	if err != nil {
		s.Fatal(err)
	}
	file := s.write("plan-"+id+".json", b)
	s.muster(append([]string{"rollout", "create", id, "--product", s.product, "--version", version, "--plan", file, "--start"}, flags...)...)
}

func everyone() []map[string]any { return []map[string]any{{"percent": 100}} }

// jobs returns the states of a rollout's devices.
func (s *scene) jobs(id string) map[fleet.DeviceID]api.Job {
	s.Helper()
	out := map[fleet.DeviceID]api.Job{}
	for _, j := range read[[]api.Job](s, "rollout", "devices", id) {
		out[fleet.DeviceID(j.Device)] = j
	}
	return out
}

// An image that works and reports nothing at all: its hello is proof enough.
func TestAnImageThatNeverReportsSucceedsByItsHello(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "silent")
	ids := s.add(3)
	s.runAll(ids, func(c *simdev.Config) { c.Faults.NoReports = true })
	s.release("1.1.0", simdev.NoReports, 4096)
	s.start(s.product+"-110", "1.1.0", map[string]any{"stages": []map[string]any{{"count": 1}, {"percent": 100}}, "verify_for": "2s"})
	r := s.awaitRollout(s.product+"-110", api.RolloutStateCompleted)
	if r.Counts["succeeded"] != 3 {
		t.Errorf("counts %v", r.Counts)
	}
}

// A device below a floor takes it first, in the same rollout: the release itself would not start over what it runs.
func TestADeviceBelowAFloorGoesThroughIt(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "floor")
	ids := s.add(3)
	s.runAll(ids, nil)
	s.release("1.5.0", simdev.Good, 4096)
	s.muster("firmware", "floor", s.product, "1.5.0", "--why", "moves the settings")
	s.image(simdev.Firmware{Version: "2.0.0", Behaviour: simdev.Good, Needs: "1.5.0"}, 4096)
	s.start(s.product+"-200", "2.0.0", map[string]any{"stages": everyone()})
	r := s.awaitRollout(s.product+"-200", api.RolloutStateCompleted)
	if r.Counts["succeeded"] != 3 {
		t.Errorf("counts %v", r.Counts)
	}
	for _, id := range ids {
		if n := s.installs(id); n != 2 || s.device(id).Status.Version != "2.0.0" {
			t.Errorf("%s installed %d images and runs %s", id, n, s.device(id).Status.Version)
		}
	}
}

// Forth, back by hand, and forth again: each way is a rollout of its own, and the histories say who took whom back.
func TestAFleetIsRolledBackAndTheRollbackIsRolledBack(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "back")
	ids := s.add(4)
	s.runAll(ids, nil)
	s.release("1.0.0", simdev.Good, 4096)
	s.release("1.1.0", simdev.Good, 4096)
	id := s.product + "-x"
	s.start(id, "1.1.0", map[string]any{"stages": everyone(), "rollback": map[string]any{"version": "1.0.0"}})
	s.awaitRollout(id, api.RolloutStateCompleted)
	s.muster("rollout", "rollback", id)
	s.awaitRollout(id, api.RolloutState("rolled-back"))
	if r := s.awaitRollout(id+"-rb", api.RolloutStateCompleted); r.Counts["succeeded"] != 4 {
		t.Errorf("the way back: %v", r.Counts)
	}
	for _, d := range ids {
		if v := s.device(d).Status.Version; v != "1.0.0" {
			t.Errorf("%s runs %s", d, v)
		}
	}
	s.muster("rollout", "rollback", id+"-rb")
	s.awaitRollout(id+"-rb", api.RolloutState("rolled-back"))
	if r := s.awaitRollout(id+"-rb-rb", api.RolloutStateCompleted); r.Counts["succeeded"] != 4 {
		t.Errorf("forth again: %v", r.Counts)
	}
	for _, d := range ids {
		if v := s.device(d).Status.Version; v != "1.1.0" {
			t.Errorf("%s runs %s", d, v)
		}
	}
}

// By itself, when devices fail, and without a download: each boots what is still in its other slot.
func TestABadReleaseIsTakenBackToTheOtherSlot(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "slot")
	ids := s.add(4)
	for i, id := range ids {
		s.run(id, func(c *simdev.Config) {
			if i == 3 {
				c.Faults.Reject = "not today"
			}
		})
	}
	s.awaitAll("connected", ids, func(id fleet.DeviceID) bool { return s.device(id).Status.Online })
	s.release("1.1.0", simdev.Good, 4096)
	id := s.product + "-x"
	// The first two succeed; the one that says no is one failure too many.
	s.start(id, "1.1.0", map[string]any{
		"stages": everyone(), "max_in_flight": 4, "max_failures": 100, "verify_for": "6s",
		"limits":   []map[string]any{{"kinds": []string{"rejected"}, "percent": 10, "min_sample": 4, "then": "rollback"}},
		"rollback": map[string]any{"previous_slot": true},
	})
	s.awaitRollout(id, api.RolloutState("rolled-back"))
	for i, d := range ids {
		s.await(fmt.Sprintf("%s runs the old image", d), func() bool { return s.device(d).Status.Version == "1.0.0" })
		if i < 3 && s.installs(d) != 1 {
			t.Errorf("%s downloaded to go back: %d installs", d, s.installs(d))
		}
	}
	var history []string
	for _, d := range read[[]api.Decision](s, "rollout", "history", id) {
		history = append(history, d.Code)
	}
	if got := strings.Join(history, " "); !strings.Contains(got, "failure-limit") || !strings.HasSuffix(got, "rollback-done") {
		t.Errorf("history: %s", got)
	}
}

// A canary that is never heard of again is a failure, and nobody else is touched.
func TestACanaryThatGoesDarkHaltsTheRollout(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "dark")
	ids := s.add(4)
	s.runAll(ids, func(c *simdev.Config) { c.Faults.Dark = simdev.Darkness{On: true} })
	s.release("1.1.0", simdev.Good, 4096)
	id := s.product + "-110"
	s.start(id, "1.1.0", map[string]any{"stages": []map[string]any{{"count": 1}, {"percent": 100}}, "dark_after": "4s"})
	r := s.awaitRollout(id, api.RolloutStateHalted)
	if r.Counts["went-dark"] != 1 || r.Counts["pending"] != 3 {
		t.Errorf("halted with %v", r.Counts)
	}
	for d, j := range s.jobs(id) {
		if j.State != "went-dark" {
			continue
		}
		out, code := s.mayFail("device", "why", string(d))
		if code != 1 || !strings.Contains(out, "offline since") {
			t.Errorf("why %s: exit %d, %s", d, code, out)
		}
	}
}

// mayFail runs the CLI and returns what it said and its exit code.
func (s *scene) mayFail(args ...string) (string, int) {
	s.Helper()
	out, err := s.w.Muster(s.ctx, args...)
	if err != nil {
		return out + err.Error(), 1
	}
	return out, 0
}

// While devices download, an operator pauses, resumes, and in the end aborts: those in flight may finish during a pause, and
// nobody finishes after an abort.
func TestAnOperatorPausesAndAbortsMidDownload(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "abort")
	ids := s.add(4)
	s.runAll(ids, nil)
	s.release("1.1.0", simdev.Good, 400_000)
	id := s.product + "-110"
	s.start(id, "1.1.0", map[string]any{"stages": everyone(), "max_in_flight": 1, "bytes_per_second": 100_000})
	downloading := func() bool { return s.rollout(id).Counts["downloading"] == 1 }
	s.await("the first download", downloading)
	s.muster("rollout", "pause", id)
	s.await("the one in flight has finished", func() bool { return s.rollout(id).Counts["succeeded"] == 1 })
	if r := s.rollout(id); r.State != api.RolloutStatePaused || r.InFlight != 0 {
		t.Errorf("while paused: %s, %v", r.State, r.Counts)
	}
	s.muster("rollout", "resume", id)
	s.await("the second download", downloading)
	s.muster("rollout", "abort", id)
	r := s.awaitRollout(id, api.RolloutStateAborted)
	if r.Counts["succeeded"] != 1 {
		t.Errorf("aborted with %v", r.Counts)
	}
	s.await("the device has given up what it was downloading", func() bool {
		for _, e := range s.devs.Since(0, "", simdev.Updating) {
			if strings.HasPrefix(e.Detail, "failed") {
				return true
			}
		}
		return false
	})
	updated := 0
	for _, d := range ids {
		if s.devs.Get(d).Snapshot().Version == "1.1.0" {
			updated++
		}
	}
	if updated != 1 {
		t.Errorf("%d devices took the update, one of them before the abort", updated)
	}
}

// A new device joins what is under way, and an operator who asks is told why a device has to wait.
func TestADeviceThatJoinsAndWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "join")
	ids := s.add(2)
	s.runAll(ids, nil)
	s.release("1.1.0", simdev.Good, 4096)
	id := s.product + "-110"
	s.start(id, "1.1.0", map[string]any{"stages": []map[string]any{{"count": 1, "hold": true}, {"percent": 100}}})
	s.await("the first stage is done", func() bool { r := s.rollout(id); return r.Counts["succeeded"] == 1 && !r.Stages[0].DoneAt.IsZero() })
	late := []fleet.DeviceID{fleet.DeviceID(s.product + "-late")}
	s.muster("device", "add", string(late[0]), "--product", s.product)
	s.muster("device", "credentials", string(late[0]), "--out", s.kit(late[0]))
	s.runAll(late, nil)
	s.await("it has joined", func() bool { return s.rollout(id).Targets == 3 })
	s.await("the reason", func() bool {
		out, code := s.mayFail("device", "why", string(late[0]))
		return code == 1 && strings.Contains(out, "held until an operator advances")
	})
	s.muster("rollout", "advance", id)
	if r := s.awaitRollout(id, api.RolloutStateCompleted); r.Counts["succeeded"] != 3 {
		t.Errorf("counts %v", r.Counts)
	}
}
