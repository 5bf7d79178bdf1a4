package app

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"muster/internal/access"
	"muster/internal/config"
	"muster/internal/expiry"
	"muster/internal/fleet"
	"muster/internal/servercert"
	"muster/internal/tlsfiles"
)

// credentials are what musterd presents and what it trusts, on every connection: the one place that listeners and clients
// of the broker ask at each handshake, so that nothing of it needs a restart.
type credentials struct {
	devices, ops, auth *tlsfiles.Source // presented; auth is nil on loopback
	broker             *tlsfiles.Source // presented by RabbitMQ; nil if its files are not on this machine
	brokerRoots        *tlsfiles.Roots  // trusted: AMQP, management
	brokerClient       *tlsfiles.Roots  // trusted: RabbitMQ at listen.broker_auth; nil on loopback
	deviceCAs          atomic.Pointer[x509.CertPool]

	keeper *servercert.Keeper
}

// Names of server certificates, as operators type them.
const (
	certDevices    = "devices" // device API and recovery API
	certOps        = "ops"
	certBrokerAuth = "broker-auth"
	certBroker     = "broker" // every listener of RabbitMQ
)

// loadCredentials reads every file once; what is missing or wrong here keeps musterd from starting.
func loadCredentials(c *config.Config) (_ *credentials, err error) {
	out := &credentials{}
	open := func(cert, key string) *tlsfiles.Source {
		if err != nil {
			return nil
		}
		var s *tlsfiles.Source
		s, err = tlsfiles.Open(tlsfiles.Pair{Cert: cert, Key: key})
		return s
	}
	out.devices = open(c.Path(c.TLS.DevicesCert), c.Path(c.TLS.DevicesKey))
	out.ops = open(c.Path(c.TLS.OpsCert), c.Path(c.TLS.OpsKey))
	tlsDir := c.Path(c.Broker.TLSDir)
	if c.TLS.BrokerAuth {
		out.auth = open(c.Path(c.TLS.BrokerAuthCert), c.Path(c.TLS.BrokerAuthKey))
		if err == nil {
			out.brokerClient, err = tlsfiles.OpenRoots(filepath.Join(tlsDir, fileAuthClientCert))
		}
	}
	if err != nil {
		return nil, err
	}
	out.broker, err = tlsfiles.Open(tlsfiles.Pair{Cert: filepath.Join(tlsDir, fileBrokerCert), Key: filepath.Join(tlsDir, fileBrokerKey)})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a broker elsewhere may have files of its own
		return nil, err
	}
	out.brokerRoots, err = tlsfiles.OpenRoots(c.Path(c.Broker.CAFile))
	return out, err
}

// trustDevices says which CAs of devices the device API believes from now on.
func (c *credentials) trustDevices(cas []byte) error {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(cas) {
		return fmt.Errorf("no CA of devices")
	}
	c.deviceCAs.Store(pool)
	return nil
}

// brokerTLS returns what a client of the broker at host uses for its next connection.
func (c *credentials) brokerTLS(host string) *tls.Config {
	return &tls.Config{RootCAs: c.brokerRoots.Pool(), ServerName: host, MinVersion: tls.VersionTLS12}
}

// authTLS returns the TLS of listen.broker_auth: mutual, with the one certificate that RabbitMQ has.
func (c *credentials) authTLS() *tls.Config {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS12, GetCertificate: c.auth.Get, NextProtos: []string{"http/1.1"},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: c.brokerClient.Pool(),
	}
	inner := conf.Clone()
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := inner.Clone()
		now.ClientCAs = c.brokerClient.Pool()
		return now, nil
	}
	return conf
}

// keepCertificates makes the use case that renews the server certificates.
func (a *App) keepCertificates(record func(context.Context, access.Entry) error) {
	c := a.credentials
	servers := []servercert.Server{{Name: certDevices, Files: c.devices}, {Name: certOps, Files: c.ops}}
	if c.auth != nil {
		servers = append(servers, servercert.Server{Name: certBrokerAuth, Files: c.auth})
	}
	broker := servercert.Server{Name: certBroker, Doors: brokerDoors(&a.c)}
	if c.broker != nil {
		broker.Files = c.broker
	}
	faults := atomic.Bool{}
	a.metrics.Gauge("muster_server_certificates_ok", "1 if every server certificate is renewed, taken over and served as it should.", func() float64 {
		if faults.Load() {
			return 0
		}
		return 1
	})
	c.keeper = servercert.New(servercert.Config{
		Servers: append(servers, broker), Issuer: serverIssuer{a.cas}, Record: record, Served: a.served, Log: a.log,
		Report: func(err error) {
			faults.Store(err != nil)
			words := ""
			if err != nil {
				words = err.Error()
			}
			a.health.Remark("server-certificates", words)
		},
	})
	a.expiries.add("server certificates", func(_ context.Context, at time.Time) ([]expiry.Item, error) { return c.keeper.Expiring(at), nil })
	a.expiries.add("client certificates", func(context.Context, time.Time) ([]expiry.Item, error) { return c.clients(), nil })
}

