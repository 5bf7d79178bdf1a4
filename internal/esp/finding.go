// Package esp holds what the ESP32 formats share: the chips with what differs between them, and findings, in which a
// parser says everything that it noticed about a file. It does no I/O. Its subpackages hold one format each.
package esp

import (
	"fmt"

	"muster/internal/fleet"
)

// Severity says what a finding means for the file.
type Severity string

// Severities.
const (
	Error   Severity = "error"   // a device refuses it, or must not get it
	Warning Severity = "warning" // it works, and somebody should know
	Info    Severity = "info"    // worth saying
)

// Finding is one thing that a parser noticed. Code is a stable word for programs, and the Code of the fleet.Error that
// an Error becomes. Message says what was found; Hint, where there is something to do, what that is.
type Finding struct {
	Severity Severity `json:"severity"`
	Code     string   `json:"code"`
	Offset   int64    `json:"offset"` // in the file, bytes
	Message  string   `json:"message"`
	Hint     string   `json:"hint,omitempty"`
}

// String returns the finding as one line.
func (f Finding) String() string {
	s := fmt.Sprintf("%s at 0x%x: %s", f.Severity, f.Offset, f.Message)
	if f.Hint != "" {
		s += ": " + f.Hint
	}
	return s
}

// Err returns the finding as an Unprocessable error.
func (f Finding) Err() error {
	if f.Hint == "" {
		return fleet.Coded(fleet.Unprocessable, f.Code, "at offset 0x%x: %s", f.Offset, f.Message)
	}
	return fleet.Coded(fleet.Unprocessable, f.Code, "at offset 0x%x: %s: %s", f.Offset, f.Message, f.Hint)
}

// Findings are in the order in which a device, or a strict reader, comes upon them.
type Findings []Finding

// Err returns the first error, nil if there is none.
func (fs Findings) Err() error {
	for _, f := range fs {
		if f.Severity == Error {
			return f.Err()
		}
	}
	return nil
}

// Has reports whether a finding has the code.
func (fs Findings) Has(code string) bool {
	for _, f := range fs {
		if f.Code == code {
			return true
		}
	}
	return false
}
