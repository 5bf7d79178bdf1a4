package app

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"muster/internal/enroll"
	"muster/internal/rollout"
)

// rolloutCounts shows how rollouts stand, as they are stored when somebody asks.
type rolloutCounts struct {
	list func(context.Context) ([]rollout.Rollout, error)
}

var (
	rolloutsByState = prometheus.NewDesc("muster_rollouts", "Rollouts by state.", []string{"state"}, nil)
	devicesByState  = prometheus.NewDesc("muster_rollout_devices", "Devices by their state in the rollouts that are not over.", []string{"state"}, nil)
)

// Describe implements prometheus.Collector.
func (c rolloutCounts) Describe(ch chan<- *prometheus.Desc) {
	ch <- rolloutsByState
	ch <- devicesByState
}

// Collect implements prometheus.Collector. Every state is shown, also with 0, so that alarms have something to compare.
func (c rolloutCounts) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	rs, err := c.list(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(rolloutsByState, err)
		return
	}
	rollouts, devices := map[rollout.State]int{}, map[rollout.JobState]int{}
	for _, r := range rs {
		rollouts[r.State]++
		if r.State.Final() {
			continue
		}
		for _, s := range rollout.JobStates() {
			devices[s] += r.Total.Of(s)
		}
	}
	for _, s := range rollout.States() {
		ch <- prometheus.MustNewConstMetric(rolloutsByState, prometheus.GaugeValue, float64(rollouts[s]), string(s))
	}
	for _, s := range rollout.JobStates() {
		ch <- prometheus.MustNewConstMetric(devicesByState, prometheus.GaugeValue, float64(devices[s]), string(s))
	}
}

// renewalSteps are the steps of a renewal as a rollout of certificates counts them.
var renewalSteps = map[enroll.Step]rollout.Report{
	enroll.Requested: rollout.ReportAccepted, enroll.Signed: rollout.ReportDownloading, enroll.Stored: rollout.ReportInstalled,
}
