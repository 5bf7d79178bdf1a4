package httpapi

import (
	"muster/api"
	"muster/internal/firmware"
)

func (s *Server) listRepairs(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	rs, err := s.c.Firmware.Repairs(c.ctx)
	if err != nil {
		return answer{}, err
	}
	rs, next := cut(rs, page, func(r firmware.Repair) string { return string(r.Device) })
	out := api.RepairList{Items: []api.Repair{}}
	for _, r := range rs {
		out.Items = append(out.Items, showRepair(r))
	}
	if next != "" {
		out.NextCursor = s.next(c, next)
	}
	return ok(out)
}

func (s *Server) repairDevice(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	var in api.NewRepair
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	v, err := firmware.ParseVersion(in.Version)
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Firmware.Repair(c.ctx, c.at, id, v, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showRepair(r))
}

func (s *Server) cancelRepair(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	if err := s.c.Firmware.CancelRepair(c.ctx, c.at, id, c.who.Name); err != nil {
		return answer{}, err
	}
	return gone()
}

func showRepair(r firmware.Repair) api.Repair {
	return api.Repair{
		Device: string(r.Device), Product: string(r.Product), Version: string(r.Version), Job: string(r.Job), At: r.At, By: r.By,
		Offered: r.Offered, Offers: r.Offers,
	}
}
