package app

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/robfig/cron/v3"

	"muster/api"
	"muster/internal/access"
	"muster/internal/admission"
	"muster/internal/blob"
	"muster/internal/broker"
	"muster/internal/broker/brokerconf"
	"muster/internal/brokerauth"
	"muster/internal/ca"
	"muster/internal/config"
	"muster/internal/crlapi"
	"muster/internal/devapi"
	"muster/internal/dispatch"
	"muster/internal/downlink"
	"muster/internal/enroll"
	"muster/internal/est"
	"muster/internal/expiry"
	"muster/internal/fleet"
	"muster/internal/httpapi"
	"muster/internal/inventory"
	"muster/internal/obs"
	"muster/internal/ota"
	"muster/internal/pki"
	"muster/internal/recovery"
	"muster/internal/revocation"
	"muster/internal/rollout"
	"muster/internal/rotation"
	"muster/internal/store/bolt"
	"muster/internal/trust"
	"muster/internal/uplink"
	"muster/internal/wire"
)

// App is one musterd. New binds its listeners, Start serves, Stop ends everything in the reverse order.
type App struct {
	c       config.Config
	version string
	log     *slog.Logger
	life    lifecycle
	health  *obs.Health
	metrics *obs.Metrics

	store      *bolt.DB
	index      *brokerauth.Index
	inventory  *inventory.Inventory
	enroll     *enroll.Enroller
	recovery   *recovery.Recovery
	attempts   *recovery.Attempts
	dispatch   *dispatch.Dispatcher
	catalog    *ota.Catalog
	trust      *trust.Publisher
	lists      *revocation.Lists
	cas        *generations
	rotations  *rotation.Rotator
	blocklist  blocklist
	intake     *uplink.Intake[*bolt.Tx]
	pump       *downlink.Pump
	management *broker.Management
	consumers  map[string]*broker.Consumer  // by vhost
	publishers map[string]*broker.Publisher // by vhost

	auth               *brokerauth.Server
	devices, recoverer *devapi.Server
	ops                *http.Server
	listeners          listeners
	reconciled         atomic.Int64 // Unix seconds of the last reconciliation of presence
	credentials        *credentials
	expiries           *expiries
	operators          *access.Access
	trail              *access.Trail
}

type listeners struct{ auth, devices, recovery, ops net.Listener }

// Addrs are the addresses that were bound, host:port.
type Addrs struct{ BrokerAuth, Devices, Recovery, Ops string }

// Files of the data directory that have no setting of their own.
const (
	fileStore = "muster.db"
	dirImages = "images"
)

