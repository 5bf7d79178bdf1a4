package simdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/eclipse/paho.golang/paho"
	"github.com/go-json-experiment/json"

	"muster/internal/wire"
)

// session is one MQTT session: a single goroutine that hears, says and keeps the timers.
type session struct {
	d *Device
	l *link
	w door

	answered bool  // muster answered a hello
	stored   bool  // a certificate was stored that is to be used next
	leave    error // how the session ends when a download that goes on has ended; nil: not for that
	helloed  bool  // once more, because an offer named what runs already
	slices   wire.Assembler
	update   update
	askAgain *time.Timer // for a certificate; nil unless muster said when

	pause  *time.Timer                     // until a stored certificate that did not work is tried again; nil for none
	paused func(ctx context.Context) error // does so
}

// errLost ends a session, not the life.
type errLost struct{ why string }

func (e errLost) Error() string { return e.why }

func newSession(d *Device, l *link, w door) *session { return &session{d: d, l: l, w: w} }

// run lives the session. It returns why it ended, and an error if the life ends with it.
func (s *session) run(ctx context.Context) (end string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer s.stopUpdate()
	defer cancel()
	// A write to a peer that reads no more must not hold up the end.
	stop := context.AfterFunc(ctx, func() { s.l.conn.SetDeadline(time.Now().Add(time.Second)) })
	defer stop()
	err = s.begin(ctx)
	if err == nil {
		err = s.loop(ctx)
	}
	if lost, is := errors.AsType[errLost](err); is {
		return lost.why, nil
	}
	return "", err
}

// begin subscribes and says hello.
func (s *session) begin(ctx context.Context) error {
	limit, cancel := s.l.limit(ctx, s.d.c.Timing.Ack)
	defer cancel()
	if _, err := s.l.client.Subscribe(limit, &paho.Subscribe{Subscriptions: []paho.SubscribeOptions{{Topic: wire.DownFilter(s.d.id), QoS: 1}}}); err != nil {
		return s.broken(ctx, "subscribe", err)
	}
	if s.d.fw.Behaviour == Mute || s.d.fault().Silent {
		return nil
	}
	if err := s.hello(ctx); err != nil {
		return err
	}
	if s.w.fallback {
		return s.askForCertificate(ctx)
	}
	if err := s.reportRollback(ctx); err != nil {
		return err
	}
	if b := s.d.boot; b.Verify && b.Job != "" {
		if err := s.reportStep(ctx, wire.OTAReport{Job: b.Job, Step: wire.StepVerifying}); err != nil {
			return err
		}
	}
	return s.state(ctx)
}

// loop hears and says until the session or the life ends.
func (s *session) loop(ctx context.Context) error {
	f := s.d.fault()
	var telemetry, flood, drop <-chan time.Time
	var stay *time.Timer
	patience := s.d.c.Timing.Answer
	unanswered := time.NewTimer(patience)
	defer unanswered.Stop()
	if !s.w.fallback && s.d.fw.Behaviour != Mute {
		if every := s.d.c.Timing.TelemetryEvery; every > 0 {
			t := time.NewTicker(every)
			defer t.Stop()
			telemetry = t.C
		}
		if f.FloodPerSecond > 0 {
			t := time.NewTicker(max(time.Second/time.Duration(f.FloodPerSecond), time.Microsecond))
			defer t.Stop()
			flood = t.C
		}
	}
	if every := max(f.DropEvery, s.d.conduct.dropEvery); every > 0 {
		t := time.NewTimer(time.Duration(float64(every) * -math.Log(1-s.d.rnd.Float64())))
		defer t.Stop()
		drop = t.C
	}
	if s.w.fallback {
		stay = time.NewTimer(s.d.c.Timing.FallbackStay)
		defer stay.Stop()
	}
	for {
		var err error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case r := <-s.d.orders:
			return r
		case why := <-s.l.lost:
			return errLost{why}
		case p := <-s.l.in:
			err = s.hear(ctx, p)
		case <-telemetry:
			err = s.telemetry(ctx)
		case <-flood:
			err = s.flood(ctx)
		case <-drop:
			s.l.conn.Close()
			return errLost{"dropped by itself"}
		case <-ticks(stay):
			if s.update.cancel == nil {
				return errLost{"no certificate yet"}
			}
			stay.Reset(s.d.c.Timing.FallbackStay) // it loads an image
		case <-unanswered.C:
			if s.answered || f.Silent || s.d.fw.Behaviour == Mute {
				continue
			}
			patience = min(2*patience, time.Hour)
			unanswered.Reset(patience)
			err = s.hello(ctx)
		case <-ticks(s.askAgain):
			s.askAgain = nil
			err = s.askForCertificate(ctx)
		case <-ticks(s.pause):
			s.pause = nil
			err = s.paused(ctx)
		case pct := <-s.update.progress:
			err = s.reportStep(ctx, wire.OTAReport{Job: s.update.offer.Job, Step: wire.StepDownloading, Percent: pct})
		case r := <-s.update.done:
			err = s.downloaded(ctx, r)
		}
		if err != nil {
			return err
		}
	}
}

