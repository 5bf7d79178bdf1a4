package est

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// maxPassword bounds what is hashed, in bytes.
const maxPassword = 128

// What the audit trail calls refusals.
const (
	enrolDenied = "device.enrol-denied"
	renewDenied = "certificate.renew-denied"
)

// byPassword is simpleenroll with HTTP Basic authentication (RFC 7030 §3.2.3): user name = device id, password = the enrolment
// password.
func (s *Server) byPassword(w http.ResponseWriter, r *http.Request) error {
	user, password, ok := r.BasicAuth()
	id, err := fleet.ParseDeviceID(user)
	if !ok || err != nil || len(password) > maxPassword {
		return s.unauthorized(w, r)
	}
	sum := fleet.HashOf(sha256.Sum256([]byte(password)))
	if err := s.c.Enroll.CheckEnrolment(r.Context(), time.Now(), id, sum); err != nil {
		if !fleet.Is(err, fleet.Unauthorized) {
			return err
		}
		s.c.Log.LogAttrs(r.Context(), slog.LevelInfo, "enrolment refused", slog.String("device", string(id)), slog.String("peer", r.RemoteAddr))
		return s.unauthorized(w, r)
	}
	return s.enrol(w, r, id, enrolDenied, func(ctx context.Context, csr []byte) (pki.Certificate, error) {
		return s.c.Enroll.EnrolByPassword(ctx, time.Now(), id, sum, csr)
	})
}

