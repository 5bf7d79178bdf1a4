package httpapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"muster/internal/access"
	"muster/internal/fleet"
)

// call is one request that may be served: who makes it, when, and readers for what it holds.
type call struct {
	echo  echo.Context
	ctx   context.Context
	at    time.Time
	who   access.Principal
	op    *operation
	query url.Values
	body  []byte // of a JSON operation
}

// answer is what an operation returns.
type answer struct {
	status int
	body   any    // nil: none
	etag   string // "" : none
}

func ok(v any) (answer, error)      { return answer{status: http.StatusOK, body: v}, nil }
func created(v any) (answer, error) { return answer{status: http.StatusCreated, body: v}, nil }
func gone() (answer, error)         { return answer{status: http.StatusNoContent}, nil }

// bodyKind says what an operation takes as its body, and how much of it.
type bodyKind int

const (
	noBody    bodyKind = iota
	jsonBody           // at most maxJSON
	maybeJSON          // the same, and none is an empty object
	bulkBody           // JSON, at most maxBulk
	image              // a stream, at most Config.MaxImage
)

// Limits of bodies in bytes.
const (
	maxJSON = 64 << 10
	maxBulk = 4 << 20
)

// readQuery parses the query and refuses names that the operation does not know, and repeated ones that it takes once.
func readQuery(raw string, op *operation) (url.Values, error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, fleet.Coded(fleet.Invalid, "query_invalid", "the query is not well formed")
	}
	for name, values := range q {
		if !slices.Contains(op.query, name) {
			if len(op.query) == 0 {
				return nil, fleet.Coded(fleet.Invalid, "query_unknown", "this call takes no query parameters")
			}
			return nil, fleet.Coded(fleet.Invalid, "query_unknown", "there is an unknown query parameter; this call takes %s", strings.Join(op.query, ", "))
		}
		if len(values) > 1 && name != "label" {
			return nil, fleet.Coded(fleet.Invalid, "query_invalid", "query parameter %s is given more than once", name)
		}
		for _, v := range values {
			if !utf8.ValidString(v) || strings.ContainsRune(v, 0) {
				return nil, fleet.Coded(fleet.Invalid, "query_invalid", "query parameter %s is not text", name)
			}
		}
	}
	return q, nil
}

// readBody checks the headers of the body and reads a JSON one. Sizes are judged before anything is read.
func readBody(r *http.Request, w http.ResponseWriter, kind bodyKind, maxImage int64) ([]byte, error) {
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return nil, refuse(http.StatusUnsupportedMediaType, "encoding_unsupported", "send the body without Content-Encoding")
	}
	switch kind {
	case noBody:
		if r.ContentLength == 0 {
			return nil, nil
		}
		var one [1]byte
		if n, _ := io.ReadFull(r.Body, one[:]); n > 0 {
			return nil, fleet.Coded(fleet.Invalid, "body_unexpected", "this call takes no body")
		}
		return nil, nil
	case image:
		if err := checkType(r, "application/octet-stream"); err != nil {
			return nil, err
		}
		if r.ContentLength < 0 {
			return nil, refuse(http.StatusLengthRequired, "length_required", "send Content-Length: the size of the image")
		}
		if r.ContentLength > maxImage {
			return nil, fleet.Coded(fleet.TooLarge, "image_too_large", "the image has %d bytes, at most %d are taken", r.ContentLength, maxImage)
		}
		return nil, nil
	}
	if kind == maybeJSON && r.ContentLength == 0 {
		return []byte("{}"), nil
	}
	limit := int64(maxJSON)
	if kind == bulkBody {
		limit = maxBulk
	}
	if err := checkType(r, "application/json"); err != nil {
		return nil, err
	}
	tooLarge := fleet.Coded(fleet.TooLarge, "body_too_large", "the body is larger than the %d bytes that this call takes", limit)
	if r.ContentLength > limit {
		return nil, tooLarge
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if _, is := errors.AsType[*http.MaxBytesError](err); is {
		return nil, tooLarge
	}
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the body ended early or came too slowly")
	}
	return raw, nil
}

func checkType(r *http.Request, want string) error {
	have := r.Header.Values("Content-Type")
	if len(have) == 1 {
		t, p, err := mime.ParseMediaType(have[0])
		if cs, is := p["charset"]; err == nil && t == want && (!is || strings.EqualFold(cs, "utf-8")) {
			return nil
		}
	}
	return refuse(http.StatusUnsupportedMediaType, "media_type_unsupported", "send the body with Content-Type: "+want)
}

// checkAccept refuses a request that does not want what the operation answers with (RFC 9110 §12.5.1). No Accept means
// anything.
func checkAccept(r *http.Request, produces string) error {
	accepts := r.Header.Values("Accept")
	if len(accepts) == 0 {
		return nil
	}
	group, _, _ := strings.Cut(produces, "/")
	for part := range strings.SplitSeq(strings.Join(accepts, ","), ",") {
		t, p, err := mime.ParseMediaType(part)
		if err != nil {
			continue
		}
		if q, err := strconv.ParseFloat(p["q"], 64); p["q"] != "" && (err != nil || q <= 0) {
			continue
		}
		if t == "*/*" || t == group+"/*" || t == produces {
			return nil
		}
	}
	return refuse(http.StatusNotAcceptable, "not_acceptable", "this call answers with "+produces)
}

