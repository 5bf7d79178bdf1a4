package httpapi

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (s *Server) listRevocationLists(c *call) (answer, error) {
	ls, err := s.c.Lists.All(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.RevocationLists{Items: []api.RevocationList{}}
	for _, l := range ls {
		shown, err := showList(l)
		if err != nil {
			return answer{}, err
		}
		shown.PEM = ""
		out.Items = append(out.Items, shown)
	}
	return ok(out)
}

func (s *Server) getRevocationList(c *call) (answer, error) {
	id, err := c.issuer()
	if err != nil {
		return answer{}, err
	}
	l, err := s.c.Lists.List(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	shown, err := showList(l)
	if err != nil {
		return answer{}, err
	}
	return ok(shown)
}

func (s *Server) signRevocationList(c *call) (answer, error) {
	id, err := c.issuer()
	if err != nil {
		return answer{}, err
	}
	l, err := s.c.Lists.SignNow(c.ctx, c.at, id, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	shown, err := showList(l)
	if err != nil {
		return answer{}, err
	}
	return ok(shown)
}

// issuer returns the key id of the path.
func (c *call) issuer() (pki.IssuerID, error) { return issuerID(c.echo.Param("issuer")) }

func issuerID(id string) (pki.IssuerID, error) {
	if raw, err := hex.DecodeString(id); err != nil || len(raw) == 0 || len(raw) > 32 || hex.EncodeToString(raw) != id {
		return "", fleet.Coded(fleet.Invalid, "id_invalid", "issuer: use the key id of the CA, in lower-case hex")
	}
	return pki.IssuerID(id), nil
}

func showList(l pki.List) (api.RevocationList, error) {
	crl, err := x509.ParseRevocationList(l.DER)
	if err != nil {
		return api.RevocationList{}, fleet.Wrap(fleet.Internal, err, "the list of issuer %s cannot be read", l.Issuer)
	}
	return api.RevocationList{
		Issuer: string(l.Issuer), Name: crl.Issuer.CommonName, Number: l.Number, Entries: l.Entries, At: l.At, Next: l.Next,
		Path: "/crl/" + string(l.Issuer) + ".crl", PEM: string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: l.DER})),
	}, nil
}
