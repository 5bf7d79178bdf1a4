package bolt

import (
	"muster/internal/firmware"
	"muster/internal/fleet"
)

// Repair returns the order to bring a device a release over the fallback; false if there is none.
func (tx *Tx) Repair(id fleet.DeviceID) (firmware.Repair, bool, error) {
	return get[firmware.Repair](tx, bucketRepairs, []byte(id))
}

// PutRepair stores r, in place of an older one of the same device.
func (tx *Tx) PutRepair(r firmware.Repair) error { return put(tx, bucketRepairs, []byte(r.Device), r) }

// DropRepair removes the order for a device; one that is gone already does not matter.
func (tx *Tx) DropRepair(id fleet.DeviceID) error {
	return tx.b.Bucket(bucketRepairs).Delete([]byte(id))
}

// Repairs returns all of them, in the order of the devices' ids.
func (tx *Tx) Repairs() ([]firmware.Repair, error) {
	return all[firmware.Repair](tx, bucketRepairs, nil)
}

// checkRepairs holds each order to a device and a release of its product.
func checkRepairs(tx *Tx, say func(string, ...any)) error {
	return each(tx, bucketRepairs, nil, func(k []byte, r firmware.Repair) (bool, error) {
		if string(k) != string(r.Device) || r.Job == "" || r.At.IsZero() || r.By == "" || (r.Offers == 0) != r.Offered.IsZero() {
			say("repair %q: device, job, times and operator do not fit together", k)
		}
		d, ok, err := get[fleet.Device](tx, bucketDevices, k)
		if err != nil || !ok {
			say("repair %q: no such device", k)
			return true, err
		}
		if d.Product != r.Product {
			say("repair %q: the release is for product %s, the device is of product %s", k, r.Product, d.Product)
		}
		if _, err := tx.Release(r.Product, r.Version); err != nil {
			say("repair %q: no release %s %s", k, r.Product, r.Version)
		}
		return true, nil
	})
}