// New puts everything together from checked settings and binds the listeners. It starts nothing: a failed New leaves
// nothing behind.
//
// It is one straight piece on purpose: the order is the order of dependence, and a helper would only pass all of it on.
func New(c config.Config, version string, log *slog.Logger) (_ *App, err error) {
	a := &App{
		c: c, version: version, log: log, life: lifecycle{log: log}, metrics: obs.NewMetrics(),
		health:     obs.NewHealth("broker", "presence", "signer"),
		consumers:  map[string]*broker.Consumer{},
		publishers: map[string]*broker.Publisher{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Stop(context.Background()))
		}
	}()

	// What is kept.
	if a.store, err = bolt.Open(c.Path(fileStore), bolt.Options{}); err != nil {
		return nil, err
	}
	a.life.onStop("store", func(context.Context) error { return a.store.Close() })
	images, err := blob.New(c.Path(dirImages))
	if err != nil {
		return nil, err
	}
	a.life.onStop("images", func(context.Context) error { return images.Close() })

	// Who gets in: an index in memory that follows the store, commit by commit.
	a.index = brokerauth.NewIndex()
	a.store.WatchCredentials(a.index.Put)
	a.store.WatchRemovals(a.index.Delete)
	if err := a.store.Credentials(context.Background(), a.index.Put); err != nil {
		return nil, err
	}

	// The CA.
	passphrase, err := c.Secret(c.PKI.PassphraseFile)
	if err != nil {
		return nil, err
	}
	if c.Certificates.BlockedKeys != "" {
		a.blocklist.path = c.Path(c.Certificates.BlockedKeys)
	}
	if _, _, err := a.blocklist.load(); err != nil {
		return nil, err
	}
	keys := pki.KeyPolicy{RSA: c.Certificates.RSA, Blocked: a.blocklist.blocked}
	a.cas = &generations{files: ca.Store{Dir: c.Path(c.PKI.Dir), Passphrase: []byte(passphrase), Keys: keysOf(&c)}, policy: keys, records: records{a}, log: log}
	a.life.onStop("CA keys", func(context.Context) error { return a.cas.close() })
	var rotations []pki.Rotation
	if err := a.store.View(context.Background(), func(tx *bolt.Tx) (err error) { rotations, err = tx.Rotations(); return err }); err != nil {
		return nil, err
	}
	if err := a.cas.load(context.Background(), rotations); err != nil {
		return nil, err
	}
	trustKey, trustSigner, err := ca.TrustKey(c.Path(c.PKI.Dir), []byte(passphrase))
	if err != nil {
		return nil, err
	}

	// What is presented and what is trusted.
	if a.credentials, err = loadCredentials(&c); err != nil {
		return nil, err
	}
	if err := a.credentials.trustDevices(a.cas.deviceCAs()); err != nil {
		return nil, err
	}
	a.expiries = &expiries{log: log, health: a.health}
	a.metrics.Registry().MustRegister(a.expiries)
	a.expiries.add("CAs", func(context.Context, time.Time) ([]expiry.Item, error) { return a.cas.expiring(), nil })

	// The broker.
	if err := a.joinBroker(); err != nil {
		return nil, err
	}

	// Use cases. Each gets transactions of its own small kind; committed is called after those that may have news for devices.
	committed := func() { a.pump.Kick(); a.dispatch.Kick() }
	a.inventory = inventory.New(inventory.Config{
		Update: update(a.store, func(tx *bolt.Tx) inventory.Tx { return tx }),
		View:   view(a.store, func(tx *bolt.Tx) inventory.Tx { return tx }),
	})
	a.enroll, err = enroll.New(enroll.Config{
		Update:    update(a.store, func(tx *bolt.Tx) enroll.Tx { return tx }),
		View:      view(a.store, func(tx *bolt.Tx) enroll.Tx { return tx }),
		Authority: a.cas, Sessions: a.management, Log: log, Committed: committed,
		Revoked: func() { a.lists.Revoked() }, Refusals: a.refusals,
		Terms: func(tx enroll.Tx, id fleet.DeviceID) (time.Duration, bool, error) {
			return a.dispatch.RenewalTerms(tx.(*bolt.Tx), id)
		},
		Renewing: func(tx enroll.Tx, at time.Time, id fleet.DeviceID, step enroll.Step) error {
			return a.dispatch.Renewing(tx.(*bolt.Tx), at, id, renewalSteps[step])
		},
		Policy: enroll.Policy{
			Lifetime: c.Certificates.Lifetime, MinLifetime: c.Certificates.MinLifetime, Grace: c.Certificates.Grace,
			ApproveEST: c.Certificates.ESTNewKeys == "approve",
			MaxLockOut: c.Certificates.MaxLockOut / 100, Keys: keys,
		},
	})
	if err != nil {
		return nil, err
	}
	a.lists = revocation.New(revocation.Config{
		Update:  update(a.store, func(tx *bolt.Tx) revocation.Tx { return tx }),
		View:    view(a.store, func(tx *bolt.Tx) revocation.Tx { return tx }),
		Issuers: a.cas.issuers, Log: log,
	})
	a.expiries.add("revocation lists", expiringLists(a.lists))
	a.trust = trust.New(trust.Config{
		Update: update(a.store, func(tx *bolt.Tx) trust.Tx { return tx }),
		View:   view(a.store, func(tx *bolt.Tx) trust.Tx { return tx }),
		Key:    trustKey, Signer: trustSigner, Log: log, Committed: committed,
		InUse: a.cas.inUse,
	})
	a.recovery, err = recovery.New(recovery.Config{
		Update: update(a.store, func(tx *bolt.Tx) recovery.Tx { return tx }),
		View:   view(a.store, func(tx *bolt.Tx) recovery.Tx { return tx }),
		Enroll: a.enroll, Log: log, Committed: committed,
		Policy: recovery.Policy{ApproveNewKeys: c.Recovery.NewKeys == "automatic", PerDeviceHour: c.Recovery.PerDeviceHour, PerSecond: c.Recovery.PerSecond},
	})
	if err != nil {
		return nil, err
	}
	a.rotations = a.rotator(
		view(a.store, func(tx *bolt.Tx) rotation.Tx { return tx }),
		update(a.store, func(tx *bolt.Tx) rotation.Tx { return tx }),
	)
	a.attempts = recovery.NewAttempts(update(a.store, func(tx *bolt.Tx) recovery.AuditTx { return tx }))
	a.dispatch = dispatch.New(dispatch.Config{
		Update:        update(a.store, func(tx *bolt.Tx) dispatch.Tx { return tx }),
		View:          view(a.store, func(tx *bolt.Tx) dispatch.Tx { return tx }),
		PresenceKnown: a.presenceKnown, Committed: func() { a.pump.Kick() }, Log: log,
		Approval: c.Rollouts.Approval, Refusal: a.index.LastRefusal,
		Penalty: rollout.PenaltyRule{Failures: c.Rollouts.PenaltyFailures, Within: c.Rollouts.PenaltyWithin, For: c.Rollouts.PenaltyFor},
	})
	a.catalog = ota.New(ota.Config{
		Update: update(a.store, func(tx *bolt.Tx) ota.Tx { return tx }),
		View:   view(a.store, func(tx *bolt.Tx) ota.Tx { return tx }),
		Images: images, MaxImage: c.Firmware.MaxImage, BytesPerSecond: c.Firmware.BytesPerSecond, Committed: committed,
	})
	if n, err := a.catalog.Prune(context.Background()); err != nil {
		return nil, err
	} else if n > 0 {
		log.Info("images without a release were removed", "images", n)
	}
	a.operators = access.New(access.Config{
		Update: update(a.store, func(tx *bolt.Tx) access.Tx { return tx }),
		View:   view(a.store, func(tx *bolt.Tx) access.Tx { return tx }),
	})
	if err := a.openTrail([]byte(passphrase)); err != nil {
		return nil, err
	}
	a.intake = uplink.New(a.store.Update, a.handlers(), committed, log)
	a.pump = downlink.New(downlink.Config{
		Update:  update(a.store, func(tx *bolt.Tx) downlink.Tx { return tx }),
		View:    view(a.store, func(tx *bolt.Tx) downlink.Tx { return tx }),
		Publish: topicPublisher(a.publishers), Compose: a.composers(), Log: log,
	})

	// The doors.
	if err := a.openBrokerAuth(); err != nil {
		return nil, err
	}
	a.keepCertificates(a.operators.Record)
	a.expiries.add("tokens", expiringTokens(a.operators.Tokens))
	enrolment := est.New(est.Config{
		Enroll: a.enroll, Admission: a.index, Identify: devapi.Identify, CACerts: func() [][]byte { return certificatesIn(a.trustPEM(context.Background()), a.cas.clientCAs()) }, Log: log,
	})
	public := crlapi.New(a.lists, log)
	device := devapi.New(devapi.Config{
		Revocation: public, Revokes: crlapi.Serves,
		EST: enrolment.Devices(), RecoveryEST: enrolment.Recovery(),
		Grants: a.catalog, Images: images, Admission: a.index, TrustBundle: func() []byte { return a.trustPEM(context.Background()) }, SignedTrust: a.signedTrust, Poller: poller{a}, Log: log, Served: a.countDownloads(),
		Refused: func(id fleet.DeviceID, why, peer string) {
			a.noteKnock(time.Now(), id, admission.Reason(why), "the device API", peer)
		}, BytesPerSecond: c.Firmware.BytesPerSecond,
	})
	a.metrics.Gauge("muster_download_backlog_bytes", "Bytes promised to downloads under a byte budget and not sent yet.", func() float64 { n, _ := device.Budget(); return float64(n) })
	a.metrics.Counter("muster_downloads_sent_away_total", "Downloads that were told to come back later because of a byte budget.", func() float64 { _, n := device.Budget(); return float64(n) })
	a.devices = device.Devices(devapi.MutualTLS(a.credentials.devices.Get, a.credentials.deviceCAs.Load))
	a.recoverer = device.Recovery(devapi.PasswordTLS(a.credentials.devices.Get))
	if a.listeners.devices, err = a.listen("devices", c.Listen.Devices); err != nil {
		return nil, err
	}
	if a.listeners.recovery, err = a.listen("recovery", c.Listen.Recovery); err != nil {
		return nil, err
	}
	rest, err := httpapi.New(httpapi.Config{
		Devices: a.inventory, Doors: a.enroll, Certificates: a.enroll, Servers: a.credentials.keeper, Expiries: a.expiries, Recovery: a.recovery, Firmware: a.catalog, Rollouts: a.dispatch,
		Quarantine: quarantine{a.store}, Operators: a.operators, Trail: a.trail,
		Trust:        func(ctx context.Context) ([]byte, error) { return a.trustPEM(ctx), nil },
		TrustBundles: a.trust, Rotations: a.rotations, TrustKey: trustKey, Lists: a.lists,
		Endpoints: api.Endpoints{MQTT: c.Public.MQTT, FallbackMQTT: c.Public.FallbackMQTT, HTTPS: c.Public.HTTPS, RecoveryHTTPS: c.Public.RecoveryHTTPS},
		Version:   api.Version{API: "v1", Version: version, Go: runtime.Version()},
		Log:       log, MaxImage: c.Firmware.MaxImage,
		Livez: http.HandlerFunc(obs.Livez), Readyz: http.HandlerFunc(a.health.Readyz), Metrics: a.metrics.Handler(),
	})
	if err != nil {
		return nil, err
	}
	a.ops = httpapi.HTTPServer(rest, log)
	a.ops.Handler = withLists(rest, public)
	ops, err := a.listen("ops", c.Listen.Ops)
	if err != nil {
		return nil, err
	}
	a.listeners.ops = tls.NewListener(ops, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: a.credentials.ops.Get, NextProtos: []string{"http/1.1"}})
	a.registerMetrics()
	return a, nil
}

