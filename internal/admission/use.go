package admission

import (
	"strings"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// MaxTopicWords is the most levels that a topic may have. Ours have four to six; the broker walks a trie by them.
const MaxTopicWords = 10

// queuePrefix and the two suffixes make the names of the only queues that an MQTT session needs (rabbitmq.md §4.2).
// The queue mqtt-will-<id> of a delayed will is not among them: it would need the default exchange as well.
const queuePrefix = "mqtt-subscription-"

// resource allows a device its own subscription queues, and the topic exchange to publish to and bind from.
func resource(q *Question, device fleet.DeviceID) Reason {
	switch q.Resource {
	case "queue":
		if ownQueue(q.Name, device) && (q.Permission == "configure" || q.Permission == "write" || q.Permission == "read") {
			return Allowed
		}
	case "exchange":
		if q.Name == wire.ExchangeTopic && (q.Permission == "write" || q.Permission == "read") {
			return Allowed
		}
	}
	return ResourceDenied
}

func ownQueue(name string, device fleet.DeviceID) bool {
	rest, ok := strings.CutPrefix(name, queuePrefix)
	if !ok {
		return false
	}
	qos, ok := strings.CutPrefix(rest, string(device))
	return ok && (qos == "qos0" || qos == "qos1")
}

// topic allows a device to write d.<id>.up.<words> and to read d.<id>.dn.<words>, the last of which may be #. A will
// comes through here when the broker publishes it.
//
// The broker has turned / into . and + into * before it asks, so a level that held a dot ("up/a.b") cannot be told from
// two ("up/a/b"), nor d.dev.up.x from d/dev/up/x. What can be enforced is that no spelling reaches beyond the device's own
// branch: a device id holds no dot, and the words are counted and compared after the translation, as the broker's own
// matching does. A dotted topic is therefore only another way to write one that the device may use anyway.
func topic(q *Question, device fleet.DeviceID) Reason {
	if q.Resource != "topic" || q.Name != wire.ExchangeTopic {
		return ResourceDenied
	}
	key := q.RoutingKey
	if len(key) > wire.MaxTopicLen {
		return TopicLong
	}
	switch q.Permission {
	case "write":
		return own(key, device, "up", q.Vhost)
	case "read":
		key, _ = strings.CutSuffix(key, ".#")
		if key == "d."+string(device)+".dn" && key != q.RoutingKey {
			return Allowed // the whole branch
		}
		return own(key, device, "dn", q.Vhost)
	}
	return ResourceDenied
}

// own checks that key is d.<device>.<branch>.<words>, without wildcards.
func own(key string, device fleet.DeviceID, branch, vhost string) Reason {
	if r := plain(key); r != Allowed {
		return r
	}
	rest, ok := strings.CutPrefix(key, "d.")
	if !ok {
		return TopicDenied
	}
	id, rest, _ := strings.Cut(rest, ".")
	if id != string(device) {
		return OtherDevice
	}
	b, word, ok := strings.Cut(rest, ".")
	if !ok || b != branch {
		return TopicDenied
	}
	if vhost == wire.VhostFallback && branch == "up" && word != string(wire.UpHello) && word != string(wire.UpCert) {
		return FallbackTopic
	}
	return Allowed
}

// plain checks that key is 1 to MaxTopicWords non-empty words of visible ASCII without wildcards, the $ of the
// broker's own topics, or a slash, which the broker never leaves in a routing key.
func plain(key string) Reason {
	words, length := 1, 0
	for i := range len(key) {
		switch c := key[i]; {
		case c == '.':
			if length == 0 {
				return TopicForm
			}
			words, length = words+1, 0
		case c == '*' || c == '#' || c == '+':
			return TopicWildcard
		case c <= ' ' || c > '~' || c == '$' || c == '/':
			return TopicForm
		default:
			length++
		}
	}
	if length == 0 || words > MaxTopicWords {
		return TopicForm
	}
	return Allowed
}
