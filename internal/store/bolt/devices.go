package bolt

import (
	"bytes"

	json "github.com/go-json-experiment/json/v1"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Device returns the device with that id, or a NotFound error.
func (tx *Tx) Device(id fleet.DeviceID) (fleet.Device, error) {
	return must[fleet.Device](tx, bucketDevices, []byte(id), "device")
}

// PutDevice stores d. d.Rev must be that of the stored record, 0 for a new one, else it returns a Conflict error; the
// stored record has Rev+1. The watchers of credentials hear of it after the commit.
func (tx *Tx) PutDevice(d fleet.Device) error {
	old, ok, err := get[fleet.Device](tx, bucketDevices, []byte(d.ID))
	if err != nil {
		return err
	}
	if ok && d.Rev == 0 {
		return fleet.Coded(fleet.Conflict, "device_exists", "device %s exists already", d.ID)
	}
	if old.Rev != d.Rev {
		return fleet.Coded(fleet.Conflict, "stale", "device %s was changed by somebody else: read it again and repeat", d.ID)
	}
	d.Rev++
	tx.touched[d.ID] = true
	if err := tx.mayJoin(d.ID); err != nil {
		return err
	}
	return put(tx, bucketDevices, []byte(d.ID), d)
}

// Devices returns up to limit devices after id after, in id order; all of them if limit is not positive.
func (tx *Tx) Devices(after fleet.DeviceID, limit int) ([]fleet.Device, error) {
	var out []fleet.Device
	c := tx.b.Bucket(bucketDevices).Cursor()
	k, raw := c.Seek([]byte(after))
	if k != nil && bytes.Equal(k, []byte(after)) {
		k, raw = c.Next()
	}
	for ; k != nil && (limit <= 0 || len(out) < limit); k, raw = c.Next() {
		var d fleet.Device
		if err := json.Unmarshal(raw, &d); err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

// Status returns the last known state of a device; one that never spoke has a zero Status.
func (tx *Tx) Status(id fleet.DeviceID) (fleet.Status, error) {
	s, _, err := get[fleet.Status](tx, bucketStatus, []byte(id))
	s.Device = id
	return s, err
}

// PutStatus stores s.
func (tx *Tx) PutStatus(s fleet.Status) error {
	old, _, err := get[fleet.Status](tx, bucketStatus, []byte(s.Device))
	if err != nil {
		return err
	}
	online, now := tx.b.Bucket(bucketOnline), s.Online && s.Vhost == wire.VhostDevices
	if now != tx.Online(s.Device) {
		if now {
			err = online.Put([]byte(s.Device), []byte{}) // nil would read as absent in this transaction
		} else {
			err = online.Delete([]byte(s.Device))
		}
		if err == nil {
			err = tx.presenceChanged(s.Device)
		}
		if err != nil {
			return err
		}
	}
	if !s.HelloAt.Equal(old.HelloAt) {
		if err := tx.mayJoin(s.Device); err != nil {
			return err
		}
	}
	return put(tx, bucketStatus, []byte(s.Device), s)
}

// Online reports whether a device has a session with its certificate, as far as is known.
func (tx *Tx) Online(id fleet.DeviceID) bool { return tx.b.Bucket(bucketOnline).Get([]byte(id)) != nil }
