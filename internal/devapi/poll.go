package devapi

import (
	"context"
	"net/http"
	"strconv"
	"strings"

	"github.com/labstack/echo/v4"

	"muster/internal/fleet"
	"muster/internal/ota"
)

// Poller decides for clients that ask for an update by themselves.
type Poller interface {
	// Poll says what a device may have now, under the same gates as one that was rung; false: nothing.
	Poll(ctx context.Context, device fleet.DeviceID, run Running) (ota.Grant, bool, error)
	// Fetching hears that a device begins to fetch what it was granted, and that all of it was sent.
	Fetching(ctx context.Context, device fleet.DeviceID, g ota.Grant, sent bool) error
	// Unfit hears that the device cannot take what it was granted, and why.
	Unfit(ctx context.Context, device fleet.DeviceID, g ota.Grant, why string) error
}

// Running is what a polling client says of itself. It is the device's own word: who it is says its certificate.
type Running struct {
	Image   fleet.Hash // appended SHA-256 of the image that runs; empty if it did not say
	Version string
}

// httpUpdate serves Arduino's HTTPUpdate (esp32.md §6.1): the image at once, or 304 if there is nothing to do. Such a client
// takes 200 with a Content-Length, no redirect, and reports nothing.
func (a *API) httpUpdate(c echo.Context) error {
	r, device := c.Request(), deviceOf(c)
	if mode := r.Header.Get("x-ESP32-mode"); mode != "" && mode != "sketch" {
		return c.NoContent(http.StatusNotModified) // file systems are not rolled out
	}
	run := Running{Version: plainVersion(r.Header.Get("x-ESP32-version"))}
	if sum := r.Header.Get("x-ESP32-sketch-sha256"); sum != "" {
		hash, err := fleet.ParseHash(strings.ToLower(sum))
		if err != nil {
			return fleet.Errorf(fleet.Invalid, "x-ESP32-sketch-sha256 is not a SHA-256 in hex")
		}
		run.Image = hash
	}
	g, ok, err := a.c.Poller.Poll(r.Context(), device, run)
	if err != nil {
		return err
	}
	if !ok {
		return c.NoContent(http.StatusNotModified)
	}
	if free, err := strconv.ParseInt(r.Header.Get("x-ESP32-free-space"), 10, 64); err == nil && free > 0 && g.Size > free {
		why := "the image has " + strconv.FormatInt(g.Size, 10) + " bytes, its next OTA partition " + strconv.FormatInt(free, 10)
		if err := a.c.Poller.Unfit(r.Context(), device, g, why); err != nil {
			return err
		}
		return c.NoContent(http.StatusNotModified)
	}
	c.SetParamNames("name")
	c.SetParamValues(string(g.SHA256))
	get := r.Method == http.MethodGet
	if get {
		if err := a.c.Poller.Fetching(r.Context(), device, g, false); err != nil {
			return err
		}
	}
	if err := a.image(c); err != nil || !get || c.Response().Status != http.StatusOK || !complete(c) {
		return err
	}
	return a.c.Poller.Fetching(context.WithoutCancel(r.Context()), device, g, true)
}

// plainVersion returns s if it is short and printable, else nothing: it is kept and shown.
func plainVersion(s string) string {
	if len(s) > 32 {
		return ""
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return ""
		}
	}
	return s
}
