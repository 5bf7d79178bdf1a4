package bolt

import (
	"bytes"
	"encoding/binary"
	"time"

	json "github.com/go-json-experiment/json/v1"

	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Rollout returns the header of a rollout, or a NotFound error.
func (tx *Tx) Rollout(id fleet.RolloutID) (rollout.Rollout, error) {
	if h := tx.headers[id]; h != nil {
		return h.r, nil
	}
	r, err := must[rollout.Rollout](tx, bucketRollouts, []byte(id), "rollout")
	if err == nil && tx.headers != nil {
		tx.headers[id] = &header{r: r}
	}
	return r, err
}

// PutRollout stores r. A stored header with a higher Rev, or a new rollout under an id that is taken, is a Conflict.
func (tx *Tx) PutRollout(r rollout.Rollout) error {
	old, err := tx.Rollout(r.ID)
	if err != nil && !fleet.Is(err, fleet.NotFound) {
		return err
	}
	if err == nil && (old.Rev > r.Rev || !old.CreatedAt.Equal(r.CreatedAt)) {
		return fleet.Coded(fleet.Conflict, "rollout_exists", "rollout %s exists or was changed by somebody else", r.ID)
	}
	live, index := liveValue(r), tx.b.Bucket(bucketLive)
	switch have := index.Get([]byte(r.ID)); {
	case live == nil && have != nil:
		err = index.Delete([]byte(r.ID))
	case live != nil && !bytes.Equal(live, have):
		err = index.Put([]byte(r.ID), live)
	default:
		err = nil
	}
	if err != nil {
		return err
	}
	if tx.headers == nil {
		return put(tx, bucketRollouts, []byte(r.ID), r)
	}
	tx.headers[r.ID] = &header{r: r, put: true}
	return nil
}

// liveValue returns what rollouts-live says of r: "d" if devices may join it, "-" if the engine drives it, nil if neither.
func liveValue(r rollout.Rollout) []byte {
	switch {
	case r.Dynamic && !r.Filling && r.State != rollout.RollingBack && !r.State.Final():
		return []byte("d")
	case r.Filling || r.Sweep != "" || r.State != rollout.Draft && !r.State.Final():
		return []byte("-")
	}
	return nil
}

// LiveRollouts returns the ids of the rollouts that the engine has to look at, in order.
func (tx *Tx) LiveRollouts() (ids []fleet.RolloutID, err error) {
	err = tx.b.Bucket(bucketLive).ForEach(func(k, _ []byte) error {
		ids = append(ids, fleet.RolloutID(k))
		return nil
	})
	return ids, err
}

// DynamicRollouts returns the ids of the rollouts that devices may join, in order.
func (tx *Tx) DynamicRollouts() (ids []fleet.RolloutID, err error) {
	err = tx.b.Bucket(bucketLive).ForEach(func(k, v []byte) error {
		if string(v) == "d" {
			ids = append(ids, fleet.RolloutID(k))
		}
		return nil
	})
	return ids, err
}

// mayJoin notes that d has to be held against the targets of the running rollouts, if there is one that it could join.
func (tx *Tx) mayJoin(d fleet.DeviceID) error {
	c := tx.b.Bucket(bucketLive).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		if string(v) == "d" {
			return tx.b.Bucket(bucketJoins).Put([]byte(d), []byte{})
		}
	}
	return nil
}

// Joins returns up to limit devices that may have come into a target.
func (tx *Tx) Joins(limit int) (ids []fleet.DeviceID, err error) {
	err = eachKey(tx, bucketJoins, nil, nil, func(k []byte) (bool, error) {
		ids = append(ids, fleet.DeviceID(k))
		return len(ids) < limit, nil
	})
	return ids, err
}

// DropJoin forgets that d may have come into a target.
func (tx *Tx) DropJoin(d fleet.DeviceID) error { return tx.b.Bucket(bucketJoins).Delete([]byte(d)) }

