package e2e

import (
	"testing"

	"muster/internal/simdev"
	"muster/internal/wire"
)

// The receive buffer of real clients has 256 bytes (esp32.md §7): what comes for the device must fit it packet by packet, the
// certificate and the new password in slices. At the front and at the side, with the properties that the real broker adds.
func TestSmallBufferIsRecoveredInSlices(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "slices")
	id := s.add(1, "--lifetime", "12s")[0]
	flash := &simdev.MemFlash{}
	s.run(id, func(c *simdev.Config) { c.Flash, c.Faults.Buffer = flash, 256 })
	s.await("hello answered", func() bool { return s.did(0, id, simdev.Answered) > 0 })
	old := s.devs.Get(id).Snapshot().Serial
	before := s.file(s.kit(id), simdev.PasswordFile)
	s.await("the fallback", func() bool { return s.did(0, id, simdev.FallbackTaken) > 0 })
	s.await("back at the front", func() bool { return s.inFrontBy(id, old) })
	recovered := s.devs.Get(id).Snapshot().Serial
	if c := s.devs.Get(id).Counts(); c.Received < 10 {
		t.Errorf("the certificate came in %d messages: that was not in slices of 256 bytes", c.Received)
	}
	s.await("the new password rules alone", func() bool { return s.device(id).FallbackPasswords == 1 })

	// And a renewal over the front, on the same buffer.
	s.await("known to be online", func() bool { d := s.device(id); return d.Status.Online && d.Status.Vhost == wire.VhostDevices })
	s.muster("certs", "renew", "--device", string(id))
	s.await("renewed", func() bool { return s.inFrontBy(id, recovered) && s.device(id).Current != string(recovered) })
	if dropped := s.devs.Since(0, id, simdev.Dropped); len(dropped) != 0 {
		t.Errorf("messages that the device could not take: %v", dropped)
	}
	s.wantAdmitted(id, s.side(id, passwordOtherThan(t, flash, before)))
}
