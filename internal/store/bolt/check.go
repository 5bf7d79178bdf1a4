package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	bbolt "go.etcd.io/bbolt"

	"muster/internal/access"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
)

func seqOf(key []byte) uint64 { return binary.BigEndian.Uint64(key[len(key)-8:]) }

// IsOpen reports whether the file is still open.
func (d *DB) IsOpen() bool {
	return d.bolt.View(func(*bbolt.Tx) error { return nil }) == nil
}

// Check looks for what must not be: pages that bbolt finds broken, records that cannot be read, indexes that disagree
// with the records, slots without their certificate, two active certificates of a device, two jobs of a device, counts
// that do not add up, an audit trail whose chain does not hold. It returns a line for each finding; none is a sound store. `musterd fsck` prints them.
func (d *DB) Check(ctx context.Context) ([]string, error) {
	var found []string
	say := func(format string, a ...any) { found = append(found, fmt.Sprintf(format, a...)) }
	err := d.View(ctx, func(tx *Tx) error {
		for err := range tx.b.Check() {
			say("file: %v", err)
		}
		if len(found) > 0 {
			return nil // nothing that is read from broken pages means anything
		}
		for _, check := range []func(*Tx, func(string, ...any)) error{checkDevices, checkCertificates, checkLists, checkTrust, checkEnrolments, checkBlocked, checkRepairs, checkRollouts, checkTokens, checkAudit} {
			if err := check(tx, say); err != nil {
				say("%v", err)
			}
		}
		return nil
	})
	return found, err
}

// checkBlocked holds each blocked key to its hash.
func checkBlocked(tx *Tx, say func(string, ...any)) error {
	return each(tx, bucketBlocked, nil, func(k []byte, b pki.BlockedKey) (bool, error) {
		if _, err := fleet.ParseHash(string(k)); err != nil || string(k) != string(b.SHA256) || b.By == "" || b.Since.IsZero() {
			say("blocked key %q: hash, time and operator do not fit together", k)
		}
		return true, nil
	})
}

// checkEnrolments holds each enrolment password to its device and to the key it is bound to.
func checkEnrolments(tx *Tx, say func(string, ...any)) error {
	return each(tx, bucketEnrolments, nil, func(k []byte, e pki.Enrolment) (bool, error) {
		if string(k) != string(e.Device) || len(e.SHA256) != 64 || !e.Since.Before(e.Until) || e.UsedAt.IsZero() != (e.KeyHash == "") {
			say("enrolment %q: device, hash, times and key do not fit together", k)
		}
		if _, ok, err := get[fleet.Device](tx, bucketDevices, k); err != nil || !ok {
			say("enrolment %q: no such device", k)
			return true, err
		}
		if e.Serial == "" {
			return true, nil
		}
		c, ok, err := get[pki.Certificate](tx, bucketCerts, []byte(e.Serial))
		if err == nil && (!ok || c.Device != e.Device || c.KeyHash != e.KeyHash) {
			say("enrolment %q: certificate %s is not the device's for that key", k, e.Serial)
		}
		return true, err
	})
}

func checkDevices(tx *Tx, say func(string, ...any)) error {
	return each(tx, bucketDevices, nil, func(k []byte, d fleet.Device) (bool, error) {
		if string(k) != string(d.ID) || !d.ID.Valid() || d.Rev == 0 {
			say("device %q: bad id or revision", k)
		}
		for _, s := range []fleet.Serial{d.Current, d.Next} {
			if s == "" {
				continue
			}
			c, ok, err := get[pki.Certificate](tx, bucketCerts, []byte(s))
			if err != nil {
				return false, err
			}
			if !ok || c.Device != d.ID {
				say("device %s: slot holds serial %s, which is not its own", d.ID, s)
			}
		}
		if d.Current != "" && d.Current == d.Next {
			say("device %s: both slots hold serial %s", d.ID, d.Current)
		}
		return true, nil
	})
}

