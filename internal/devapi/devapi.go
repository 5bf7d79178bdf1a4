// Package devapi is the HTTPS side of muster that devices speak: firmware images and the trust bundle, on one listener
// for certificates (mutual TLS) and one for recovery (fallback password). Real clients are picky (esp32.md §6.1, §6.2):
// HTTP/1.0 and 1.1 only, a Content-Length on everything, never chunked or compressed, never a redirect, one range at a
// time, immutable bytes under a path.
package devapi

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/labstack/echo/v4"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/internal/wire"
)

// Limits of the listeners. They are generous to a slow device and short to one that is gone.
const (
	maxHeader      = 16 << 10         // bytes of a request's header
	headerTimeout  = 20 * time.Second // TLS handshake and header; mbedTLS on a busy ESP32 takes seconds
	idleTimeout    = 60 * time.Second
	bodyTimeout    = 5 * time.Second // for the body of a request that should have none
	maxConnections = 4096            // per listener; more wait to be accepted
	perDevice      = 4               // requests of one device at the same time
	retryAfter     = "5"             // seconds
)

// Grants says what a device may download.
type Grants interface {
	// Granted returns the release whose image device may have under name (16 or 64 hex digits), and the budget that its
	// download has to keep to, or NotFound.
	Granted(ctx context.Context, device fleet.DeviceID, name string) (ota.Grant, error)
}

// Images opens image files; NotFound if there is none. The size is in bytes.
type Images interface {
	Open(fleet.Hash) (io.ReadSeekCloser, int64, error)
}

// Admission decides who comes in, by the same records as the broker's admission. The reason is a stable word for the log.
type Admission interface {
	// Admit is asked for a certificate whose chain is verified.
	Admit(device fleet.DeviceID, serial fleet.Serial, at time.Time) (ok bool, reason string)
	// AdmitPassword takes the same time for every password.
	AdmitPassword(device fleet.DeviceID, sha256 fleet.Hash) (ok bool, reason string)
}

// Served is what became of one request for an image.
type Served struct {
	Device   fleet.DeviceID
	Product  fleet.ProductID
	Version  firmware.Version
	Recovery bool          // by the recovery listener
	Status   int           // of HTTP: 200, 206, 304, 416
	Bytes    int64         // of the body, written
	Complete bool          // the body was written to its end
	Took     time.Duration // from header to the last byte
}

// Config of an API. All fields but Served, Refused, CacheBytes and BytesPerSecond are needed.
type Config struct {
	Grants      Grants
	Images      Images
	Admission   Admission
	TrustBundle func() []byte // PEM: what devices trust; read at each request
	// Poller serves clients that ask for updates by themselves; nil: none are served.
	Poller Poller
	// SignedTrust returns the same as a signed document with a version (pki.Bundle); nil if there is none.
	SignedTrust func(context.Context) []byte
	Log         *slog.Logger
	Served      func(Served) // counts downloads; must not block
	// Refused hears of those that were kept out, and why: a word of Admission, or no-grant. It must not block.
	Refused    func(device fleet.DeviceID, reason, peer string)
	CacheBytes int64 // images kept in memory, in bytes; 0 means DefaultCacheBytes
	// BytesPerSecond is the budget of all downloads together; 0: none. A rollout may have one of its own.
	BytesPerSecond int64
	// EST and RecoveryEST answer what is below /.well-known/est/ on the two listeners; nil: nothing does.
	EST, RecoveryEST http.Handler
	// Revocation answers the paths of Revokes on the listener for certificates; nil: nothing does.
	Revocation http.Handler
	Revokes    func(path string) bool
}

// DefaultCacheBytes holds the few images that a rollout serves at a time.
const DefaultCacheBytes = 64 << 20

// API is what both listeners share. Its methods may be called from any goroutine.
type API struct {
	c        Config
	cache    *cache
	busy     *counter // requests under way, by device
	failures *limiter // failed passwords, by address
	requests *limiter // requests, by device
	pace     *pacer   // bytes of images
}