// ticks returns the channel of a timer, nil for none.
func ticks(t *time.Timer) <-chan time.Time {
	if t == nil {
		return nil
	}
	return t.C
}

// hear handles one message of muster.
func (s *session) hear(ctx context.Context, p *paho.Publish) error {
	s.d.count(func(c *Counts) { c.Received++ })
	if f := s.d.fault(); f.Buffer > 0 {
		if n := packetSize(p); n > f.Buffer {
			return s.drop("%s: a packet of %d bytes does not fit the receive buffer", p.Topic, n)
		}
	}
	switch p.Topic {
	case wire.DownTopic(s.d.id, wire.DownCmd):
		c, err := wire.DecodeCmd(p.Payload)
		if err != nil {
			return s.drop("%s: %v", p.Topic, err)
		}
		return s.command(ctx, c)
	case wire.DownTopic(s.d.id, wire.DownOTA):
		o, err := wire.DecodeOffer(p.Payload)
		if err != nil {
			return s.drop("%s: %v", p.Topic, err)
		}
		return s.offered(ctx, o)
	case wire.DownTopic(s.d.id, wire.DownCert):
		o, err := wire.DecodeCertOrder(p.Payload)
		if err != nil {
			return s.drop("%s: %v", p.Topic, err)
		}
		return s.certOrder(ctx, o)
	}
	return s.drop("%q: not a topic of this device", p.Topic)
}

// packetSize returns how many bytes a message took on the wire, properties included.
func packetSize(p *paho.Publish) int {
	n, err := p.Packet().ToControlPacket().WriteTo(io.Discard)
	if err != nil {
		return math.MaxInt
	}
	return int(n)
}

// drop counts a message that the device can do nothing with. It is no error: the session goes on.
func (s *session) drop(format string, a ...any) error {
	s.d.count(func(c *Counts) { c.Dropped++ })
	s.d.emit(Dropped, format, a...)
	return nil
}

func (s *session) command(ctx context.Context, c wire.Cmd) error {
	if c.Op != wire.CmdHello {
		s.d.emit(Commanded, "%s", c.Op)
	}
	switch c.Op {
	case wire.CmdHello:
		s.answered = true
		s.d.count(func(c *Counts) { c.Answers++ })
		s.d.emit(Answered, "%s", time.Unix(c.Time, 0).UTC().Format(time.RFC3339))
		if err := s.d.tellTime(c.Time); err != nil || s.w.fallback {
			return err
		}
		return s.d.confirm()
	case wire.CmdTrust:
		return s.fetchTrust(ctx, c.Bundle)
	case wire.CmdReboot:
		return reboot{"commanded"}
	case wire.CmdPrevious:
		return s.bootPrevious(ctx, c)
	case wire.CmdReport:
		if err := s.hello(ctx); err != nil || s.w.fallback {
			return err
		}
		return s.state(ctx)
	}
	return nil
}

