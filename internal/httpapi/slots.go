package httpapi

import (
	"muster/api"
	"muster/internal/firmware"
	"muster/internal/fleet"
)

func (s *Server) listOTASlots(c *call) (answer, error) {
	all, err := s.c.Firmware.OTASlots(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.OTASlotList{Items: []api.OTASlot{}}
	for _, slot := range all {
		out.Items = append(out.Items, showOTASlot(slot))
	}
	return ok(out)
}

func (s *Server) setOTASlot(c *call) (answer, error) {
	var in api.NewOTASlot
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	product, err := idInvalid(fleet.ParseProductID(c.echo.Param("product")))
	if err != nil {
		return answer{}, err
	}
	slot, err := s.c.Firmware.SetOTASlot(c.ctx, c.at, product, in.Bytes, in.Force, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showOTASlot(slot))
}

func (s *Server) clearOTASlot(c *call) (answer, error) {
	product, err := idInvalid(fleet.ParseProductID(c.echo.Param("product")))
	if err != nil {
		return answer{}, err
	}
	if err := s.c.Firmware.ClearOTASlot(c.ctx, c.at, product, c.who.Name); err != nil {
		return answer{}, err
	}
	return gone()
}

func showOTASlot(s firmware.OTASlot) api.OTASlot {
	return api.OTASlot{Product: string(s.Product), Bytes: s.Bytes, SetAt: s.SetAt, SetBy: s.SetBy}
}