// decode reads the JSON body into v: unknown and duplicate names, wrong case, invalid UTF-8 and what follows the document
// are refused.
func (c *call) decode(v any) error {
	if body := bytes.TrimLeft(c.body, " \t\r\n"); len(body) == 0 || body[0] != '{' {
		return fleet.Coded(fleet.Invalid, "body_invalid", "body: send a JSON object")
	}
	err := json.Unmarshal(c.body, v, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*json.SemanticError](err); ok {
		why := "is of the wrong type or form"
		if errors.Is(err, json.ErrUnknownName) {
			why = "is not known here"
		}
		return bodyInvalid(err, "%s %s", place(e.JSONPointer), why)
	}
	if errors.Is(err, jsontext.ErrDuplicateName) {
		return bodyInvalid(err, "a name stands twice in an object")
	}
	return bodyInvalid(err, "it is not valid JSON")
}

func bodyInvalid(cause error, format string, a ...any) error {
	return &fleet.Error{Kind: fleet.Invalid, Code: "body_invalid", Msg: "body: " + fmt.Sprintf(format, a...), Err: cause}
}

var plainPointer = regexp.MustCompile(`^(/[A-Za-z0-9_-]{1,40}){1,6}$`)

// place names a member of the body. A name that a caller made up is shown only if it is plain.
func place(p jsontext.Pointer) string {
	if !plainPointer.MatchString(string(p)) {
		return "a member"
	}
	return string(p)
}

// page reads limit and cursor. The cursor belongs to the operation, its path and all other parameters.
func (s *Server) page(c *call) (fleet.Page, error) {
	limit, err := c.limit()
	if err != nil {
		return fleet.Page{}, err
	}
	p := fleet.Page{Limit: limit}
	if cur := c.query.Get("cursor"); cur != "" {
		if p.After, err = s.cursors.open(c.list(), cur); err != nil {
			return fleet.Page{}, err
		}
	}
	return p, nil
}

// next returns the cursor of the page after item after.
func (s *Server) next(c *call, after string) string { return s.cursors.make(c.list(), after) }

// list names what a cursor belongs to.
func (c *call) list() string {
	q := url.Values{}
	for k, v := range c.query {
		if k != "cursor" && k != "limit" {
			q[k] = slices.Sorted(slices.Values(v))
		}
	}
	return c.op.id + " " + strings.Join(c.echo.ParamValues(), "/") + "?" + q.Encode()
}

func (c *call) limit() (int, error) {
	v := c.query.Get("limit")
	if v == "" && !c.query.Has("limit") {
		return fleet.DefaultPageLimit, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > fleet.MaxPageLimit {
		return 0, fleet.Coded(fleet.Invalid, "limit_invalid", "limit: use 1 to %d", fleet.MaxPageLimit)
	}
	return n, nil
}

// flag reads a boolean parameter, nil if it is not there.
func (c *call) flag(name string) (*bool, error) {
	switch v := c.query.Get(name); {
	case !c.query.Has(name):
		return nil, nil
	case v == "true" || v == "false":
		b := v == "true"
		return &b, nil
	}
	return nil, fleet.Coded(fleet.Invalid, "query_invalid", "%s: use true or false", name)
}

// idInvalid gives the refusals of ids their own code.
func idInvalid[T any](v T, err error) (T, error) {
	if e, ok := errors.AsType[*fleet.Error](err); ok && e.Code == "" {
		return v, fleet.Coded(e.Kind, "id_invalid", "%s", e.Msg)
	}
	return v, err
}

func (c *call) device() (fleet.DeviceID, error) {
	return idInvalid(fleet.ParseDeviceID(c.echo.Param("device")))
}

func (c *call) serial() (fleet.Serial, error) {
	return idInvalid(fleet.ParseSerial(c.echo.Param("serial")))
}

func (c *call) rollout() (fleet.RolloutID, error) {
	return idInvalid(fleet.ParseRolloutID(c.echo.Param("rollout")))
}

// product reads the query parameter product, empty if it is not there.
func (c *call) product() (fleet.ProductID, error) {
	if !c.query.Has("product") {
		return "", nil
	}
	return idInvalid(fleet.ParseProductID(c.query.Get("product")))
}

// duration reads a duration of an operator, within bounds.
func duration(name, text string, min, max time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || len(text) > 24 || d < min || d > max {
		return 0, fleet.Coded(fleet.Invalid, "duration_invalid", "%s: use a duration like 90s, 30m or 24h, from %v to %v", name, min, max)
	}
	return d, nil
}
