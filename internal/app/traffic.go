package app

import (
	"context"
	"fmt"
	"net"
	"time"

	"muster/internal/access"
	"muster/internal/admission"
	"muster/internal/broker"
	"muster/internal/brokerauth"
	"muster/internal/devapi"
	"muster/internal/downlink"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/inventory"
	"muster/internal/pki"
	"muster/internal/recovery"
	"muster/internal/store/bolt"
	"muster/internal/uplink"
	"muster/internal/wire"
)

// subscriptions are the queues that musterd consumes in a vhost.
func (a *App) subscriptions(vhost string) []broker.Subscription {
	batch, linger := a.c.Uplink.Batch, a.c.Uplink.Linger
	subs := []broker.Subscription{
		{Queue: wire.QueueUp, MaxBatch: batch, Linger: linger, Handle: a.takeReports("")},
		{Queue: wire.QueueDead, MaxBatch: 64, Linger: linger, Handle: a.takeReports("its delivery failed again and again")},
	}
	if vhost == wire.VhostDevices {
		subs = append(subs, broker.Subscription{Queue: wire.QueuePresence, MaxBatch: batch, Linger: linger, Handle: a.takePresence})
	}
	return subs
}

// takeReports stores a batch from a queue; dead says why it is not to be handled.
func (a *App) takeReports(dead string) func(context.Context, []broker.Message) error {
	return func(ctx context.Context, ms []broker.Message) error {
		batch := make([]uplink.Message, len(ms))
		for i, m := range ms {
			batch[i] = uplink.Message{Vhost: m.Vhost, Key: m.Key, Body: m.Body, At: m.At, Dead: dead}
		}
		return a.intake.Store(ctx, batch)
	}
}

// handlers joins what a device says to the use cases that it concerns.
func (a *App) handlers() uplink.Handlers[*bolt.Tx] {
	return uplink.Handlers[*bolt.Tx]{
		Admitted: func(_ *bolt.Tx, id fleet.DeviceID) (bool, string, error) {
			ok, why := a.index.Heard(id)
			return ok, why, nil
		},
		Hello: a.hello,
		State: func(tx *bolt.Tx, at time.Time, id fleet.DeviceID, doc []byte) error {
			if err := a.inventory.State(tx, at, id, doc); err != nil {
				return err
			}
			return a.dispatch.Health(tx, at, id)
		},
		OTA: func(tx *bolt.Tx, at time.Time, id fleet.DeviceID, r wire.OTAReport) error {
			if err := a.inventory.Seen(tx, at, id); err != nil {
				return err
			}
			return a.dispatch.Report(tx, at, id, r)
		},
		Cert:       a.cert,
		Quarantine: (*bolt.Tx).Quarantine,
	}
}

// hello keeps what a device says of itself, takes it as evidence, and brings it every open intent.
func (a *App) hello(tx *bolt.Tx, at time.Time, vhost string, id fleet.DeviceID, h wire.Hello) error {
	if err := a.inventory.Hello(tx, at, vhost, id, h); err != nil {
		return err
	}
	if err := tx.Enqueue(downlink.Entry{Device: id, Vhost: vhost, Kind: downlink.Hello, At: at}); err != nil {
		return err
	}
	if err := a.trust.Hello(tx, at, vhost, id, h); err != nil {
		return err
	}
	// Before a certificate: that one sends the device away, and a good image may be what it needs.
	if err := a.catalog.Hello(tx, at, vhost, id); err != nil {
		return err
	}
	var err error
	if vhost == wire.VhostFallback {
		err = a.recovery.Hello(tx, at, id, h)
	} else {
		err = a.enroll.OpenIntents(tx, at, id, vhost)
	}
	if err != nil {
		return err
	}
	return a.dispatch.Hello(tx, at, vhost, id, h)
}

