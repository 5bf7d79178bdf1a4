package simdev

import (
	"context"
	"errors"
	"fmt"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// bootPrevious starts the image in the other slot. With a job it is part of a rollout: it is done only where that slot
// holds the very image that is meant, and the device says what it does about it. Either way the other image must be one
// that the bootloader would start.
func (s *session) bootPrevious(ctx context.Context, c wire.Cmd) error {
	if c.Job == "" {
		if why := s.noWayBack(""); why != "" {
			return s.drop("boot-previous-slot: %s", why)
		}
		s.d.boot = bootRecord{Active: s.d.boot.Active.other()}
		if err := s.d.mem.boot.write(s.d.boot); err != nil {
			return err
		}
		return reboot{"commanded"}
	}
	want := fleet.HashOf([32]byte(c.Image))
	if want == s.d.image { // done before, or always so: hello is the proof
		if s.helloed {
			return nil
		}
		s.helloed = true
		return s.hello(ctx)
	}
	if why := s.noWayBack(want); why != "" {
		return s.reportStep(ctx, wire.OTAReport{Job: c.Job, Step: wire.StepRejected, Error: cut(why)})
	}
	if err := s.reportStep(ctx, wire.OTAReport{Job: c.Job, Step: wire.StepAccepted}); err != nil {
		return err
	}
	// The image must prove itself once more: what it meets may be other than what it left.
	if err := s.d.mem.boot.write(bootRecord{Active: s.d.boot.Active.other(), Verify: true, Job: c.Job}); err != nil {
		return err
	}
	return s.restart(ctx, c.Job, "commanded")
}

// noWayBack says why the image in the other slot is not started, or nothing. Want is the image that must be there; empty:
// any.
func (s *session) noWayBack(want fleet.Hash) string {
	p := s.d.previous
	switch {
	case want != "" && s.d.fault().Reject != "":
		return s.d.fault().Reject
	case p.image == "":
		return "there is no image in the other slot"
	case want != "" && p.image != want:
		return fmt.Sprintf("the other slot holds %.16s, not %.16s", p.image, want)
	case p.fw.SecureVersion < s.d.fuse:
		return fmt.Sprintf("secure version %d of the other slot is below %d in the eFuses", p.fw.SecureVersion, s.d.fuse)
	}
	return ""
}

// restart says so and does it. What to start is chosen already, so a report that is lost does not matter.
func (s *session) restart(ctx context.Context, job fleet.RolloutID, reason string) error {
	err := s.reportStep(ctx, wire.OTAReport{Job: job, Step: wire.StepRebooting})
	if _, lost := errors.AsType[errLost](err); err != nil && !lost {
		return err
	}
	return reboot{reason}
}
