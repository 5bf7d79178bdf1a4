package devapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// signedSuffix makes of an image's path that of its manifest.
const signedSuffix = ".jws"

// file serves an image or, under its path with .jws behind, its signed manifest: a device that holds the public keys of
// releases need not trust muster to send only what was released.
func (a *API) file(c echo.Context) error {
	name, ok := strings.CutSuffix(c.Param("name"), signedSuffix)
	if !ok {
		return a.image(c)
	}
	device := deviceOf(c)
	g, err := a.c.Grants.Granted(c.Request().Context(), device, name)
	if err != nil {
		if fleet.Is(err, fleet.NotFound) {
			a.refused(c, device, "no-grant")
		}
		return err
	}
	return serveBytes(c, "application/jose", immutable, []byte(g.JWS))
}

// immutable is the Cache-Control of bytes that never change under their path.
const immutable = "private, max-age=31536000, immutable, no-transform"

// image serves the image of the job that the device is at, as http.ServeContent does with three tightenings: see
// oneRange. Without a grant the answer is 404, whatever exists.
func (a *API) image(c echo.Context) error { return a.deliver(c, nil) }

// deliver is image for a file that may begin with something else; before says with what, nil: nothing.
func (a *API) deliver(c echo.Context, before func(firmware.Release) ([]byte, error)) error {
	device, r := deviceOf(c), c.Request()
	grant, err := a.c.Grants.Granted(r.Context(), device, c.Param("name"))
	rel := grant.Release
	if err != nil {
		if fleet.Is(err, fleet.NotFound) {
			a.refused(c, device, "no-grant")
		}
		return err
	}
	file := body{size: rel.Size, tag: etag(string(rel.SHA256)), md5: rel.MD5}
	var prefix []byte
	if before != nil {
		if prefix, err = before(rel); err != nil {
			return err
		}
		file = body{size: rel.Size + int64(len(prefix)), tag: prefixedTag(prefix, rel.SHA256)}
	}
	content, done, err := a.content(r.Context(), rel)
	if err != nil {
		return err
	}
	defer done()
	if len(prefix) > 0 {
		content = &prefixed{prefix: prefix, image: content, size: rel.Size}
	}

	pace, again := a.pace.enter(grant, announced(r, file.tag, file.size), time.Now())
	if again > 0 {
		c.Response().Header().Set(echo.HeaderRetryAfter, later(again))
		return fleet.Coded(fleet.Unavailable, "byte_budget", "others are downloading; try again after the time in Retry-After")
	}
	if pace != nil {
		defer func() { pace.leave(time.Now()) }()
	}

	h := c.Response().Header()
	if file.md5 != "" {
		h["x-MD5"] = []string{file.md5} // lower-case hex: old Arduino cores compare it byte by byte (esp32.md §6.1)
	}
	h.Set("ETag", file.tag)
	h.Set(echo.HeaderContentType, echo.MIMEOctetStream)
	h.Set(echo.HeaderCacheControl, immutable)
	began := time.Now()
	serve(c, content, file.size, a.guard(c, device, pace))
	a.c.Served(Served{
		Device: device, Product: rel.Product, Version: rel.Version, Recovery: c.Get(recoveryKey) == true, Status: c.Response().Status,
		Bytes: c.Response().Size, Complete: complete(c), Took: time.Since(began),
	})
	return nil
}

// body is what is delivered: an image, or one behind a prefix.
type body struct {
	size int64  // bytes
	tag  string // ETag
	md5  string // empty: nobody asks for it
}

// guard returns what stands between the body and the device: the byte budget, and that the grant still holds. A rollout that
// is aborted takes its grants back, and what is half sent then ends half sent.
func (a *API) guard(c echo.Context, device fleet.DeviceID, d *download) *guarded {
	ctx, name := c.Request().Context(), c.Param("name")
	return &guarded{ResponseWriter: c.Response(), ctx: ctx, d: d, checked: time.Now(), granted: func() error {
		_, err := a.c.Grants.Granted(ctx, device, name)
		if err != nil && !fleet.Is(err, fleet.NotFound) {
			return nil // a store that does not answer ends no download
		}
		return err
	}}
}

// complete reports whether the body that the header announced was written. Only 200 and 206 to a GET have one that counts.
func complete(c echo.Context) bool {
	w := c.Response()
	if c.Request().Method == http.MethodHead || w.Status >= 300 {
		return true
	}
	return w.Header().Get(echo.HeaderContentLength) == itoa(w.Size)
}

// content returns the bytes of a release's image for one request, and what to call after it.
func (a *API) content(ctx context.Context, rel firmware.Release) (io.ReadSeeker, func(), error) {
	b, err := a.cache.get(rel.SHA256, rel.Size, func() ([]byte, error) { return a.load(rel) })
	if err != nil {
		return nil, nil, err
	}
	if b != nil {
		return &memory{Reader: bytes.NewReader(b), bytes: b}, func() {}, nil
	}
	f, err := a.open(rel)
	if err != nil {
		return nil, nil, err
	}
	return f, func() {
		if err := f.Close(); err != nil {
			a.c.Log.LogAttrs(ctx, slog.LevelWarn, "close an image", slog.Any("error", err))
		}
	}, nil
}

