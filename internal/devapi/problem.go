package devapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"

	"github.com/labstack/echo/v4"

	"muster/internal/fleet"
)

// statuses is what each kind of error is to a device. Forbidden comes from admission alone: what a device may not have is
// NotFound before it gets here.
var statuses = map[fleet.Kind]int{
	fleet.Invalid: http.StatusBadRequest, fleet.Unauthorized: http.StatusUnauthorized, fleet.Forbidden: http.StatusForbidden,
	fleet.NotFound: http.StatusNotFound, fleet.TooMany: http.StatusTooManyRequests, fleet.Unavailable: http.StatusServiceUnavailable,
}

// problem answers a failed request (RFC 9457), in few bytes. What the device is not to know is logged instead.
func (a *API) problem(err error, c echo.Context) {
	if c.Response().Committed { // half an image is out; the connection is all that can be ended
		return
	}
	status, detail := explain(err)
	log := slog.LevelDebug
	if status >= 500 && status != http.StatusServiceUnavailable {
		log = slog.LevelError
	}
	a.c.Log.LogAttrs(c.Request().Context(), log, "device request failed",
		slog.String("device", string(deviceOf(c))), slog.Int("status", status), slog.Any("error", err))
	if (status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable) && c.Response().Header().Get(echo.HeaderRetryAfter) == "" {
		c.Response().Header().Set(echo.HeaderRetryAfter, retryAfter)
	}
	body, err := json.Marshal(struct {
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail,omitempty"`
	}{http.StatusText(status), status, detail})
	if err != nil {
		body = []byte("{}")
	}
	h := c.Response().Header()
	h.Set(echo.HeaderContentType, "application/problem+json")
	h.Set(echo.HeaderContentLength, strconv.Itoa(len(body)))
	h.Set(echo.HeaderCacheControl, "no-store")
	c.Response().WriteHeader(status)
	if c.Request().Method != http.MethodHead {
		// A write error means that the device is gone.
		_, _ = c.Response().Write(body)
	}
}

// recovered turns a panic into a 500 and a line in the log, where net/http would only end the connection.
func (a *API) recovered(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) (err error) {
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler {
				panic(p)
			}
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}()
		return next(c)
	}
}

func explain(err error) (status int, detail string) {
	if he, ok := errors.AsType[*echo.HTTPError](err); ok { // the router's: 404, 405
		return he.Code, ""
	}
	e, ok := errors.AsType[*fleet.Error](err)
	if !ok {
		return http.StatusInternalServerError, ""
	}
	status, ok = statuses[e.Kind]
	if !ok {
		return http.StatusInternalServerError, ""
	}
	return status, e.Msg
}
