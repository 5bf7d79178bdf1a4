package httpapi

import (
	"muster/api"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (s *Server) listBlockedKeys(c *call) (answer, error) {
	list, err := s.c.Certificates.BlockedKeys(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.BlockedKeyList{Items: []api.BlockedKey{}}
	for _, k := range list {
		out.Items = append(out.Items, showBlockedKey(k))
	}
	return ok(out)
}

func (s *Server) blockKey(c *call) (answer, error) {
	var in api.NewBlockedKey
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	h, err := idInvalid(fleet.ParseHash(in.SHA256))
	if err != nil {
		return answer{}, err
	}
	k, of, err := s.c.Certificates.BlockKey(c.ctx, c.at, h, in.Why, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	out := showBlockedKey(k)
	for _, cert := range of {
		out.Certificates = append(out.Certificates, showCertificate(cert))
	}
	return ok(out)
}

func (s *Server) unblockKey(c *call) (answer, error) {
	h, err := idInvalid(fleet.ParseHash(c.echo.Param("key")))
	if err != nil {
		return answer{}, err
	}
	if err := s.c.Certificates.UnblockKey(c.ctx, c.at, h, c.who.Name); err != nil {
		return answer{}, err
	}
	return gone()
}

func showBlockedKey(k pki.BlockedKey) api.BlockedKey {
	return api.BlockedKey{SHA256: string(k.SHA256), Since: k.Since, By: k.By, Why: k.Why}
}
