package httpapi

import (
	"net/http"

	"muster/api"
)

// whyDevice says why a device is not updating, or not connecting.
func (s *Server) whyDevice(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	reasons, err := s.c.Rollouts.Why(c.ctx, c.at, id)
	if err != nil {
		return answer{}, err
	}
	out := api.Why{Device: string(id), Reasons: []api.Reason{}}
	for _, r := range reasons {
		out.Blocked = out.Blocked || r.Blocking
		out.Reasons = append(out.Reasons, api.Reason{Code: r.Code, Text: r.Text, Rollout: string(r.Rollout), Blocking: r.Blocking})
	}
	return ok(out)
}

// pardonDevice ends a penalty.
func (s *Server) pardonDevice(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	if err := s.c.Rollouts.Pardon(c.ctx, c.at, id, c.who.Name); err != nil {
		return answer{}, err
	}
	return s.showNow(c, http.StatusOK, id)
}
