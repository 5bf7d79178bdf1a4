// Package image reads, checks and writes ESP32 application and bootloader images (esp32.md §1; esptool's bin_image.py,
// ESP-IDF's esp_image_format.c).
//
// Inspect reads a file in one pass with bounded memory and reports everything that a firmware engineer wants to know,
// for good and broken files alike; Parse is Inspect that takes only what a device would take. One running SHA-256 gives
// the appended hash, the message of Secure Boot v2 and the hash of the file. Findings come in the order of esp32.md
// §1.5. The package does no I/O of its own and allocates the same for every input.
package image

import (
	"fmt"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// Kind is what an image is for.
type Kind string

// Kinds. As a wish, Any takes each of them.
const (
	Any        Kind = ""
	App        Kind = "app"
	Bootloader Kind = "bootloader"
	Other      Kind = "other" // has neither descriptor: an old bootloader, or something else that a bootloader loads
)

// Report is everything about a file. Fields that the file is too broken to tell are zero.
type Report struct {
	Size   int64      `json:"size"`             // of the file, bytes; for a file above MaxSize what was read of it
	SHA256 fleet.Hash `json:"sha256,omitempty"` // of the whole file

	Kind     Kind      `json:"kind,omitempty"`
	Chip     string    `json:"chip,omitempty"`
	Header   *Header   `json:"header,omitempty"`
	Segments []Segment `json:"segments,omitempty"`

	Checksum         byte `json:"checksum"`          // as stored
	ComputedChecksum byte `json:"computed_checksum"` // as it should be

	BodyLen   int64      `json:"body_len"`                // what the appended hash covers, bytes
	Len       int64      `json:"image_len"`               // BodyLen and the appended hash, bytes
	Appended  fleet.Hash `json:"appended_hash,omitempty"` // as stored
	ImageHash fleet.Hash `json:"image_hash,omitempty"`    // SHA-256 of the body: how a device names the image that it runs (esp32.md §0.2)

	App        *AppDesc  `json:"app,omitempty"`
	Bootloader *BootDesc `json:"bootloader,omitempty"`
	Trailer    Trailer   `json:"trailer"`

	Findings esp.Findings `json:"findings,omitempty"`

	message [HashSize]byte
}

// Err returns the first finding that makes the file unfit for a device as an Unprocessable error, nil if there is none.
func (r *Report) Err() error { return r.Findings.Err() }

// Whole reports whether header, segments, checksum and appended hash were read to the end, right or wrong.
func (r *Report) Whole() bool { return r.Len > 0 }

// MessageLen returns how many bytes Secure Boot v2 signs: the image with 0xFF up to the next sector.
func (r *Report) MessageLen() int64 { return (r.Len + SectorSize - 1) &^ (SectorSize - 1) }

// Message returns the SHA-256 of those bytes, whatever follows the image in the file. It is valid if the image is Whole.
func (r *Report) Message() [HashSize]byte { return r.message }

// CheckSlot returns an Unprocessable error unless the file, with its signature, fits an OTA slot of that many bytes.
func (r *Report) CheckSlot(bytes int64) error {
	if r.Size <= bytes {
		return nil
	}
	return fleet.Coded(fleet.Unprocessable, "esp_slot_too_small",
		"the file has %d bytes, the OTA slot %d: make the firmware %d bytes smaller, or give the product a partition table with larger slots", r.Size, bytes, r.Size-bytes)
}

// CheckDevice returns an Unprocessable error if a device of that chip and revision would refuse the image.
func (r *Report) CheckDevice(chip esp.ChipID, rev esp.Revision) error {
	if r.Header == nil {
		return fleet.Coded(fleet.Unprocessable, "esp_no_header", "the file has no image header")
	}
	if r.Header.Chip != chip {
		return fleet.Coded(fleet.Unprocessable, "esp_chip", "the image is for %s, the device is %s", r.Header.Chip, chip)
	}
	if rev < r.Header.MinRev {
		return fleet.Coded(fleet.Unprocessable, "esp_revision", "the image needs chip revision %s or later, the device has %s", r.Header.MinRev, rev)
	}
	if highest, limited := r.Header.MaxRevision(); limited && rev > highest {
		return fleet.Coded(fleet.Unprocessable, "esp_revision", "the image runs up to chip revision %s, the device has %s", highest, rev)
	}
	return nil
}

// SecureSteps returns how often the anti-rollback counter of the image's chip can still rise after this image was
// confirmed, and how often it can rise in all; false if muster does not know the chip or the image is no app.
func (r *Report) SecureSteps() (left, all int, known bool) {
	if r.App == nil || r.Header == nil {
		return 0, 0, false
	}
	chip, _ := esp.ChipByID(r.Header.Chip)
	if chip.SecureSteps == 0 {
		return 0, 0, false
	}
	return chip.SecureSteps - int(min(r.App.SecureVersion, uint32(chip.SecureSteps))), chip.SecureSteps, true
}

// Named returns the project name and version that the image tells, false if it tells none that mean anything: Arduino's
// descriptor is the same in every image (esp32.md §0.1).
func (r *Report) Named() (project, version string, known bool) {
	if r.App == nil || r.App.Constant {
		return "", "", false
	}
	return r.App.ProjectName, r.App.Version, true
}

func (r *Report) add(s esp.Severity, code string, offset int64, hint, format string, a ...any) {
	r.Findings = append(r.Findings, esp.Finding{Severity: s, Code: code, Offset: offset, Message: fmt.Sprintf(format, a...), Hint: hint})
}