// Rollouts returns the headers of all rollouts, in id order.
func (tx *Tx) Rollouts() ([]rollout.Rollout, error) {
	if err := tx.flush(); err != nil {
		return nil, err
	}
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
	var was jobKeys
	if ok {
		was = tx.jobIndex(old)
	}
	now := tx.jobIndex(j)
	for _, i := range []struct{ bucket, old, now []byte }{
		{bucketJobsPending, was.pending, now.pending}, {bucketJobsDue, was.due, now.due},
		{bucketJobsOpen, was.open, now.open}, {bucketJobsReady, was.ready, now.ready},
	} {
		if err := tx.reindex(i.bucket, keys(i.old), keys(i.now), []byte(j.Device)); err != nil {
			return err
		}
	}
	if err := tx.countSite(old, j, ok); err != nil {
		return err
	}
	return put(tx, bucketJobs, key, j)
}

// keys returns the one key of an index, or none.
func keys(k []byte) [][]byte {
	if k == nil {
		return nil
	}
	return [][]byte{k}
}

// jobKeys are the keys of a row in the indexes; nil where it has none.
type jobKeys struct{ pending, open, ready, due []byte }

// jobIndex returns the keys of j. Whether it is in jobs-ready depends on whether its device is online.
func (tx *Tx) jobIndex(j rollout.Job) (k jobKeys) {
	if j.State == rollout.Pending {
		k.pending = join(text(j.Rollout), []byte{byte(j.Ring)}, be64(j.Rank), []byte(j.Device)) //nolint:gosec // at most rollout.MaxStages
	}
	if j.State.Open() {
		k.open = join(text(j.Device), []byte(j.Rollout))
		if tx.Online(j.Device) {
			k.ready = readyKey(j)
		}
	}
	if j.State.InFlight() || j.State == rollout.Waiting {
		k.due = join(text(j.Rollout), beTime(j.Deadline), []byte(j.Device))
	}
	return k
}

func readyKey(j rollout.Job) []byte {
	if j.State == rollout.Waiting {
		return join(text(j.Rollout), []byte{'w'}, beTime(j.RetryAt), []byte(j.Device))
	}
	return join(text(j.Rollout), []byte{'p', byte(j.Ring)}, be64(j.Rank), []byte(j.Device))
}

// presenceChanged brings the open rows of a device into jobs-ready, or out of it.
func (tx *Tx) presenceChanged(d fleet.DeviceID) error {
	ready, online := tx.b.Bucket(bucketJobsReady), tx.Online(d)
	return eachKey(tx, bucketJobsOpen, text(d), nil, func(k []byte) (bool, error) {
		j, ok, err := tx.Job(fleet.RolloutID(k[len(d)+1:]), d)
		if err != nil || !ok {
			return true, err
		}
		if online {
			return true, ready.Put(readyKey(j), []byte(d))
		}
		return true, ready.Delete(readyKey(j))
	})
}

// Site counts the targets of one site in one rollout, and those that are disrupted: in flight.
type Site struct {
	Targets   int `json:"targets"`
	Disrupted int `json:"disrupted"`
}

func disrupted(s rollout.JobState) bool { return s.InFlight() }

// countSite keeps the counts of a row's site.
func (tx *Tx) countSite(old, now rollout.Job, had bool) error {
	was := had && disrupted(old.State)
	if now.Site == "" || had && was == disrupted(now.State) {
		return nil
	}
	key := join(text(now.Rollout), []byte(now.Site))
	s, _, err := get[Site](tx, bucketSites, key)
	if err != nil {
		return err
	}
	if !had {
		s.Targets++
	}
	if was {
		s.Disrupted--
	}
	if disrupted(now.State) {
		s.Disrupted++
	}
	return put(tx, bucketSites, key, s)
}

// Site returns how many targets of a rollout are in a site, and how many of them are disrupted now.
func (tx *Tx) Site(r fleet.RolloutID, site string) (targets, disrupted int, err error) {
	s, _, err := get[Site](tx, bucketSites, join(text(r), []byte(site)))
	return s.Targets, s.Disrupted, err
}

