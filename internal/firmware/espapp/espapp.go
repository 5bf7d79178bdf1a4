// Package espapp holds an ESP32 image to the manifest of its release: it takes from the image what the manifest must say,
// and finds contradictions between the two (esp32.md §0, §1.5). The person who signs, and the server that publishes, ask
// the same functions. It does no I/O of its own.
//
// What an image says of itself comes from its header (chip, revisions), its hash and its descriptor (secure version).
// Its name and version do not: they are the manifest's, and the descriptor's only raise doubts, because every Arduino
// image carries those of the pre-built core.
package espapp

import (
	"fmt"
	"io"
	"strings"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/secureboot"
	"muster/internal/firmware"
	"muster/internal/fleet"
)

// magic is the first byte of every ESP32 image (esp32.md §1.1).
const magic = 0xE9

// Recognise reports whether a file that begins with this byte and is released for chip, which may be empty, is an ESP32
// image. Whoever names a chip of another family has a file that only begins like one.
func Recognise(first byte, chip string) bool {
	return first == magic && (chip == "" || strings.HasPrefix(chip, "esp32"))
}

// App is what there is to know of an ESP32 image, good or broken.
type App struct {
	Image      *image.Report      `json:"image"`
	SecureBoot *secureboot.Report `json:"secure_boot"` // of the signature sector, if there is one
}

// Inspect reads the image in file, which has size bytes, with bounded memory. The error is file's own.
func Inspect(file io.ReaderAt, size int64, want image.Kind) (*App, error) {
	rep, err := image.Inspect(io.NewSectionReader(file, 0, size), want)
	if err != nil {
		return nil, err
	}
	sector, err := secureboot.Inspect(file, rep)
	if err != nil {
		return nil, err
	}
	return &App{Image: rep, SecureBoot: sector}, nil
}

// Findings returns all findings, those of the image first.
func (a *App) Findings() esp.Findings {
	return append(append(esp.Findings(nil), a.Image.Findings...), a.SecureBoot.Findings...)
}

// Err returns the first finding for which some device would refuse the image, or take harm, as an Unprocessable error.
func (a *App) Err() error { return a.Findings().Err() }

// Complete returns m with what the image tells in those fields that m leaves empty. A field that says something else
// than the image is an error of Agree. Name, version, size and file hash are the caller's.
func (a *App) Complete(m firmware.Manifest) (firmware.Manifest, error) {
	if err := a.Err(); err != nil {
		return m, err
	}
	if chip, known := a.chip(); known && m.Chip == "" {
		m.Chip = chip.Name
	}
	if m.ImageHash == "" {
		m.ImageHash = a.Image.ImageHash
	}
	if m.SecureVersion == 0 {
		m.SecureVersion = a.secureVersion()
	}
	lowest, highest := a.revisions()
	if m.MinChipRevision == 0 {
		m.MinChipRevision = lowest
	}
	if m.MaxChipRevision == 0 {
		m.MaxChipRevision = highest
	}
	return m, a.Agree(m)
}

// Agree returns an Unprocessable error if the image is broken, or if m says of it what is not so. Its codes are those of
// the findings, and manifest_chip, manifest_image_hash, manifest_secure_version and manifest_chip_revision. A manifest may
// narrow the range of chip revisions, and it names the chip if muster knows it.
func (a *App) Agree(m firmware.Manifest) error {
	if err := a.Err(); err != nil {
		return err
	}
	if chip, known := a.chip(); known && m.Chip != chip.Name {
		return contradiction("manifest_chip", "chip", orNone(m.Chip), chip.Name)
	}
	if m.ImageHash != a.Image.ImageHash {
		return contradiction("manifest_image_hash", "image_hash", orNone(string(m.ImageHash)), string(a.Image.ImageHash))
	}
	if v := a.secureVersion(); m.SecureVersion != v {
		return contradiction("manifest_secure_version", "secure_version", fmt.Sprint(m.SecureVersion), fmt.Sprint(v))
	}
	lowest, highest := a.revisions()
	if m.MinChipRevision < lowest {
		return contradiction("manifest_chip_revision", "min_chip_revision", fmt.Sprint(m.MinChipRevision), fmt.Sprint(lowest))
	}
	if highest > 0 && (m.MaxChipRevision == 0 || m.MaxChipRevision > highest) {
		return contradiction("manifest_chip_revision", "max_chip_revision", fmt.Sprint(m.MaxChipRevision), fmt.Sprint(highest))
	}
	return nil
}

func contradiction(code, field, said, is string) error {
	return fleet.Coded(fleet.Unprocessable, code, "the manifest's %s is %s, the image's is %s: sign the image again with muster firmware sign, which reads it from the image", field, said, is)
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}

// Doubts returns warnings about a name or a version in the image that are not those of m. A descriptor that says nothing
// raises none.
func (a *App) Doubts(m firmware.Manifest) esp.Findings {
	project, version, known := a.Image.Named()
	if !known {
		return nil
	}
	const offset = 0x20 // of the descriptor
	var out esp.Findings
	if project != "" && !strings.EqualFold(project, string(m.Product)) {
		out = append(out, esp.Finding{Severity: esp.Warning, Code: "esp_name_differs", Offset: offset + 48,
			Message: fmt.Sprintf("the image calls its project %q, the release is of product %s", project, m.Product), Hint: "is it the right file?"})
	}
	if version != "" && strings.TrimPrefix(version, "v") != string(m.Version) {
		out = append(out, esp.Finding{Severity: esp.Warning, Code: "esp_version_differs", Offset: offset + 16,
			Message: fmt.Sprintf("the image calls itself version %q, the release is %s", version, m.Version), Hint: "a device that reports the image's word will not match the release"})
	}
	return out
}

// Steps says how many steps of the chip's anti-rollback counter are left once a device has confirmed the image; empty if
// muster does not know the chip.
func (a *App) Steps() string {
	left, all, known := a.Image.SecureSteps()
	if !known {
		return ""
	}
	return fmt.Sprintf("%d of %d steps of the %s are left", left, all, a.Image.Chip)
}

func (a *App) chip() (esp.Chip, bool) {
	if a.Image.Header == nil {
		return esp.Chip{}, false
	}
	return esp.ChipByID(a.Image.Header.Chip)
}

// BootKeys returns the digests of the keys whose signatures the image has where its chip looks, as Release has them;
// empty for an image that is not signed, or has a block that is wrong.
func (a *App) BootKeys() string {
	chip, known := a.chip()
	if !known || a.SecureBoot == nil || a.SecureBoot.Err() != nil {
		return ""
	}
	var out []string
	for _, b := range a.SecureBoot.Blocks {
		if !chip.FirstBlock || b.Index == 0 {
			out = append(out, b.Key.String())
		}
	}
	return strings.Join(out, " ")
}

// Accepted returns an Unprocessable error unless a block of the image was made by one of keys, none of which is revoked.
func (a *App) Accepted(keys []secureboot.Slot) error {
	chip, _ := a.chip()
	_, err := a.SecureBoot.Check(secureboot.Policy{Chip: chip, Keys: keys})
	return err
}

func (a *App) secureVersion() uint32 {
	if a.Image.App == nil {
		return 0
	}
	return a.Image.App.SecureVersion
}

// revisions returns the chip revisions that the image runs on, as a manifest counts them: 0 is no limit.
func (a *App) revisions() (lowest, highest int) {
	if a.Image.Header == nil {
		return 0, 0
	}
	if top, limited := a.Image.Header.MaxRevision(); limited && int(top) <= firmware.MaxChipRevision {
		highest = int(top)
	}
	return int(a.Image.Header.MinRev), highest
}