// clients are the certificates by which the broker proves itself to musterd.
func (c *credentials) clients() (out []expiry.Item) {
	if c.brokerClient == nil {
		return nil
	}
	for _, cert := range c.brokerClient.Certificates() {
		out = append(out, expiry.Item{
			Name: "broker-auth-" + string(fleet.SerialOf(cert.SerialNumber)), Kind: "client", NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, Stops: true,
			Fix: "make a new " + fileAuthClientCert + " and " + fileAuthClientKey + " in broker.tls_dir, reload musterd, restart RabbitMQ",
		})
	}
	return out
}

// reload takes over all files now.
func (c *credentials) reload(at time.Time, log func(msg string, args ...any)) {
	c.keeper.Reload(at)
	c.reloadTrust(true, log)
}

// reloadTrust takes over the files of what is trusted.
func (c *credentials) reloadTrust(force bool, log func(msg string, args ...any)) {
	for name, r := range map[string]*tlsfiles.Roots{"broker": c.brokerRoots, "broker's client certificate": c.brokerClient} {
		if r == nil {
			continue
		}
		if changed, err := r.Reload(force); err != nil {
			log("a file of trusted certificates is refused; what was trusted before stays so", "for", name, "error", err)
		} else if changed {
			log("trusted certificates taken over from their file", "for", name, "certificates", len(r.Certificates()))
		}
	}
}

// ReloadCertificates takes over every file of certificates, keys and trust now. What is wrong with one is logged, and what
// was in use before stays so.
func (a *App) ReloadCertificates() { a.credentials.reload(time.Now(), a.log.Warn) }

// runTrust follows the files of what is trusted until ctx ends.
func (a *App) runTrust(ctx context.Context) error {
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			a.credentials.reloadTrust(false, a.log.Warn)
		}
	}
}

// brokerDoors are the places where RabbitMQ serves its certificate.
func brokerDoors(c *config.Config) []servercert.Door {
	host := hostOf(c.Broker.AMQPS)
	doors := []servercert.Door{
		{Name: "mqtt", Address: net.JoinHostPort(host, strconv.Itoa(c.Broker.MQTTPort))},
		{Name: "fallback", Address: net.JoinHostPort(host, strconv.Itoa(c.Broker.FallbackPort))},
		{Name: "amqps", Address: c.Broker.AMQPS},
	}
	if u, err := url.Parse(c.Broker.Management); err == nil && u.Port() != "" {
		doors = append(doors, servercert.Door{Name: "management", Address: u.Host})
	}
	return doors
}

// served returns the chain that a server shows. It only looks: nothing is said or believed on the connection, so a
// certificate that has ended is seen as well.
func (a *App) served(ctx context.Context, address string) ([]*x509.Certificate, error) {
	name := a.c.Broker.ServerName
	if name == "" {
		name = hostOf(address)
	}
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, ServerName: name, MinVersion: tls.VersionTLS12}}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates, nil
}

// serverIssuer lets the CA of the moment issue server certificates.
type serverIssuer struct{ *generations }

func (i serverIssuer) Until() time.Time { return i.hierarchy().Server.Cert.NotAfter }

func (i serverIssuer) New(at time.Time, names []string) (fleet.Serial, []byte, []byte, error) {
	s, err := i.hierarchy().NewServer(at, names)
	if err != nil {
		return "", nil, nil, err
	}
	block, _ := pem.Decode(s.Chain)
	if block == nil {
		return "", nil, nil, fmt.Errorf("the server CA made no certificate")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", nil, nil, err
	}
	return fleet.SerialOf(leaf.SerialNumber), s.Chain, s.Key, nil
}