// joinBroker makes the clients of RabbitMQ; they connect in Start.
func (a *App) joinBroker() error {
	b := a.c.Broker
	conf, roots := &tls.Config{ServerName: b.ServerName, MinVersion: tls.VersionTLS12}, a.credentials.brokerRoots.Pool
	passwords := map[string]string{}
	for user, file := range map[string]string{brokerconf.UserMuster: b.PasswordFile, brokerconf.UserMonitor: b.MonitorFile, brokerconf.UserAdmin: b.AdminFile} {
		p, err := a.c.Secret(file)
		if err != nil {
			return err
		}
		passwords[user] = p
	}
	a.management = broker.NewManagement(broker.ManagementConfig{
		URL: b.Management, TLS: conf, Roots: roots,
		MonitorUser: brokerconf.UserMonitor, MonitorPassword: passwords[brokerconf.UserMonitor],
		AdminUser: brokerconf.UserAdmin, AdminPassword: passwords[brokerconf.UserAdmin],
	})
	a.life.onStop("management client", func(context.Context) error { a.management.Close(); return nil })
	amqp := broker.Config{Address: b.AMQPS, User: brokerconf.UserMuster, Password: passwords[brokerconf.UserMuster], TLS: conf, Roots: roots, Log: a.log}
	for _, vhost := range []string{wire.VhostDevices, wire.VhostFallback} {
		a.consumers[vhost] = broker.NewConsumer(amqp, vhost, a.subscriptions(vhost)...)
		a.publishers[vhost] = broker.NewPublisher(amqp, vhost)
	}
	return nil
}

