package httpapi

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"strconv"
	"strings"
	"time"
	"unicode"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rotation"
)

// rotation returns the number of the path.
func (c *call) rotation() (int64, error) {
	text := c.echo.Param("rotation")
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 1 || strconv.FormatInt(n, 10) != text {
		return 0, fleet.Coded(fleet.Invalid, "id_invalid", "rotation: use its number, as muster rotation list shows it")
	}
	return n, nil
}

func (s *Server) listRotations(c *call) (answer, error) {
	list, err := s.c.Rotations.List(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.RotationList{Items: []api.Rotation{}}
	for _, r := range list {
		out.Items = append(out.Items, showRotation(rotation.View{Rotation: r, Next: r.State.Next()}))
	}
	return ok(out)
}

func (s *Server) getRotation(c *call) (answer, error) {
	id, err := c.rotation()
	if err != nil {
		return answer{}, err
	}
	v, err := s.c.Rotations.Show(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	return ok(showRotation(v))
}

// maxKeyURI is how long the URI of a key may be, in bytes.
const maxKeyURI = 1024

func (s *Server) startRotation(c *call) (answer, error) {
	var in api.NewRotation
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	for _, uri := range []string{in.DeviceKey, in.ServerKey} {
		if len(uri) > maxKeyURI || strings.ContainsFunc(uri, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return answer{}, fleet.Coded(fleet.Invalid, "key_invalid", "device_key, server_key: use at most %d bytes of printable text", maxKeyURI)
		}
	}
	r, err := s.c.Rotations.Start(c.ctx, c.at, pki.RotationKind(in.Kind), rotation.Keys{Device: in.DeviceKey, Server: in.ServerKey}, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showRotation(rotation.View{Rotation: r, Next: r.State.Next()}))
}

func (s *Server) listRotationRequests(c *call) (answer, error) {
	id, err := c.rotation()
	if err != nil {
		return answer{}, err
	}
	list, err := s.c.Rotations.Requests(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	out := api.RotationRequestList{Items: []api.RotationRequest{}}
	for _, q := range list {
		out.Items = append(out.Items, api.RotationRequest{Profile: q.Profile, CSRPEM: q.PEM, KeySHA256: string(q.KeyHash)})
	}
	return ok(out)
}

func (s *Server) getRotationCertificates(c *call) (answer, error) {
	id, err := c.rotation()
	if err != nil {
		return answer{}, err
	}
	g, roots, cross, err := s.c.Rotations.Certificates(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	return ok(api.RotationCertificates{RootsPEM: pemText(roots...), CrossPEM: pemText(cross...), DeviceCaPEM: pemText(g.Device), ServerCaPEM: pemText(g.Server)})
}

func pemText(certs ...*x509.Certificate) string {
	var out strings.Builder
	for _, c := range certs {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return out.String()
}

func (s *Server) importRotationCertificates(c *call) (answer, error) {
	id, err := c.rotation()
	if err != nil {
		return answer{}, err
	}
	var in api.RotationImport
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	certs, err := readCerts("pem", in.PEM)
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Rotations.Import(c.ctx, c.at, id, certs, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showRotation(rotation.View{Rotation: r, Next: r.State.Next()}))
}

// orderOf reads what an operator says to a step.
func (c *call) orderOf() (id int64, in api.RotationStepOrder, err error) {
	if id, err = c.rotation(); err != nil {
		return id, in, err
	}
	if err = c.decode(&in); err != nil {
		return id, in, err
	}
	const maxWhy = 200
	if len(in.Why) > maxWhy || strings.ContainsFunc(in.Why, func(r rune) bool { return !unicode.IsPrint(r) }) {
		err = fleet.Coded(fleet.Invalid, "why_invalid", "why: use at most %d bytes of printable text", maxWhy)
	}
	return id, in, err
}

func (s *Server) advanceRotation(c *call) (answer, error) {
	id, in, err := c.orderOf()
	if err != nil {
		return answer{}, err
	}
	v, err := s.c.Rotations.Advance(c.ctx, c.at, id, in.Force, in.Why, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showRotation(v))
}

// unwind is a step back, which takes no force.
func unwind(step func(r Rotations, ctx context.Context, at time.Time, id int64, why, by string) (rotation.View, error)) func(*Server, *call) (answer, error) {
	return func(s *Server, c *call) (answer, error) {
		id, in, err := c.orderOf()
		if err != nil {
			return answer{}, err
		}
		if in.Force {
			return answer{}, fleet.Coded(fleet.Invalid, "force_invalid", "force: nothing stands against this step")
		}
		v, err := step(s.c.Rotations, c.ctx, c.at, id, in.Why, c.who.Name)
		if err != nil {
			return answer{}, err
		}
		return ok(showRotation(v))
	}
}

func showRotation(v rotation.View) api.Rotation {
	out := api.Rotation{
		ID: v.ID, Kind: api.RotationKind(v.Kind), From: v.From, State: api.RotationState(v.State), Next: string(v.Next), Bundle: v.Bundle,
		Blockers: v.Blockers, Proofs: showProofs(v.Facts.Proofs), Steps: []api.RotationStep{}, OldIssuer: string(v.Facts.OldCA),
		Lacking: api.DeviceCount{Count: v.Facts.Lacking, Devices: listed(v.Facts.Named)},
		Holders: api.DeviceCount{Count: v.Facts.Old, Devices: listed(v.Facts.OldIDs)},
	}
	if out.Blockers == nil {
		out.Blockers = []string{}
	}
	for _, s := range v.Steps {
		out.Steps = append(out.Steps, api.RotationStep{State: string(s.State), At: s.At, By: s.By, Why: s.Why, Forced: s.Forced, Before: showProofs(s.Before), After: showProofs(s.After)})
	}
	return out
}

func listed(names []string) []string {
	if names == nil {
		return []string{}
	}
	return names
}

func showProofs(list []pki.Proof) []api.Proof {
	out := []api.Proof{}
	for _, p := range list {
		shown := api.Proof{Door: p.Door, Roots: p.Roots, Issuer: p.Issuer, At: p.At, Ok: p.OK(), Words: p.String()}
		if p.Client != pki.NoClient {
			shown.Client = &p.Client
		}
		out = append(out, shown)
	}
	return out
}
