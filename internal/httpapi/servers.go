package httpapi

import (
	"muster/api"
	"muster/internal/servercert"
)

func (s *Server) listServerCertificates(c *call) (answer, error) {
	out := api.ServerCertificateList{Items: []api.ServerCertificate{}}
	for _, st := range s.c.Servers.List(c.at) {
		out.Items = append(out.Items, showServer(st))
	}
	return ok(out)
}

func (s *Server) renewServerCertificate(c *call) (answer, error) {
	st, err := s.c.Servers.Renew(c.ctx, c.at, c.echo.Param("name"), c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showServer(st))
}

func showServer(st servercert.State) api.ServerCertificate {
	out := api.ServerCertificate{
		Name: st.Name, File: st.File, Serial: string(st.Serial), Names: st.Names, Issuer: st.Issuer, Ours: st.Ours,
		NotBefore: st.Validity.NotBefore, NotAfter: st.Validity.NotAfter, RenewsAt: st.RenewsAt, Refused: st.Refused, Failed: st.Failed,
		Doors: []api.ServerCertificateDoor{},
	}
	for _, d := range st.Doors {
		out.Doors = append(out.Doors, api.ServerCertificateDoor{
			Name: d.Name, Address: d.Address, Serial: string(d.Serial), NotAfter: d.Validity.NotAfter, Proven: d.Proven, SeenAt: d.SeenAt, Error: d.Error,
		})
	}
	return out
}

func (s *Server) listExpiries(c *call) (answer, error) {
	items, err := s.c.Expiries.List(c.ctx, c.at)
	out := api.ExpiryList{Items: []api.Expiry{}}
	if err != nil {
		s.c.Log.Error("what expires cannot be listed in full", "error", err)
		out.Incomplete = err.Error()
	}
	for _, i := range items {
		out.Items = append(out.Items, api.Expiry{
			Kind: i.Kind, Name: i.Name, NotBefore: i.NotBefore, NotAfter: i.NotAfter, RenewsAt: i.Renews,
			LeftPercent: int(100 * i.Left(c.at)), Alarm: api.ExpiryAlarm(i.Level(c.at).String()), Fix: i.Fix,
		})
	}
	return ok(out)
}
