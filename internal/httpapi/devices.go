package httpapi

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/inventory"
	"muster/internal/pki"
	"muster/internal/target"
)

func (s *Server) listDevices(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	f := inventory.Filter{Text: c.query.Get("q")}
	if f.Product, err = c.product(); err != nil {
		return answer{}, err
	}
	if f.Online, err = c.flag("online"); err != nil {
		return answer{}, err
	}
	if f.Labels, err = labelFilter(c.query["label"]); err != nil {
		return answer{}, err
	}
	if f.Group = c.query.Get("group"); len(f.Group) > inventory.MaxLabelKey {
		return answer{}, fleet.Coded(fleet.Invalid, "query_invalid", "group: use at most %d bytes", inventory.MaxLabelKey)
	}
	if text := c.query.Get("where"); text != "" {
		f.At = c.at
		if f.Where, err = target.Compile(text); err != nil {
			return answer{}, err
		}
	}
	if len(f.Text) > fleet.MaxDeviceIDLen {
		return answer{}, fleet.Coded(fleet.Invalid, "query_invalid", "q: use at most %d bytes", fleet.MaxDeviceIDLen)
	}
	rows, more, err := s.c.Devices.List(c.ctx, f, page)
	if err != nil {
		return answer{}, err
	}
	out := api.DeviceList{Items: make([]api.Device, 0, len(rows))}
	for _, r := range rows {
		d := showDevice(r)
		d.Status.State = nil // a list of 500 state documents helps nobody
		out.Items = append(out.Items, d)
	}
	if more && len(rows) > 0 {
		out.NextCursor = s.next(c, string(rows[len(rows)-1].Device.ID))
	}
	return ok(out)
}

// labelFilter reads terms of the form key=value.
func labelFilter(terms []string) (map[string]string, error) {
	if len(terms) > 16 {
		return nil, fleet.Coded(fleet.Invalid, "label_invalid", "label: at most 16 in one call")
	}
	out := map[string]string{}
	for _, t := range terms {
		k, v, ok := strings.Cut(t, "=")
		if !ok || k == "" || len(k) > inventory.MaxLabelKey || len(v) > inventory.MaxLabelValue {
			return nil, fleet.Coded(fleet.Invalid, "label_invalid", "label: write it as key=value, with a key of 1 to %d bytes and a value of at most %d", inventory.MaxLabelKey, inventory.MaxLabelValue)
		}
		if have, twice := out[k]; twice && have != v {
			return nil, fleet.Coded(fleet.Invalid, "label_invalid", "label: no device has two values of one label")
		}
		out[k] = v
	}
	return out, nil
}