// Ready calls f with the rows of a rollout whose device is online, until f returns false: first those that wait for another
// attempt, soonest first, then pending ones up to stage ring in the order of rollout.Compare. f may change the rows it is
// given, and no others.
func (tx *Tx) Ready(r fleet.RolloutID, ring int, f func(rollout.Job) (bool, error)) error {
	from, end := text(r), join(text(r), []byte{'p', byte(ring + 1)}) //nolint:gosec // at most rollout.MaxStages
	const batch = 256
	for kind, prefix := range [][]byte{join(text(r), []byte{'w'}), join(text(r), []byte{'p'})} {
		from = prefix
		for more := true; more; {
			var found [][]byte
			more = false
			err := eachKey(tx, bucketJobsReady, prefix, from, func(k []byte) (bool, error) {
				if kind == 1 && bytes.Compare(k, end) >= 0 {
					return false, nil
				}
				if len(found) == batch {
					more, from = true, k
					return false, nil
				}
				found = append(found, k)
				return true, nil
			})
			if err != nil {
				return err
			}
			for _, k := range found {
				d := tx.b.Bucket(bucketJobsReady).Get(k)
				if d == nil {
					continue // a row before it has taken it out
				}
				j, ok, err := tx.Job(r, fleet.DeviceID(d))
				if err != nil || !ok {
					return err
				}
				if goOn, err := f(j); err != nil || !goOn {
					return err
				}
			}
		}
	}
	return nil
}

// RewoundJobs returns up to limit rows whose deadline is after at: what no plan would set, if at is far enough ahead.
func (tx *Tx) RewoundJobs(r fleet.RolloutID, at time.Time, limit int) (out []rollout.Job, err error) {
	prefix := text(r)
	c := tx.b.Bucket(bucketJobsDue).Cursor()
	var k, d []byte
	if beyond, _ := c.Seek(append(bytes.Clone(prefix[:len(prefix)-1]), 1)); beyond == nil {
		k, d = c.Last()
	} else {
		k, d = c.Prev()
	}
	for ; k != nil && bytes.HasPrefix(k, prefix) && len(out) < limit; k, d = c.Prev() {
		if bytes.Compare(k[len(prefix):len(prefix)+8], beTime(at)) <= 0 {
			break
		}
		j, ok, err := tx.Job(r, fleet.DeviceID(d))
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, j)
		}
	}
	return out, nil
}

// OpenJobs returns the rows of a device that are pending or waiting, in rollout order.
func (tx *Tx) OpenJobs(d fleet.DeviceID) (out []rollout.Job, err error) {
	err = eachKey(tx, bucketJobsOpen, text(d), nil, func(k []byte) (bool, error) {
		j, ok, err := tx.Job(fleet.RolloutID(k[len(d)+1:]), d)
		if ok {
			out = append(out, j)
		}
		return true, err
	})
	return out, err
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

// PendingJobs returns up to limit pending rows of a rollout, in the order of rollout.Compare.
func (tx *Tx) PendingJobs(r fleet.RolloutID, limit int) ([]rollout.Job, error) {
	return tx.jobsIn(r, bucketJobsPending, nil, limit, nil)
}

// DueJobs returns up to limit rows in flight or waiting whose deadline is not after at, soonest first.
func (tx *Tx) DueJobs(r fleet.RolloutID, at time.Time, limit int) ([]rollout.Job, error) {
	end := beTime(at)
	skip := len(text(r))
	return tx.jobsIn(r, bucketJobsDue, nil, limit, func(k []byte) bool { return bytes.Compare(k[skip:skip+8], end) > 0 })
}

// NextDeadline returns the soonest deadline of a row in flight or waiting; false if there is none.
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

// JobsInFlight returns up to limit rows in flight or waiting of a rollout, soonest deadline first.
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

// DecisionsAfter calls f with the decisions of a rollout whose number is above seq, oldest first, until it returns false.
func (tx *Tx) DecisionsAfter(r fleet.RolloutID, seq uint64, f func(seq uint64, d rollout.Decision) bool) error {
	prefix := text(r)
	return eachKey(tx, bucketDecisions, prefix, join(prefix, be64(seq+1)), func(k []byte) (bool, error) {
		d, _, err := get[rollout.Decision](tx, bucketDecisions, k)
		return err == nil && f(binary.BigEndian.Uint64(k[len(prefix):]), d), err
	})
}

// Penalty returns what keeps a device out of rollouts; a zero one if nothing does.
func (tx *Tx) Penalty(d fleet.DeviceID) (rollout.Penalty, error) {
	p, _, err := get[rollout.Penalty](tx, bucketPenalties, []byte(d))
	return p, err
}

// PutPenalty stores p, and forgets a zero one.
func (tx *Tx) PutPenalty(d fleet.DeviceID, p rollout.Penalty) error {
	if len(p.Failures) == 0 && p.Until.IsZero() {
		return tx.b.Bucket(bucketPenalties).Delete([]byte(d))
	}
	return put(tx, bucketPenalties, []byte(d), p)
}
