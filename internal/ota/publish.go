package ota

import (
	"cmp"
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"time"

	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/fleet"
)

// Upload is an image that is to become a release.
type Upload struct {
	JWS   string // the signed manifest
	Image io.Reader
	By    string // who publishes it
	// BurnSecureVersion says that the release is meant to raise the secure version of its product, which devices burn
	// into eFuses for good.
	BurnSecureVersion bool
}

// Publish stores an image and its signed manifest as a release, for good. Publishing the same again changes nothing and
// returns what there is, so a client may repeat a request whose answer it lost; it also brings back an image file that
// was lost. An ESP32 image must be whole and what its manifest says of it. Errors: those of firmware.Verify; TooLarge
// over the limit; Unprocessable if the image is not the one that was signed (image_mismatch), with the codes of
// espapp.App.Agree, if no live Secure Boot key of a product that has any signed it (those of secureboot.Report.Check), and
// if it raises the secure version without being meant to (secure_version_burns); Conflict
// (release_exists) if the version has another manifest, and (secure_version_lower) if an older version has a higher secure
// version; Full when the disk is.
func (c *Catalog) Publish(ctx context.Context, at time.Time, u Upload) (firmware.Release, error) {
	// Before the upload is read: what is refused now costs nothing.
	var signed firmware.Verified
	err := c.c.View(ctx, func(tx Tx) error {
		var err error
		signed, err = c.admissible(tx, u.JWS)
		return err
	})
	if err != nil {
		return firmware.Release{}, err
	}
	m := signed.Manifest()
	sum := md5.New() // for Arduino's updater, which checks nothing better; not for security
	var app *espapp.App
	err = c.c.Images.PutIf(ctx, io.TeeReader(u.Image, sum), m.Size, func(hash fleet.Hash, size int64, file io.ReaderAt) error {
		if hash != m.SHA256 || size != m.Size {
			return fleet.Coded(fleet.Unprocessable, "image_mismatch",
				"the image is not the one that was signed: it has %d bytes with SHA-256 %s, the manifest names %d bytes with %s", size, hash, m.Size, m.SHA256)
		}
		var err error
		if app, err = inspect(file, m); err != nil {
			return err
		}
		return c.c.View(ctx, func(tx Tx) error { return admit(tx, m, app, u.BurnSecureVersion) })
	})
	if err != nil {
		return firmware.Release{}, sizeError(err, m)
	}
	// The image is on disk before a record names it: a release without an image would fail devices, an image without a
	// release is only swept up by Prune. The signature is verified again in the transaction that stores the release,
	// because a key may have been revoked during the upload; so is all else that may have changed.
	var rel firmware.Release
	err = c.c.Update(ctx, func(tx Tx) error {
		v, err := c.admissible(tx, u.JWS)
		if err != nil {
			return err
		}
		if err := admit(tx, m, app, u.BurnSecureVersion); err != nil {
			return err
		}
		rel, err = publish(tx, at, v, app, hex.EncodeToString(sum.Sum(nil)), u.By)
		return err
	})
	return rel, err
}

// admissible verifies jws and returns an error if no image could make it a release.
func (c *Catalog) admissible(tx Tx, jws string) (firmware.Verified, error) {
	v, err := verify(tx, jws)
	if err != nil {
		return firmware.Verified{}, err
	}
	m := v.Manifest()
	if m.Size > c.c.MaxImage {
		return firmware.Verified{}, fleet.Errorf(fleet.TooLarge, "the image has %d bytes; this server takes up to %d", m.Size, c.c.MaxImage)
	}
	old, err := tx.Release(m.Product, m.Version)
	switch {
	case err == nil && old.Manifest != m:
		return firmware.Verified{}, fleet.Coded(fleet.Conflict, "release_exists", "%s %s is published already, with another manifest; a release never changes, so give this one another version", m.Product, m.Version)
	case err == nil:
		return v, nil
	case !fleet.Is(err, fleet.NotFound):
		return firmware.Verified{}, err
	}
	return v, secureVersionHolds(tx, m)
}

// verify looks keys up in tx. That a key is not there is Verify's to say; that the store fails is not.
func verify(tx Tx, jws string) (firmware.Verified, error) {
	var failed error
	v, err := firmware.Verify(jws, func(kid string) (firmware.Key, bool) {
		k, err := tx.Key(kid)
		if err != nil && !fleet.Is(err, fleet.NotFound) {
			failed = err
		}
		return k, err == nil
	})
	if failed != nil {
		return firmware.Verified{}, failed
	}
	return v, err
}

// secureVersionHolds refuses a release whose secure version is below that of an older one: devices that took the older
// would never start it (esp32.md §1.4).
func secureVersionHolds(tx Tx, m firmware.Manifest) error {
	all, err := tx.Releases(m.Product)
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.Version.Compare(m.Version) < 0 && r.SecureVersion > m.SecureVersion {
			return fleet.Coded(fleet.Conflict, "secure_version_lower",
				"%s %s has secure version %d, but the older %s has %d: a device that ran it could never start this one; build it with at least %d",
				m.Product, m.Version, m.SecureVersion, r.Version, r.SecureVersion, r.SecureVersion)
		}
	}
	return nil
}

// publish stores the release of v, whose image is in the store; app is nil for what is no ESP32 image.
func publish(tx Tx, at time.Time, v firmware.Verified, app *espapp.App, md5, by string) (firmware.Release, error) {
	m := v.Manifest()
	var boot string
	if app != nil {
		boot = app.BootKeys()
	}
	old, err := tx.Release(m.Product, m.Version)
	if err == nil && old.BootKeys == "" && boot != "" { // it was published before these were on record
		old.BootKeys = boot
		return old, tx.PutRelease(old)
	}
	if err == nil {
		return old, nil
	}
	if !fleet.Is(err, fleet.NotFound) {
		return firmware.Release{}, err
	}
	rel, err := v.Release(md5, by, at)
	if err != nil {
		return firmware.Release{}, err
	}
	rel.BootKeys = boot
	if err := tx.PutRelease(rel); err != nil {
		return firmware.Release{}, err
	}
	return rel, audit(tx, at, by, "firmware.publish", fmt.Sprintf("%s %s", m.Product, m.Version), "sha256 "+string(m.SHA256)+", signed by "+v.KeyID())
}

// sizeError says what a limit that came from the manifest means.
func sizeError(err error, m firmware.Manifest) error {
	if !fleet.Is(err, fleet.TooLarge) {
		return err
	}
	return &fleet.Error{Kind: fleet.Unprocessable, Code: "image_mismatch", Msg: fmt.Sprintf("the image is larger than the %d bytes that were signed", m.Size), Err: err}
}

func newestFirst(all []firmware.Release) {
	slices.SortFunc(all, func(a, b firmware.Release) int {
		return cmp.Or(cmp.Compare(a.Product, b.Product), b.Version.Compare(a.Version))
	})
}
