package app

import (
	"context"
	"errors"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"muster/internal/rollout"
)

func TestRolloutsAreCountedByState(t *testing.T) {
	rs := []rollout.Rollout{
		{State: rollout.Running, Total: rollout.Counts{Pending: 3, Verifying: 2}},
		{State: rollout.Halted, Total: rollout.Counts{Pending: 4, WentDark: 1}},
		{State: rollout.Completed, Total: rollout.Counts{Succeeded: 100}},
	}
	var fail error
	reg := prometheus.NewRegistry()
	reg.MustRegister(rolloutCounts{func(context.Context) ([]rollout.Rollout, error) { return rs, fail }})
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[f.GetName()+" "+m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue()
		}
	}
	for name, want := range map[string]float64{
		"muster_rollouts running": 1, "muster_rollouts halted": 1, "muster_rollouts completed": 1, "muster_rollouts paused": 0,
		"muster_rollout_devices pending": 7, "muster_rollout_devices verifying": 2, "muster_rollout_devices went-dark": 1, "muster_rollout_devices succeeded": 0,
	} {
		if have, ok := got[name]; !ok || have != want {
			t.Errorf("%s is %v (%v), want %v", name, have, ok, want)
		}
	}
	if want := len(rollout.States()) + len(rollout.JobStates()); len(got) != want {
		t.Errorf("%d values, want %d", len(got), want)
	}
	fail = errors.New("closed")
	if _, err := reg.Gather(); err == nil {
		t.Error("a store that cannot be read shows as no rollouts")
	}
}
