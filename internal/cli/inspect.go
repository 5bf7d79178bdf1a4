package cli

import (
	"fmt"
	"strings"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
	"muster/internal/firmware"
	"muster/internal/firmware/espapp"
	"muster/internal/signing"
)

// showInspected prints what there is to say about an image, a manifest or both.
func (a *app) showInspected(r signing.Report) {
	if r.App != nil {
		a.showImage(r.App.Image, r.Steps)
		a.showBlocks(r.App)
	}
	if r.Raw {
		a.ui.facts("image", "not an ESP32's: nothing in it can be checked")
	}
	if r.Manifest != nil {
		if r.App != nil || r.Raw {
			a.ui.printf("\nmanifest %s\n", clean(r.ManifestFile))
		}
		a.showManifest(*r.Manifest, r.KeyID, r.Verified)
	}
	if len(r.Findings) == 0 {
		return
	}
	a.ui.printf("\n")
	for _, f := range r.Findings {
		a.ui.printf("%s %s (0x%x, %s)\n", a.ui.paint(string(f.Severity)+":", severityShade(f.Severity)), clean(f.Message), f.Offset, clean(f.Code))
		if f.Hint != "" {
			a.ui.printf("  hint: %s\n", clean(f.Hint))
		}
	}
}

func severityShade(s esp.Severity) shade {
	switch s {
	case esp.Error:
		return red
	case esp.Warning:
		return yellow
	}
	return dim
}

func (a *app) showImage(r *image.Report, steps string) {
	kind := first(string(r.Kind), "not recognised")
	facts := []any{"image", kind, "size", fmt.Sprintf("%d bytes", r.Size), "sha256", string(r.SHA256)}
	if h := r.Header; h != nil {
		facts = append(facts, "chip", r.Chip, "chip revisions", imageRevisions(h), "entry", fmt.Sprintf("0x%08x", h.Entry), "flash", flashOf(h))
	}
	if r.Whole() {
		facts = append(facts, "image length", fmt.Sprintf("%d bytes", r.Len), "checksum", a.compared(fmt.Sprintf("0x%02x", r.Checksum), fmt.Sprintf("0x%02x", r.ComputedChecksum)),
			"image hash", string(r.ImageHash), "appended hash", a.appended(r), "after the image", trailerOf(r))
	}
	facts = append(facts, descriptorOf(r)...)
	if r.App != nil {
		secure := fmt.Sprint(r.App.SecureVersion)
		if steps != "" {
			secure += ": " + steps
		}
		facts = append(facts, "secure version", secure)
	}
	a.ui.facts(facts...)
	if len(r.Segments) == 0 {
		return
	}
	a.ui.printf("\n")
	t := a.ui.table("SEGMENT", "LOAD", "LENGTH", "OFFSET", "USE")
	for i, s := range r.Segments {
		t.row(i, fmt.Sprintf("0x%08x", s.Load), fmt.Sprint(s.Length), fmt.Sprintf("0x%x", s.Offset), string(s.Use))
	}
	t.print()
}

func imageRevisions(h *image.Header) string {
	s := "from " + h.MinRev.String()
	if highest, limited := h.MaxRevision(); limited {
		return s + " to " + highest.String()
	}
	return s + " on"
}

func flashOf(h *image.Header) string {
	parts := []string{}
	for _, s := range []string{h.FlashMode(), h.FlashFrequency()} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	if n := h.FlashSize(); n > 0 {
		parts = append(parts, size(n))
	}
	return strings.Join(parts, ", ")
}

// compared shows a stored value, and beside a wrong one what it should be.
func (a *app) compared(stored, computed string) cell {
	if stored == computed {
		return cell{stored + ", good", green}
	}
	return cell{stored + ", should be " + computed, red}
}

func (a *app) appended(r *image.Report) cell {
	switch {
	case r.Header.HashPresent == 0:
		return cell{"none", yellow}
	case r.Appended == r.ImageHash:
		return cell{"good", green}
	}
	return cell{string(r.Appended) + ", is not the image's", red}
}

func trailerOf(r *image.Report) string {
	t := r.Trailer
	if t.Length == 0 {
		return "nothing"
	}
	return fmt.Sprintf("%s, %d bytes from 0x%x", t.Kind, t.Length, t.Offset)
}

func descriptorOf(r *image.Report) []any {
	switch {
	case r.Bootloader != nil:
		b := r.Bootloader
		return []any{"bootloader version", fmt.Sprint(b.Version), "ESP-IDF", b.IDFVersion, "built", b.BuiltAt, "secure version", fmt.Sprint(b.SecureVersion)}
	case r.App == nil:
		return nil
	}
	d := r.App
	out := []any{}
	if project, version, known := r.Named(); known {
		out = append(out, "project", project, "project version", version)
	} else {
		out = append(out, "project", cell{"unknown: the descriptor is that of Arduino's pre-built core", yellow})
	}
	return append(out, "ESP-IDF", d.IDFVersion, "built", strings.TrimSpace(d.Date+" "+d.Time), "ELF sha256", string(d.ELF))
}

func (a *app) showBlocks(app *espapp.App) {
	if !app.SecureBoot.Signed() {
		if app.Image.Whole() {
			a.ui.printf("\n")
			a.ui.facts("secure boot", "not signed")
		}
		return
	}
	a.ui.printf("\n")
	t := a.ui.table("BLOCK", "SCHEME", "KEY DIGEST", "SIGNATURE")
	for _, b := range app.SecureBoot.Blocks {
		status := cell{string(b.Status), red}
		if b.Status == secureboot.Valid {
			status.shade = green
		}
		if b.Why != "" {
			status.text += ": " + b.Why
		}
		t.row(b.Index, string(b.Scheme), b.Key.String(), status)
	}
	t.print()
}

func (a *app) showManifest(m firmware.Manifest, key string, good bool) {
	secure, verified := "", cell{"not verified: no --key was given", yellow}
	if m.SecureVersion > 0 {
		secure = fmt.Sprint(m.SecureVersion)
	}
	if good {
		verified = cell{"good", green}
	}
	a.ui.facts("product", string(m.Product), "version", string(m.Version), "size", fmt.Sprintf("%d bytes", m.Size), "sha256", string(m.SHA256),
		"image hash", string(m.ImageHash), "chip", m.Chip, "chip revisions", revisions(m.MinChipRevision, m.MaxChipRevision), "secure version", secure,
		"minimum version", string(m.MinVersion), "key", key, "signature", verified)
}