// cert takes a certificate request, or the word that one was stored.
func (a *App) cert(tx *bolt.Tx, at time.Time, vhost string, id fleet.DeviceID, r wire.CertReport) error {
	if err := a.inventory.Seen(tx, at, id); err != nil {
		return err
	}
	switch {
	case r.Have != "":
		return a.enroll.Have(tx, at, id, r.Have)
	case r.Error != "":
		a.log.Warn("a device could not store its certificate", "device", id, "why", r.Error)
		return nil
	case vhost == wire.VhostFallback:
		return a.recovery.CSR(tx, at, id, r.CSR)
	}
	return a.enroll.RequestByCSR(tx, at, id, r.CSR, pki.ViaMQTT)
}

// takePresence stores a batch of the broker's connection events.
func (a *App) takePresence(ctx context.Context, ms []broker.Message) error {
	err := a.store.Update(ctx, func(tx *bolt.Tx) error {
		for _, m := range ms {
			e, ok := broker.ParseConnectionEvent(m)
			if !ok {
				continue
			}
			if !e.Began {
				id, err := fleet.ParseDeviceID(e.ClientID)
				if err != nil {
					continue // muster's own connections
				}
				if err := a.inventory.Disconnected(tx, inventory.Session{Device: id, Connection: e.Name, At: e.At}); err != nil {
					return err
				}
				continue
			}
			if err := a.connected(tx, session(e.Vhost, e.User, e.Peer, e.Name, e.At)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		a.dispatch.Kick()
		a.pump.Kick()
	}
	return err
}

// session returns a device's session from what the broker says; its Device is empty if the user is no device.
func session(vhost, user, peer, name string, at time.Time) inventory.Session {
	s := inventory.Session{Vhost: vhost, Peer: peer, Connection: name, At: at}
	switch vhost {
	case wire.VhostDevices:
		s.Device, s.Serial, _ = wire.ParseCertUser(user)
	case wire.VhostFallback:
		s.Device, _ = fleet.ParseDeviceID(user)
	}
	return s
}

// connected notes a session, and promotes the certificate that it was made with.
func (a *App) connected(tx *bolt.Tx, s inventory.Session) error {
	if s.Device == "" {
		return nil
	}
	if err := a.inventory.Connected(tx, s); err != nil {
		return err
	}
	if err := a.dispatch.Health(tx, s.At, s.Device); err != nil {
		return err
	}
	if s.Serial == "" {
		return nil
	}
	if err := a.enroll.Connected(tx, s.At, s.Device, s.Serial); err != nil {
		return err
	}
	if err := a.dispatch.Session(tx, s.At, s.Device, s.Serial); err != nil {
		return err
	}
	// What was wished between its hello and this event rang no bell, since the device counted as offline.
	return a.enroll.OpenIntents(tx, s.At, s.Device, s.Vhost)
}

// composers say what each kind of outbox entry means now.
func (a *App) composers() map[downlink.Kind]downlink.Composer {
	one := func(e downlink.Entry, w wire.Down, payload []byte) []downlink.Message {
		return []downlink.Message{{Device: e.Device, Word: w, Payload: payload}}
	}
	return map[downlink.Kind]downlink.Composer{
		downlink.Hello: func(_ context.Context, at time.Time, e downlink.Entry) ([]downlink.Message, error) {
			return one(e, wire.DownCmd, wire.HelloAnswer(at)), nil
		},
		downlink.OTA: func(ctx context.Context, _ time.Time, e downlink.Entry) (ms []downlink.Message, err error) {
			err = a.store.View(ctx, func(tx *bolt.Tx) error {
				st, err := tx.Status(e.Device)
				if err != nil {
					return err
				}
				payload, ok, err := a.catalog.Offer(tx, e.Device, st)
				if ok {
					ms = one(e, wire.DownOTA, payload)
				}
				if ok || err != nil {
					return err
				}
				if payload, ok, err = a.dispatch.BootPrevious(tx, e.Device, st); ok {
					ms = one(e, wire.DownCmd, payload)
				}
				return err
			})
			return ms, err
		},
		downlink.Renew: func(ctx context.Context, _ time.Time, e downlink.Entry) (ms []downlink.Message, err error) {
			err = a.store.View(ctx, func(tx *bolt.Tx) error {
				payload, err := a.enroll.ComposeRenew(tx, e.Device)
				if len(payload) > 0 {
					ms = one(e, wire.DownCert, payload)
				}
				return err
			})
			return ms, err
		},
		// A delivery on the fallback brings a new password, whose hash is stored before it is sent.
		downlink.Cert: func(ctx context.Context, at time.Time, e downlink.Entry) (ms []downlink.Message, err error) {
			err = a.store.Update(ctx, func(tx *bolt.Tx) error {
				st, err := tx.Status(e.Device)
				if err != nil {
					return err
				}
				payloads, err := a.enroll.ComposeCert(tx, at, e.Device, fleet.Serial(e.Ref), st, e.Vhost == wire.VhostFallback)
				ms = nil
				for _, p := range payloads {
					ms = append(ms, one(e, wire.DownCert, p)...)
				}
				return err
			})
			return ms, err
		},
		downlink.No: func(_ context.Context, _ time.Time, e downlink.Entry) ([]downlink.Message, error) {
			return one(e, wire.DownCert, enroll.ComposeNo(e.Ref)), nil
		},
		downlink.Trust: func(ctx context.Context, _ time.Time, e downlink.Entry) (ms []downlink.Message, err error) {
			err = a.store.View(ctx, func(tx *bolt.Tx) error {
				payload, err := a.trust.Compose(tx, e.Device)
				if len(payload) > 0 {
					ms = one(e, wire.DownCmd, payload)
				}
				return err
			})
			return ms, err
		},
		downlink.Cmd: func(_ context.Context, _ time.Time, e downlink.Entry) ([]downlink.Message, error) {
			return one(e, wire.DownCmd, wire.Encode(wire.Cmd{Op: wire.CmdOp(e.Ref)})), nil
		},
	}
}

// topicPublisher brings messages to the publisher of their vhost.
type topicPublisher map[string]*broker.Publisher

func (p topicPublisher) Publish(ctx context.Context, vhost string, ms []downlink.Message) []error {
	to, ok := p[vhost]
	if !ok {
		errs := make([]error, len(ms))
		for i := range errs {
			errs[i] = fleet.Errorf(fleet.Internal, "no such vhost %q", vhost)
		}
		return errs
	}
	outs := make([]broker.Out, len(ms))
	for i, m := range ms {
		outs[i] = broker.Out{Key: wire.DownKey(m.Device, m.Word), Body: m.Payload}
	}
	return to.Publish(ctx, outs)
}

// runBroker checks the broker before anything is believed that comes from it, then consumes and publishes until ctx ends.
func (a *App) runBroker(ctx context.Context) error {
	if err := a.checkBroker(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, 4)
	n := 0
	for _, run := range []func(context.Context) error{
		a.consumers[wire.VhostDevices].Run, a.consumers[wire.VhostFallback].Run,
		a.publishers[wire.VhostDevices].Run, a.publishers[wire.VhostFallback].Run,
	} {
		n++
		go func() { errs <- safely(ctx, run) }()
	}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	var first error
	for first == nil && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case first = <-errs:
			n--
		case <-ticker.C:
			a.health.Set("broker", a.brokerHealth())
			a.pump.Kick() // what could not be sent while the broker was away
		}
	}
	cancel()
	for range n {
		<-errs
	}
	return first
}

func (a *App) brokerHealth() error {
	for vhost, c := range a.consumers {
		if !c.Connected() {
			return fmt.Errorf("no consumer in vhost %s", vhost)
		}
	}
	for vhost, p := range a.publishers {
		if !p.Connected() {
			return fmt.Errorf("no publisher in vhost %s", vhost)
		}
	}
	return nil
}

// checkBroker refuses a broker that is too old, or that lets in whom it must not.
func (a *App) checkBroker(ctx context.Context) error {
	if err := a.management.CheckVersion(ctx); err != nil {
		return err
	}
	if !a.c.Broker.Probe {
		return nil
	}
	return broker.Probe(ctx, broker.ProbeConfig{
		MQTT:     net.JoinHostPort(hostOf(a.c.Broker.AMQPS), fmt.Sprint(a.c.Broker.MQTTPort)),
		Fallback: net.JoinHostPort(hostOf(a.c.Broker.AMQPS), fmt.Sprint(a.c.Broker.FallbackPort)),
		TLS:      a.credentials.brokerTLS(a.c.Broker.ServerName),
	})
}

func hostOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return host
}