// unauthorized asks for user name and password; who fails too often is told to wait.
func (s *Server) unauthorized(w http.ResponseWriter, r *http.Request) error {
	if r.Header.Get("Authorization") != "" && !s.failures.allow(address(r.RemoteAddr)) {
		return fleet.Errorf(fleet.TooMany, "too many failed logins; try again later")
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="muster enrolment", charset="UTF-8"`)
	return fleet.Errorf(fleet.Unauthorized, "user name (device id) and enrolment password are needed; an operator makes one")
}

// byCertificate is simpleenroll and, with renew, simplereenroll for the device that the verified certificate of the connection names. It
// is asked at every request whether that certificate still counts: a connection may outlive a revocation.
func (s *Server) byCertificate(w http.ResponseWriter, r *http.Request, renew bool) error {
	if r.TLS == nil {
		return fleet.Errorf(fleet.Forbidden, "a client certificate is needed")
	}
	id, serial, err := s.c.Identify(*r.TLS)
	if err != nil {
		return fleet.Wrap(fleet.Forbidden, err, "this certificate does not name a device")
	}
	if ok, reason := s.c.Admission.Admit(id, serial, time.Now()); !ok {
		err := fleet.Coded(fleet.Forbidden, "not_admitted", "this certificate does not let the device in: %s", reason)
		s.deny(r.Context(), id, renewDenied, reason)
		return err
	}
	return s.enrol(w, r, id, renewDenied, func(ctx context.Context, csr []byte) (pki.Certificate, error) {
		return s.c.Enroll.EnrolByCertificate(ctx, time.Now(), id, serial, csr, renew)
	})
}

// enrol reads the request of a device that is known by now and answers with the certificate that issue gives it.
func (s *Server) enrol(w http.ResponseWriter, r *http.Request, id fleet.DeviceID, denied string, issue func(context.Context, []byte) (pki.Certificate, error)) error {
	if !s.requests.allow(string(id)) {
		return fleet.Errorf(fleet.TooMany, "too many requests of this device; try again later")
	}
	csr, err := readCSR(w, r)
	if err != nil {
		return err
	}
	c, err := issue(r.Context(), csr)
	if err != nil {
		if f, ok := errors.AsType[*fleet.Error](err); ok && f.Kind != fleet.Unavailable && f.Code != "" {
			s.deny(r.Context(), id, denied, f.Code)
		}
		return err
	}
	cms, err := certsOnly(c.Chain[0])
	if err != nil {
		return err
	}
	send(w, r, "application/pkcs7-mime; smime-type=certs-only", cms)
	return nil
}

// deny logs a refusal, and puts it into the audit trail unless the device fills that already.
func (s *Server) deny(ctx context.Context, id fleet.DeviceID, what, why string) {
	s.c.Log.LogAttrs(ctx, slog.LevelWarn, "certificate refused over EST", slog.String("device", string(id)), slog.String("reason", why))
	if !s.denials.allow(string(id)) {
		return
	}
	if err := s.c.Enroll.DenyEST(ctx, time.Now(), id, what, why); err != nil {
		s.c.Log.LogAttrs(ctx, slog.LevelError, "a refusal could not be audited", slog.String("device", string(id)), slog.Any("error", err))
	}
}

// statuses is what each kind of error is here. The rest is 500.
var statuses = map[fleet.Kind]int{
	fleet.Invalid: http.StatusBadRequest, fleet.Unauthorized: http.StatusUnauthorized, fleet.Forbidden: http.StatusForbidden,
	fleet.NotFound: http.StatusNotFound, fleet.Conflict: http.StatusConflict, fleet.TooLarge: http.StatusRequestEntityTooLarge,
	fleet.Unprocessable: http.StatusUnprocessableEntity, fleet.TooMany: http.StatusTooManyRequests, fleet.Unavailable: http.StatusServiceUnavailable,
	fleet.Full: http.StatusInsufficientStorage,
}

// Codes of enroll and pki that have a status or a time of their own.
const (
	codeWait    = "wait"                  // an operator must decide
	codeSigning = "signing"               // stored, not signed yet
	codeTooMany = "too_many_certificates" // in a day
)

// errMediaType is a body of another type than PKCS #10.
var errMediaType = errors.New("the body must be application/pkcs10")

// refuse answers with why a request failed, as plain text (RFC 7030 §4.2.3). What a client is not to know is logged instead.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	status, retry, text := explain(err)
	level := slog.LevelDebug
	if status >= 500 && status != http.StatusServiceUnavailable {
		level = slog.LevelError
	}
	s.c.Log.LogAttrs(r.Context(), level, "EST request failed", slog.Int("status", status), slog.Any("error", err))
	if retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(retry/time.Second)))
	}
	if !r.Close && r.ContentLength != 0 && status != http.StatusAccepted {
		w.Header().Set("Connection", "close") // the body may be there still, unread
	}
	answer(w, r, status, "text/plain; charset=utf-8", []byte(text+"\n"))
}

func explain(err error) (status int, retry time.Duration, text string) {
	if errors.Is(err, errMediaType) {
		return http.StatusUnsupportedMediaType, 0, err.Error()
	}
	e, ok := errors.AsType[*fleet.Error](err)
	if !ok {
		return http.StatusInternalServerError, 0, "an error of the server"
	}
	status, ok = statuses[e.Kind]
	switch {
	case !ok:
		return http.StatusInternalServerError, 0, "an error of the server"
	case e.Code == codeWait:
		return http.StatusAccepted, 10 * time.Minute, e.Msg
	case e.Code == codeSigning:
		return http.StatusAccepted, 5 * time.Second, e.Msg
	case e.Code == codeTooMany:
		return status, time.Hour, e.Msg
	case e.Code == pki.CodeSignature: // who asks has not proven to hold the key
		return http.StatusForbidden, 0, e.Msg
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable:
		retry = 10 * time.Second
	}
	return status, retry, e.Msg
}

// send answers with der as base64. RFC 8951 §3.1 lets every recipient ignore the Content-Transfer-Encoding; clients of before
// insist on it.
func send(w http.ResponseWriter, r *http.Request, contentType string, der []byte) {
	w.Header().Set("Content-Transfer-Encoding", "base64")
	answer(w, r, http.StatusOK, contentType, encodeBody(der))
}

// answer writes a whole response: with a Content-Length, never chunked, never cached.
func answer(w http.ResponseWriter, r *http.Request, status int, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		// A write error means that the client is gone; it asks again.
		_, _ = w.Write(body)
	}
}

// address returns the part of a peer's address that failures are counted by: an IPv4 address, or the /64 network of an IPv6 one.
func address(remote string) string {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return remote
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	p, err := ip.Prefix(64)
	if err != nil {
		return remote
	}
	return p.String()
}
