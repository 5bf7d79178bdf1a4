package inventory

import (
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// MaxState is the largest merged state document of a device, in bytes.
const MaxState = 32 << 10

// Hello keeps what a device said at the start of its session.
func (inv *Inventory) Hello(tx Tx, at time.Time, vhost string, id fleet.DeviceID, h wire.Hello) error {
	s, err := tx.Status(id)
	if err != nil {
		return err
	}
	s.LastSeen, s.HelloAt, s.Vhost = at, at, vhost
	s.Version, s.Image, s.Hardware, s.Chip = h.Version, h.Image, h.Hardware, h.Chip
	s.SecureVersion, s.Boot, s.Buffer = h.SecureVersion, h.Boot, h.Buffer
	s.Bundle = h.Bundle
	s.ChipRevision, s.Previous, s.PreviousSecureVersion = h.Revision, h.Previous, h.PreviousSecureVersion
	if h.Boot != "" {
		s.Booted(at, h.Boot)
	}
	return tx.PutStatus(s)
}

// Seen notes that a device spoke.
func (inv *Inventory) Seen(tx Tx, at time.Time, id fleet.DeviceID) error {
	s, err := tx.Status(id)
	if err != nil {
		return err
	}
	s.LastSeen = at
	return tx.PutStatus(s)
}

// State merges a partial state document into the last known one as RFC 7396 says: members replace, objects merge, null
// removes. A document that would grow over MaxState is Invalid.
func (inv *Inventory) State(tx Tx, at time.Time, id fleet.DeviceID, doc []byte) error {
	s, err := tx.Status(id)
	if err != nil {
		return err
	}
	merged, err := mergePatch(jsontext.Value(s.State), jsontext.Value(doc))
	if err != nil {
		return fleet.Wrap(fleet.Invalid, err, "state: cannot be merged")
	}
	if len(merged) > MaxState {
		return fleet.Errorf(fleet.Invalid, "state: the device's whole state would be over %d bytes: remove members by null", MaxState)
	}
	s.State, s.StateAt, s.LastSeen = []byte(merged), at, at
	return tx.PutStatus(s)
}

// mergePatch applies an RFC 7396 patch. target may be empty or not an object; then the patch starts a new one.
func mergePatch(target, patch jsontext.Value) (jsontext.Value, error) {
	if patch.Kind() != '{' {
		return patch, nil
	}
	members := map[string]jsontext.Value{}
	if len(target) > 0 && target.Kind() == '{' {
		if err := json.Unmarshal(target, &members); err != nil {
			return nil, err
		}
	}
	var changes map[string]jsontext.Value
	if err := json.Unmarshal(patch, &changes); err != nil {
		return nil, err
	}
	for k, v := range changes {
		if v.Kind() == 'n' {
			delete(members, k)
			continue
		}
		m, err := mergePatch(members[k], v)
		if err != nil {
			return nil, err
		}
		members[k] = m
	}
	b, err := json.Marshal(members, json.Deterministic(true))
	return jsontext.Value(b), err
}

// Session is a connection of a device as the broker knows it.
type Session struct {
	Device     fleet.DeviceID
	Vhost      string
	Serial     fleet.Serial // of the certificate; empty on the fallback
	Peer       string       // address
	Connection string       // the broker's name for it
	At         time.Time    // when it began or, for Disconnected, ended
}

// Connected notes that a session began. Of an unknown device it is nothing: the broker's events may come late.
func (inv *Inventory) Connected(tx Tx, s Session) error {
	if _, err := tx.Device(s.Device); err != nil {
		return ignoreNotFound(err)
	}
	st, err := tx.Status(s.Device)
	if err != nil {
		return err
	}
	if st.Online && st.ConnectedAt.After(s.At) {
		return nil // an older event that came late
	}
	st.Online, st.ConnectedAt, st.Vhost, st.Peer, st.Serial, st.Connection = true, s.At, s.Vhost, s.Peer, s.Serial, s.Connection
	if n := len(st.Sessions); n == 0 || st.Sessions[n-1].Before(s.At) {
		st.Began(s.At)
	}
	if s.Serial != "" {
		st.LastSerial = s.Serial
	}
	if st.LastSeen.Before(s.At) {
		st.LastSeen = s.At
	}
	return tx.PutStatus(st)
}

// Disconnected notes that a session ended. A session that another one has replaced changes nothing: on a take-over the
// broker tells of the new session before it tells of the end of the old one.
func (inv *Inventory) Disconnected(tx Tx, s Session) error {
	st, err := tx.Status(s.Device)
	if err != nil {
		return err
	}
	if !st.Online || st.Connection != s.Connection {
		return nil
	}
	st.Online, st.LostAt = false, s.At
	return tx.PutStatus(st)
}

// Reconcile corrects who is connected by the broker's own list, taken at time at: its events are best effort
// (rabbitmq.md §4.8). A session younger than at-settle is left alone, since the list may not show it yet.
func (inv *Inventory) Reconcile(tx Tx, at time.Time, live []Session, settle time.Duration) (changed int, err error) {
	seen := map[fleet.DeviceID]Session{}
	for _, s := range live {
		if have, ok := seen[s.Device]; !ok || have.At.Before(s.At) {
			seen[s.Device] = s
		}
	}
	var after fleet.DeviceID
	for {
		ds, err := tx.Devices(after, 256)
		if err != nil || len(ds) == 0 {
			return changed, err
		}
		after = ds[len(ds)-1].ID
		for _, d := range ds {
			did, err := inv.reconcileOne(tx, at, d.ID, seen, settle)
			if err != nil {
				return changed, err
			}
			if did {
				changed++
			}
		}
	}
}

func (inv *Inventory) reconcileOne(tx Tx, at time.Time, id fleet.DeviceID, seen map[fleet.DeviceID]Session, settle time.Duration) (bool, error) {
	st, err := tx.Status(id)
	if err != nil {
		return false, err
	}
	s, live := seen[id]
	switch {
	case live && (!st.Online || st.Connection != s.Connection) && !st.ConnectedAt.After(s.At):
		return true, inv.Connected(tx, s)
	case live && !st.Online && at.Sub(st.LostAt) > settle:
		// An older session outlived a newer one: somebody came to the fallback and left while the device was at the front.
		return true, inv.Connected(tx, s)
	case !live && st.Online && at.Sub(st.ConnectedAt) > settle:
		st.Online, st.LostAt = false, at
		return true, tx.PutStatus(st)
	}
	return false, nil
}

func ignoreNotFound(err error) error {
	if fleet.Is(err, fleet.NotFound) {
		return nil
	}
	return err
}
