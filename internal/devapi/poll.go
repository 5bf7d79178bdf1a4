package devapi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
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

// esp32FOTA reads versions of one to three numbers alone; any other counts as 0.0.0 there (esp32.md §6.4).
var fotaVersion = regexp.MustCompile(`^[0-9]{1,5}(\.[0-9]{1,5}){0,2}$`)

// fotaManifest serves esp32FOTA (esp32.md §6.4): one entry, its version above the device's if there is something to do, and
// 0.0.0 if not. The library tells nothing of what runs, so the sketch may: ?img=SHA-256&v=VERSION.
func (a *API) fotaManifest(c echo.Context) error {
	r, device := c.Request(), deviceOf(c)
	q := r.URL.Query()
	kind := q.Get("type")
	if kind == "" {
		return fleet.Errorf(fleet.Invalid, "type is missing: put the name that the sketch gave to esp32FOTA into the manifest's URL, ?type=NAME")
	}
	if len(kind) > 40 || plainVersion(kind) == "" {
		return fleet.Errorf(fleet.Invalid, "type must be 1 to 40 printable characters")
	}
	run := Running{Version: plainVersion(q.Get("v"))}
	if sum := q.Get("img"); sum != "" {
		hash, err := fleet.ParseHash(strings.ToLower(sum))
		if err != nil {
			return fleet.Errorf(fleet.Invalid, "img is not a SHA-256 in hex")
		}
		run.Image = hash
	}
	g, ok, err := a.c.Poller.Poll(r.Context(), device, run)
	if err != nil {
		return err
	}
	if ok && !fotaVersion.MatchString(string(g.Version)) {
		ok = false
		if err := a.c.Poller.Unfit(r.Context(), device, g, "esp32FOTA cannot read the version "+string(g.Version)+": it knows three numbers alone"); err != nil {
			return err
		}
	}
	entry := struct {
		Type    string `json:"type"`
		Version string `json:"version"`
		URL     string `json:"url"`
	}{kind, "0.0.0", "https://" + r.Host + "/fw/none"}
	if ok {
		entry.Version = string(g.Version)
		entry.URL = (&url.URL{Scheme: "https", Host: r.Host, Path: g.Path()}).String()
		if err := a.c.Poller.Fetching(r.Context(), device, g, false); err != nil {
			return err
		}
	}
	body, err := json.Marshal(entry)
	if err != nil {
		return fleet.Wrap(fleet.Internal, err, "the manifest cannot be written")
	}
	return serveBytes(c, echo.MIMEApplicationJSON, "no-store", body)
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