func checkCertificates(tx *Tx, say func(string, ...any)) error {
	active := map[fleet.DeviceID]fleet.Serial{}
	want := make([]map[string]bool, len(certIndexes))
	for i := range want {
		want[i] = map[string]bool{}
	}
	err := each(tx, bucketCerts, nil, func(k []byte, c pki.Certificate) (bool, error) {
		if string(k) != string(c.Serial) {
			say("certificate %q names itself %s", k, c.Serial)
		}
		if _, ok, err := get[fleet.Device](tx, bucketDevices, []byte(c.Device)); err != nil || !ok && c.State != pki.Revoked && c.State != pki.Expired {
			say("certificate %s is %s, and there is no device %s", c.Serial, c.State, c.Device) // a removed device leaves ended ones
		}
		if c.State != pki.Intended && c.State.Live() && len(c.Chain) == 0 {
			say("certificate %s is %s and has no chain", c.Serial, c.State)
		}
		if c.State == pki.Active {
			if other, ok := active[c.Device]; ok {
				say("device %s: %s and %s are both active", c.Device, other, c.Serial)
			}
			active[c.Device] = c.Serial
		}
		for i, keys := range certIndex(c) {
			for _, key := range keys {
				want[i][string(key)] = true
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	for i, bucket := range certIndexes {
		if err := checkIndex(tx, bucket, want[i], say); err != nil {
			return err
		}
	}
	return nil
}

func checkRollouts(tx *Tx, say func(string, ...any)) error {
	type set = map[string]bool
	pendingKeys, dueKeys, activeKeys, openKeys, readyKeys, liveKeys, siteKeys := set{}, set{}, set{}, set{}, set{}, set{}, set{}
	sites := map[string]Site{}
	headers, err := tx.Rollouts()
	if err != nil {
		return err
	}
	for _, r := range headers {
		var jobs []rollout.Job
		err := each(tx, bucketJobs, text(r.ID), func(k []byte, j rollout.Job) (bool, error) {
			if !bytes.Equal(k, jobKey(j.Rollout, j.Device)) {
				say("job %q names itself %s of %s", k, j.Device, j.Rollout)
			}
			keys := tx.jobIndex(j)
			for _, i := range []struct {
				to  set
				key []byte
			}{{pendingKeys, keys.pending}, {dueKeys, keys.due}, {openKeys, keys.open}, {readyKeys, keys.ready}} {
				if i.key != nil {
					i.to[string(i.key)] = true
				}
			}
			if j.Site != "" {
				key := string(join(text(j.Rollout), []byte(j.Site)))
				n := sites[key]
				n.Targets++
				if disrupted(j.State) {
					n.Disrupted++
				}
				sites[key], siteKeys[key] = n, true
			}
			if j.State.InFlight() {
				if activeKeys[string(j.Device)] {
					say("device %s has two jobs in flight", j.Device)
				}
				activeKeys[string(j.Device)] = true
			}
			jobs = append(jobs, j)
			return true, nil
		})
		if err != nil {
			return err
		}
		if err := rollout.CheckAll(r, slices.Values(jobs)); err != nil {
			say("rollout %s: %v", r.ID, err)
		}
		if liveValue(r) != nil {
			liveKeys[string(r.ID)] = true
		}
	}
	for key, want := range sites {
		if have, _, err := get[Site](tx, bucketSites, []byte(key)); err != nil || have != want {
			say("rollout-sites: %q says %+v, the rows %+v", key, have, want)
		}
	}
	for _, i := range []struct {
		bucket []byte
		want   map[string]bool
	}{
		{bucketJobsPending, pendingKeys}, {bucketJobsDue, dueKeys}, {bucketJobsActive, activeKeys}, {bucketJobsOpen, openKeys},
		{bucketJobsReady, readyKeys}, {bucketLive, liveKeys}, {bucketSites, siteKeys},
	} {
		if err := checkIndex(tx, i.bucket, i.want, say); err != nil {
			return err
		}
	}
	return nil
}

func checkTokens(tx *Tx, say func(string, ...any)) error {
	want := map[string]bool{}
	err := each(tx, bucketTokens, nil, func(k []byte, t access.Token) (bool, error) {
		if string(k) != t.Name {
			say("token %q names itself otherwise", k)
		}
		want[string(t.SHA256)] = true
		return true, nil
	})
	if err != nil {
		return err
	}
	return checkIndex(tx, bucketTokensBySHA, want, say)
}

// checkIndex reports keys of an index that no record asks for, and those that are missing.
func checkIndex(tx *Tx, bucket []byte, want map[string]bool, say func(string, ...any)) error {
	seen := 0
	err := tx.b.Bucket(bucket).ForEach(func(k, _ []byte) error {
		if !want[string(k)] {
			say("%s: %q belongs to no record", bucket, k)
		} else {
			seen++
		}
		return nil
	})
	if err == nil && seen != len(want) {
		say("%s: %d keys are missing", bucket, len(want)-seen)
	}
	return err
}

// Stats are sizes of the store, for metrics.
type Stats struct {
	Bytes      int64 `json:"bytes"`
	Devices    int   `json:"devices"`
	Outbox     int   `json:"outbox"`
	Quarantine int   `json:"quarantine"`
}

// Stats counts what is cheap to count.
func (d *DB) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	err := d.View(ctx, func(tx *Tx) error {
		s.Bytes = tx.b.Size()
		s.Devices = tx.b.Bucket(bucketDevices).Stats().KeyN
		s.Outbox = tx.b.Bucket(bucketOutbox).Stats().KeyN
		s.Quarantine = tx.b.Bucket(bucketQuarantine).Stats().KeyN
		return nil
	})
	return s, err
}
