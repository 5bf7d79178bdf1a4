package httpapi

import (
	"strconv"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/uplink"
)

func (s *Server) listQuarantine(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	after, err := afterNumber(page)
	if err != nil {
		return answer{}, err
	}
	qs, err := s.c.Quarantine.Quarantined(c.ctx, after, page.Limit+1)
	if err != nil {
		return answer{}, err
	}
	out := api.QuarantineList{Items: []api.Quarantined{}}
	for _, q := range qs[:min(page.Limit, len(qs))] {
		shown := showQuarantined(q)
		shown.Body = nil
		out.Items = append(out.Items, shown)
	}
	if len(qs) > page.Limit {
		out.NextCursor = s.next(c, strconv.FormatUint(qs[page.Limit-1].Seq, 10))
	}
	return ok(out)
}

// afterNumber reads the place of a page in a numbered list.
func afterNumber(p fleet.Page) (uint64, error) {
	if p.After == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(p.After, 10, 64)
	if err != nil {
		return 0, fleet.Coded(fleet.Invalid, "cursor_invalid", "cursor: it is not one of this list")
	}
	return n, nil
}

// seq reads the number in the path.
func (c *call) seq() (uint64, error) {
	text := c.echo.Param("seq")
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != text {
		return 0, fleet.Coded(fleet.Invalid, "id_invalid", "number: use a positive whole number")
	}
	return n, nil
}

func (s *Server) getQuarantined(c *call) (answer, error) {
	n, err := c.seq()
	if err != nil {
		return answer{}, err
	}
	q, err := s.c.Quarantine.QuarantinedOne(c.ctx, n)
	if err != nil {
		return answer{}, err
	}
	return ok(showQuarantined(q))
}

func (s *Server) dropQuarantined(c *call) (answer, error) {
	n, err := c.seq()
	if err != nil {
		return answer{}, err
	}
	if err := s.c.Quarantine.DropQuarantined(c.ctx, c.at, n, c.who.Name); err != nil {
		return answer{}, err
	}
	return gone()
}

func showQuarantined(q uplink.Quarantined) api.Quarantined {
	return api.Quarantined{Seq: q.Seq, At: q.At, Vhost: q.Vhost, Key: q.Key, Body: q.Body, Size: q.Size, Reason: q.Reason, Details: q.Details}
}
