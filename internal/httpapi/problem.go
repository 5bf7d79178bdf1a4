package httpapi

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/labstack/echo/v4"

	"muster/api"
	"muster/internal/fleet"
)

// statuses gives each kind of error its HTTP status (RFC 9110 §15) and, where the caller should wait, the seconds for
// Retry-After. It is the only such table.
var statuses = map[fleet.Kind]struct {
	status int
	retry  string
}{
	fleet.Invalid:       {http.StatusBadRequest, ""},
	fleet.Unauthorized:  {http.StatusUnauthorized, ""},
	fleet.Forbidden:     {http.StatusForbidden, ""},
	fleet.NotFound:      {http.StatusNotFound, ""},
	fleet.Conflict:      {http.StatusConflict, ""},
	fleet.TooLarge:      {http.StatusRequestEntityTooLarge, ""},
	fleet.Unprocessable: {http.StatusUnprocessableEntity, ""},
	fleet.TooMany:       {http.StatusTooManyRequests, "10"},
	fleet.Unavailable:   {http.StatusServiceUnavailable, "5"},
	fleet.Full:          {http.StatusInsufficientStorage, ""},
	fleet.Internal:      {http.StatusInternalServerError, ""},
}

// protocolError is a refusal that only HTTP knows: it has a status and no kind.
type protocolError struct {
	status    int
	code, msg string
}

func (e *protocolError) Error() string { return e.msg }

func refuse(status int, code, msg string) error { return &protocolError{status, code, msg} }

// problemOf returns the problem document (RFC 9457) for err, without raw input and without the cause, and the seconds for
// Retry-After.
func problemOf(err error) (p api.Problem, retry string) {
	kind, code, msg := fleet.Internal, "", ""
	status := 0
	if e, ok := errors.AsType[*protocolError](err); ok {
		status, code, msg = e.status, e.code, e.msg
	} else if e, ok := errors.AsType[*fleet.Error](err); ok {
		kind, code, msg = e.Kind, e.Code, e.Msg
	} else if e, ok := errors.AsType[*echo.HTTPError](err); ok {
		status, code, msg = routing(e.Code)
	} else if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		kind, msg = fleet.TooLarge, "the body is larger than this call takes"
	} else if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		kind, msg = fleet.Unavailable, "the call took too long or was given up"
	}
	if status == 0 {
		row, known := statuses[kind]
		if !known {
			row, kind = statuses[fleet.Internal], fleet.Internal
		}
		status, retry = row.status, row.retry
		if code == "" {
			code = strings.ReplaceAll(string(kind), "-", "_")
		}
	}
	if status == http.StatusInternalServerError {
		code, msg = "internal", "a fault of musterd: its log has more under this request id"
	}
	return api.Problem{
		Type: "urn:muster:problem:" + code, Title: http.StatusText(status), Status: status, Code: code, Detail: msg,
	}, retry
}

// routing says what the router's own refusals mean.
func routing(status int) (int, string, string) {
	switch status {
	case http.StatusNotFound:
		return status, "no_such_path", "there is nothing at this path: see /api/v1/openapi.yaml"
	case http.StatusMethodNotAllowed:
		return status, "method_not_allowed", "this path does not take this method: Allow names those that it takes"
	}
	return http.StatusInternalServerError, "", ""
}

// fail answers with the problem document for err and logs what is musterd's own fault.
func (s *Server) fail(c echo.Context, err error) {
	p, retry := problemOf(err)
	p.RequestID = requestID(c)
	if p.Status >= http.StatusInternalServerError && p.Status != http.StatusServiceUnavailable {
		s.c.Log.Error("api call failed", "request", p.RequestID, "path", c.Path(), "error", err)
	} else if p.Status == http.StatusServiceUnavailable {
		s.c.Log.Warn("api call could not be served", "request", p.RequestID, "path", c.Path(), "error", err)
	}
	if c.Response().Committed {
		return // half an answer is out; the connection is all that can be closed
	}
	h := c.Response().Header()
	if retry != "" {
		h.Set("Retry-After", retry)
	}
	if p.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="muster"`) // RFC 6750 §3
	}
	writeJSON(c, s.c.Log, p.Status, "application/problem+json", p)
}

// writeJSON writes v. Encoding fails only for what musterd itself put together wrongly.
func writeJSON(c echo.Context, log *slog.Logger, status int, contentType string, v any) {
	raw, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		log.Error("an answer cannot be encoded", "request", requestID(c), "path", c.Path(), "error", err)
		status, contentType = http.StatusInternalServerError, "application/problem+json"
		raw = []byte(`{"type":"urn:muster:problem:internal","title":"Internal Server Error","status":500,"code":"internal"}`)
	}
	if err := c.Blob(status, contentType, append(raw, '\n')); err != nil {
		log.Debug("an answer was not taken", "request", requestID(c), "error", err)
	}
}
