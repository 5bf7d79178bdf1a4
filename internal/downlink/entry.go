// Package downlink carries muster's words to devices: it takes entries from the outbox, composes each message from the
// state of that moment, publishes it and deletes the entry once the broker confirmed it. Delivery is at least once, and
// nothing depends on it: a hello returns every open intent.
package downlink

import (
	"time"

	"muster/internal/fleet"
)

// Kind says what a device is to be told.
type Kind string

// Kinds of entries.
const (
	Hello Kind = "hello" // the answer to a hello: server time
	OTA   Kind = "ota"   // an update offer; Ref is the rollout
	Renew Kind = "renew" // ask for a CSR
	Cert  Kind = "cert"  // deliver a certificate; Ref is the serial
	No    Kind = "no"    // a certificate request was refused or waits; Ref is the reason
	Cmd   Kind = "cmd"   // a command; Ref is its CmdOp
	Trust Kind = "trust" // fetch the trust bundle
)

// Entry is one item of the outbox. It holds no payload and no secret: what is said is composed when it is sent.
type Entry struct {
	Seq    uint64         `json:"seq"` // given by the store
	Device fleet.DeviceID `json:"device"`
	Vhost  string         `json:"vhost"`
	Kind   Kind           `json:"kind"`
	Ref    string         `json:"ref,omitempty"`
	At     time.Time      `json:"at"`
}
