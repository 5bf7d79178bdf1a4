package broker

import (
	"strings"
	"time"

	"muster/internal/fleet"
)

// ConnectionEvent is a session that began or ended, as RabbitMQ's event exchange tells it.
type ConnectionEvent struct {
	Began    bool
	Name     string // of the connection; the end has the name of the beginning
	ClientID string // of MQTT; empty for other protocols
	Vhost    string // only of a beginning, like all that follow
	User     string
	Protocol string
	Peer     string       // host
	Serial   fleet.Serial // of the client certificate; empty without one
	At       time.Time    // of the event, by the broker's clock
}

// Keys of connection events on the event exchange.
const (
	keyCreated = "connection.created"
	keyClosed  = "connection.closed"
)

// ParseConnectionEvent reads a message from the presence queue. It reports false for what is no connection event of a
// client. The end of a session has no user, vhost or serial: Name joins it to the beginning.
func ParseConnectionEvent(m Message) (ConnectionEvent, bool) {
	if m.Key != keyCreated && m.Key != keyClosed {
		return ConnectionEvent{}, false
	}
	text := func(key string) string {
		s, _ := m.Headers[key].(string)
		return s
	}
	e := ConnectionEvent{
		Began: m.Key == keyCreated, Name: text("name"), Vhost: text("vhost"), User: text("user"), Protocol: text("protocol"),
		Peer: host(text("peer_host")), ClientID: clientID(m.Headers["client_properties"]), At: m.At,
		Serial: certSerial(text("peer_cert_serial_number")),
	}
	if ms, ok := m.Headers["timestamp_in_ms"].(int64); ok {
		e.At = time.UnixMilli(ms)
	}
	return e, e.Name != ""
}

// clientID finds client_id among a connection's client properties: Erlang terms as text, {client_id,longstr,<<"d1">>}
// for MQTT, with the name as <<"client_id">> where a client chose it.
func clientID(v any) string {
	list, _ := v.([]any)
	for _, item := range list {
		s, _ := item.(string)
		if id, ok := strings.CutPrefix(s, `{client_id,longstr,<<"`); ok {
			id, _, _ = strings.Cut(id, `"`)
			return id
		}
	}
	return ""
}

// host turns an Erlang address, {127,0,0,1}, into the usual form; anything else stays.
func host(s string) string {
	inner, ok := strings.CutPrefix(strings.TrimSuffix(s, "}"), "{")
	if parts := strings.Split(inner, ","); ok && len(parts) == 4 {
		return strings.Join(parts, ".")
	}
	return s
}

// certSerial reads a serial number as RabbitMQ prints it: hex, upper case, perhaps with leading zeros.
func certSerial(s string) fleet.Serial {
	serial, err := fleet.ParseSerial(strings.TrimLeft(strings.ToLower(s), "0"))
	if err != nil {
		return ""
	}
	return serial
}
