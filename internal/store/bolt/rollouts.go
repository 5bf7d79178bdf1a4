package bolt

import (
	"bytes"
	"encoding/json"
	"time"

	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Rollout returns the header of a rollout, or a NotFound error.
func (tx *Tx) Rollout(id fleet.RolloutID) (rollout.Rollout, error) {
	return must[rollout.Rollout](tx, bucketRollouts, []byte(id), "rollout")
}

// PutRollout stores r. A stored header with a higher Rev, or a new rollout under an id that is taken, is a Conflict.
func (tx *Tx) PutRollout(r rollout.Rollout) error {
	old, ok, err := get[rollout.Rollout](tx, bucketRollouts, []byte(r.ID))
	if err != nil {
		return err
	}
	if ok && (old.Rev > r.Rev || !old.CreatedAt.Equal(r.CreatedAt)) {
		return fleet.Coded(fleet.Conflict, "rollout_exists", "rollout %s exists or was changed by somebody else", r.ID)
	}
	return put(tx, bucketRollouts, []byte(r.ID), r)
}

// Rollouts returns the headers of all rollouts, in id order.
func (tx *Tx) Rollouts() ([]rollout.Rollout, error) {
	return all[rollout.Rollout](tx, bucketRollouts, nil)
}

func jobKey(r fleet.RolloutID, d fleet.DeviceID) []byte { return join(text(r), []byte(d)) }

// Job returns the row of a device in a rollout; false if it has none.
func (tx *Tx) Job(r fleet.RolloutID, d fleet.DeviceID) (rollout.Job, bool, error) {
	return get[rollout.Job](tx, bucketJobs, jobKey(r, d))
}

// PutJob stores j and its place in the indexes. A device that is in flight in another rollout makes it a Conflict: no
// device ever has two jobs.
func (tx *Tx) PutJob(j rollout.Job) error {
	key := jobKey(j.Rollout, j.Device)
	old, ok, err := get[rollout.Job](tx, bucketJobs, key)
	if err != nil {
		return err
	}
	active := tx.b.Bucket(bucketJobsActive)
	holder := active.Get([]byte(j.Device))
	switch mine := string(holder) == string(j.Rollout); {
	case j.State.InFlight() && holder != nil && !mine:
		return fleet.Coded(fleet.Conflict, "device_busy", "device %s is being updated by rollout %s", j.Device, holder)
	case j.State.InFlight():
		if err := active.Put([]byte(j.Device), []byte(j.Rollout)); err != nil {
			return err
		}
		if err := tx.b.Bucket(bucketJobsLatest).Put([]byte(j.Device), []byte(j.Rollout)); err != nil {
			return err
		}
	case mine:
		if err := active.Delete([]byte(j.Device)); err != nil {
			return err
		}
	}
	var wasPending, wasDue [][]byte
	if ok {
		wasPending, wasDue = jobIndex(old)
	}
	pending, due := jobIndex(j)
	if err := tx.reindex(bucketJobsPending, wasPending, pending, []byte(j.Device)); err != nil {
		return err
	}
	if err := tx.reindex(bucketJobsDue, wasDue, due, []byte(j.Device)); err != nil {
		return err
	}
	return put(tx, bucketJobs, key, j)
}

// jobIndex returns the keys of j in jobs-pending and jobs-due.
func jobIndex(j rollout.Job) (pending, due [][]byte) {
	switch {
	case j.State == rollout.Pending:
		pending = [][]byte{join(text(j.Rollout), be64(j.Rank), []byte(j.Device))}
	case j.State.InFlight():
		due = [][]byte{join(text(j.Rollout), beTime(j.Deadline), []byte(j.Device))}
	}
	return pending, due
}

// jobsIn returns the rows that an index names from key from on, until stop returns true for a key.
func (tx *Tx) jobsIn(r fleet.RolloutID, index, from []byte, limit int, stop func(key []byte) bool) ([]rollout.Job, error) {
	var out []rollout.Job
	err := eachKey(tx, index, text(r), from, func(k []byte) (bool, error) {
		if limit > 0 && len(out) == limit || stop != nil && stop(k) {
			return false, nil
		}
		j, ok, err := tx.Job(r, fleet.DeviceID(tx.b.Bucket(index).Get(k)))
		if ok {
			out = append(out, j)
		}
		return true, err
	})
	return out, err
}

// PendingJobs returns up to limit pending rows of a rollout in rank order, after the row of rank afterRank and device
// afterDevice; from the first one if both are zero.
func (tx *Tx) PendingJobs(r fleet.RolloutID, afterRank uint64, afterDevice fleet.DeviceID, limit int) ([]rollout.Job, error) {
	from := text(r)
	if afterRank != 0 || afterDevice != "" {
		from = join(text(r), be64(afterRank), text(afterDevice))
	}
	return tx.jobsIn(r, bucketJobsPending, from, limit, nil)
}

// DueJobs returns up to limit rows in flight whose deadline is not after at, soonest first.
func (tx *Tx) DueJobs(r fleet.RolloutID, at time.Time, limit int) ([]rollout.Job, error) {
	end := beTime(at)
	skip := len(text(r))
	return tx.jobsIn(r, bucketJobsDue, nil, limit, func(k []byte) bool { return bytes.Compare(k[skip:skip+8], end) > 0 })
}

// NextDeadline returns the soonest deadline of a row in flight; false if none is.
func (tx *Tx) NextDeadline(r fleet.RolloutID) (time.Time, bool, error) {
	jobs, err := tx.jobsIn(r, bucketJobsDue, nil, 1, nil)
	if err != nil || len(jobs) == 0 {
		return time.Time{}, false, err
	}
	return jobs[0].Deadline, true, nil
}

// ActiveJob returns the job that a device holds a grant for; false if it holds none. A device has at most one.
func (tx *Tx) ActiveJob(d fleet.DeviceID) (rollout.Job, bool, error) {
	r := tx.b.Bucket(bucketJobsActive).Get([]byte(d))
	if r == nil {
		return rollout.Job{}, false, nil
	}
	return tx.Job(fleet.RolloutID(r), d)
}

// LatestJob returns the job of a device's newest grant, whatever became of it; false if it never had one.
func (tx *Tx) LatestJob(d fleet.DeviceID) (rollout.Job, bool, error) {
	r := tx.b.Bucket(bucketJobsLatest).Get([]byte(d))
	if r == nil {
		return rollout.Job{}, false, nil
	}
	return tx.Job(fleet.RolloutID(r), d)
}

// JobsInFlight returns up to limit rows in flight of a rollout, soonest deadline first.
func (tx *Tx) JobsInFlight(r fleet.RolloutID, limit int) ([]rollout.Job, error) {
	return tx.jobsIn(r, bucketJobsDue, nil, limit, nil)
}

// Jobs returns up to limit rows of a rollout after device after, in device order.
func (tx *Tx) Jobs(r fleet.RolloutID, after fleet.DeviceID, limit int) ([]rollout.Job, error) {
	var out []rollout.Job
	prefix := text(r)
	c := tx.b.Bucket(bucketJobs).Cursor()
	k, raw := c.Seek(jobKey(r, after))
	if k != nil && after != "" && bytes.Equal(k, jobKey(r, after)) {
		k, raw = c.Next()
	}
	for ; k != nil && bytes.HasPrefix(k, prefix) && (limit <= 0 || len(out) < limit); k, raw = c.Next() {
		var j rollout.Job
		if err := json.Unmarshal(raw, &j); err != nil {
			return nil, err
		}
		out = append(out, j)
	}
	return out, nil
}

// AddDecision appends to a rollout's history.
func (tx *Tx) AddDecision(r fleet.RolloutID, d rollout.Decision) error {
	return appendNumbered(tx, bucketDecisions, text(r), func(uint64) any { return d })
}

// Decisions returns a rollout's history, oldest first.
func (tx *Tx) Decisions(r fleet.RolloutID) ([]rollout.Decision, error) {
	return all[rollout.Decision](tx, bucketDecisions, text(r))
}
