package httpapi

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/fleet"
)

// Bounds of exports.
const (
	maxExports  = 2                // at once
	exportWrite = 30 * time.Second // for one page; whoever takes longer has gone
	exportType  = "application/x-ndjson"
)

// download is the body of an answer of any length that is sent piece by piece. What fails before the first piece is a
// problem; after it, the answer ends, and its format must show that something is missing.
type download func(ctx context.Context, emit func([]byte) error) error

// exportAudit streams the audit trail, as audit.VerifyExport reads it.
func (s *Server) exportAudit(c *call) (answer, error) {
	var r access.Range
	var err error
	if r.After, err = numberQuery(c, "after"); err != nil {
		return answer{}, err
	}
	if r.Since, err = timeQuery(c, "since"); err != nil {
		return answer{}, err
	}
	if r.Until, err = timeQuery(c, "until"); err != nil {
		return answer{}, err
	}
	if !r.Until.IsZero() && !r.Since.Before(r.Until) {
		return answer{}, fleet.Coded(fleet.Invalid, "range_invalid", "since must be before until")
	}
	return answer{status: http.StatusOK, body: download(func(ctx context.Context, emit func([]byte) error) error {
		return s.c.Trail.Export(ctx, r, emit)
	})}, nil
}

func numberQuery(c *call, name string) (uint64, error) {
	text := c.query.Get(name)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		return 0, fleet.Coded(fleet.Invalid, "query_invalid", "%s: use the number of an entry", name)
	}
	return n, nil
}

func timeQuery(c *call, name string) (time.Time, error) {
	text := c.query.Get(name)
	if text == "" {
		return time.Time{}, nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, fleet.Coded(fleet.Invalid, "query_invalid", "%s: use a time such as 2030-01-02T15:04:05Z", name)
	}
	return at, nil
}

// send serves a download.
func (s *Server) send(c *call, contentType string, do download) error {
	select {
	case s.exports <- struct{}{}:
		defer func() { <-s.exports }()
	default:
		return fleet.Coded(fleet.Unavailable, "too_many_exports", "%d exports are under way, which is as many as may be: try later", maxExports)
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	defer context.AfterFunc(s.ended, cancel)()
	w := c.echo.Response()
	control := http.NewResponseController(w)
	begun := false
	err := do(ctx, func(b []byte) error {
		if !begun {
			begun = true
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(http.StatusOK)
			if err := control.SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return err
			}
		}
		if err := control.SetWriteDeadline(time.Now().Add(exportWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		_, err := w.Write(b)
		return err
	})
	if err != nil && begun {
		s.c.Log.Warn("an export ended before its end", "request", requestID(c.echo), "error", err)
		return nil
	}
	return err
}

func (s *Server) listCheckpoints(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	after, err := afterNumber(page)
	if err != nil {
		return answer{}, err
	}
	cs, err := s.c.Trail.Checkpoints(c.ctx, after, page.Limit+1)
	if err != nil {
		return answer{}, err
	}
	out := api.CheckpointList{Items: []api.Checkpoint{}}
	for _, p := range cs[:min(page.Limit, len(cs))] {
		out.Items = append(out.Items, showCheckpoint(p))
	}
	if len(cs) > page.Limit {
		out.NextCursor = s.next(c, strconv.FormatUint(cs[page.Limit-1].Seq, 10))
	}
	return ok(out)
}

func (s *Server) makeCheckpoint(c *call) (answer, error) {
	p, err := s.c.Trail.Checkpoint(c.ctx, c.at, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showCheckpoint(p))
}

func (s *Server) listAuditKeys(c *call) (answer, error) {
	ks, err := s.c.Trail.Keys(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.AuditKeyList{Items: []api.AuditKey{}}
	for _, k := range ks {
		out.Items = append(out.Items, api.AuditKey{ID: k.ID, Since: k.Since, PublicKey: string(k.PEM())})
	}
	return ok(out)
}

func showCheckpoint(p audit.SignedCheckpoint) api.Checkpoint {
	return api.Checkpoint{Seq: p.Seq, Hash: string(p.Hash), At: p.At, KeyID: p.KeyID, Signed: p.JWS}
}
