// Package est is the HTTP side of Enrollment over Secure Transport (RFC 7030, clarified by RFC 8951): cacerts, csrattrs,
// simpleenroll and simplereenroll under /.well-known/est. Who may have a certificate is decided in internal/enroll.
//
// There are two doors. Devices is for the listener with mutual TLS: the certificate of the connection says who asks. Recovery
// is for the listener that asks for no certificate: there a device gets its first one by an enrolment password, and nothing else.
package est

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Prefix is the path of all operations (RFC 7030 §3.2.2). Labels are not used.
const Prefix = "/.well-known/est/"

// Enroll issues certificates. It is enroll.Enroller.
type Enroll interface {
	// CheckEnrolment returns Unauthorized unless sum is the SHA-256 of the device's enrolment password.
	CheckEnrolment(ctx context.Context, at time.Time, id fleet.DeviceID, sum fleet.Hash) error
	EnrolByPassword(ctx context.Context, at time.Time, id fleet.DeviceID, sum fleet.Hash, csr []byte) (pki.Certificate, error)
	EnrolByCertificate(ctx context.Context, at time.Time, id fleet.DeviceID, s fleet.Serial, csr []byte, renew bool) (pki.Certificate, error)
	// DenyEST puts a refusal into the audit trail; why is a stable word.
	DenyEST(ctx context.Context, at time.Time, id fleet.DeviceID, what, why string) error
}

// Admission decides who comes in, by the same records as the broker's admission. The reason is a stable word.
type Admission interface {
	Admit(device fleet.DeviceID, serial fleet.Serial, at time.Time) (ok bool, reason string)
}

// Config of a Server. All fields are needed.
type Config struct {
	Enroll    Enroll
	Admission Admission
	// Identify returns who a verified client certificate names, or an Unauthorized error.
	Identify func(tls.ConnectionState) (fleet.DeviceID, fleet.Serial, error)
	CACerts  func() [][]byte // DER: the present roots and intermediates; read at each request
	Log      *slog.Logger
}

// Server answers both doors. Its methods may be called from any goroutine.
type Server struct {
	c        Config
	requests *limiter // by device
	failures *limiter // failed passwords, by address
	denials  *limiter // audited refusals, by device
}

// Budgets. A device asks for a certificate a few times a year, and for one that is not ready every few seconds. A password
// has 256 random bits: failures are limited to spare the log, and never keep a right password out.
const (
	requestsPerSecond = 0.2
	requestsBurst     = 40
	failuresPerSecond = 0.2
	failuresBurst     = 10
	denialsPerSecond  = 1.0 / 600
	denialsBurst      = 5
)

// New returns a Server. It starts nothing.
func New(c Config) *Server {
	return &Server{
		c: c, requests: newLimiter(requestsPerSecond, requestsBurst), failures: newLimiter(failuresPerSecond, failuresBurst), denials: newLimiter(denialsPerSecond, denialsBurst),
	}
}

// operation answers a request that is allowed by method, or returns why not.
type operation struct {
	methods []string
	do      func(w http.ResponseWriter, r *http.Request) error
}

var (
	read = []string{http.MethodGet, http.MethodHead}
	post = []string{http.MethodPost}
)

// Devices returns the handler for the listener on which every client has a verified certificate.
func (s *Server) Devices() http.Handler {
	return s.door(map[string]operation{
		"cacerts":        {read, s.caCerts},
		"csrattrs":       {read, s.csrAttrs},
		"simpleenroll":   {post, func(w http.ResponseWriter, r *http.Request) error { return s.byCertificate(w, r, false) }},
		"simplereenroll": {post, func(w http.ResponseWriter, r *http.Request) error { return s.byCertificate(w, r, true) }},
	})
}

// Recovery returns the handler for the listener that asks for no certificate.
func (s *Server) Recovery() http.Handler {
	return s.door(map[string]operation{
		"cacerts":      {read, s.caCerts},
		"csrattrs":     {read, s.csrAttrs},
		"simpleenroll": {post, s.byPassword},
		"simplereenroll": {post, func(http.ResponseWriter, *http.Request) error {
			return fleet.Errorf(fleet.Forbidden, "renewing needs the certificate that is renewed: use the listener for certificates")
		}},
	})
}

func (s *Server) door(operations map[string]operation) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer s.recovered(w, r)
		op, ok := operations[strings.TrimPrefix(r.URL.Path, Prefix)]
		switch {
		case !ok || !strings.HasPrefix(r.URL.Path, Prefix):
			s.refuse(w, r, fleet.Errorf(fleet.NotFound, "no such operation: cacerts, csrattrs, simpleenroll and simplereenroll are there"))
		case !slices.Contains(op.methods, r.Method):
			w.Header().Set("Allow", strings.Join(op.methods, ", "))
			answer(w, r, http.StatusMethodNotAllowed, "text/plain; charset=utf-8", []byte("use "+strings.Join(op.methods, " or ")+"\n"))
		default:
			if err := op.do(w, r); err != nil {
				s.refuse(w, r, err)
			}
		}
	})
}

// recovered turns a panic into a 500 and a line in the log.
func (s *Server) recovered(w http.ResponseWriter, r *http.Request) {
	p := recover()
	if p == nil {
		return
	}
	if p == http.ErrAbortHandler {
		panic(p)
	}
	s.c.Log.LogAttrs(r.Context(), slog.LevelError, "EST request panicked", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
	answer(w, r, http.StatusInternalServerError, "text/plain; charset=utf-8", []byte("an error of the server\n"))
}

// caCerts answers with the certificates of the CA (RFC 7030 §4.1). It needs no authentication.
func (s *Server) caCerts(w http.ResponseWriter, r *http.Request) error {
	cms, err := certsOnly(s.c.CACerts()...)
	if err != nil {
		return err
	}
	send(w, r, "application/pkcs7-mime", cms)
	return nil
}

// csrAttrs says what a request should look like (RFC 7030 §4.5), for the device of the certificate if there is one.
func (s *Server) csrAttrs(w http.ResponseWriter, r *http.Request) error {
	var id fleet.DeviceID
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		var err error
		if id, _, err = s.c.Identify(*r.TLS); err != nil {
			return err
		}
	}
	der, err := attributes(id)
	if err != nil {
		return err
	}
	send(w, r, "application/csrattrs", der)
	return nil
}
