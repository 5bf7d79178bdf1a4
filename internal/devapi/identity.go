package devapi

import (
	"crypto/sha256"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/labstack/echo/v4"

	"muster/internal/fleet"
)

// Budgets. A password has 256 random bits, so nobody guesses one: failures are limited to spare the log and the CPU, and
// never keep a right password out, not even from the same address (a whole site of devices may be behind it). A device's
// own requests are limited so that a broken one does not starve the others; the burst holds the ranges of a large image,
// which some clients fetch in pieces of 64 KiB (esp32.md §6.2).
const (
	failuresPerSecond = 0.2
	failuresBurst     = 10
	requestsPerSecond = 5
	requestsBurst     = 600
	maxPassword       = 128 // bytes
)

// deviceKey holds the fleet.DeviceID of a request in its echo.Context, recoveryKey whether it came with a password.
const (
	deviceKey   = "device"
	recoveryKey = "recovery"
)

func deviceOf(c echo.Context) fleet.DeviceID {
	d, _ := c.Get(deviceKey).(fleet.DeviceID)
	return d
}

// byCertificate lets in the device that the verified certificate names, if that certificate is one of its present ones
// and the device is not disabled. It is asked at every request: a connection may outlive a revocation.
func (a *API) byCertificate(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		s := c.Request().TLS
		if s == nil {
			return fleet.Errorf(fleet.Unauthorized, "a client certificate is needed")
		}
		device, serial, err := identify(*s)
		if err != nil {
			return err
		}
		if ok, reason := a.c.Admission.Admit(device, serial, time.Now()); !ok {
			a.refused(c, device, reason)
			return fleet.Coded(fleet.Forbidden, "not_admitted", "this certificate does not let the device in: %s", reason)
		}
		c.Set(deviceKey, device)
		return next(c)
	}
}

// byPassword lets in the device that user name and password (RFC 7617) name.
func (a *API) byPassword(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		device, ok := a.password(c)
		if !ok {
			c.Response().Header().Set(echo.HeaderWWWAuthenticate, `Basic realm="muster recovery", charset="UTF-8"`)
			if !a.failures.allow(address(c.Request().RemoteAddr)) {
				return fleet.Errorf(fleet.TooMany, "too many failed logins; try again later")
			}
			return fleet.Errorf(fleet.Unauthorized, "user name (device id) and fallback password are needed")
		}
		c.Set(deviceKey, device)
		c.Set(recoveryKey, true)
		return next(c)
	}
}

func (a *API) password(c echo.Context) (fleet.DeviceID, bool) {
	user, password, ok := c.Request().BasicAuth()
	if !ok || len(password) > maxPassword {
		return "", false
	}
	device, err := fleet.ParseDeviceID(user)
	if err != nil {
		return "", false
	}
	ok, reason := a.c.Admission.AdmitPassword(device, fleet.HashOf(sha256.Sum256([]byte(password))))
	if !ok {
		a.refused(c, device, reason)
	}
	return device, ok
}

// refused notes who was kept out. Device and reason are checked words; the path may be anything and is left out.
func (a *API) refused(c echo.Context, device fleet.DeviceID, reason string) {
	a.c.Log.LogAttrs(c.Request().Context(), slog.LevelInfo, "device refused",
		slog.String("device", string(device)), slog.String("reason", reason), slog.String("peer", c.Request().RemoteAddr))
	a.c.Refused(device, reason, c.Request().RemoteAddr)
}

// budget limits how much of the server one device may use, by either door.
func (a *API) budget(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		device := string(deviceOf(c))
		if !a.requests.allow(device) {
			return fleet.Errorf(fleet.TooMany, "too many requests; try again later")
		}
		if !a.busy.enter(device) {
			return fleet.Errorf(fleet.TooMany, "the device has %d requests under way already", perDevice)
		}
		defer a.busy.leave(device)
		return next(c)
	}
}

// noBody refuses requests that carry one: no request of this API does, and waiting for it would hold the connection.
func noBody(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if r := c.Request(); r.ContentLength != 0 {
			// Errors of a connection that cannot be closed in time show when the answer is written.
			_ = http.NewResponseController(c.Response()).SetReadDeadline(time.Now().Add(bodyTimeout))
			c.Response().Header().Set("Connection", "close")
			if r.Method == http.MethodGet || r.Method == http.MethodHead {
				return fleet.Errorf(fleet.Invalid, "the request has a body; leave it out")
			}
		}
		return next(c)
	}
}

// address returns the part of a peer's address that failures are counted by: an IPv4 address, or the network of an IPv6
// one, because a host has as many addresses there as it likes.
func address(remote string) string {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return remote
	}
	ip := ap.Addr().Unmap()
	if ip.Is4() {
		return ip.String()
	}
	p, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return remote
	}
	return p.String()
}
