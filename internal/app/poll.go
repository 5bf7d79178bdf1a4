package app

import (
	"context"
	"time"

	"muster/internal/devapi"
	"muster/internal/dispatch"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/internal/rollout"
)

// poller brings together what a client that asks for updates by itself needs: its place in a rollout, and what that brings.
type poller struct{ a *App }

func (p poller) Poll(ctx context.Context, device fleet.DeviceID, run devapi.Running) (ota.Grant, bool, error) {
	asked, err := p.a.dispatch.Poll(ctx, time.Now(), device, dispatch.Running{Image: run.Image, Version: run.Version})
	if err != nil || !asked {
		return ota.Grant{}, false, err
	}
	return p.a.catalog.Wanted(ctx, device)
}

func (p poller) Fetching(ctx context.Context, device fleet.DeviceID, g ota.Grant, sent bool) error {
	step := rollout.ReportDownloading
	if sent {
		step = rollout.ReportDownloaded
	}
	return p.a.dispatch.Fetching(ctx, time.Now(), device, g.Rollout, step, "")
}

func (p poller) Unfit(ctx context.Context, device fleet.DeviceID, g ota.Grant, why string) error {
	return p.a.dispatch.Fetching(ctx, time.Now(), device, g.Rollout, rollout.ReportRejected, why)
}
