package httpapi

import (
	"encoding/base64"
	"errors"
	"net/http"
	"regexp"
	"time"

	"muster/api"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
)

func (s *Server) listSigningKeys(c *call) (answer, error) {
	ks, err := s.c.Firmware.Keys(c.ctx)
	if err != nil {
		return answer{}, err
	}
	out := api.SigningKeyList{Items: []api.SigningKey{}}
	for _, k := range ks {
		out.Items = append(out.Items, showKey(k))
	}
	return ok(out)
}

func (s *Server) addSigningKey(c *call) (answer, error) {
	var in api.NewSigningKey
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	k, err := s.c.Firmware.AddKey(c.ctx, c.at, []byte(in.PublicKey), fleet.ProductID(in.Product), c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showKey(k))
}

var keyID = regexp.MustCompile(`^[A-Za-z0-9_-]{43}$`)

func (s *Server) revokeSigningKey(c *call) (answer, error) {
	id := c.echo.Param("key")
	if !keyID.MatchString(id) {
		return answer{}, fleet.Coded(fleet.Invalid, "id_invalid", "key id: it is the key's RFC 7638 thumbprint, 43 characters of base64url")
	}
	k, err := s.c.Firmware.RevokeKey(c.ctx, c.at, id, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showKey(k))
}

func showKey(k firmware.Key) api.SigningKey {
	return api.SigningKey{ID: k.ID, Product: string(k.Product), PublicKey: string(k.PEM()), AddedAt: k.AddedAt, AddedBy: k.AddedBy, Revoked: k.Revoked}
}

func (s *Server) listReleases(c *call) (answer, error) {
	page, err := s.page(c)
	if err != nil {
		return answer{}, err
	}
	product, err := c.product()
	if err != nil {
		return answer{}, err
	}
	rs, err := s.c.Firmware.Releases(c.ctx, product)
	if err != nil {
		return answer{}, err
	}
	rs, next := cut(rs, page, releaseKey)
	out := api.ReleaseList{Items: []api.Release{}}
	for _, r := range rs {
		shown := showRelease(r)
		shown.JWS = ""
		out.Items = append(out.Items, shown)
	}
	if next != "" {
		out.NextCursor = s.next(c, next)
	}
	return ok(out)
}

func releaseKey(r firmware.Release) string { return string(r.Product) + " " + string(r.Version) }

// cut returns the page of a list that fits in memory as a whole, and the key of its last item if there are others. If the
// item after which the page begins is gone, the list begins again.
func cut[T any](all []T, page fleet.Page, key func(T) string) (part []T, next string) {
	if page.After != "" {
		for i := range all {
			if key(all[i]) == page.After {
				all = all[i+1:]
				break
			}
		}
	}
	if len(all) <= page.Limit {
		return all, ""
	}
	return all[:page.Limit], key(all[page.Limit-1])
}

func (s *Server) getRelease(c *call) (answer, error) {
	product, version, err := c.release()
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Firmware.Release(c.ctx, product, version)
	if err != nil {
		return answer{}, err
	}
	return ok(showRelease(r))
}

// release reads which release a path names.
func (c *call) release() (fleet.ProductID, firmware.Version, error) {
	product, err := idInvalid(fleet.ParseProductID(c.echo.Param("product")))
	if err != nil {
		return "", "", err
	}
	version, err := idInvalid(firmware.ParseVersion(c.echo.Param("version")))
	return product, version, err
}

func (s *Server) setFloor(c *call) (answer, error) {
	var in api.FloorMark
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	return s.markFloor(c, true, in.Why)
}

func (s *Server) clearFloor(c *call) (answer, error) { return s.markFloor(c, false, "") }

func (s *Server) markFloor(c *call, on bool, why string) (answer, error) {
	product, version, err := c.release()
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Firmware.SetFloor(c.ctx, c.at, product, version, on, why, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showRelease(r))
}

func (s *Server) setESP32FOTA(c *call) (answer, error) {
	var in api.NewESP32FOTA
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	product, version, err := c.release()
	if err != nil {
		return answer{}, err
	}
	signature, err := base64.StdEncoding.DecodeString(in.Signature)
	if err != nil {
		return answer{}, fleet.Errorf(fleet.Invalid, "signature: use base64 with padding (RFC 4648 §4)")
	}
	r, err := s.c.Firmware.SignForFOTA(c.ctx, c.at, product, version, ota.FOTAOrder{Signature: signature, PublicKey: []byte(in.PublicKey), NewKey: in.NewKey, By: c.who.Name})
	if err != nil {
		return answer{}, err
	}
	return ok(showRelease(r))
}

func (s *Server) clearESP32FOTA(c *call) (answer, error) {
	product, version, err := c.release()
	if err != nil {
		return answer{}, err
	}
	r, err := s.c.Firmware.UnsignForFOTA(c.ctx, c.at, product, version, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return ok(showRelease(r))
}

// maxManifest is the longest signed manifest in bytes.
const maxManifest = 8 << 10

func (s *Server) uploadRelease(c *call) (answer, error) {
	r := c.echo.Request()
	jws := r.Header.Values("Muster-Manifest")
	if len(jws) != 1 || jws[0] == "" || len(jws[0]) > maxManifest {
		return answer{}, fleet.Coded(fleet.Invalid, "manifest_missing", "send the signed manifest, a compact JWS of at most %d bytes, once in the header Muster-Manifest", maxManifest)
	}
	burn, err := c.flag("burn_secure_version")
	if err != nil {
		return answer{}, err
	}
	// An image may take longer than any other call, over a line that is slow but not dead. A server that cannot change its
	// deadlines (a test's recorder) has none.
	rc := http.NewResponseController(c.echo.Response())
	until := time.Now().Add(uploadTimeout)
	for _, set := range []func(time.Time) error{rc.SetReadDeadline, rc.SetWriteDeadline} {
		if err := set(until); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return answer{}, err
		}
	}
	body := http.MaxBytesReader(c.echo.Response(), r.Body, r.ContentLength)
	rel, err := s.c.Firmware.Publish(c.ctx, c.at, ota.Upload{JWS: jws[0], Image: body, By: c.who.Name, BurnSecureVersion: burn != nil && *burn})
	if err != nil {
		return answer{}, err
	}
	if rel.UploadedAt.Equal(c.at) {
		return created(showRelease(rel))
	}
	return ok(showRelease(rel))
}

func showRelease(r firmware.Release) api.Release {
	return api.Release{
		Product: string(r.Product), Version: string(r.Version), Size: r.Size, SHA256: string(r.SHA256), ImageHash: string(r.ImageHash),
		Chip: r.Chip, SecureVersion: r.SecureVersion, MinVersion: string(r.MinVersion), KeyID: r.KeyID, JWS: r.JWS,
		UploadedAt: r.UploadedAt, UploadedBy: r.UploadedBy, MinChipRevision: r.MinChipRevision, MaxChipRevision: r.MaxChipRevision,
		Floor: r.Floor, FloorWhy: r.FloorWhy, FloorBy: r.FloorBy, FloorAt: r.FloorAt,
		Esp32FotaKey: string(r.FOTA.Key), Esp32FotaBy: r.FOTA.By, Esp32FotaAt: r.FOTA.At,
	}
}
