package httpapi

import (
	"context"
	"regexp"
	"slices"
	"time"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (s *Server) listRecoveryRequests(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	states := []pki.RequestState{pki.Waiting, pki.Approved, pki.Denied}
	state := pki.RequestState(c.query.Get("state"))
	if c.query.Has("state") && !slices.Contains(states, state) {
		return answer{}, unknownState("state", states)
	}
	rs, err := s.c.Recovery.Requests(c.ctx)
	if err != nil {
		return answer{}, err
	}
	rs = slices.DeleteFunc(rs, func(r pki.Request) bool { return state != "" && r.State != state })
	rs, next := cut(rs, page, func(r pki.Request) string { return r.ID })
	out := api.RecoveryRequestList{Items: []api.RecoveryRequest{}}
	for _, r := range rs {
		out.Items = append(out.Items, showRequest(r))
	}
	if next != "" {
		out.NextCursor = s.next(c, next)
	}
	return ok(out)
}

var requestForm = regexp.MustCompile(`^[0-9a-f]{16}$`)

// decide is an operator's word on a certificate request.
func decide(do func(Recovery, context.Context, time.Time, string, string) (pki.Request, error)) func(*Server, *call) (answer, error) {
	return func(s *Server, c *call) (answer, error) {
		id := c.echo.Param("request")
		if !requestForm.MatchString(id) {
			return answer{}, fleet.Coded(fleet.Invalid, "id_invalid", "request id: use its 16 lower-case hex digits")
		}
		r, err := do(s.c.Recovery, c.ctx, c.at, id, c.who.Name)
		if err != nil {
			return answer{}, err
		}
		return ok(showRequest(r))
	}
}

func showRequest(r pki.Request) api.RecoveryRequest {
	via := api.RecoveryRequestViaFallback
	if r.Via == pki.ViaEST {
		via = api.RecoveryRequestViaEst
	}
	return api.RecoveryRequest{
		ID: r.ID, Device: string(r.Device), KeySHA256: string(r.KeyHash), State: api.RecoveryState(r.State), Via: via,
		AskedAt: r.AskedAt, DecidedAt: r.DecidedAt, By: r.By,
	}
}
