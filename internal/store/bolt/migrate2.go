package bolt

import (
	json "github.com/go-json-experiment/json/v1"
	bbolt "go.etcd.io/bbolt"

	"muster/internal/rollout"
)

// toSchema2 brings rollouts to the second schema: the state granted is called offered, rows have a ring, verdicts are
// counted by kind and round, and the indexes of open rows are new.
func toSchema2(b *bbolt.Tx) error {
	tx := &Tx{b: b}
	headers, err := rewriteHeaders(b)
	if err != nil {
		return err
	}
	var jobs []rollout.Job
	err = b.Bucket(bucketJobs).ForEach(func(_, raw []byte) error {
		var j rollout.Job
		if err := json.Unmarshal(raw, &j); err != nil {
			return err
		}
		jobs = append(jobs, j)
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range [][]byte{bucketJobs, bucketJobsPending, bucketJobsOpen, bucketJobsReady, bucketJobsDue, bucketJobsActive, bucketSites} {
		if err := b.DeleteBucket(name); err != nil {
			return err
		}
		if _, err := b.CreateBucket(name); err != nil {
			return err
		}
	}
	// Which rollout gave a device its newest grant is not in the rows: PutJob below would set it by their order.
	latest := map[string][]byte{}
	_ = b.Bucket(bucketJobsLatest).ForEach(func(k, v []byte) error { latest[string(k)] = append([]byte(nil), v...); return nil })
	for _, j := range jobs {
		j = upgradeJob(j)
		if r := headers[string(j.Rollout)]; r != nil {
			if j.State == rollout.Succeeded {
				j.Round = r.Round
				r.Verdicts.Succeeded++
			}
			countFailure(r, j)
		}
		if err := tx.PutJob(j); err != nil {
			return err
		}
	}
	for d, r := range latest {
		if err := b.Bucket(bucketJobsLatest).Put([]byte(d), r); err != nil {
			return err
		}
	}
	for _, r := range headers {
		if err := tx.PutRollout(*r); err != nil {
			return err
		}
	}
	return nil
}

// rewriteHeaders reads the headers of schema 1; counts of granted devices become those of offered ones.
func rewriteHeaders(b *bbolt.Tx) (map[string]*rollout.Rollout, error) {
	out := map[string]*rollout.Rollout{}
	err := b.Bucket(bucketRollouts).ForEach(func(k, raw []byte) error {
		var old struct {
			Total  struct{ Granted int } `json:"total"`
			Stages []struct {
				Counts struct{ Granted int } `json:"counts"`
			} `json:"stages"`
		}
		r := new(rollout.Rollout)
		if err := json.Unmarshal(raw, r); err != nil {
			return err
		}
		if err := json.Unmarshal(raw, &old); err != nil {
			return err
		}
		r.Total.Offered = old.Total.Granted
		for i := range old.Stages {
			r.Stages[i].Counts.Offered = old.Stages[i].Counts.Granted
		}
		r.Plan = r.Plan.WithDefaults()
		r.Failures = 0 // counted again from the rows
		out[string(k)] = r
		return nil
	})
	return out, err
}

// upgradeJob returns a row of schema 1 as it is in schema 2.
func upgradeJob(j rollout.Job) rollout.Job {
	if j.State == "granted" {
		j.State = rollout.Offered
	}
	if j.Ring == 0 {
		j.Ring = 1
	}
	if !j.GrantedAt.IsZero() && j.ProgressAt.IsZero() {
		j.ProgressAt = j.StateAt
	}
	return j
}

// countFailure counts a failure of the round that is under way.
func countFailure(r *rollout.Rollout, j rollout.Job) {
	if j.Round != r.Round || !j.State.Failure() {
		return
	}
	r.Failures++
	switch j.State {
	case rollout.Failed:
		r.Verdicts.Failed++
	case rollout.RolledBack:
		r.Verdicts.RolledBack++
	case rollout.TimedOut:
		r.Verdicts.TimedOut++
	}
}
