package httpapi

import (
	"muster/api"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (s *Server) revokeIssuer(c *call) (answer, error) {
	id, err := c.issuer()
	if err != nil {
		return answer{}, err
	}
	var in api.NewMassRevocation
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	reason, known := reasons[in.Reason]
	if !known {
		return answer{}, fleet.Coded(fleet.Invalid, "reason_invalid", "reason: use unspecified, key-compromise, affiliation-changed, superseded, cessation-of-operation or privilege-withdrawn")
	}
	if in.Drill {
		d, err := s.c.Certificates.DrillIssuer(c.ctx, c.at, id, c.who.Name)
		if err != nil {
			return answer{}, err
		}
		return ok(api.MassRevocation{Issuer: string(id), State: api.MassRevocationStateDrill, Total: d.Certificates, Connections: d.Live, Took: took(d.Took), Estimate: took(d.Estimate)})
	}
	m, err := s.c.Certificates.RevokeIssuer(c.ctx, c.at, id, reason, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(s.showMass(c, m, 0))
}

func (s *Server) getMassRevocation(c *call) (answer, error) {
	id, err := c.issuer()
	if err != nil {
		return answer{}, err
	}
	m, open, err := s.c.Certificates.MassRevocation(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	return ok(s.showMass(c, m, open))
}

func (s *Server) showMass(c *call, m pki.MassRevocation, closing int) api.MassRevocation {
	out := api.MassRevocation{
		Issuer: string(m.Issuer), State: api.MassRevocationStateRunning, Reason: reasonName(m.Reason), By: m.By, Since: m.Since, DoneAt: m.DoneAt,
		Total: m.Total, Revoked: m.Revoked, Connections: m.Live, Closing: closing, Took: took(max(0, c.at.Sub(m.Since))),
	}
	if m.Done() {
		out.State, out.Took = api.MassRevocationStateDone, took(m.DoneAt.Sub(m.Since))
	}
	return out
}
