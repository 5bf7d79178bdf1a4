package dispatch

import (
	"context"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// takeBack stores the draft of the rollout that takes the devices of r back. It is filled and started by Run.
func (d *Dispatcher) takeBack(tx Tx, r rollout.Rollout) error {
	p := rollout.Plan{
		Stages:      []rollout.Stage{{Name: "back", Percent: 100}},
		MaxFailures: r.Plan.Rollback.MaxFailures, FailThen: rollout.ThenPause, MaxInFlight: r.Plan.Rollback.MaxInFlight,
		DeviceTimeout: r.Plan.DeviceTimeout, DownloadTimeout: r.Plan.DownloadTimeout, InstallTimeout: r.Plan.InstallTimeout,
		VerifyFor: r.Plan.VerifyFor, DarkAfter: r.Plan.DarkAfter, Retries: r.Plan.Retries, RetryBackoff: r.Plan.RetryBackoff,
		OfflineGrace: r.Plan.OfflineGrace, BytesPerSecond: r.Plan.BytesPerSecond, Sites: r.Plan.Sites, AllowDowngrade: true,
	}
	spec := rollout.Spec{ID: r.UndoneBy, Filling: true, By: r.CreatedBy, Undoes: r.ID}
	if r.Plan.Rollback.Previous {
		spec.Mode = rollout.PreviousSlot
		spec.Release = rollout.Release{Product: r.Release.Product, Version: "previous-slot"}
	} else {
		rel, err := tx.Release(r.Release.Product, firmware.Version(r.Plan.Rollback.Version))
		if err != nil {
			return err
		}
		spec.Release = rollout.Release{Product: rel.Product, Version: string(rel.Version), Image: rel.ImageHash, Size: rel.Size}
	}
	if r.Mode == rollout.Download { // the way back from the way back
		p.Rollback = rollout.RollbackPlan{Version: r.Release.Version, MaxFailures: r.Plan.Rollback.MaxFailures, MaxInFlight: r.Plan.Rollback.MaxInFlight}
	}
	spec.Plan = p
	child, err := rollout.New(spec, r.StateAt)
	if err != nil {
		return err
	}
	return tx.PutRollout(child)
}

// fillUndo adds the devices of the undone rollout that may run its image.
func (d *Dispatcher) fillUndo(tx Tx, at time.Time, r rollout.Rollout, after fleet.DeviceID) (_ rollout.Rollout, last fleet.DeviceID, done bool, err error) {
	parent, err := tx.Rollout(r.Undoes)
	if err != nil {
		return r, after, false, err
	}
	jobs, err := tx.Jobs(parent.ID, after, fillBatch)
	if err != nil {
		return r, after, false, err
	}
	var ts []rollout.Target
	var rows []rollout.Job
	for _, j := range jobs {
		last = j.Device
		s, err := tx.Status(j.Device)
		if err != nil {
			return r, last, false, err
		}
		if !mayRun(parent, j, s) {
			continue
		}
		if have, had, err := tx.Job(r.ID, j.Device); err != nil {
			return r, last, false, err
		} else if had {
			rows = append(rows, have)
		}
		ts = append(ts, rollout.Target{Device: j.Device, Site: j.Site, Image: j.From})
	}
	if len(ts) > 0 {
		if r, _, err = d.apply(tx, r, rows, rollout.Added{At: at, Targets: ts}); err != nil {
			return r, last, false, err
		}
	}
	if len(jobs) == fillBatch {
		return r, last, false, nil
	}
	r, _, err = d.apply(tx, r, nil, rollout.Filled{At: at})
	return r, last, true, err
}

// mayRun reports whether a device runs the image of a rollout, or may come to run it.
func mayRun(r rollout.Rollout, j rollout.Job, s fleet.Status) bool {
	if j.GrantedAt.IsZero() || j.Floor > 0 {
		return false
	}
	if s.Image == r.Wanted(j).Image {
		return true
	}
	switch j.Report {
	case rollout.ReportInstalled, rollout.ReportRebooting, rollout.ReportVerifying:
		return j.State != rollout.RolledBack && s.HelloAt.Before(j.ProgressAt)
	}
	return false
}

// startUndo starts a rollback; one without a device to take back has nothing to do.
func (d *Dispatcher) startUndo(ctx context.Context, at time.Time, id fleet.RolloutID) error {
	return d.c.Update(ctx, func(tx Tx) error {
		r, err := tx.Rollout(id)
		if err != nil || r.State != rollout.Draft || r.Filling {
			return err
		}
		if r.Targets > 0 {
			_, _, err = d.apply(tx, r, nil, rollout.Started{At: at})
			return err
		}
		parent, err := tx.Rollout(r.Undoes)
		if err != nil {
			return err
		}
		if _, _, err = d.apply(tx, parent, nil, rollout.RollbackEnded{At: at, Completed: true}); err != nil {
			return err
		}
		_, _, err = d.apply(tx, r, nil, rollout.AbortedBy{At: at, Why: "no device runs the image that is taken back"})
		return err
	})
}

// tellParent ends the rollout that r undoes, when r is over.
func (d *Dispatcher) tellParent(tx Tx, at time.Time, r rollout.Rollout) error {
	parent, err := tx.Rollout(r.Undoes)
	if err != nil || parent.State != rollout.RollingBack || parent.UndoneBy != r.ID {
		return err
	}
	_, _, err = d.apply(tx, parent, nil, rollout.RollbackEnded{At: at, Completed: r.State == rollout.Completed})
	return err
}
