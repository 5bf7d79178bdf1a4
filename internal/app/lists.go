package app

import (
	"context"
	"net/http"
	"time"

	"muster/internal/crlapi"
	"muster/internal/enroll"
	"muster/internal/expiry"
	"muster/internal/fleet"
	"muster/internal/revocation"
)

// expiringLists are the revocation lists: who checks certificates by one that has ended believes none.
func expiringLists(l *revocation.Lists) func(context.Context, time.Time) ([]expiry.Item, error) {
	return func(ctx context.Context, _ time.Time) (out []expiry.Item, err error) {
		lists, err := l.All(ctx)
		for _, list := range lists {
			out = append(out, expiry.Item{
				Name: string(list.Issuer), Kind: "crl", NotBefore: list.At, NotAfter: list.Next, Renews: list.At.Add(24 * time.Hour),
				Fix: "see why musterd does not sign it any more: muster certs crl --issuer " + string(list.Issuer) + " --sign-now",
			})
		}
		return out, err
	}
}

// refusals watches for refused logins at the broker, as enroll wants it.
func (a *App) refusals(id fleet.DeviceID) (seen func() []enroll.Refusal, stop func()) {
	logins, stop := a.index.WatchLogins(id)
	return func() (out []enroll.Refusal) {
		for _, l := range logins() {
			out = append(out, enroll.Refusal(l))
		}
		return out
	}, stop
}

// withLists serves revocation lists and OCSP, which are for everybody, beside the API.
func withLists(api, public http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if crlapi.Serves(r.URL.Path) {
			public.ServeHTTP(w, r)
			return
		}
		api.ServeHTTP(w, r)
	})
}
