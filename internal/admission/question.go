package admission

import (
	"muster/internal/fleet"
	"muster/internal/wire"
)

// Kind is which of its four questions RabbitMQ asks.
type Kind string

// RabbitMQ's questions, in the order of a session.
const (
	User     Kind = "user"     // may this user log in? The only one that carries a password
	Vhost    Kind = "vhost"    // may it enter the vhost?
	Resource Kind = "resource" // may it configure, write or read this queue or exchange?
	Topic    Kind = "topic"    // may it write or read below this routing key?
)

// Question is one question of the broker, as it came. All strings are what a client chose unless said otherwise, so
// nothing is assumed of their form.
type Question struct {
	Kind     Kind
	Vhost    string // chosen by the broker from the port (brokerconf), not by the client
	User     string // the URI of the certificate; the client's own word where it sent a password
	ClientID string // empty if the question came without one: then it was not an MQTT session that asked

	// HasPassword is whether a password came at all: an empty one is one. Password is its SHA-256.
	HasPassword bool
	Password    fleet.Hash

	Resource   string // Resource: "queue" or "exchange"; Topic: "topic"
	Name       string // of the queue or exchange; Topic: the exchange
	Permission string // "configure", "write" or "read"
	RoutingKey string // Topic: the MQTT topic with / written as . and + as *
}

// Claim returns who q says it is: the device whose record Decide needs, and, in vhost devices, the certificate. The
// reason is Allowed if user name and vhost fit together, whatever else the question holds.
func (q *Question) Claim() (fleet.DeviceID, fleet.Serial, Reason) {
	switch q.Vhost {
	case wire.VhostDevices:
		id, serial, err := wire.ParseCertUser(q.User)
		if err != nil {
			return "", "", UserName
		}
		return id, serial, Allowed
	case wire.VhostFallback:
		id, err := fleet.ParseDeviceID(q.User)
		if err != nil {
			return "", "", UserName
		}
		return id, "", Allowed
	}
	return "", "", UnknownVhost
}
