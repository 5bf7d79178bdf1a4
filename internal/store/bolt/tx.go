package bolt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	json "github.com/go-json-experiment/json/v1"
	bbolt "go.etcd.io/bbolt"

	"muster/internal/admission"
	"muster/internal/audit"
	"muster/internal/fleet"
	"muster/internal/rollout"
)

// Tx is one transaction. It must not be used after the function that got it returned.
type Tx struct {
	b *bbolt.Tx
	// touched are the devices whose credentials may have changed; nil in a read transaction.
	touched map[fleet.DeviceID]bool
	// headers are the rollouts that this write transaction has read or put, and whether they were put: every report of a
	// batch changes the same few, and each is written once, by flush. nil in a read transaction.
	headers map[fleet.RolloutID]*header
	// trail is the end of the audit trail, once this write transaction has appended to it.
	trail *audit.Head
}

type header struct {
	r   rollout.Rollout
	put bool
}

// flush writes what was kept back.
func (tx *Tx) flush() error {
	for id, h := range tx.headers {
		if !h.put {
			continue
		}
		if err := put(tx, bucketRollouts, []byte(id), h.r); err != nil {
			return err
		}
		h.put = false
	}
	return nil
}

// changedRecords returns the admission records of the touched devices, and which of them do not exist: a certificate
// whose device does not exist lets nobody in.
func (tx *Tx) changedRecords() (out []admission.Record, gone []fleet.DeviceID, err error) {
	out = make([]admission.Record, 0, len(tx.touched))
	for id := range tx.touched {
		d, err := tx.Device(id)
		if fleet.Is(err, fleet.NotFound) {
			gone = append(gone, id)
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		r, err := tx.record(d)
		if err != nil {
			return nil, nil, err
		}
		out = append(out, r)
	}
	return out, gone, nil
}

// record derives what lets d in.
func (tx *Tx) record(d fleet.Device) (admission.Record, error) {
	r := admission.Record{Device: d.ID, Disabled: d.Disabled, RecoveryOff: d.RecoveryOff != ""}
	for i, s := range []fleet.Serial{d.Current, d.Next} {
		if s == "" {
			continue
		}
		c, err := tx.Certificate(s)
		if err != nil {
			return admission.Record{}, err
		}
		if c.State.Live() && c.Device == d.ID {
			r.Certificates[i] = admission.Certificate{Serial: s, NotAfter: c.NotAfter}
		}
	}
	for _, p := range d.Passwords {
		r.Passwords = append(r.Passwords, p.SHA256)
	}
	return r, nil
}

// get reads the record under key in bucket. The bool is false if there is none.
func get[T any](tx *Tx, bucket, key []byte) (T, bool, error) {
	var v T
	raw := tx.b.Bucket(bucket).Get(key)
	if raw == nil {
		return v, false, nil
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, false, fmt.Errorf("store: record %q in %s: %w", key, bucket, err)
	}
	return v, true, nil
}

// must is get for a record whose absence is a NotFound error that says what is missing.
func must[T any](tx *Tx, bucket, key []byte, what string) (T, error) {
	v, ok, err := get[T](tx, bucket, key)
	if err == nil && !ok {
		err = fleet.Errorf(fleet.NotFound, "no such %s", what)
	}
	return v, err
}

// put writes v under key in bucket.
func put(tx *Tx, bucket, key []byte, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store: record %q for %s: %w", key, bucket, err)
	}
	return tx.b.Bucket(bucket).Put(key, raw)
}

// each calls f with the records of bucket whose key has prefix, in key order, until f returns false.
func each[T any](tx *Tx, bucket, prefix []byte, f func(key []byte, v T) (bool, error)) error {
	c := tx.b.Bucket(bucket).Cursor()
	for k, raw := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, raw = c.Next() {
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("store: record %q in %s: %w", k, bucket, err)
		}
		more, err := f(k, v)
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// eachKey calls f with the keys of bucket that have prefix, in order, from the first one not below from, until f
// returns false. The key is f's to keep.
func eachKey(tx *Tx, bucket, prefix, from []byte, f func(key []byte) (bool, error)) error {
	c := tx.b.Bucket(bucket).Cursor()
	if bytes.Compare(from, prefix) < 0 {
		from = prefix
	}
	for k, _ := c.Seek(from); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		more, err := f(bytes.Clone(k))
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// reindex replaces the keys of a record in an index.
func (tx *Tx) reindex(bucket []byte, old, now [][]byte, value []byte) error {
	b := tx.b.Bucket(bucket)
	for _, k := range old {
		if !slices.ContainsFunc(now, func(n []byte) bool { return bytes.Equal(n, k) }) {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
	}
	for _, k := range now {
		if err := b.Put(k, value); err != nil {
			return err
		}
	}
	return nil
}

// appendNumbered gives a record the next number of its bucket and stores what make returns for it.
func appendNumbered(tx *Tx, bucket, prefix []byte, make func(seq uint64) any) error {
	seq, err := tx.b.Bucket(bucket).NextSequence()
	if err != nil {
		return err
	}
	return put(tx, bucket, join(prefix, be64(seq)), make(seq))
}

// numbered returns up to limit records of bucket after number after.
func numbered[T any](tx *Tx, bucket []byte, after uint64, limit int) ([]T, error) {
	var out []T
	c := tx.b.Bucket(bucket).Cursor()
	for k, raw := c.Seek(be64(after + 1)); k != nil && (limit <= 0 || len(out) < limit); k, raw = c.Next() {
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return nil, fmt.Errorf("store: record %x in %s: %w", k, bucket, err)
		}
		out = append(out, v)
	}
	return out, nil
}

func be64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// beTime orders times after 1970 like numbers.
func beTime(t time.Time) []byte { return be64(uint64(max(0, t.UnixNano()))) }

// text ends a part of variable length; ids hold no zero byte.
func text[S ~string](s S) []byte { return append([]byte(s), 0) }

func join(parts ...[]byte) []byte { return slices.Concat(parts...) }
