package devapi

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/labstack/echo/v4"

	"muster/internal/firmware"
	"muster/internal/fleet"
)

// esp32FOTA reads versions of one to three numbers alone; any other counts as 0.0.0 there (esp32.md §6.4).
var fotaVersion = regexp.MustCompile(`^[0-9]{1,5}(\.[0-9]{1,5}){0,2}$`)

// fotaPrefix is where a release's image lies behind its signature for esp32FOTA. Below /fw/ it is as it was uploaded.
const fotaPrefix = "/fota/"

// fotaManifest serves esp32FOTA (esp32.md §6.4): one entry, its version above the device's if there is something to do, and
// 0.0.0 if not. The library tells nothing of what runs, nor whether it checks signatures, so the sketch may:
// ?img=SHA-256&v=VERSION&sig=BYTES. Without sig the image has a signature before it if the release has one.
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
	sig := q.Get("sig")
	switch sig {
	case "", "0", "256", "384", "512":
	default:
		return fleet.Errorf(fleet.Invalid, "sig is the length of the signature that the sketch expects before the image: 256, 384 or 512 bytes, or 0 for none")
	}
	g, ok, err := a.c.Poller.Poll(r.Context(), device, run)
	if err != nil {
		return err
	}
	path := g.Path()
	if ok {
		var why string
		if path, why, err = fotaPath(g.Release, sig); err != nil {
			return err
		}
		if why != "" {
			ok = false
			if err := a.c.Poller.Unfit(r.Context(), device, g, why); err != nil {
				return err
			}
		}
	}
	entry := struct {
		Type    string `json:"type"`
		Version string `json:"version"`
		URL     string `json:"url"`
	}{kind, "0.0.0", "https://" + r.Host + "/fw/none"}
	if ok {
		entry.Version = string(g.Version)
		entry.URL = (&url.URL{Scheme: "https", Host: r.Host, Path: path}).String()
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

// fotaPath returns where a sketch that expects sig bytes of signature (empty: it did not say) finds the image of rel, or why
// it could not take it.
func fotaPath(rel firmware.Release, sig string) (path, why string, err error) {
	if !fotaVersion.MatchString(string(rel.Version)) {
		return "", "esp32FOTA cannot read the version " + string(rel.Version) + ": it knows three numbers alone", nil
	}
	signature, err := rel.FOTA.Bytes()
	if err != nil {
		return "", "", err
	}
	has := strconv.Itoa(len(signature))
	switch {
	case sig == "0" || sig == "" && len(signature) == 0:
		return rel.Path(), "", nil
	case sig != "" && len(signature) == 0:
		return "", "its esp32FOTA expects a signature of " + sig + " bytes before the image, and the release has none: muster firmware esp32fota", nil
	case sig != "" && sig != has:
		return "", "its esp32FOTA expects a signature of " + sig + " bytes before the image, and that of the release has " + has, nil
	}
	return fotaPrefix + strings.TrimPrefix(rel.Path(), "/fw/"), "", nil
}

// fotaImage serves the signature of a release for esp32FOTA and its image behind it as one file.
func (a *API) fotaImage(c echo.Context) error {
	return a.deliver(c, func(rel firmware.Release) ([]byte, error) {
		b, err := rel.FOTA.Bytes()
		if err == nil && len(b) == 0 {
			err = fleet.Errorf(fleet.NotFound, "this release has no signature for esp32FOTA")
		}
		return b, err
	})
}

// prefixed is a file that begins with prefix and goes on with size bytes of image.
type prefixed struct {
	prefix []byte
	image  io.ReadSeeker
	size   int64
	at     int64
	placed bool // image stands where at says
}

// Read implements io.Reader.
func (p *prefixed) Read(b []byte) (int, error) {
	head := int64(len(p.prefix))
	if p.at < head {
		n := copy(b, p.prefix[p.at:])
		p.at += int64(n)
		return n, nil
	}
	if !p.placed {
		if _, err := p.image.Seek(p.at-head, io.SeekStart); err != nil {
			return 0, err
		}
		p.placed = true
	}
	n, err := p.image.Read(b)
	p.at += int64(n)
	return n, err
}

// Seek implements io.Seeker.
func (p *prefixed) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += p.at
	case io.SeekEnd:
		offset += int64(len(p.prefix)) + p.size
	}
	if offset < 0 {
		return 0, errors.New("seek before the beginning")
	}
	p.at, p.placed = offset, false
	return offset, nil
}

// prefixedTag is a strong validator of both together.
func prefixedTag(prefix []byte, image fleet.Hash) string {
	sum := sha256.Sum256(append([]byte(image), prefix...))
	return `"esp32fota-` + hex.EncodeToString(sum[:]) + `"`
}
