package devapi

import (
	"crypto/tls"
	"net/http"
	"strings"

	"muster/internal/fleet"
)

// estPrefix is where EST lives (RFC 7030 §3.2.2).
const estPrefix = "/.well-known/est/"

// Identify returns which device and which certificate of it a connection of the listener for certificates stands for, or an
// Unauthorized error.
func Identify(s tls.ConnectionState) (fleet.DeviceID, fleet.Serial, error) { return identify(s) }

// withEST hands the requests for EST, which has its own rules for bodies and errors, to est; nil: there is none.
func withEST(own, est http.Handler) http.Handler {
	if est == nil {
		return own
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, estPrefix) {
			est.ServeHTTP(w, r)
			return
		}
		own.ServeHTTP(w, r)
	})
}

// withRevocation hands requests for what is public by its nature, revocation lists and OCSP, to lists; nil: there are none.
// A body is OCSP's own affair.
func withRevocation(own, lists http.Handler, takes func(path string) bool) http.Handler {
	if lists == nil || takes == nil {
		return own
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if takes(r.URL.Path) {
			lists.ServeHTTP(w, r)
			return
		}
		own.ServeHTTP(w, r)
	})
}