// hello says what runs here. A device with a small buffer leaves out what does not fit: most such clients have one buffer
// for both ways (esp32.md §7).
func (s *session) hello(ctx context.Context) error {
	buffer := s.d.fault().Buffer
	h := wire.Hello{
		Version: s.d.fw.Version, Image: s.d.image, Hardware: s.d.c.Hardware, Chip: s.d.c.Chip, Revision: s.d.c.Revision, SecureVersion: s.d.fuse,
		Boot: s.d.Snapshot().Boot, Serial: s.l.serial, Buffer: buffer, Bundle: s.d.bundle, Previous: s.d.previous.image, PreviousSecureVersion: s.d.previous.fw.SecureVersion,
	}
	topic := wire.UpTopic(s.d.id, wire.UpHello)
	b := wire.Encode(h)
	if buffer > 0 && 7+len(topic)+len(b) > buffer {
		h.Previous, h.PreviousSecureVersion = "", 0
		b = wire.Encode(h)
	}
	if err := s.say(ctx, topic, b); err != nil {
		return err
	}
	s.d.count(func(c *Counts) { c.Hellos++ })
	s.d.emit(SaidHello, "%s %.16s", h.Version, h.Image)
	return nil
}

// state says what the device measures of itself.
func (s *session) state(ctx context.Context) error {
	if s.d.fault().Silent {
		return nil
	}
	doc := map[string]any{"uptime": int(time.Since(s.d.bootedAt).Seconds()), "rssi": -40 - s.d.rnd.IntN(40), "heap": s.heap()}
	claim := s.d.fault().ClaimID
	if claim != "" {
		doc["device"] = claim
	}
	b, err := json.Marshal(doc, json.Deterministic(true))
	if err != nil {
		return err
	}
	if err := s.say(ctx, wire.UpTopic(s.d.id, wire.UpState), b); err != nil || claim == "" {
		return err
	}
	return s.say(ctx, wire.UpTopic(s.d.id, wire.UpOTA), fmt.Appendf(nil, `{"job":"none","step":"failed","device":%q}`, claim))
}

// heap is what the device measures of its free memory, in bytes. That of a leaking image loses a tenth every minute.
func (s *session) heap() int {
	free := 90_000 + s.d.rnd.IntN(40_000)
	if s.d.fw.Behaviour != LowHeap {
		return free
	}
	return int(20_000 * math.Pow(0.9, time.Since(s.d.bootedAt).Minutes()))
}

// telemetry sends one numbered measurement and notes that the broker took it.
func (s *session) telemetry(ctx context.Context) error {
	s.d.seq++
	b := fmt.Appendf(nil, `{"seq":%d,"t":%.1f}`, s.d.seq, 18+6*s.d.rnd.Float64())
	if err := s.say(ctx, wire.TelemetryTopic(s.d.id, "env"), b); err != nil {
		return err
	}
	s.d.mu.Lock()
	s.d.acked.add(s.d.seq)
	s.d.counts.Telemetry++
	s.d.mu.Unlock()
	s.d.emit(SentTelemetry, "%d", s.d.seq)
	if s.d.fw.Behaviour == LowHeap {
		return s.state(ctx)
	}
	return nil
}

func (s *session) flood(ctx context.Context) error {
	_, err := s.l.client.Publish(ctx, &paho.Publish{Topic: wire.TelemetryTopic(s.d.id, "flood"), Payload: []byte(`{"flood":true}`)})
	if err != nil {
		return s.broken(ctx, "flood", err)
	}
	s.d.count(func(c *Counts) { c.Published++ })
	return nil
}

// say publishes at QoS 1 and waits for the acknowledgement: a session in which none comes is over.
func (s *session) say(ctx context.Context, topic string, payload []byte) error {
	times := 1
	if s.d.fault().Duplicates {
		times = 2
	}
	for range times {
		s.d.count(func(c *Counts) { c.Published++ })
		limit, cancel := s.l.limit(ctx, s.d.c.Timing.Ack)
		_, err := s.l.client.Publish(limit, &paho.Publish{Topic: topic, QoS: 1, Payload: payload})
		cancel()
		if err != nil {
			return s.broken(ctx, "publish to "+topic, err)
		}
		s.d.count(func(c *Counts) { c.Acked++ })
	}
	return nil
}

// broken returns the end of the session for a failure of the client library; the end of the life goes before.
func (s *session) broken(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case why := <-s.l.lost:
		return errLost{why}
	default:
		return errLost{what + ": " + err.Error()}
	}
}
