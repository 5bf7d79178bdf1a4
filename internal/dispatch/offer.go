package dispatch

import (
	"encoding/hex"

	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/wire"
)

// BootPrevious composes the command that brings a device back to the image in its other slot, from the state of the
// moment; false if no rollout wants that of it now. Errors are Unprocessable if it may not be said: the device is guarded
// by what it told of its slots, and by itself when it gets the command.
func (d *Dispatcher) BootPrevious(tx Tx, dev fleet.DeviceID, s fleet.Status) (payload []byte, ok bool, err error) {
	j, ok, err := tx.ActiveJob(dev)
	if err != nil || !ok {
		return nil, false, err
	}
	r, err := tx.Rollout(j.Rollout)
	if err != nil || r.Mode != rollout.PreviousSlot {
		return nil, false, err
	}
	switch j.State {
	case rollout.Installed, rollout.Rebooting, rollout.Verifying:
		return nil, false, nil
	}
	if f := previousFits(j, s); f.why != "" {
		return nil, false, fleet.Coded(fleet.Unprocessable, f.code, "%s", f.why)
	}
	sum, err := hex.DecodeString(string(j.Image))
	if err != nil {
		return nil, false, fleet.Wrap(fleet.Internal, err, "device %s is to go back to an image without a hash", dev)
	}
	payload = wire.Encode(wire.Cmd{Op: wire.CmdPrevious, Job: j.Rollout, Image: sum})
	if room := wire.Budget(wire.DownTopic(dev, wire.DownCmd), s.Buffer); len(payload) > room {
		return nil, false, fleet.Coded(fleet.Unprocessable, "buffer_too_small", "the command has %d bytes and the device can take %d", len(payload), room)
	}
	return payload, true, nil
}