// openBrokerAuth binds the listener on which RabbitMQ asks.
func (a *App) openBrokerAuth() (err error) {
	perMinute := brokerauth.PerMinute(a.c.Recovery.LoginsPerMinute)
	a.auth, err = brokerauth.New(brokerauth.Config{
		Index: a.index, Log: a.log, Registry: a.metrics.Registry(), OnRefusal: a.noteRefusal,
		Limits: brokerauth.Limits{DeviceLogins: perMinute, DeviceFailures: perMinute},
	})
	if err != nil {
		return err
	}
	lc := brokerauth.ListenConfig{Address: a.c.Listen.BrokerAuth}
	if a.c.TLS.BrokerAuth {
		lc.TLS = a.credentials.authTLS()
	}
	a.listeners.auth, err = brokerauth.Listen(context.Background(), lc)
	if err != nil {
		return err
	}
	a.life.onStop("auth listener", func(context.Context) error { return ignoreClosed(a.listeners.auth.Close()) })
	return nil
}

// listen binds an address; the listener is closed at the latest by Stop.
func (a *App) listen(name, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen.%s: %w", name, err)
	}
	a.life.onStop(name+" listener", func(context.Context) error { return ignoreClosed(l.Close()) })
	return l, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Addrs returns what was bound: of use where the settings ask for port 0.
