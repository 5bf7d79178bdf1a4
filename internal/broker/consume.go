package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Message is a delivery. Key, Body and Headers are bytes that a device chose.
type Message struct {
	Vhost   string
	Key     string // routing key
	Body    []byte
	At      time.Time // when the broker took it; the same at every delivery
	Headers map[string]any
}

// Subscription is a queue and what to do with its messages.
type Subscription struct {
	Queue    string
	MaxBatch int           // messages in one call of Handle
	Linger   time.Duration // how long a batch waits for more
	// Handle is called with one batch at a time. nil: all of it is safe, it is acknowledged. An error: none of it is; the
	// same batch is tried again after a pause, for as long as the connection lives, and comes again from the queue after.
	Handle func(ctx context.Context, batch []Message) error
}

// Consumer consumes queues of one vhost over a connection of its own.
type Consumer struct {
	link
	subs []Subscription
}

// NewConsumer returns a Consumer. Run it once.
func NewConsumer(c Config, vhost string, subs ...Subscription) *Consumer {
	return &Consumer{link: link{c: c, vhost: vhost, what: "consumer"}, subs: subs}
}

// Connected reports whether the consumer consumes now.
func (c *Consumer) Connected() bool { return c.up.Load() }

// Losses returns how often a connection was lost or could not be made. A consumer that keeps losing its connection may
// be dying of a message (rabbitmq.md §4.4).
func (c *Consumer) Losses() uint64 { return c.lost.Load() }

// Run declares the queues and consumes until ctx ends. Batches under way are finished first.
func (c *Consumer) Run(ctx context.Context) error {
	return c.run(ctx, func(ctx context.Context, conn *amqp.Connection) error {
		// The broker answers some requests only when it is ready: give up on one that never is.
		guard := time.AfterFunc(setupTimeout, func() { _ = conn.CloseDeadline(time.Now().Add(time.Second)) })
		err := declare(ctx, conn, c.vhost)
		if guard.Stop(); err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		errs := make(chan error, len(c.subs))
		for _, s := range c.subs {
			go func() { errs <- c.consume(ctx, conn, s) }()
		}
		c.up.Store(true)
		first := <-errs
		c.up.Store(false)
		cancel()
		for range len(c.subs) - 1 {
			<-errs
		}
		return first
	})
}

// consume handles the deliveries of one queue until the channel or ctx ends.
func (c *Consumer) consume(ctx context.Context, conn *amqp.Connection, s Subscription) error {
	ch, err := openChannel(ctx, conn)
	if err != nil {
		return err
	}
	gone := ch.NotifyClose(make(chan *amqp.Error, 1))
	cancelled := ch.NotifyCancel(make(chan string, 1))
	guard := time.AfterFunc(setupTimeout, func() { _ = conn.CloseDeadline(time.Now().Add(time.Second)) })
	defer guard.Stop()
	// Two batches: one is handled while the next one arrives.
	if err := ch.Qos(2*s.MaxBatch, 0, false); err != nil {
		return err
	}
	deliveries, err := ch.Consume(s.Queue, "", false, false, false, false, nil)
	if err != nil {
		return fmt.Errorf("queue %s: %w", s.Queue, err)
	}
	guard.Stop()
	for {
		var batch []amqp.Delivery
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-gone:
			return fmt.Errorf("queue %s: %w", s.Queue, closed(e))
		case <-cancelled:
			return fmt.Errorf("queue %s was deleted, or its leader is gone", s.Queue)
		case d, ok := <-deliveries:
			if !ok {
				return fmt.Errorf("queue %s: the connection was lost", s.Queue)
			}
			batch = gather(ctx, d, deliveries, s)
		}
		if err := c.handle(ctx, ch, s, batch); err != nil {
			return err
		}
	}
}

// gather adds to the first delivery those that come within the linger.
func gather(ctx context.Context, first amqp.Delivery, more <-chan amqp.Delivery, s Subscription) []amqp.Delivery {
	batch := append(make([]amqp.Delivery, 0, s.MaxBatch), first)
	timer := time.NewTimer(s.Linger)
	defer timer.Stop()
	for len(batch) < s.MaxBatch {
		select {
		case d, ok := <-more:
			if !ok {
				return batch // handled, and handled again after the reconnect
			}
			batch = append(batch, d)
			continue
		default:
		}
		select {
		case d, ok := <-more:
			if !ok {
				return batch
			}
			batch = append(batch, d)
		case <-timer.C:
			return batch
		case <-ctx.Done():
			return batch
		}
	}
	return batch
}

// arrived returns when the broker took a message: its own stamp, which a client cannot set (brokerconf), and which is the
// same at every delivery. Without one, or with one from the future, it is now.
func arrived(d amqp.Delivery, now time.Time) time.Time {
	ms, ok := d.Headers["timestamp_in_ms"].(int64)
	if at := time.UnixMilli(ms); ok && ms > 0 && at.Before(now) {
		return at
	}
	return now
}

// handle has a batch stored, however long that takes, and acknowledges it.
func (c *Consumer) handle(ctx context.Context, ch *amqp.Channel, s Subscription, batch []amqp.Delivery) error {
	now := time.Now()
	messages := make([]Message, len(batch))
	for i, d := range batch {
		messages[i] = Message{Vhost: c.vhost, Key: d.RoutingKey, Body: d.Body, At: arrived(d, now), Headers: d.Headers}
	}
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		err := s.Handle(ctx, messages)
		if err == nil {
			break
		}
		c.c.Log.Error("reports could not be stored; they stay in the queue", "queue", s.Queue, "vhost", c.vhost, "reports", len(batch), "error", err, "again_in", pause)
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		if ch.IsClosed() {
			return errors.New("the connection was lost while reports could not be stored")
		}
	}
	return ch.Ack(batch[len(batch)-1].DeliveryTag, true)
}
