package ota

import (
	"fmt"
	"io"

	"muster/internal/esp/image"
	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/fleet"
)

// inspect reads the image of m from file; nil if it is not an ESP32's. It uses the same little memory for every image.
func inspect(file io.ReaderAt, m firmware.Manifest) (*espapp.App, error) {
	var first [1]byte
	if _, err := file.ReadAt(first[:], 0); err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "read the image")
	}
	if !espapp.Recognise(first[0], m.Chip) {
		return nil, nil
	}
	app, err := espapp.Inspect(file, m.Size, image.App)
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "read the image")
	}
	return app, nil
}

// admit returns an error if an image may not be published under m. app is nil for what is no ESP32 image. A release that
// exists was judged when it came.
func admit(tx Tx, m firmware.Manifest, app *espapp.App, burn bool) error {
	_, err := tx.Release(m.Product, m.Version)
	if err == nil || !fleet.Is(err, fleet.NotFound) {
		return err
	}
	if app != nil { // first what is wrong with the image itself
		if err := app.Agree(m); err != nil {
			return err
		}
	}
	if err := fitsSlot(tx, m); err != nil {
		return err
	}
	if err := trusted(tx, m.Product, app); err != nil || app == nil {
		return err
	}
	return burns(tx, m, app, burn)
}

// burns refuses a release that raises the secure version of its product unless that is meant: every device that confirms
// it burns one more fuse for each step, and never runs an older release again (esp32.md §1.4).
func burns(tx Tx, m firmware.Manifest, app *espapp.App, meant bool) error {
	all, err := tx.Releases(m.Product)
	if err != nil || meant {
		return err
	}
	var highest uint32
	for _, r := range all {
		highest = max(highest, r.SecureVersion)
	}
	if m.SecureVersion <= highest {
		return nil
	}
	left := ""
	if s := app.Steps(); s != "" {
		left = fmt.Sprintf(", and then %s", s)
	}
	return fleet.Coded(fleet.Unprocessable, "secure_version_burns",
		"%s %s raises the secure version from %d to %d: every device that takes it burns that into its eFuses for good and never runs an older release again%s; if that is meant, publish it with burn_secure_version (muster firmware upload --burn-secure-version)",
		m.Product, m.Version, highest, m.SecureVersion, left)
}
