package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

func TestGoodReleaseGoesOutInThreeStages(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "staged")
	ids := s.add(8)
	s.runAll(ids, nil)
	image := s.release("1.1.0", simdev.Good, 200_000)
	r := read[api.Rollout](s, "rollout", "create", s.product+"-110", "--product", s.product, "--version", "1.1.0",
		"--stage", "1", "--stage", "25%", "--stage", "100%", "--verify-for", "0s", "--start")
	if r.State != api.RolloutStateRunning || r.Targets != 8 {
		t.Fatalf("created as %+v", r)
	}
	r = s.awaitRollout(r.ID, api.RolloutStateCompleted)
	if r.Counts["succeeded"] != 8 || r.Failures != 0 || r.InFlight != 0 {
		t.Errorf("counts %v, %d failures, %d in flight", r.Counts, r.Failures, r.InFlight)
	}
	checkStages(t, r, []int{1, 2, 8}, []int{1, 1, 6})
	for _, j := range read[[]api.Job](s, "rollout", "devices", r.ID) {
		if st := r.Stages[j.Stage-1]; j.State != api.JobStateSucceeded || j.GrantedAt.Before(st.OpenedAt) {
			t.Errorf("%+v, its stage opened at %v", j, st.OpenedAt)
		}
	}
	for _, id := range ids {
		if d := s.device(id); d.Status.Version != "1.1.0" || d.Status.Image != string(image) {
			t.Errorf("%s said %s %s", id, d.Status.Version, d.Status.Image)
		}
		if n := s.installs(id); n != 1 {
			t.Errorf("%s installed %d times", id, n)
		}
	}
	var opened int
	for _, d := range read[[]api.Decision](s, "rollout", "history", r.ID) {
		if strings.Contains(d.Code, "stage") && d.Text == "" {
			t.Errorf("a decision without a reason: %+v", d)
		}
		if d.Stage > opened {
			opened = d.Stage
		}
	}
	if opened != 3 {
		t.Errorf("the history tells of %d stages", opened)
	}
}

func checkStages(t *testing.T, r api.Rollout, quotas, started []int) {
	t.Helper()
	for i, st := range r.Stages {
		if st.Quota != quotas[i] || st.Started != started[i] || st.Counts["succeeded"] != started[i] || st.ClosedAt.IsZero() {
			t.Errorf("stage %+v, want quota %d and %d devices", st, quotas[i], started[i])
		}
		if i > 0 && st.OpenedAt.Before(r.Stages[i-1].ClosedAt) {
			t.Errorf("stage %d opened before the one before it was done", i+1)
		}
	}
}

// installs is how often a device wrote an image.
func (s *scene) installs(id fleet.DeviceID) (n int) {
	for _, e := range s.devs.Since(0, id, simdev.Rebooting) {
		if e.Detail == "update" {
			n++
		}
	}
	return n
}

func TestBootLoopHaltsAtItsCanary(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "looping")
	ids := s.add(6)
	s.runAll(ids, nil)
	s.release("1.2.0", simdev.BootLoop, 4096)
	s.muster("rollout", "create", s.product+"-120", "--product", s.product, "--version", "1.2.0", "--stage", "1", "--stage", "100%", "--verify-for", "0s", "--start")
	r := s.awaitRollout(s.product+"-120", api.RolloutStateHalted)
	if r.Failures != 1 || r.Counts["rolled-back"] != 1 || r.Counts["pending"] != 5 || r.Reason == "" {
		t.Errorf("halted with %v, reason %q", r.Counts, r.Reason)
	}
	canary := read[[]api.Job](s, "rollout", "devices", r.ID, "--state", "rolled-back")
	if len(canary) != 1 || canary[0].Stage != 1 || canary[0].Cause == "" {
		t.Fatalf("rolled back: %+v", canary)
	}
	for _, id := range ids {
		is := string(id) == canary[0].Device
		if offered := s.did(0, id, simdev.Offered) > 0; offered != is {
			t.Errorf("%s was offered it: %v", id, offered)
		}
		if boots := s.did(0, id, simdev.Booted); !is && boots != 1 {
			t.Errorf("%s restarted %d times", id, boots-1)
		}
		s.await(fmt.Sprintf("%s runs the old image", id), func() bool { return s.device(id).Status.Version == "1.0.0" && s.device(id).Status.Online })
	}
}

func TestDevicesThatAreOfflineUpdateWhenTheyCome(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "absent")
	ids := s.add(6)
	s.runAll(ids[:3], nil)
	s.release("1.1.0", simdev.Good, 4096)
	s.muster("rollout", "create", s.product+"-110", "--product", s.product, "--version", "1.1.0", "--stage", "1", "--stage", "100%", "--verify-for", "0s", "--start")
	s.await("those that are there are done", func() bool { return s.rollout(s.product + "-110").Counts["succeeded"] == 3 })
	if r := s.rollout(s.product + "-110"); r.State != api.RolloutStateRunning || r.Counts["pending"] != 3 || r.InFlight != 0 {
		t.Errorf("with three offline: %s, %v", r.State, r.Counts)
	}
	s.runAll(ids[3:], nil)
	if r := s.awaitRollout(s.product+"-110", api.RolloutStateCompleted); r.Counts["succeeded"] != 6 {
		t.Errorf("counts %v", r.Counts)
	}
	for _, id := range ids {
		if n := s.installs(id); n != 1 {
			t.Errorf("%s installed %d times", id, n)
		}
	}
}

func TestMuteImageTimesOutAndHalts(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "mute")
	ids := s.add(4)
	s.runAll(ids, func(c *simdev.Config) { c.Timing.Watchdog = -1 }) // a device that does not go back by itself
	s.release("1.2.0", simdev.Mute, 4096)
	s.muster("rollout", "create", s.product+"-120", "--product", s.product, "--version", "1.2.0", "--stage", "1", "--stage", "100%", "--timeout", "6s", "--verify-for", "0s", "--start")
	begin := time.Now()
	r := s.awaitRollout(s.product+"-120", api.RolloutStateHalted)
	if r.Counts["timed-out"] != 1 || r.Counts["pending"] != 3 {
		t.Errorf("halted with %v", r.Counts)
	}
	if took := time.Since(begin); took < 4*time.Second {
		t.Errorf("timed out after %s", took)
	}
	if n := s.did(0, "", simdev.Offered); n != 1 {
		t.Errorf("%d offers", n)
	}
}
