package brokerauth

import (
	"bytes"
	"crypto/sha256"
	"fmt"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// MaxBody is the longest question that is read, in bytes. The longest one that could be allowed has less than 1 KiB.
const MaxBody = 8 << 10

// field is one field of a question.
type field uint

// Fields that RabbitMQ 4.1 to 4.3 sends; asked says with which question (measured on 4.3.6).
const (
	fieldUsername field = 1 << iota
	fieldPassword
	fieldVhost
	fieldClientID
	fieldIP
	fieldTags
	fieldResource
	fieldName
	fieldPermission
	fieldRoutingKey
	fieldMapClientID
	fieldMapUsername
	fieldMapVhost
	fieldContext // sockOrAddr, is_loopback: internals that leak from versions before 4.2.9; ignored
	fieldUnknown
)

// asked and needed are the fields that a question may have and must have. A login over AMQP or by the management API
// has neither vhost nor client id: it is well formed, and Decide refuses it.
var (
	asked = map[admission.Kind]field{
		admission.User:     fieldUsername | fieldPassword | fieldVhost | fieldClientID | fieldContext,
		admission.Vhost:    fieldUsername | fieldVhost | fieldIP | fieldTags | fieldClientID,
		admission.Resource: fieldUsername | fieldVhost | fieldResource | fieldName | fieldPermission | fieldTags | fieldClientID,
		admission.Topic: fieldUsername | fieldVhost | fieldResource | fieldName | fieldPermission | fieldTags | fieldRoutingKey |
			fieldMapClientID | fieldMapUsername | fieldMapVhost,
	}
	needed = map[admission.Kind]field{
		admission.User:     fieldUsername,
		admission.Vhost:    fieldUsername | fieldVhost,
		admission.Resource: fieldUsername | fieldVhost | fieldResource | fieldName | fieldPermission,
		admission.Topic:    fieldUsername | fieldVhost | fieldResource | fieldName | fieldPermission | fieldRoutingKey | fieldMapClientID,
	}
)

func fieldOf(name []byte) field {
	switch string(name) {
	case "username":
		return fieldUsername
	case "password":
		return fieldPassword
	case "vhost":
		return fieldVhost
	case "client_id":
		return fieldClientID
	case "ip":
		return fieldIP
	case "tags":
		return fieldTags
	case "resource":
		return fieldResource
	case "name":
		return fieldName
	case "permission":
		return fieldPermission
	case "routing_key":
		return fieldRoutingKey
	case "variable_map.client_id":
		return fieldMapClientID
	case "variable_map.username":
		return fieldMapUsername
	case "variable_map.vhost":
		return fieldMapVhost
	case "sockOrAddr", "is_loopback":
		return fieldContext
	}
	return fieldUnknown
}

// parse reads a question of kind from body, an application/x-www-form-urlencoded document that it decodes in place.
// peer is the address of the MQTT client where the broker tells it. Anything that RabbitMQ would not send is an error:
// an unknown, repeated or missing field, a bad escape, a field that contradicts another. The error names fields only.
func parse(kind admission.Kind, body []byte) (q admission.Question, peer string, err error) {
	q.Kind = kind
	var seen field
	var mapUser, mapVhost string
	for len(body) > 0 {
		pair := body
		if i := bytes.IndexByte(body, '&'); i >= 0 {
			pair, body = body[:i], body[i+1:]
		} else {
			body = nil
		}
		name, raw, ok := bytes.Cut(pair, []byte{'='})
		f := fieldOf(name)
		switch {
		case !ok || f&asked[kind] == 0:
			return q, "", fmt.Errorf("unexpected field %.40q", name)
		case f&seen != 0 && f != fieldContext:
			return q, "", fmt.Errorf("field %s comes twice", name)
		}
		seen |= f
		value, ok := unescape(raw)
		if !ok {
			return q, "", fmt.Errorf("field %s has a bad escape", name)
		}
		switch f {
		case fieldUsername:
			q.User = string(value)
		case fieldPassword:
			q.HasPassword, q.Password = true, fleet.HashOf(sha256.Sum256(value))
		case fieldVhost:
			q.Vhost = string(value)
		case fieldClientID, fieldMapClientID:
			q.ClientID = string(value)
		case fieldIP:
			peer = string(value)
		case fieldTags:
			if len(value) > 0 {
				return q, "", fmt.Errorf("the user has tags, which muster gives to nobody")
			}
		case fieldResource:
			q.Resource = string(value)
		case fieldName:
			q.Name = string(value)
		case fieldPermission:
			q.Permission = string(value)
		case fieldRoutingKey:
			q.RoutingKey = string(value)
		case fieldMapUsername:
			mapUser = string(value)
		case fieldMapVhost:
			mapVhost = string(value)
		}
	}
	switch {
	case needed[kind]&^seen != 0:
		return q, "", fmt.Errorf("a field is missing")
	case seen&fieldMapUsername != 0 && mapUser != q.User, seen&fieldMapVhost != 0 && mapVhost != q.Vhost:
		return q, "", fmt.Errorf("variable_map contradicts the other fields")
	}
	return q, peer, nil
}

// unescape decodes s in place: + is a space, %XX a byte. It reports false if an escape is not two hex digits.
func unescape(s []byte) ([]byte, bool) {
	n := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch c {
		case '+':
			c = ' '
		case '%':
			if i+2 >= len(s) {
				return nil, false
			}
			hi, ok1 := unhex(s[i+1])
			lo, ok2 := unhex(s[i+2])
			if !ok1 || !ok2 {
				return nil, false
			}
			c = hi<<4 | lo
			i += 2
		}
		s[n] = c
		n++
	}
	return s[:n], true
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
