package httpapi

import (
	"muster/api"
	"muster/internal/fleet"
	"muster/internal/inventory"
	"muster/internal/target"
)

func (s *Server) previewTarget(c *call) (answer, error) {
	var in api.TargetQuestion
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	f := inventory.Filter{At: c.at}
	var err error
	if in.Product != "" {
		if f.Product, err = idInvalid(fleet.ParseProductID(in.Product)); err != nil {
			return answer{}, err
		}
	}
	if f.Where, err = target.Compile(in.Where); err != nil {
		return answer{}, err
	}
	done, err := s.walk()
	if err != nil {
		return answer{}, err
	}
	defer done()
	p, err := s.c.Devices.Preview(c.ctx, f)
	if err != nil {
		return answer{}, err
	}
	return ok(api.TargetPreview{Count: p.Count, Online: p.Online, Scanned: p.Scanned, Sample: words(p.Sample)})
}

func (s *Server) updateDevices(c *call) (answer, error) {
	var in api.BulkUpdate
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	b := inventory.Bulk{Change: inventory.Change{Labels: in.Labels, Join: in.Join, Leave: in.Leave}, DryRun: in.DryRun}
	if in.Where != "" {
		var err error
		if b.Where, err = target.Compile(in.Where); err != nil {
			return answer{}, err
		}
		done, err := s.walk()
		if err != nil {
			return answer{}, err
		}
		defer done()
	}
	for _, id := range in.Devices {
		d, err := idInvalid(fleet.ParseDeviceID(id))
		if err != nil {
			return answer{}, err
		}
		b.Devices = append(b.Devices, d)
	}
	rep, err := s.c.Devices.UpdateMany(c.ctx, c.at, b, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(api.BulkReport{Count: rep.Count, Changed: rep.Changed, Sample: words(rep.Sample)})
}

func words(ids []fleet.DeviceID) []string {
	out := make([]string, 0, len(ids))
	for _, id := range ids {
		out = append(out, string(id))
	}
	return out
}
