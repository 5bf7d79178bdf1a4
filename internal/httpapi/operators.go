package httpapi

import (
	"strconv"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/fleet"
)

func (s *Server) listTokens(c *call) (answer, error) {
	ts, err := s.c.Operators.Tokens(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.TokenList{Items: []api.Token{}}
	for _, t := range ts {
		out.Items = append(out.Items, showToken(t))
	}
	return ok(out)
}

// defaultTTL is how long a token works if its maker does not say.
const defaultTTL = 90 * 24 * time.Hour

func (s *Server) createToken(c *call) (answer, error) {
	var in api.NewToken
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	role, err := access.ParseRole(string(in.Role))
	if err != nil {
		return answer{}, err
	}
	ttl := defaultTTL
	switch in.ExpiresIn {
	case "":
	case "never":
		ttl = 0
	default:
		if ttl, err = duration("expires_in", in.ExpiresIn, access.MinTTL, access.MaxTTL); err != nil {
			return answer{}, err
		}
	}
	secret, t, err := s.c.Operators.Create(c.ctx, c.at, in.Name, role, ttl, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(api.CreatedToken{Token: showToken(t), Secret: secret})
}

func (s *Server) deleteToken(c *call) (answer, error) {
	name, err := idInvalid(fleet.ParseDeviceID(c.echo.Param("token"))) // names of tokens have this form
	if err != nil {
		return answer{}, fleet.Coded(fleet.Invalid, "id_invalid", "token name: use 1 to %d of a-z, 0-9 and -", fleet.MaxDeviceIDLen)
	}
	if err := s.c.Operators.Delete(c.ctx, c.at, string(name), c.who.Name); err != nil {
		return answer{}, err
	}
	return gone()
}

func (s *Server) whoAmI(c *call) (answer, error) {
	w := c.who
	return ok(api.Token{Name: w.Name, Role: api.Role(w.Role), CreatedAt: w.CreatedAt, ExpiresAt: w.ExpiresAt, CreatedBy: w.CreatedBy})
}

func (s *Server) listAudit(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	before, err := afterNumber(page)
	if err != nil {
		return answer{}, err
	}
	es, err := s.c.Operators.Audit(c.ctx, before, page.Limit+1)
	if err != nil {
		return answer{}, err
	}
	out := api.AuditList{Items: []api.AuditEntry{}}
	for _, e := range es[:min(page.Limit, len(es))] {
		out.Items = append(out.Items, api.AuditEntry{Seq: e.Seq, At: e.At, Who: e.Who, What: e.What, On: e.On, Details: e.Details})
	}
	if len(es) > page.Limit {
		out.NextCursor = s.next(c, strconv.FormatUint(es[page.Limit-1].Seq, 10))
	}
	return ok(out)
}

func showToken(t access.Token) api.Token {
	return api.Token{Name: t.Name, Role: api.Role(t.Role), CreatedAt: t.CreatedAt, ExpiresAt: t.ExpiresAt, CreatedBy: t.CreatedBy}
}
