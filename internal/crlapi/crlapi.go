// Package crlapi serves revocation lists (RFC 5280) and OCSP (RFC 6960, RFC 5019) over HTTP. Both are for everybody: what
// they say is signed, and public by its nature.
package crlapi

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"
	"golang.org/x/time/rate"

	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/revocation"
)

// Lists is revocation's use case.
type Lists interface {
	List(ctx context.Context, id pki.IssuerID) (pki.List, error)
	Answer(ctx context.Context, at time.Time, request []byte) []byte
}

// An OCSP answer costs a signature, so they are limited: no crowd of strangers takes the CPU from the fleet.
const (
	answersPerSecond = 100
	answersBurst     = 200
)

// New returns the handler of /crl/<issuer>.crl and /ocsp: of every path that Serves names. Its limits hold for all listeners
// that it is mounted on.
func New(l Lists, log *slog.Logger) http.Handler {
	return &server{lists: l, log: log, budget: rate.NewLimiter(answersPerSecond, answersBurst)}
}

const (
	listPath = "/crl/"
	ocspPath = "/ocsp"
)

// Serves reports whether a path is one of this package's.
func Serves(path string) bool {
	return strings.HasPrefix(path, listPath) || path == ocspPath || strings.HasPrefix(path, ocspPath+"/")
}

type server struct {
	lists  Lists
	log    *slog.Logger
	budget *rate.Limiter
}

// ServeHTTP implements http.Handler. It is no http.ServeMux, which would redirect a base64 text with two slashes in a row.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := r.URL.EscapedPath()
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	w.Header().Set("X-Content-Type-Options", "nosniff")
	name, isList := strings.CutPrefix(path, listPath)
	text, inPath := strings.CutPrefix(path, ocspPath+"/")
	switch {
	case isList && reads:
		s.list(w, r, name)
	case isList:
		refuse(w, "GET, HEAD")
	case (path == ocspPath || text == "") && r.Method == http.MethodPost:
		s.post(w, r)
	case inPath && text != "" && reads:
		s.get(w, r, text)
	case inPath && text != "":
		refuse(w, "GET, HEAD")
	case Serves(path):
		refuse(w, "POST")
	default:
		http.NotFound(w, r)
	}
}

func refuse(w http.ResponseWriter, allow string) {
	w.Header().Set("Allow", allow)
	http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
}

func (s *server) list(w http.ResponseWriter, r *http.Request, name string) {
	id, ok := strings.CutSuffix(name, ".crl")
	if raw, err := hex.DecodeString(id); !ok || err != nil || len(raw) == 0 || len(raw) > 32 {
		http.Error(w, "no such list: /crl/<key id of the issuer, hex>.crl", http.StatusNotFound)
		return
	}
	l, err := s.lists.List(r.Context(), pki.IssuerID(strings.ToLower(id)))
	switch {
	case fleet.Is(err, fleet.NotFound):
		http.Error(w, "no such list", http.StatusNotFound)
		return
	case err != nil:
		s.log.Error("a revocation list cannot be read", "error", err)
		http.Error(w, "try again later", http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/pkix-crl")
	h.Set("ETag", fmt.Sprintf(`"%d"`, l.Number))
	h.Set("Cache-Control", "public, max-age=3600") // another one may be signed at any moment
	http.ServeContent(w, r, "", l.At, strings.NewReader(string(l.DER)))
}

func (s *server) post(w http.ResponseWriter, r *http.Request) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/ocsp-request" {
		http.Error(w, "send application/ocsp-request", http.StatusUnsupportedMediaType)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, revocation.MaxRequest))
	if err != nil {
		status := http.StatusBadRequest
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			status = http.StatusRequestEntityTooLarge
		}
		http.Error(w, http.StatusText(status), status)
		return
	}
	s.answer(w, r, body, false)
}

// get takes the request from the path, as base64 (RFC 6960 appendix A.1). Clients differ in what they escape.
func (s *server) get(w http.ResponseWriter, r *http.Request, text string) {
	if len(text) > 2*revocation.MaxRequest {
		http.Error(w, "the request is too long", http.StatusRequestURITooLong)
		return
	}
	if plain, err := url.PathUnescape(text); err == nil {
		text = plain
	}
	body, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(text, " ", "+"))
	if err != nil {
		s.write(w, ocsp.MalformedRequestErrorResponse)
		return
	}
	s.answer(w, r, body, true)
}

func (s *server) answer(w http.ResponseWriter, r *http.Request, request []byte, cacheable bool) {
	if !s.budget.Allow() {
		w.Header().Set("Retry-After", "1")
		s.write(w, ocsp.TryLaterErrorResponse)
		return
	}
	out := s.lists.Answer(r.Context(), time.Now(), request)
	if cacheable {
		sum := sha256.Sum256(out)
		w.Header().Set("ETag", `"`+hex.EncodeToString(sum[:16])+`"`)
		w.Header().Set("Cache-Control", "public, max-age=60, no-transform, must-revalidate")
	}
	s.write(w, out)
}

func (s *server) write(w http.ResponseWriter, der []byte) {
	w.Header().Set("Content-Type", "application/ocsp-response")
	_, _ = w.Write(der) // a client that is gone is no fault
}
