// Package wire is the only codec of what crosses the MQTT and AMQP border: topics, routing keys and payloads.
// api/asyncapi.yaml is the contract in words; a test holds the two together. The package does no I/O.
package wire

import (
	"strings"

	"muster/internal/fleet"
)

// Vhosts of the broker (DESIGN §5).
const (
	VhostDevices  = "devices"  // mutual TLS, the normal way in
	VhostFallback = "fallback" // password over TLS, for a device whose certificate failed
)

// Queues that muster declares. Each exists in both vhosts, but Presence and Telemetry only in VhostDevices.
const (
	QueueUp        = "muster.up"
	QueueDead      = "muster.dead"
	QueuePresence  = "muster.presence"
	QueueTelemetry = "telemetry"
	ExchangeTopic  = "amq.topic"
	ExchangeEvents = "amq.rabbitmq.event"
	ExchangeDead   = "muster.dlx"
)

// MaxTopicLen is the longest topic a device may use, in bytes. A topic of 256 bytes or more kills every AMQP consumer
// of the queue it lands in (rabbitmq.md §4.4).
const MaxTopicLen = 128

// Up is the last word of a topic that a device writes and muster reads.
type Up string

// What a device says (DESIGN §6).
const (
	UpHello Up = "hello"
	UpState Up = "state"
	UpOTA   Up = "ota"
	UpCert  Up = "cert"
)

// Down is the last word of a topic that muster writes.
type Down string

// What muster says to a device (DESIGN §6).
const (
	DownOTA  Down = "ota"
	DownCert Down = "cert"
	DownCmd  Down = "cmd"
)

// UpTopic returns the MQTT topic on which device id says w.
func UpTopic(id fleet.DeviceID, w Up) string { return "d/" + string(id) + "/up/" + string(w) }

// TelemetryTopic returns the MQTT topic of a telemetry channel; name may hold further levels.
func TelemetryTopic(id fleet.DeviceID, name string) string {
	return "d/" + string(id) + "/up/tm/" + name
}

// DownTopic returns the MQTT topic on which device id hears w.
func DownTopic(id fleet.DeviceID, w Down) string { return "d/" + string(id) + "/dn/" + string(w) }

// DownFilter returns the one subscription that a device needs.
func DownFilter(id fleet.DeviceID) string { return "d/" + string(id) + "/dn/#" }

// DownKey returns the AMQP routing key that reaches DownTopic(id, w).
func DownKey(id fleet.DeviceID, w Down) string { return "d." + string(id) + ".dn." + string(w) }

// ParseUpKey splits the routing key of a message that muster reads. The key is the device's authenticated word for who
// it is: the broker let it publish only below its own id. The error is of kind Invalid and does not echo the key.
func ParseUpKey(key string) (fleet.DeviceID, Up, error) {
	if len(key) > MaxTopicLen {
		return "", "", fleet.Errorf(fleet.Invalid, "topic longer than %d bytes", MaxTopicLen)
	}
	part := strings.Split(key, ".")
	if len(part) != 4 || part[0] != "d" || part[2] != "up" {
		return "", "", fleet.Errorf(fleet.Invalid, "topic is not d/<device>/up/<word>")
	}
	id, err := fleet.ParseDeviceID(part[1])
	if err != nil {
		return "", "", err
	}
	switch w := Up(part[3]); w {
	case UpHello, UpState, UpOTA, UpCert:
		return id, w, nil
	}
	return "", "", fleet.Errorf(fleet.Invalid, "topic: muster does not read this word after up/")
}

// certUserPrefix starts the URI SAN of every device certificate.
const certUserPrefix = "urn:muster:device:"

// CertUser returns the URI that a device certificate carries and that RabbitMQ takes as the user name (DESIGN §4).
func CertUser(id fleet.DeviceID, s fleet.Serial) string {
	return certUserPrefix + string(id) + ":" + string(s)
}

// ParseCertUser is the reverse of CertUser. The error is of kind Invalid.
func ParseCertUser(user string) (fleet.DeviceID, fleet.Serial, error) {
	rest, ok := strings.CutPrefix(user, certUserPrefix)
	id, serial, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 {
		return "", "", fleet.Errorf(fleet.Invalid, "user name is not %s<device>:<serial>", certUserPrefix)
	}
	d, err := fleet.ParseDeviceID(id)
	if err != nil {
		return "", "", err
	}
	s, err := fleet.ParseSerial(serial)
	if err != nil {
		return "", "", err
	}
	return d, s, nil
}
