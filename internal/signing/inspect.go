package signing

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/fleet"
)

// Look says what to inspect.
type Look struct {
	File     string // an image, or a signed manifest
	Manifest string // of the image; empty: File with .jws behind, if there is one
	Public   string // path of the public key that must have signed the manifest; empty: nothing is verified
}

// Report is what a file says: an image, a signed manifest, or an image with its manifest.
type Report struct {
	File string `json:"file"`

	App   *espapp.App `json:"app,omitempty"`   // of an ESP32 image, and of whatever is neither a manifest nor has one
	Raw   bool        `json:"raw,omitempty"`   // an image of another kind, which only its manifest describes
	Steps string      `json:"steps,omitempty"` // how far the chip's anti-rollback counter can still rise

	ManifestFile string             `json:"manifest_file,omitempty"`
	Manifest     *firmware.Manifest `json:"manifest,omitempty"`
	KeyID        string             `json:"key_id,omitempty"`
	Verified     bool               `json:"verified"` // by the public key that was given; without one nothing was proven

	Findings esp.Findings `json:"findings,omitempty"`
}

// Err returns nil if nothing that was found is an error, else how many there are.
func (r Report) Err() error {
	n := 0
	for _, f := range r.Findings {
		if f.Severity == esp.Error {
			n++
		}
	}
	switch n {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("%s: broken: 1 error", r.File)
	}
	return fmt.Errorf("%s: broken: %d errors", r.File, n)
}

// refuse makes an error of muster's own a finding; others it returns.
func (r *Report) refuse(err error) error {
	e, ours := errors.AsType[*fleet.Error](err)
	if !ours || e.Kind != fleet.Unprocessable && e.Kind != fleet.TooLarge && e.Kind != fleet.Invalid {
		return err
	}
	code := e.Code
	if code == "" {
		code = "manifest_malformed"
	}
	r.Findings = append(r.Findings, esp.Finding{Severity: esp.Error, Code: code, Message: e.Error()})
	return nil
}

// Inspect reads a file and reports all there is to say about it, good or broken; see Report.Err. Its own errors are about
// files that cannot be read. An image and its manifest are compared with each other.
func Inspect(l Look) (Report, error) {
	r := Report{File: l.File, ManifestFile: l.Manifest}
	f, err := openImage(l.File)
	if err != nil {
		return r, err
	}
	defer f.Close()
	err = r.inspect(f, l.Public)
	if r.App != nil { // all findings are in one place
		r.App.Image.Findings, r.App.SecureBoot.Findings = nil, nil
	}
	return r, err
}

func (r *Report) inspect(f *imageFile, public string) error {
	if f.size == 0 || espapp.Recognise(f.first, "") {
		if err := r.inspectApp(f); err != nil {
			return err
		}
	} else if jws, err := ReadManifest(f.Name()); err == nil && looksSigned(jws) {
		r.ManifestFile = f.Name()
		return r.inspectManifest(jws, public)
	}
	return r.inspectPair(f, public)
}

// looksSigned reports whether a text begins like a JWS in compact form: base64url of {".
func looksSigned(text string) bool { return len(text) > 2 && text[:3] == "eyJ" }

func (r *Report) inspectApp(f *imageFile) error {
	app, err := espapp.Inspect(f, f.size, image.Any)
	if err != nil {
		return fileError(err, "read the image %s", f.Name())
	}
	r.App, r.Steps, r.Findings = app, app.Steps(), app.Findings()
	return nil
}

// inspectPair looks for the manifest of an image and holds the two together.
func (r *Report) inspectPair(f *imageFile, public string) error {
	path := r.ManifestFile
	if path == "" {
		path = f.Name() + ".jws"
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			if r.App == nil {
				return r.inspectApp(f) // which says what the file may be
			}
			return nil
		}
	}
	r.ManifestFile = path
	jws, err := ReadManifest(path)
	if err != nil {
		return err
	}
	if err := r.inspectManifest(jws, public); err != nil || r.Manifest == nil {
		return err
	}
	return r.compare(f)
}

// inspectManifest reads a signed manifest; what is wrong with it is a finding.
func (r *Report) inspectManifest(jws, public string) error {
	m, id, err := firmware.Inspect(jws)
	if err != nil {
		return r.refuse(err)
	}
	r.Manifest, r.KeyID = &m, id
	if public == "" {
		return nil
	}
	text, err := readSome(public, firmware.MaxKeyPEM)
	if err != nil {
		return err
	}
	key, err := firmware.ParseKey(text, "")
	if err != nil {
		return err
	}
	if _, err := firmware.Verify(jws, func(kid string) (firmware.Key, bool) { return key, kid == key.ID }); err != nil {
		return r.refuse(err)
	}
	r.Verified = true
	return nil
}

// compare holds the image to the manifest.
func (r *Report) compare(f *imageFile) error {
	m := *r.Manifest
	hash, size, err := f.hash()
	if err != nil {
		return err
	}
	if hash != m.SHA256 || size != m.Size {
		r.Findings = append(r.Findings, esp.Finding{Severity: esp.Error, Code: "image_mismatch",
			Message: fmt.Sprintf("the manifest is of another file: of %d bytes with SHA-256 %s", m.Size, m.SHA256), Hint: "sign the image again with muster firmware sign"})
		return nil
	}
	if r.Raw = !espapp.Recognise(f.first, m.Chip); r.Raw {
		if r.App != nil { // it only begins like an ESP32's
			r.Findings = r.Findings[len(r.App.Findings()):]
		}
		r.App, r.Steps = nil, ""
		return nil
	}
	if r.App.Err() != nil {
		return nil // has been said
	}
	app, err := espapp.Inspect(f, f.size, image.App)
	if err != nil {
		return fileError(err, "read the image %s", f.Name())
	}
	r.Findings = append(r.Findings, app.Doubts(m)...)
	if err := app.Agree(m); err != nil {
		return r.refuse(err)
	}
	return nil
}

// Worth is what a person should know of an ESP32 image before it is published.
type Worth struct {
	Warnings      esp.Findings
	SecureVersion uint32
	Steps         string // how far the chip's anti-rollback counter can still rise
}

// Preview reads the image in path, which is to be published under the signed manifest jws. It is empty if the image is not
// an ESP32's, and if either is broken, which the server has to say. Errors are about files that cannot be read.
func Preview(path, jws string) (Worth, error) {
	m, _, err := firmware.Inspect(jws)
	if err != nil {
		return Worth{}, nil
	}
	f, err := openImage(path)
	if err != nil {
		return Worth{}, err
	}
	defer f.Close()
	if f.size == 0 || !espapp.Recognise(f.first, m.Chip) {
		return Worth{}, nil
	}
	app, err := espapp.Inspect(f, f.size, image.App)
	if err != nil {
		return Worth{}, fileError(err, "read the image %s", path)
	}
	if app.Err() != nil {
		return Worth{}, nil
	}
	w := Worth{SecureVersion: m.SecureVersion, Steps: app.Steps()}
	for _, f := range append(app.Findings(), app.Doubts(m)...) {
		if f.Severity == esp.Warning {
			w.Warnings = append(w.Warnings, f)
		}
	}
	return w, nil
}
