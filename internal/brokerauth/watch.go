package brokerauth

import (
	"slices"
	"time"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// LoginRefusal is a login of a device, or of somebody who said to be it, that the broker was told to refuse.
type LoginRefusal struct {
	At     time.Time
	Serial fleet.Serial // of the certificate; empty: a password
	Why    string       // in words
}

// keptLogins bounds what one watch keeps: the first ones count.
const keptLogins = 64

// watch collects refused logins of one device.
type watch struct{ seen []LoginRefusal }

// WatchLogins begins to collect the refused logins of a device, known or not, the first 64 of them. seen returns what came
// so far, oldest first; stop ends it and must be called.
func (x *Index) WatchLogins(id fleet.DeviceID) (seen func() []LoginRefusal, stop func()) {
	s, w := x.shard(id), &watch{}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watches == nil {
		s.watches = map[fleet.DeviceID][]*watch{}
	}
	s.watches[id] = append(s.watches[id], w)
	seen = func() []LoginRefusal {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return slices.Clone(w.seen)
	}
	stop = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		left := slices.DeleteFunc(s.watches[id], func(o *watch) bool { return o == w })
		if len(left) == 0 {
			delete(s.watches, id)
			return
		}
		s.watches[id] = left
	}
	return seen, stop
}

// noteLogin tells those who watch a device. A login is asked about twice: by user, and by virtual host if the first answer
// was yes.
func (x *Index) noteLogin(kind admission.Kind, d admission.Decision, at time.Time) {
	if kind != admission.User && kind != admission.Vhost {
		return
	}
	s := x.shard(d.Device)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.watches[d.Device] {
		if len(w.seen) < keptLogins {
			w.seen = append(w.seen, LoginRefusal{at, d.Serial, words(d.Reason)})
		}
	}
}