// New returns an API. It starts nothing.
func New(c Config) *API {
	if c.CacheBytes == 0 {
		c.CacheBytes = DefaultCacheBytes
	}
	if c.Served == nil {
		c.Served = func(Served) {}
	}
	if c.Refused == nil {
		c.Refused = func(fleet.DeviceID, string, string) {}
	}
	return &API{
		c: c, cache: newCache(c.CacheBytes), pace: newPacer(c.BytesPerSecond), busy: newCounter(perDevice),
		failures: newLimiter(failuresPerSecond, failuresBurst), requests: newLimiter(requestsPerSecond, requestsBurst),
	}
}

// Budget returns how many bytes of images are promised to downloads under a budget and not sent yet, and how many downloads
// were sent away because of it.
func (a *API) Budget() (backlog int64, refused uint64) {
	return a.pace.backlog(time.Now()), a.pace.refused.Load()
}

// Server is one listener's HTTP server.
type Server struct {
	http *http.Server
	tls  *tls.Config
}

// Devices returns the server for devices with a certificate. conf comes from MutualTLS.
func (a *API) Devices(conf *tls.Config) *Server {
	s := a.server(conf, a.byCertificate, a.c.EST, true)
	s.http.Handler = withRevocation(s.http.Handler, a.c.Revocation, a.c.Revokes)
	return s
}

// Recovery returns the server for devices with a fallback password. conf comes from PasswordTLS.
func (a *API) Recovery(conf *tls.Config) *Server {
	return a.server(conf, a.byPassword, a.c.RecoveryEST, false)
}

// server makes the server of one listener. Clients that poll are served where the certificate says who they are.
func (a *API) server(conf *tls.Config, who echo.MiddlewareFunc, est http.Handler, polls bool) *Server {
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.Logger.SetOutput(io.Discard) // muster logs by slog
	e.HTTPErrorHandler = a.problem
	e.Use(a.recovered, noBody)
	for _, m := range []string{http.MethodGet, http.MethodHead} {
		// Not by an echo.Group: its catch-all would turn 405 into 404.
		e.Add(m, "/fw/:name", a.file, who, a.budget)
		e.Add(m, "/trust-bundle", a.trustBundle, who, a.budget)
		e.Add(m, wire.PathTrust, a.signedTrust, who, a.budget)
		if polls && a.c.Poller != nil {
			e.Add(m, "/update", a.httpUpdate, who, a.budget)
			e.Add(m, "/fota.json", a.fotaManifest, who, a.budget)
			e.Add(m, fotaPrefix+":name", a.fotaImage, who, a.budget)
		}
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &Server{tls: conf, http: &http.Server{
		Handler: withEST(e, est), Protocols: protocols, MaxHeaderBytes: maxHeader, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(a.c.Log.Handler(), slog.LevelDebug), // handshakes that fail: anyone can cause them
	}}
}

// Serve answers on l, which is a plain TCP listener, until Shutdown; then it returns nil.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(tls.NewListener(newListener(l, maxConnections), s.tls))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown stops accepting and waits for requests under way until ctx ends; then it cuts them off.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// trustBundle answers with the certificates that devices should trust.
func (a *API) trustBundle(c echo.Context) error {
	return serveBytes(c, "application/pem-certificate-chain", "no-cache", a.c.TrustBundle())
}

// signedTrust answers with the trust bundle as a JWS.
func (a *API) signedTrust(c echo.Context) error {
	if a.c.SignedTrust == nil {
		return fleet.Errorf(fleet.NotFound, "no trust bundle was published")
	}
	jws := a.c.SignedTrust(c.Request().Context())
	if len(jws) == 0 {
		return fleet.Errorf(fleet.NotFound, "no trust bundle was published")
	}
	return serveBytes(c, "application/jose", "no-cache", jws)
}
