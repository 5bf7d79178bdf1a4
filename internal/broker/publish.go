package broker

import (
	"context"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"muster/internal/wire"
)

// Out is a message to be published to amq.topic.
type Out struct {
	Key  string // routing key
	Body []byte
}

// Publisher publishes to one vhost over a connection of its own, with confirms.
type Publisher struct {
	link
	requests chan request
}

type request struct {
	ctx  context.Context
	outs []Out
	errs chan []error // capacity 1
}

// confirmTimeout is how long a confirm may take. After it, whether the message arrived is unknown: it is published again.
const confirmTimeout = 15 * time.Second

// NewPublisher returns a Publisher. Run it once.
func NewPublisher(c Config, vhost string) *Publisher {
	return &Publisher{link: link{c: c, vhost: vhost, what: "publisher"}, requests: make(chan request)}
}

// Connected reports whether messages can be published now.
func (p *Publisher) Connected() bool { return p.up.Load() }

// Run serves Publish until ctx ends.
func (p *Publisher) Run(ctx context.Context) error {
	return p.run(ctx, func(ctx context.Context, conn *amqp.Connection) error {
		ch, err := openChannel(ctx, conn)
		if err != nil {
			return err
		}
		if err := ch.Confirm(false); err != nil {
			return err
		}
		gone := ch.NotifyClose(make(chan *amqp.Error, 1))
		blocked := conn.NotifyBlocked(make(chan amqp.Blocking, 8))
		p.up.Store(true)
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case e := <-gone:
				return closed(e)
			case b := <-blocked:
				// An alarm of the broker: it reads nothing from publishers. Take no work until it is over.
				p.up.Store(!b.Active)
				if b.Active {
					p.c.Log.Warn("the broker takes no messages", "reason", b.Reason)
					if err := waitUnblocked(ctx, gone, blocked); err != nil {
						return err
					}
					p.up.Store(true)
				}
			case r := <-p.requests:
				errs, err := publishAll(r.ctx, ch, r.outs)
				r.errs <- errs
				if err != nil {
					return err
				}
			}
		}
	})
}

func waitUnblocked(ctx context.Context, gone <-chan *amqp.Error, blocked <-chan amqp.Blocking) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-gone:
			return closed(e)
		case b := <-blocked:
			if !b.Active {
				return nil
			}
		}
	}
}

// publishAll publishes a batch and waits for its confirms. The second error ends the session: what is unconfirmed then
// is unknown, and is published again in the next one.
func publishAll(ctx context.Context, ch *amqp.Channel, outs []Out) ([]error, error) {
	errs := make([]error, len(outs))
	fail := func(from int, err error) ([]error, error) {
		for i := from; i < len(outs); i++ {
			if errs[i] == nil {
				errs[i] = err
			}
		}
		return errs, err
	}
	confirms := make([]*amqp.DeferredConfirmation, len(outs))
	for i, o := range outs {
		dc, err := ch.PublishWithDeferredConfirm(wire.ExchangeTopic, o.Key, false, false, amqp.Publishing{
			// No content type: an MQTT 5 device would get it as a property, in a buffer that has no room for it.
			DeliveryMode: amqp.Persistent, Body: o.Body,
		})
		if err != nil {
			return fail(0, err)
		}
		confirms[i] = dc
	}
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	for i, dc := range confirms {
		ok, err := dc.WaitContext(ctx)
		if err != nil {
			return fail(i, fmt.Errorf("no confirm from the broker: %w", err))
		}
		if !ok {
			errs[i] = fmt.Errorf("the broker refused the message")
		}
	}
	return errs, nil
}

// Publish publishes a batch in order and returns one error for each message; nil means that the broker has it. While
// there is no connection, it fails at once with Unavailable.
func (p *Publisher) Publish(ctx context.Context, outs []Out) []error {
	errs := make([]error, len(outs))
	all := func(err error) []error {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	if len(outs) == 0 {
		return errs
	}
	if !p.Connected() {
		return all(errUnavailable())
	}
	ctx, cancel := context.WithTimeout(ctx, 2*confirmTimeout)
	defer cancel()
	r := request{ctx, outs, make(chan []error, 1)}
	select {
	case p.requests <- r:
	case <-ctx.Done():
		return all(errUnavailable())
	}
	select {
	case errs := <-r.errs:
		return errs
	case <-ctx.Done():
		return all(errUnavailable())
	}
}
