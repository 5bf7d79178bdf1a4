// Package httpapi is the REST API for operators, /api/v1, as api/openapi.yaml describes it. It authenticates, limits and
// parses what comes in, calls the use cases through the ports of ports.go, and puts what they return on the wire. It
// decides nothing about devices. Health and metrics are served beside it.
package httpapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"github.com/labstack/echo/v4"

	"muster/api"
	"muster/internal/access"
)

// Config of a Server. All fields are needed except where a comment says otherwise.
type Config struct {
	Devices      Devices
	Doors        Doors
	Certificates Certificates
	Servers      ServerCertificates
	Expiries     Expiries
	Recovery     Recovery
	TrustBundles TrustBundles
	Rotations    Rotations
	Lists        Lists
	Firmware     Firmware
	Rollouts     Rollouts
	Quarantine   Quarantine
	Operators    Operators
	Trail        Trail

	Trust     func(context.Context) ([]byte, error) // the root certificates that devices need, PEM
	TrustKey  *ecdsa.PublicKey                      // by which devices check new trust bundles
	Endpoints api.Endpoints                         // what devices are told
	Version   api.Version

	Log      *slog.Logger
	MaxImage int64 // bytes that an uploaded image may have
	// CursorKey authenticates cursors, at least 16 bytes. If empty, a random one is used and cursors end with the process.
	CursorKey []byte
	// Hosts are the names, without port, under which the API may be called; empty: any.
	Hosts []string
	// Observe is told of each call that was served, by operation; may be nil.
	Observe func(operation string, status int, took time.Duration)

	// What is served beside the API; those that are nil are not. Livez and Readyz are for everybody who can connect,
	// Metrics takes a viewer's token.
	Livez, Readyz, Metrics http.Handler
}

// Server is the API as a handler. It starts nothing.
type Server struct {
	c       Config
	echo    *echo.Echo
	cursors cursors
	now     func() time.Time

	previews   chan struct{}   // one for each dry run
	streams    chan struct{}   // one for each event stream
	exports    chan struct{}   // one for each download
	ended      context.Context // of all event streams and downloads
	endStreams context.CancelFunc
}

// New checks the configuration and the table of operations, and returns a Server.
func New(c Config) (*Server, error) { return newServer(c, operations) }

func newServer(c Config, ops []operation) (*Server, error) {
	for name, missing := range map[string]bool{
		"Devices": c.Devices == nil, "Doors": c.Doors == nil, "Certificates": c.Certificates == nil, "Servers": c.Servers == nil, "Expiries": c.Expiries == nil, "Recovery": c.Recovery == nil,
		"Firmware": c.Firmware == nil, "Rollouts": c.Rollouts == nil, "Quarantine": c.Quarantine == nil, "Operators": c.Operators == nil, "Trail": c.Trail == nil,
		"Trust": c.Trust == nil, "TrustKey": c.TrustKey == nil, "TrustBundles": c.TrustBundles == nil, "Lists": c.Lists == nil, "Log": c.Log == nil, "MaxImage": c.MaxImage <= 0,
	} {
		if missing {
			return nil, fmt.Errorf("httpapi: Config.%s is missing", name)
		}
	}
	if len(c.CursorKey) == 0 {
		c.CursorKey = make([]byte, 32)
		_, _ = rand.Read(c.CursorKey) // never fails (crypto/rand)
	}
	if len(c.CursorKey) < 16 {
		return nil, errors.New("httpapi: Config.CursorKey has fewer than 16 bytes")
	}
	s := &Server{c: c, cursors: cursors{c.CursorKey}, now: time.Now, previews: make(chan struct{}, maxPreviews), streams: make(chan struct{}, maxStreams), exports: make(chan struct{}, maxExports)}
	s.ended, s.endStreams = context.WithCancel(context.Background())
	s.echo = echo.New()
	s.echo.HTTPErrorHandler = func(err error, e echo.Context) { s.fail(e, err) }

	// The order is part of the contract. Each step knows more about the caller, and costs more, than the one before:
	//  1. announce: an id for the request, headers of every answer, the log line and the metric, whatever happens below.
	//  2. rescue: a panic below becomes a 500 with that id. It must be inside announce to be logged and counted.
	//  3. host: a request for another name is refused before its token is looked at.
	//  4. authenticate: before routing shows, so that without a token all paths look the same, known ones or not.
	// Then, in serve: role, before anything of the request is parsed; then headers and query; then the size of the body;
	// then the body.
	s.echo.Use(s.announce, s.rescue, s.host, s.authenticate)

	seen := map[string]bool{}
	for i := range ops {
		op := &ops[i]
		if !slices.Contains([]access.Role{access.Viewer, access.Operator, access.Admin}, op.role) {
			return nil, fmt.Errorf("httpapi: operation %q has no role: nobody may call it, so the API does not start", op.id)
		}
		if op.do == nil || seen[op.id] || seen[op.method+op.path] {
			return nil, fmt.Errorf("httpapi: operation %q does nothing, or stands twice in the table", op.id)
		}
		seen[op.id], seen[op.method+op.path] = true, true
		s.echo.Add(op.method, api.Base+op.path, s.serve(op))
	}
	for path, h := range map[string]http.Handler{"/livez": c.Livez, "/readyz": c.Readyz, "/metrics": c.Metrics} {
		if h != nil {
			s.echo.GET(path, echo.WrapHandler(h))
			s.echo.HEAD(path, echo.WrapHandler(h))
		}
	}
	return s, nil
}

// ServeHTTP serves one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.echo.ServeHTTP(w, r) }

// Limits of the listener.
const (
	MaxHeaderBytes = 16 << 10
	readTimeout    = 30 * time.Second
	writeTimeout   = 2 * time.Minute // a revocation waits for the broker
	uploadTimeout  = 30 * time.Minute
)

// HTTPServer returns the http.Server for h with its limits set. The caller gives it a TLS listener. If h is a Server,
// Shutdown ends its event streams and downloads.
func HTTPServer(h http.Handler, log *slog.Logger) *http.Server {
	srv := &http.Server{
		Handler: h, MaxHeaderBytes: MaxHeaderBytes, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: 2 * time.Minute, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	if s, ok := h.(*Server); ok {
		srv.RegisterOnShutdown(s.EndStreams)
	}
	return srv
}

// serve is the way of a call of op, once it is known who makes it.
func (s *Server) serve(op *operation) echo.HandlerFunc {
	produces := op.produces
	if produces == "" {
		produces = "application/json"
	}
	return func(e echo.Context) error {
		r := e.Request()
		c := &call{echo: e, ctx: r.Context(), at: s.now().Round(0).UTC(), who: principal(e), op: op}
		e.Set(keyOperation, op.id)
		if !c.who.Role.May(op.role) {
			return s.forbid(c)
		}
		if err := checkAccept(r, produces); err != nil {
			return err
		}
		var err error
		if c.query, err = readQuery(r.URL.RawQuery, op); err != nil {
			return err
		}
		if c.body, err = readBody(r, e.Response(), op.body, s.c.MaxImage); err != nil {
			return err
		}
		a, err := op.do(s, c)
		if err != nil {
			return err
		}
		if a.etag != "" {
			e.Response().Header().Set("ETag", a.etag)
		}
		switch body := a.body.(type) {
		case nil:
			return e.NoContent(a.status)
		case []byte:
			return e.Blob(a.status, produces, body)
		case stream:
			return s.pour(c, body)
		case download:
			return s.send(c, produces, body)
		default:
			writeJSON(e, s.c.Log, a.status, produces, body)
			return nil
		}
	}
}
