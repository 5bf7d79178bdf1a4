package httpapi

import (
	"muster/api"
)

// specType is the media type of an OpenAPI document.
const specType = "application/vnd.oai.openapi"

func (s *Server) getTrust(c *call) (answer, error) {
	pem, err := s.c.Trust(c.ctx)
	if err != nil {
		return answer{}, err
	}
	key, err := publicPEM(s.c.TrustKey)
	if err != nil {
		return answer{}, err
	}
	return ok(api.Trust{PEM: string(pem), KeyPEM: key})
}

func (s *Server) getEndpoints(*call) (answer, error) { return ok(s.c.Endpoints) }

func (s *Server) getVersion(*call) (answer, error) { return ok(s.c.Version) }

func (s *Server) getSpec(*call) (answer, error) { return ok(api.Spec) }