// Presence is reconciled with the broker's list this often, and counts as known for a little longer.
const (
	reconcileEvery = 30 * time.Second
	presenceHolds  = 3 * reconcileEvery
	listSettles    = 15 * time.Second // a session shows up in the list a few seconds after it began
)

func (a *App) presenceKnown() bool {
	return a.consumers[wire.VhostDevices].Connected() && time.Since(time.Unix(a.reconciled.Load(), 0)) < presenceHolds
}

// runPresence corrects presence by the broker's own list: its events are best effort.
func (a *App) runPresence(ctx context.Context) error {
	for {
		wait := reconcileEvery
		if a.consumers[wire.VhostDevices].Connected() {
			err := a.reconcile(ctx)
			if ctx.Err() != nil {
				return nil
			}
			a.health.Set("presence", err)
			if err == nil {
				a.reconciled.Store(time.Now().Unix())
				a.dispatch.Kick()
			}
		} else {
			wait = 200 * time.Millisecond
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

func (a *App) reconcile(ctx context.Context) error {
	at := time.Now()
	list, err := a.management.Connections(ctx)
	if err != nil {
		return err
	}
	var live []inventory.Session
	for _, c := range list {
		if s := session(c.Vhost, c.User, c.Peer, c.Name, c.ConnectedAt); s.Device != "" {
			live = append(live, s)
		}
	}
	return a.store.Update(ctx, func(tx *bolt.Tx) error {
		absent, err := offline(tx, live)
		if err != nil {
			return err
		}
		if _, err := a.inventory.Reconcile(tx, at, live, listSettles); err != nil {
			return err
		}
		for _, s := range absent { // their event was lost
			if err := a.enroll.OpenIntents(tx, at, s.Device, s.Vhost); err != nil {
				return err
			}
		}
		for _, s := range live { // promotions whose event was lost
			d, err := tx.Device(s.Device)
			if err == nil && s.Serial != "" && d.Next == s.Serial {
				if err = a.enroll.Connected(tx, at, s.Device, s.Serial); err == nil {
					err = a.dispatch.Session(tx, at, s.Device, s.Serial)
				}
			}
			if err != nil && !fleet.Is(err, fleet.NotFound) {
				return err
			}
		}
		return nil
	})
}

// offline returns those of the live sessions whose device counts as offline.
func offline(tx *bolt.Tx, live []inventory.Session) (out []inventory.Session, err error) {
	for _, s := range live {
		st, err := tx.Status(s.Device)
		if err != nil {
			return nil, err
		}
		if !st.Online {
			out = append(out, s)
		}
	}
	return out, nil
}

// runSweep holds live sessions to their certificates' ends, retires what is superseded, and finishes what a crash left.
func (a *App) runSweep(ctx context.Context) error {
	ticker := time.NewTicker(a.c.Certificates.Sweep)
	defer ticker.Stop()
	for {
		now := time.Now()
		swept, err := a.enroll.Sweep(ctx, now)
		if _, e := a.recovery.Sweep(ctx, now); err == nil {
			err = e
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			a.log.Error("sweep failed; trying again", "error", err)
		} else if swept.Expired+swept.Retired > 0 {
			a.log.Info("sweep", "expired", swept.Expired, "retired", swept.Retired)
		}
		a.health.Set("signer", a.enroll.Health())
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// runAttempts writes refused attempts into the audit trail.
func (a *App) runAttempts(ctx context.Context) error {
	return a.attempts.Run(ctx, func(err error) {
		a.log.Error("refused attempts could not be put on record; trying again", "error", err)
	})
}

// onRecord are the refusals that an auditor asks for: of devices that nobody knows, that were barred, or that come with a
// certificate or a password that is none of theirs (any more). The others are faults, and are in the log and the metrics.
var onRecord = map[admission.Reason]bool{
	admission.UnknownDevice: true, admission.Disabled: true, admission.RecoveryOff: true, admission.CertificateUnknown: true, admission.PasswordWrong: true,
}

// noteKnock puts a refusal on record, if it is one of those.
func (a *App) noteKnock(at time.Time, id fleet.DeviceID, why admission.Reason, door, peer string) {
	if onRecord[why] && id != "" {
		a.attempts.Note(recovery.Attempt{At: at, Device: id, Door: door, Why: string(why), Peer: peer})
	}
}

// noteRefusal logs whom the broker was told to refuse.
func (a *App) noteRefusal(r brokerauth.Refusal) {
	a.noteKnock(r.At, r.Device, r.Reason, "the broker, vhost "+r.Vhost, r.Peer)
	a.log.Info("refused at the broker", "device", r.Device, "why", r.Reason, "vhost", r.Vhost, "question", r.Kind, "peer", r.Peer)
}

// quarantine is the store's drawer for bad messages, as the API wants it.
type quarantine struct{ db *bolt.DB }

func (q quarantine) Quarantined(ctx context.Context, after uint64, limit int) (out []uplink.Quarantined, err error) {
	err = q.db.View(ctx, func(tx *bolt.Tx) error { out, err = tx.Quarantined(after, limit); return err })
	return out, err
}

func (q quarantine) QuarantinedOne(ctx context.Context, seq uint64) (out uplink.Quarantined, err error) {
	err = q.db.View(ctx, func(tx *bolt.Tx) error { out, err = tx.QuarantinedOne(seq); return err })
	return out, err
}

func (q quarantine) DropQuarantined(ctx context.Context, at time.Time, seq uint64, by string) error {
	return q.db.Update(ctx, func(tx *bolt.Tx) error {
		if err := tx.DropQuarantined(seq); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "quarantine.drop", On: fmt.Sprint(seq)})
	})
}

// registerMetrics shows what the parts count.
func (a *App) registerMetrics() {
	m := a.metrics
	m.Registry().MustRegister(rolloutCounts{a.dispatch.List})
	m.Counter("muster_reports_stored_total", "Messages of devices that were stored.", func() float64 { n, _ := a.intake.Counts(); return float64(n) })
	m.Counter("muster_reports_quarantined_total", "Messages of devices that could not be handled.", func() float64 { _, n := a.intake.Counts(); return float64(n) })
	m.Counter("muster_messages_sent_total", "Messages to devices that the broker confirmed.", func() float64 { n, _ := a.pump.Counts(); return float64(n) })
	m.Counter("muster_messages_given_up_total", "Messages to devices that they cannot receive.", func() float64 { _, n := a.pump.Counts(); return float64(n) })
	for vhost, c := range a.consumers {
		m.Counter("muster_broker_losses_"+vhost+"_total", "Connections of the consumer that were lost or could not be made.", func() float64 { return float64(c.Losses()) })
	}
	m.Gauge("muster_devices", "Devices in the admission index.", func() float64 { return float64(a.index.Len()) })
	m.Gauge("muster_store_bytes", "Size of the store.", func() float64 {
		s, err := a.store.Stats(context.Background())
		if err != nil {
			return -1
		}
		return float64(s.Bytes)
	})
	m.Gauge("muster_ready", "1 if every part is well.", func() float64 {
		if _, ready := a.health.Reports(); ready {
			return 1
		}
		return 0
	})
}

// countDownloads returns a counter of image downloads.
func (a *App) countDownloads() func(devapi.Served) {
	bytes := a.metrics.CounterVec("muster_download_bytes_total", "Bytes of images sent to devices.", "product", "version")
	done := a.metrics.CounterVec("muster_downloads_total", "Requests for images by outcome.", "product", "version", "complete")
	return func(s devapi.Served) {
		bytes.WithLabelValues(string(s.Product), string(s.Version)).Add(float64(s.Bytes))
		done.WithLabelValues(string(s.Product), string(s.Version), fmt.Sprint(s.Complete)).Inc()
	}
}
