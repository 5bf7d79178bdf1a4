package brokerauth

import (
	"hash/maphash"
	"slices"
	"sync"
	"time"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// shards bounds how long a reader can wait for a writer: one map assignment in one of so many maps. A power of two.
const shards = 256

// Index holds the record of every device in memory, so that an answer never waits for the store. The store puts each
// changed record after its commit and in the order of commits. All methods may be called from many goroutines. Use
// NewIndex.
type Index struct {
	seed   maphash.Seed
	shards [shards]shard
}

// shard holds some of the records. They are never changed once they are in: Put replaces the pointer.
type shard struct {
	mu      sync.RWMutex
	records map[fleet.DeviceID]*admission.Record
	refused map[fleet.DeviceID]refused
	watches map[fleet.DeviceID][]*watch
}

// NewIndex returns an empty Index, which admits nobody.
func NewIndex() *Index {
	x := &Index{seed: maphash.MakeSeed()}
	for i := range x.shards {
		x.shards[i].records = map[fleet.DeviceID]*admission.Record{}
	}
	return x
}

func (x *Index) shard(id fleet.DeviceID) *shard {
	return &x.shards[maphash.String(x.seed, string(id))%shards]
}

// Put makes r the record of its device from the next question on. The index keeps a copy.
func (x *Index) Put(r admission.Record) {
	r.Passwords = slices.Clone(r.Passwords)
	s := x.shard(r.Device)
	s.mu.Lock()
	s.records[r.Device] = &r
	s.mu.Unlock()
}

// Delete forgets a device: from the next question on it is unknown.
func (x *Index) Delete(id fleet.DeviceID) {
	s := x.shard(id)
	s.mu.Lock()
	delete(s.records, id)
	delete(s.refused, id)
	s.mu.Unlock()
}

// Load replaces the whole content by records. Questions in the meantime see the old or the new record of a device; one
// that is in both is never unknown.
func (x *Index) Load(records []admission.Record) {
	var fresh [shards]map[fleet.DeviceID]*admission.Record
	for i := range fresh {
		fresh[i] = make(map[fleet.DeviceID]*admission.Record, len(records)/shards)
	}
	for _, r := range records {
		r.Passwords = slices.Clone(r.Passwords)
		fresh[maphash.String(x.seed, string(r.Device))%shards][r.Device] = &r
	}
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.Lock()
		s.records = fresh[i]
		s.mu.Unlock()
	}
}

// Get returns the record of a device, false if there is none.
func (x *Index) Get(id fleet.DeviceID) (admission.Record, bool) {
	r := x.record(id)
	if r == nil {
		return admission.Record{}, false
	}
	c := *r
	c.Passwords = slices.Clone(r.Passwords)
	return c, true
}

// record returns the record of a device, which must not be changed, or nil.
func (x *Index) record(id fleet.DeviceID) *admission.Record {
	s := x.shard(id)
	s.mu.RLock()
	r := s.records[id]
	s.mu.RUnlock()
	return r
}

// Len returns the number of devices.
func (x *Index) Len() int {
	n := 0
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.RLock()
		n += len(s.records)
		s.mu.RUnlock()
	}
	return n
}

// Decide answers one question of the broker at time at, without the limits on fallback logins.
func (x *Index) Decide(q admission.Question, at time.Time) admission.Decision {
	var rec *admission.Record
	if id, _, r := q.Claim(); r == admission.Allowed {
		rec = x.record(id)
	}
	return admission.Decide(q, rec, at)
}

// Admit decides whether a device may come in at time at with the certificate of this serial, whose chain the caller has
// verified. It serves the device API. The reason is an admission.Reason.
func (x *Index) Admit(id fleet.DeviceID, serial fleet.Serial, at time.Time) (ok bool, reason string) {
	d := admission.AdmitCertificate(x.record(id), id, serial, at)
	return d.Allow, string(d.Reason)
}

// AdmitPassword decides whether a device may come in by the fallback with the password of this SHA-256. It serves the
// recovery API, which limits attempts by itself (Limiter). The reason is an admission.Reason.
func (x *Index) AdmitPassword(id fleet.DeviceID, sum fleet.Hash) (ok bool, reason string) {
	d := admission.AdmitPassword(x.record(id), id, sum)
	return d.Allow, string(d.Reason)
}

// Heard reports whether what a device says counts: it exists and is not disabled. A message may have waited in a queue
// since before that changed. why is for the quarantine.
func (x *Index) Heard(id fleet.DeviceID) (ok bool, why string) {
	r, known := x.Get(id)
	switch {
	case !known:
		return false, "unknown device"
	case r.Disabled:
		return false, "the device is disabled"
	}
	return true, ""
}
