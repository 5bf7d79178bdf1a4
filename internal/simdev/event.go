package simdev

import (
	"time"

	"muster/internal/fleet"
)

// Kind says what happened on a device.
type Kind string

// Kinds of events. Detail is for people; what a program needs is in the kind and in Snapshot.
const (
	Booted        Kind = "booted"         // firmware version and reason
	Connected     Kind = "connected"      // the door: devices or fallback, and the certificate's serial
	Disconnected  Kind = "disconnected"   // why
	Unreachable   Kind = "unreachable"    // no session, and nobody said that the credential is bad
	Refused       Kind = "refused"        // the credential was refused, and how
	SaidHello     Kind = "hello"          // acknowledged by the broker
	Answered      Kind = "answered"       // muster answered the hello
	SentTelemetry Kind = "telemetry"      // acknowledged by the broker; Detail is the sequence number
	Offered       Kind = "offered"        // an update offer arrived
	Updating      Kind = "updating"       // a step of an update, as reported
	RolledBack    Kind = "rolled-back"    // the previous image runs again
	Confirmed     Kind = "confirmed"      // the new image was marked valid
	Rebooting     Kind = "rebooting"      // why
	PowerCut      Kind = "power-cut"      // in which write
	WentDark      Kind = "dark"           // the image that runs never connects
	Serviced      Kind = "serviced"       // a technician put the other image back
	RenewAsked    Kind = "renew-asked"    // muster asked for a certificate request
	Requested     Kind = "requested"      // a certificate request was sent
	Waiting       Kind = "waiting"        // muster said no for now; asked again later
	CertStored    Kind = "cert-stored"    // serial
	CertRejected  Kind = "cert-rejected"  // the device would not store it
	Promoted      Kind = "promoted"       // first connection with a new certificate
	SlotSwitched  Kind = "slot-switched"  // the other certificate slot is tried
	FallbackTaken Kind = "fallback-taken" // why
	FallbackLeft  Kind = "fallback-left"  // why
	TrustStored   Kind = "trust-stored"   // version of the trust bundle
	TrustRefused  Kind = "trust-refused"  // why
	Commanded     Kind = "commanded"      // a message on dn/cmd other than the answer
	Dropped       Kind = "dropped"        // a message was not usable, or larger than the receive buffer
)

// Event is something that happened on a device.
type Event struct {
	At     time.Time      `json:"at"`
	Device fleet.DeviceID `json:"device"`
	Kind   Kind           `json:"kind"`
	Detail string         `json:"detail,omitempty"`
}

// Counts of a device since the program started; reboots do not reset them.
type Counts struct {
	Connects     uint64 `json:"connects"`
	Unreachable  uint64 `json:"unreachable"`
	Refusals     uint64 `json:"refusals"`
	Hellos       uint64 `json:"hellos"`
	Answers      uint64 `json:"answers"`
	Published    uint64 `json:"published"` // handed to the client library
	Acked        uint64 `json:"acked"`     // PUBACK received
	Received     uint64 `json:"received"`
	Dropped      uint64 `json:"dropped"`
	Telemetry    uint64 `json:"telemetry"` // acknowledged telemetry messages
	Downloaded   uint64 `json:"downloaded"`
	Busy         uint64 `json:"busy"`  // answers of 429 or 503 to a download
	Bytes        uint64 `json:"bytes"` // of images
	Rollbacks    uint64 `json:"rollbacks"`
	CertsStored  uint64 `json:"certs_stored"`
	Promotions   uint64 `json:"promotions"`
	Fallbacks    uint64 `json:"fallbacks"`
	Reboots      uint64 `json:"reboots"`
	PowerCuts    uint64 `json:"power_cuts"`
	FlashWrites  uint64 `json:"flash_writes"`
	LongestGapMS int64  `json:"longest_gap_ms"` // between the end of a session and the start of the next one
}

// Snapshot is what a device is at this moment.
type Snapshot struct {
	Device    fleet.DeviceID `json:"device"`
	Connected bool           `json:"connected"`
	Door      string         `json:"door"` // vhost of the session, or of the next attempt
	Serial    fleet.Serial   `json:"serial,omitempty"`
	Version   string         `json:"version"`
	Image     fleet.Hash     `json:"image"`
	Boot      string         `json:"boot"`
}

// Range is a run of telemetry sequence numbers, both included.
type Range struct{ From, To uint64 }

// ledger remembers which telemetry messages the broker acknowledged. Runs are merged, so that it stays small.
type ledger []Range

func (l *ledger) add(seq uint64) {
	if n := len(*l); n > 0 && (*l)[n-1].To+1 == seq {
		(*l)[n-1].To = seq
		return
	}
	*l = append(*l, Range{seq, seq})
}