func (a *App) Addrs() Addrs {
	return Addrs{
		BrokerAuth: a.listeners.auth.Addr().String(), Devices: a.listeners.devices.Addr().String(),
		Recovery: a.listeners.recovery.Addr().String(), Ops: a.listeners.ops.Addr().String(),
	}
}

// Start serves. The auth backend comes first, since the broker refuses everybody while it is away, and ends last.
func (a *App) Start() error {
	if err := a.startTrail(); err != nil {
		return err
	}
	a.serve("broker auth", func() error { return a.auth.Serve(a.listeners.auth) }, a.auth.Shutdown)
	a.serve("ops API", func() error { return a.ops.Serve(a.listeners.ops) }, a.ops.Shutdown)
	a.serve("device API", func() error { return a.devices.Serve(a.listeners.devices) }, a.devices.Shutdown)
	a.serve("recovery API", func() error { return a.recoverer.Serve(a.listeners.recovery) }, a.recoverer.Shutdown)

	if err := a.trust.First(context.Background(), time.Now(), a.cas.roots()); err != nil {
		return err
	}
	policy, err := a.enroll.AdoptSettings(context.Background(), time.Now())
	if err != nil {
		return err
	}
	if policy.Why != "" {
		a.log.Error("the settings ask for certificates that would lock devices out; the policy before stays in force: see muster certs policy show",
			"lifetime", policy.Lifetime, "refused", policy.Refused.Lifetime, "why", policy.Why)
	}
	a.life.task("signer", a.enroll.Run, a.report("signer"))
	a.health.Set("signer", nil)
	a.life.task("revocation lists", a.lists.Run, a.failure("revocation lists"))
	a.life.task("rotation", func(ctx context.Context) error { return a.rotations.Run(ctx, a.report("rotation")) }, a.report("rotation"))
	a.life.task("ca-keys", a.runKeyCheck, a.failure("ca-keys"))
	if a.blocklist.path != "" {
		a.life.task("blocked-keys", a.runBlocklist, a.failure("blocked-keys"))
	}
	a.life.task("outbox", a.pump.Run, a.report("outbox"))
	a.life.task("rollouts", a.dispatch.Run, a.report("rollouts"))
	a.life.task("broker", a.runBroker, a.failure("broker"))
	a.life.task("presence", a.runPresence, a.failure("presence"))
	a.life.task("sweep", a.runSweep, a.report("sweep"))
	a.life.task("attempts", a.runAttempts, a.report("attempts"))
	a.life.task("server certificates", a.credentials.keeper.Run, a.report("server-certificates"))
	a.life.task("trust files", a.runTrust, a.report("trust-files"))
	a.life.task("expiries", a.expiries.Run, a.failure("expiries"))
	return a.startSchedule()
}

