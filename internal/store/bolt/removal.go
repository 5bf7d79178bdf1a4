package bolt

import (
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rollout"
)

// DropDevice removes a device and what is kept of it alone: its state, its enrolment password, its waiting requests, the
// order to repair it, its penalty. Its certificates stay: revocation lists and the check for keys that were used before need
// them. Its rows in rollouts stay, too; the engine finds out. The watchers of removals hear of it after the commit. A device
// that is gone already does not matter.
func (tx *Tx) DropDevice(id fleet.DeviceID) error {
	st, err := tx.Status(id)
	if err != nil {
		return err
	}
	if st.Online { // out of the indexes of who is there
		st.Online = false
		if err := tx.PutStatus(st); err != nil {
			return err
		}
	}
	if err := tx.dropRequestsOf(id); err != nil {
		return err
	}
	if err := tx.PutPenalty(id, rollout.Penalty{}); err != nil {
		return err
	}
	for _, bucket := range [][]byte{bucketDevices, bucketStatus, bucketEnrolments, bucketRepairs, bucketJoins} {
		if err := tx.b.Bucket(bucket).Delete([]byte(id)); err != nil {
			return err
		}
	}
	tx.touched[id] = true
	return nil
}

// dropRequestsOf removes the certificate requests of a device that wait for an operator.
func (tx *Tx) dropRequestsOf(id fleet.DeviceID) error {
	list, err := tx.Requests()
	if err != nil {
		return err
	}
	for _, r := range list {
		if r.Device != id || r.State != pki.Waiting {
			continue
		}
		if err := tx.DropRequest(r.ID); err != nil {
			return err
		}
	}
	return nil
}