// open returns the file of rel. That it is missing or of another size is a fault of muster, not the device's.
func (a *API) open(rel firmware.Release) (io.ReadSeekCloser, error) {
	f, size, err := a.c.Images.Open(rel.SHA256)
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "the image of %s %s cannot be opened; publish the release again", rel.Product, rel.Version)
	}
	if size != rel.Size {
		return nil, errors.Join(fleet.Errorf(fleet.Internal, "the image of %s %s has %d bytes on disk instead of %d", rel.Product, rel.Version, size, rel.Size), f.Close())
	}
	return f, nil
}

// load reads the whole image and checks it once more, so that a damaged disk costs no device a download.
func (a *API) load(rel firmware.Release) ([]byte, error) {
	f, err := a.open(rel)
	if err != nil {
		return nil, err
	}
	b := make([]byte, rel.Size)
	_, err = io.ReadFull(f, b)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "the image of %s %s cannot be read", rel.Product, rel.Version)
	}
	if fleet.HashOf(sha256.Sum256(b)) != rel.SHA256 {
		return nil, fleet.Errorf(fleet.Internal, "the image of %s %s is damaged on disk; publish the release again", rel.Product, rel.Version)
	}
	return b, nil
}

// etag is a strong validator: the bytes are named by their hash.
func etag(sum string) string { return `"sha256-` + sum + `"` }

// serveBytes serves a small document.
func serveBytes(c echo.Context, kind, caching string, b []byte) error {
	sum := sha256.Sum256(b)
	h := c.Response().Header()
	h.Set("ETag", etag(hex.EncodeToString(sum[:])))
	h.Set(echo.HeaderContentType, kind)
	h.Set(echo.HeaderCacheControl, caching)
	serve(c, bytes.NewReader(b), int64(len(b)), nil)
	return nil
}

// serve answers with content, which has size bytes, through g; nil: as it is.
func serve(c echo.Context, content io.ReadSeeker, size int64, g *guarded) {
	r, w := c.Request(), c.Response()
	w.Header().Set("X-Content-Type-Options", "nosniff")
	switch oneRange(r.Header.Get("Range")) {
	case ignored:
		r.Header.Del("Range")
	case unsatisfiable:
		w.Header().Set("Content-Range", "bytes */"+itoa(size))
		w.Header().Set(echo.HeaderContentLength, "0")
		w.Header().Del(echo.HeaderContentType)
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	}
	http.ServeContent(&bulk{Response: w, to: g}, r, "", time.Time{}, content)
}

type verdict int

const (
	taken         verdict = iota // http.ServeContent does the right thing
	ignored                      // answer as if there were none (RFC 9110 §14.2)
	unsatisfiable                // 416
)

// oneRange judges a Range header more strictly than http.ServeContent. Several ranges would become multipart, which no
// device reads and which multiplies what is sent. bytes=-0, the last no bytes (also as -+0), would get a 206 without a
// body, on which a client that resumes would loop.
func oneRange(header string) verdict {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return taken // none, or another unit
	}
	if strings.Contains(spec, ",") {
		return ignored
	}
	first, last, ok := strings.Cut(strings.TrimSpace(spec), "-")
	switch {
	case !ok, strings.Trim(first+last, "0123456789") != "": // not the grammar of RFC 9110 §14.1.1
		return unsatisfiable
	case first == "" && strings.Trim(last, "0") == "":
		return unsatisfiable
	}
	return taken
}

// memory is an image in memory whose bytes bulk can take as they are.
type memory struct {
	*bytes.Reader
	bytes []byte
}

// take returns the next n bytes, or fewer at the end, and moves on.
func (m *memory) take(n int64) []byte {
	from := int64(len(m.bytes)) - int64(m.Len())
	b := m.bytes[from:min(from+n, int64(len(m.bytes)))]
	// Cannot fail: it does not move beyond the end.
	_, _ = m.Seek(int64(len(b)), io.SeekCurrent)
	return b
}

// bulkSize is how much goes to TLS at once, in bytes: whole records of 16 KiB, many of them.
const bulkSize = 256 << 10

var buffers = sync.Pool{New: func() any { return new([bulkSize]byte) }}

// bulk writes in large pieces what io.CopyN in http.ServeContent would copy in pieces of 32 KiB, and what is in memory
// without copying.
type bulk struct {
	*echo.Response
	to *guarded // nil: nothing in between
}

// Write implements io.Writer.
func (w *bulk) Write(b []byte) (int, error) {
	if w.to != nil {
		return w.to.Write(b)
	}
	return w.Response.Write(b)
}

// ReadFrom implements io.ReaderFrom.
func (w *bulk) ReadFrom(r io.Reader) (int64, error) {
	if l, ok := r.(*io.LimitedReader); ok {
		if m, ok := l.R.(*memory); ok {
			return w.writeAll(m.take(l.N))
		}
	}
	buf := buffers.Get().(*[bulkSize]byte)
	defer buffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, buf[:])
}

func (w *bulk) writeAll(b []byte) (int64, error) {
	var done int64
	for len(b) > 0 {
		n, err := w.Write(b[:min(bulkSize, len(b))])
		done += int64(n)
		if err != nil {
			return done, err
		}
		b = b[n:]
	}
	return done, nil
}
