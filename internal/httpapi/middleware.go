package httpapi

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/labstack/echo/v4"

	"muster/internal/access"
	"muster/internal/fleet"
)

// Keys of what the middleware notes about a request.
const (
	keyRequest   = "muster.request"
	keyPrincipal = "muster.principal"
	keyOperation = "muster.operation"
)

func requestID(e echo.Context) string { id, _ := e.Get(keyRequest).(string); return id }

func principal(e echo.Context) access.Principal {
	p, _ := e.Get(keyPrincipal).(access.Principal)
	return p
}

// peer returns the address of the other end of the connection. Forwarded-For headers are anybody's words and are not read.
func peer(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// announce gives the request an id of our own making, sets the headers of every answer, and logs the call when it is over.
func (s *Server) announce(next echo.HandlerFunc) echo.HandlerFunc {
	return func(e echo.Context) error {
		begin := s.now()
		var id [8]byte
		_, _ = rand.Read(id[:]) // never fails (crypto/rand)
		e.Set(keyRequest, hex.EncodeToString(id[:]))
		h := e.Response().Header()
		h.Set("X-Request-Id", requestID(e))
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")

		if err := next(e); err != nil {
			s.fail(e, err)
		}
		status, took := e.Response().Status, s.now().Sub(begin)
		op, _ := e.Get(keyOperation).(string)
		if op == "" {
			op = "none" // refused before it was known, or beside the API
		}
		if s.c.Observe != nil {
			s.c.Observe(op, status, took)
		}
		// Reads, and refusals of callers who may be anybody, are too many for the log of a normal day.
		level := slog.LevelDebug
		if m := e.Request().Method; m != http.MethodGet && m != http.MethodHead && principal(e).Name != "" {
			level = slog.LevelInfo
		}
		s.c.Log.Log(e.Request().Context(), level, "api", "operation", op, "status", status, "took", took,
			"who", principal(e).Name, "peer", peer(e.Request()), "request", requestID(e))
		return nil
	}
}

// rescue turns a panic into an error of kind Internal. http.ErrAbortHandler is a way to close the connection and stays.
func (s *Server) rescue(next echo.HandlerFunc) echo.HandlerFunc {
	return func(e echo.Context) (err error) {
		defer func() {
			r := recover()
			if r == nil {
				return
			}
			if cause, is := r.(error); is && errors.Is(cause, http.ErrAbortHandler) {
				panic(r)
			}
			s.c.Log.Error("panic in an api call", "request", requestID(e), "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = fleet.Errorf(fleet.Internal, "panic")
		}()
		return next(e)
	}
}

// host refuses requests for a name that is not ours (RFC 9110 §7.4): they come from a confused client, or from a browser
// that was told a name of somebody else's with our address.
func (s *Server) host(next echo.HandlerFunc) echo.HandlerFunc {
	return func(e echo.Context) error {
		if len(s.c.Hosts) == 0 {
			return next(e)
		}
		name := e.Request().Host
		if h, _, err := net.SplitHostPort(name); err == nil {
			name = h
		}
		name = strings.Trim(strings.ToLower(name), "[]")
		if !slices.Contains(s.c.Hosts, name) {
			return refuse(http.StatusMisdirectedRequest, "misdirected", "this server does not answer for the host that was asked for")
		}
		return next(e)
	}
}

// authenticate finds out who makes the call. Only /livez and /readyz are for everybody.
func (s *Server) authenticate(next echo.HandlerFunc) echo.HandlerFunc {
	return func(e echo.Context) error {
		if p := e.Path(); p == "/livez" || p == "/readyz" {
			return next(e)
		}
		r := e.Request()
		p, err := s.c.Operators.Authenticate(r.Context(), s.now(), peer(r), bearer(r))
		if err != nil {
			return err
		}
		e.Set(keyPrincipal, p)
		return next(e)
	}
}

// bearer returns the token of a request (RFC 6750 §2.1), or something that is none. A header that is there twice is none.
func bearer(r *http.Request) string {
	h := r.Header.Values("Authorization")
	if len(h) != 1 {
		return ""
	}
	scheme, token, _ := strings.Cut(h[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimLeft(token, " ")
}

// forbid refuses a call for want of a role. An attempt to change something is put on record, but not so often that a
// token without rights could fill the store.
func (s *Server) forbid(c *call) error {
	if c.op.method != http.MethodGet {
		on := strings.Join(c.echo.ParamValues(), " ")
		if !plainOn(on) {
			on = ""
		}
		e := access.Entry{At: c.at, Who: c.who.Name, What: "refused." + c.op.id, On: on, Details: "role " + string(c.who.Role) + ", takes " + string(c.op.role)}
		if err := s.c.Operators.Forbid(c.ctx, peer(c.echo.Request()), e); err != nil {
			s.c.Log.Warn("a refused call could not be put on record", "request", requestID(c.echo), "error", err)
		}
	}
	return fleet.Coded(fleet.Forbidden, "role_too_low", "this call takes the role %s, and the token has %s", c.op.role, c.who.Role)
}

// plainOn reports whether the ids of a refused call may stand in the audit trail as they came.
func plainOn(s string) bool {
	return len(s) <= 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_. ") == ""
}
