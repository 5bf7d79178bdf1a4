package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"

	"muster/internal/wire"
)

// Bounds of the queues.
const (
	deliveryLimit    = 20             // deliveries of a report whose consumer died meanwhile; then it is a dead letter
	maxUp            = int64(2 << 30) // bytes of reports that wait; int64, or amqp091 sends 32 bits of it
	maxDead          = 100_000        // dead letters
	maxPresence      = 200_000        // events; the oldest go, presence is reconciled anyway
	telemetryMaxAge  = "7D"
	telemetryMaxSize = int64(5_000_000_000) // bytes
	telemetrySegment = int64(50_000_000)    // bytes: what retention can cut at a time
)

// queue is a queue that muster declares.
type queue struct {
	name     string
	args     amqp.Table
	exchange string
	keys     []string
}

// topology returns the queues of a vhost (DESIGN §5).
func topology(vhost string) []queue {
	qs := []queue{
		{name: wire.QueueDead, exchange: wire.ExchangeDead, keys: []string{"#"}, args: amqp.Table{
			amqp.QueueTypeArg: amqp.QueueTypeQuorum, amqp.QueueMaxLenArg: maxDead, amqp.QueueOverflowArg: "drop-head",
		}},
		{name: wire.QueueUp, exchange: wire.ExchangeTopic, args: amqp.Table{
			amqp.QueueTypeArg: amqp.QueueTypeQuorum, "x-delivery-limit": deliveryLimit,
			"x-dead-letter-exchange": wire.ExchangeDead, "x-dead-letter-strategy": "at-least-once",
			amqp.QueueMaxLenBytesArg: maxUp, amqp.QueueOverflowArg: amqp.QueueOverflowRejectPublish,
		}},
	}
	words := []wire.Up{wire.UpHello, wire.UpCert}
	if vhost == wire.VhostDevices {
		words = append(words, wire.UpState, wire.UpOTA)
		qs = append(qs,
			queue{name: wire.QueuePresence, exchange: wire.ExchangeEvents, keys: []string{"connection.*"}, args: amqp.Table{
				amqp.QueueTypeArg: amqp.QueueTypeClassic, amqp.QueueMaxLenArg: maxPresence, amqp.QueueOverflowArg: "drop-head",
			}},
			queue{name: wire.QueueTelemetry, exchange: wire.ExchangeTopic, keys: []string{"d.*.up.tm.#"}, args: amqp.Table{
				amqp.QueueTypeArg: amqp.QueueTypeStream, "x-max-age": telemetryMaxAge,
				amqp.StreamMaxLenBytesArg: telemetryMaxSize, amqp.StreamMaxSegmentSizeBytesArg: telemetrySegment,
			}},
		)
	}
	for _, w := range words {
		qs[1].keys = append(qs[1].keys, "d.*.up."+string(w))
	}
	return qs
}

// declare makes what is missing in a vhost. A queue that somebody declared with other arguments is an error that names
// it: muster never deletes a queue, since messages may be in it.
func declare(ctx context.Context, conn *amqp.Connection, vhost string) error {
	for _, q := range topology(vhost) {
		ch, err := openChannel(ctx, conn) // the broker closes it on a refusal
		if err != nil {
			return err
		}
		err = q.declare(ch)
		if refused, ok := errors.AsType[*amqp.Error](err); ok && refused.Code == amqp.PreconditionFailed && strings.Contains(refused.Reason, "inequivalent arg") {
			return fmt.Errorf("queue %s in vhost %s exists with other arguments: drain and delete it, muster declares it anew: %w", q.name, vhost, err)
		}
		if err != nil {
			return fmt.Errorf("queue %s in vhost %s: %w", q.name, vhost, err)
		}
		if err := ch.Close(); err != nil {
			return err
		}
	}
	return nil
}

func (q queue) declare(ch *amqp.Channel) error {
	if q.exchange == wire.ExchangeDead {
		if err := ch.ExchangeDeclare(q.exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
			return err
		}
	}
	if _, err := ch.QueueDeclare(q.name, true, false, false, false, q.args); err != nil {
		return err
	}
	for _, k := range q.keys {
		if err := ch.QueueBind(q.name, k, q.exchange, false, nil); err != nil {
			return err
		}
	}
	return nil
}