// report makes a part's failures visible in /readyz.
func (a *App) report(part string) func(error) { return func(err error) { a.health.Set(part, err) } }

// failure is report for parts that say themselves when they are well.
func (a *App) failure(part string) func(error) {
	return func(err error) {
		if err != nil {
			a.health.Set(part, err)
		}
	}
}

// serve runs an HTTP server; its cleanup lets requests under way finish.
func (a *App) serve(name string, run func() error, shutdown func(context.Context) error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := run(); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			a.log.Error("listener failed", "listener", name, "error", err)
			a.health.Set(name, err)
		}
	}()
	a.life.onStop(name, func(ctx context.Context) error {
		err := shutdown(ctx)
		select {
		case <-done:
		case <-ctx.Done():
		}
		return err
	})
}

// startSchedule runs the renewal pass by its cron expression.
func (a *App) startSchedule() error {
	if a.c.Certificates.RenewSchedule == "" {
		return nil
	}
	schedule := cron.New(cron.WithChain(cron.SkipIfStillRunning(cron.DiscardLogger)))
	ctx, cancel := context.WithCancel(context.Background())
	_, err := schedule.AddFunc(a.c.Certificates.RenewSchedule, func() {
		r, err := a.enroll.RenewPass(ctx, time.Now(), enroll.RenewOptions{Limit: a.c.Certificates.RenewLimit})
		switch {
		case err != nil:
			a.log.Error("renewal pass failed", "error", err)
		case r.Due > 0:
			a.log.Info("renewal pass", "due", r.Due, "asked", len(r.Asked), "asked_before", r.Already, "offline", r.Offline)
		}
	})
	if err != nil {
		cancel()
		return err
	}
	schedule.Start()
	a.life.onStop("schedule", func(stop context.Context) error {
		cancel()
		select {
		case <-schedule.Stop().Done():
			return nil
		case <-stop.Done():
			return stop.Err()
		}
	})
	return nil
}

// Stop ends everything, last started first, within ctx. It may be called more than once.
func (a *App) Stop(ctx context.Context) error { return a.life.stop(ctx) }

// update and view turn the store's transactions into those of a use case; as is checked by the compiler.
func update[T any](db *bolt.DB, as func(*bolt.Tx) T) func(context.Context, func(T) error) error {
	return func(ctx context.Context, f func(T) error) error {
		return db.Update(ctx, func(tx *bolt.Tx) error { return f(as(tx)) })
	}
}

func view[T any](db *bolt.DB, as func(*bolt.Tx) T) func(context.Context, func(T) error) error {
	return func(ctx context.Context, f func(T) error) error {
		return db.View(ctx, func(tx *bolt.Tx) error { return f(as(tx)) })
	}
}

// certificatesIn returns every certificate of some PEM texts once, DER.
func certificatesIn(texts ...[]byte) [][]byte {
	var out [][]byte
	for _, text := range texts {
		for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
			if !slices.ContainsFunc(out, func(c []byte) bool { return bytes.Equal(c, block.Bytes) }) {
				out = append(out, block.Bytes)
			}
		}
	}
	return out
}
