// Package admission decides who may enter the broker and what they may touch there (DESIGN §5): one pure function over
// RabbitMQ's question and what muster knows of the device. Whatever is not listed is denied.
package admission

import (
	"time"

	"muster/internal/fleet"
)

// Record is all that a decision needs to know of a device. It is small, because all of them are held in memory: an
// answer must not wait for the store.
type Record struct {
	Device       fleet.DeviceID
	Disabled     bool
	RecoveryOff  bool           // the fallback is closed to it
	Certificates [2]Certificate // current and next; a zero Serial is an empty slot
	Passwords    []fleet.Hash   // SHA-256 of each fallback password that works now
}

// Certificate is a slot of a device: the serial that may be used until NotAfter.
type Certificate struct {
	Serial   fleet.Serial
	NotAfter time.Time
}