func (s *Server) createDevice(c *call) (answer, error) {
	var in api.NewDevice
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	ds, err := s.c.Devices.Add(c.ctx, c.at, []inventory.Spec{newSpec(in)}, false, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return s.showNow(c, http.StatusCreated, ds[0].Device.ID)
}

func (s *Server) importDevices(c *call) (answer, error) {
	var in api.DeviceImport
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	specs := make([]inventory.Spec, 0, len(in.Devices))
	for _, d := range in.Devices {
		specs = append(specs, newSpec(d))
	}
	ds, err := s.c.Devices.Add(c.ctx, c.at, specs, in.Update, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	var out api.DeviceImportReport
	for _, d := range ds {
		switch {
		case d.Created:
			out.Created++
		case d.Changed:
			out.Updated++
		default:
			out.Unchanged++
		}
	}
	return ok(out)
}

func newSpec(in api.NewDevice) inventory.Spec {
	return inventory.Spec{ID: fleet.DeviceID(in.ID), Product: fleet.ProductID(in.Product), Hardware: in.Hardware, Labels: in.Labels, Groups: in.Groups}
}

func (s *Server) getDevice(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	return s.showNow(c, http.StatusOK, id)
}

// showNow answers with a device as it is stored.
func (s *Server) showNow(c *call, status int, id fleet.DeviceID) (answer, error) {
	row, err := s.c.Devices.Get(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	return answer{status: status, body: showDevice(row), etag: etag(row.Device.Rev)}, nil
}

func etag(rev uint64) string { return `"` + strconv.FormatUint(rev, 10) + `"` }

func (s *Server) updateDevice(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	var in api.DevicePatch
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	change := inventory.Change{Hardware: in.Hardware, Labels: in.Labels, Join: in.Join, Leave: in.Leave}
	if change.Rev, err = ifMatch(c.echo.Request()); err != nil {
		return answer{}, err
	}
	d, err := s.c.Devices.Update(c.ctx, c.at, id, change, c.who.Name)
	if p, _ := problemOf(err); err != nil && change.Rev != nil && p.Code == "stale" {
		return answer{}, refuse(http.StatusPreconditionFailed, "stale", p.Detail) // RFC 9110 §13.1.1
	}
	if err != nil {
		return answer{}, err
	}
	return s.showNow(c, http.StatusOK, d.ID)
}

// ifMatch reads the revision that a change supposes, nil if it supposes none. Lists and weak tags are refused: one
// revision is what this API gives out.
func ifMatch(r *http.Request) (*uint64, error) {
	v := r.Header.Values("If-Match")
	if len(v) == 0 || len(v) == 1 && v[0] == "*" {
		return nil, nil
	}
	if len(v) == 1 && len(v[0]) > 2 && v[0][0] == '"' && v[0][len(v[0])-1] == '"' {
		if rev, err := strconv.ParseUint(v[0][1:len(v[0])-1], 10, 64); err == nil {
			return &rev, nil
		}
	}
	return nil, fleet.Coded(fleet.Invalid, "if_match_invalid", "If-Match: send the ETag of the device as it was given")
}

func (s *Server) enableDevice(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	if err := s.c.Doors.Enable(c.ctx, c.at, id, c.who.Name); err != nil {
		return answer{}, err
	}
	return s.showNow(c, http.StatusOK, id)
}

func (s *Server) newFallbackPassword(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	pw, err := s.c.Doors.NewPassword(c.ctx, c.at, id, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(api.FallbackPassword{Device: string(id), Password: pw})
}

// enrolmentLife is how long an enrolment password works unless the request says otherwise.
const enrolmentLife = 24 * time.Hour

func (s *Server) newEnrolmentPassword(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	var in api.EnrolmentPasswordRequest
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	life := enrolmentLife
	if in.For != "" {
		if life, err = duration("for", in.For, pki.MinEnrolment, pki.MaxEnrolment); err != nil {
			return answer{}, err
		}
	}
	pw, until, err := s.c.Doors.NewEnrolment(c.ctx, c.at, id, life, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(api.EnrolmentPassword{Device: string(id), Password: pw, Until: until})
}

func showDevice(r inventory.Row) api.Device {
	d, s := r.Device, r.Status
	return api.Device{
		ID: string(d.ID), Rev: d.Rev, Product: string(d.Product), Hardware: d.Hardware, Labels: d.Labels, Groups: d.Groups, CreatedAt: d.CreatedAt,
		Disabled: d.Disabled, DisabledAt: d.DisabledAt, Current: string(d.Current), Next: string(d.Next), RenewSince: d.RenewSince,
		FallbackPasswords: len(d.Passwords), RecoveryOff: d.RecoveryOff,
		Status: api.DeviceStatus{
			Online: s.Online, ConnectedAt: s.ConnectedAt, LostAt: s.LostAt, LastSeen: s.LastSeen, Vhost: s.Vhost, Peer: s.Peer,
			Serial: string(s.Serial), Trust: s.Bundle, HelloAt: s.HelloAt, Version: s.Version, Image: string(s.Image), Hardware: s.Hardware, Chip: s.Chip,
			SecureVersion: s.SecureVersion, Boot: s.Boot, State: jsontext.Value(s.State), StateAt: s.StateAt,
		},
	}
}
