package httpapi

import (
	"context"
	"time"

	"muster/api"
	"muster/internal/enroll"
	"muster/internal/fleet"
)

func (s *Server) disableDevice(c *call) (answer, error) { return shutOut(c, s.c.Doors.Disable) }

func (s *Server) removeDevice(c *call) (answer, error) { return shutOut(c, s.c.Doors.Remove) }

// shutOut answers with the evidence that a device is out.
func shutOut(c *call, do func(context.Context, time.Time, fleet.DeviceID, string) (enroll.Evidence, error)) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	ev, err := do(c.ctx, c.at, id, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(api.ShutOut{
		Device: string(id), Connections: ev.Live, Clean: ev.Clean, Detail: ev.Detail,
		StoredAfter: took(ev.Stored), ClosedAfter: took(ev.Closed), VerifiedAfter: took(ev.Verified), StoredAt: ev.StoredAt, ClosedAt: ev.ClosedAt, EndedAt: ev.EndedAt,
		RefusedAt: ev.Refused.At, RefusedWhy: ev.Refused.Why, LastLook: ev.LastLook,
	})
}
