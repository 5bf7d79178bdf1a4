// Package uplink turns what devices say into stored state: batches of messages, one transaction each, acknowledged
// after the commit. What cannot be handled is quarantined with its reason and never comes back.
package uplink

import "time"

// Quarantined is a message that could not be handled, kept for an operator to look at.
type Quarantined struct {
	Seq     uint64    `json:"seq"` // given by the store
	At      time.Time `json:"at"`
	Vhost   string    `json:"vhost"`
	Key     string    `json:"key"`  // routing key, escaped: a device chose these bytes
	Body    []byte    `json:"body"` // cut at MaxQuarantinedBody
	Size    int       `json:"size"` // of the whole body, bytes
	Reason  string    `json:"reason"`
	Details string    `json:"details,omitempty"` // the parser's own words
}

// Bounds of the quarantine: the oldest entry makes room for a new one.
const (
	MaxQuarantined     = 10_000
	MaxQuarantinedBody = 4 << 10 // bytes
)
