package httpapi

import (
	"muster/api"
	"muster/internal/firmware"
	"muster/internal/fleet"
)

func (s *Server) listSecureBootKeys(c *call) (answer, error) {
	product, err := c.product()
	if err != nil {
		return answer{}, err
	}
	ks, err := s.c.Firmware.SecureBootKeys(c.ctx, product)
	if err != nil {
		return answer{}, err
	}
	out := api.SecureBootKeyList{Items: []api.SecureBootKey{}}
	for _, k := range ks {
		out.Items = append(out.Items, showSecureBootKey(k))
	}
	return ok(out)
}

func (s *Server) addSecureBootKey(c *call) (answer, error) {
	var in api.NewSecureBootKey
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	if len(in.Key) > firmware.MaxKeyPEM {
		return answer{}, fleet.Errorf(fleet.TooLarge, "key: longer than %d bytes", firmware.MaxKeyPEM)
	}
	k, err := s.c.Firmware.AddSecureBootKey(c.ctx, c.at, fleet.ProductID(in.Product), in.Key, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showSecureBootKey(k))
}

func (s *Server) revokeSecureBootKey(c *call) (answer, error) {
	product, err := idInvalid(fleet.ParseProductID(c.echo.Param("product")))
	if err != nil {
		return answer{}, err
	}
	digest, err := idInvalid(fleet.ParseHash(c.echo.Param("digest")))
	if err != nil {
		return answer{}, err
	}
	k, err := s.c.Firmware.RevokeSecureBootKey(c.ctx, c.at, product, digest, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showSecureBootKey(k))
}

func showSecureBootKey(k firmware.SecureBootKey) api.SecureBootKey {
	return api.SecureBootKey{Product: string(k.Product), Digest: string(k.Digest), Scheme: k.Scheme, AddedAt: k.AddedAt, AddedBy: k.AddedBy, Revoked: k.Revoked}
}
