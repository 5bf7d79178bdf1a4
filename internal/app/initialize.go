package app

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"muster/configs"
	"muster/internal/access"
	"muster/internal/broker/brokerconf"
	"muster/internal/ca"
	"muster/internal/ca/keystore"
	"muster/internal/config"
	"muster/internal/store/bolt"
)

// Files of broker.tls_dir: what RabbitMQ reads.
const (
	fileBrokerCert     = "server.crt"
	fileBrokerKey      = "server.key"
	fileDeviceCA       = "device-ca.pem"
	fileAuthClientCert = "auth-client.crt"
	fileAuthClientKey  = "auth-client.key"
	fileTrust          = "trust.pem"
)

// FileConfig is the settings file that Init writes into the data directory.
const FileConfig = "musterd.yaml"

// Made says what Init made.
type Made struct {
	Config string // path of the settings file
	Token  string // the first admin token; it is stored nowhere
	Files  []string
}

// InitOptions say what Init cannot know.
type InitOptions struct {
	Names      []string // DNS names and IP addresses under which devices and operators reach this machine
	CreateKeys bool     // make the keys that pki.device_key, pki.server_key and pki.audit_key name, in their key manager
}

// Init is InitWith for a CA of its own, its keys in files.
func Init(ctx context.Context, c config.Config, names []string) (Made, error) {
	return InitWith(ctx, c, InitOptions{Names: names})
}

// InitWith makes everything that a new musterd needs, in its data directory: CA, server certificates for the broker and
// for every HTTPS listener, secrets, the store with the first admin token, settings, and the broker's configuration. It
// refuses a directory that holds a muster already, and what it made is complete or gone; only keys that it made in a key
// manager stay.
func InitWith(ctx context.Context, c config.Config, o InitOptions) (made Made, err error) {
	clear, err := freshDir(c.DataDir)
	if err != nil {
		return Made{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, clear())
		}
	}()
	if err := makeSecrets(&c); err != nil {
		return Made{}, err
	}
	hierarchy, err := makeCA(ctx, &c, o)
	if err != nil {
		return Made{}, err
	}
	defer func() { err = errors.Join(err, hierarchy.Close()) }()
	return complete(ctx, &c, hierarchy, o.Names)
}

// freshDir makes the data directory, which must be empty or not there; clear empties it again.
func freshDir(dir string) (clear func() error, err error) {
	if _, err := os.Stat(filepath.Join(dir, FileConfig)); err == nil {
		return nil, fmt.Errorf("%s holds a muster already: choose another directory, or move it away", dir)
	}
	if _, err := os.Stat(filepath.Join(dir, dirInit)); err == nil {
		return nil, fmt.Errorf("%s waits for the certificates of its CA: have the requests in %s signed, then musterd init --import", dir, filepath.Join(dir, dirInit))
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("%s is not empty: choose a new directory", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return func() error { // the directory was empty: nothing but our own goes
		left, err := os.ReadDir(dir)
		for _, e := range left {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
		return err
	}, nil
}

// complete makes what needs the CA. The settings come last: with them, there is a muster.
func complete(ctx context.Context, c *config.Config, hierarchy *ca.Hierarchy, names []string) (made Made, err error) {
	if err := makeServerCertificates(c, hierarchy, names); err != nil {
		return Made{}, err
	}
	if made.Token, err = firstToken(ctx, c); err != nil {
		return Made{}, err
	}
	if _, err := WriteBrokerConfig(c, c.Path(c.Broker.ConfigDir)); err != nil {
		return Made{}, err
	}
	made.Config = filepath.Join(c.DataDir, FileConfig)
	return made, writeNew(made.Config, []byte(c.Render(configs.Musterd)), 0o600)
}

// makeSecrets draws every secret that is not there: 256 random bits each.
func makeSecrets(c *config.Config) error {
	for _, file := range []string{c.PKI.PassphraseFile, c.Broker.PasswordFile, c.Broker.MonitorFile, c.Broker.AdminFile} {
		if _, err := os.Stat(c.Path(file)); err == nil {
			continue // brought along: the data directory is empty, so it lies elsewhere
		}
		var raw [32]byte
		_, _ = rand.Read(raw[:]) // never fails (crypto/rand)
		if err := writeNew(c.Path(file), []byte(base64.RawURLEncoding.EncodeToString(raw[:])+"\n"), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// makeKeys makes the keys of the intermediates that are to be in a key manager, which may give them names of its own.
func makeKeys(ctx context.Context, c *config.Config, passphrase []byte) error {
	if c.PKI.DeviceKey == "" && c.PKI.ServerKey == "" && c.PKI.AuditKey == "" {
		return errors.New("--create-keys makes keys in a key manager: name them with --set pki.device_key=… and --set pki.server_key=…")
	}
	for key, ref := range map[string]*string{"pki.device_key": &c.PKI.DeviceKey, "pki.server_key": &c.PKI.ServerKey, "pki.audit_key": &c.PKI.AuditKey} {
		if *ref == "" {
			continue
		}
		made, err := keystore.Create(ctx, *ref, passphrase)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		*ref = made
	}
	return nil
}

func keysOf(c *config.Config) ca.Keys {
	return ca.Keys{Device: c.PKI.DeviceKey, Server: c.PKI.ServerKey}
}

func makeCA(ctx context.Context, c *config.Config, o InitOptions) (*ca.Hierarchy, error) {
	passphrase, err := c.Secret(c.PKI.PassphraseFile)
	if err != nil {
		return nil, err
	}
	if o.CreateKeys {
		if err := makeKeys(ctx, c, []byte(passphrase)); err != nil {
			return nil, err
		}
	}
	h, err := ca.CreateIn(ctx, ca.CreateOptions{At: time.Now()}, keysOf(c), []byte(passphrase))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(c.Path(c.PKI.Dir)), 0o700); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	if err := ca.Write(h, c.Path(c.PKI.Dir), []byte(passphrase)); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// makeServerCertificates makes a certificate for each server, all for the same names.
func makeServerCertificates(c *config.Config, h *ca.Hierarchy, names []string) error {
	names = slices.Clone(names)
	for _, public := range []string{c.Public.MQTT, c.Public.FallbackMQTT, c.Public.HTTPS, c.Public.RecoveryHTTPS, c.Broker.AMQPS} {
		if host, _, err := net.SplitHostPort(public); err == nil {
			names = append(names, host)
		}
	}
	names = append(names, "localhost", "127.0.0.1")
	slices.Sort(names)
	names = slices.Compact(names)
	// A DNS name first: it becomes the common name, and old mbedTLS matches no IP addresses (esp32.md §7).
	slices.SortStableFunc(names, func(a, b string) int {
		ip := func(s string) int {
			if net.ParseIP(s) != nil {
				return 1
			}
			return 0
		}
		return ip(a) - ip(b)
	})
	tlsDir := c.Path(c.Broker.TLSDir)
	servers := [][2]string{
		{c.Path(c.TLS.DevicesCert), c.Path(c.TLS.DevicesKey)},
		{c.Path(c.TLS.OpsCert), c.Path(c.TLS.OpsKey)},
		{filepath.Join(tlsDir, fileBrokerCert), filepath.Join(tlsDir, fileBrokerKey)},
	}
	if c.TLS.BrokerAuth {
		servers = append(servers, [2]string{c.Path(c.TLS.BrokerAuthCert), c.Path(c.TLS.BrokerAuthKey)})
	}
	for _, files := range servers {
		s, err := h.NewServer(time.Now(), names)
		if err != nil {
			return err
		}
		if err := errors.Join(writeNew(files[0], s.Chain, 0o644), writeNew(files[1], s.Key, 0o600)); err != nil {
			return err
		}
	}
	err := errors.Join(
		writeNew(filepath.Join(tlsDir, fileDeviceCA), h.ClientCAs(), 0o644),
		writeNew(filepath.Join(tlsDir, fileTrust), h.TrustBundle(), 0o644),
	)
	if err != nil || !c.TLS.BrokerAuth {
		return err
	}
	return makeAuthClient(tlsDir)
}

// makeAuthClient makes the certificate by which the broker proves itself at listen.broker_auth. It is self-signed: that
// listener trusts this one certificate and no CA.
func makeAuthClient(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "rabbitmq"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		writeNew(filepath.Join(dir, fileAuthClientCert), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		writeNew(filepath.Join(dir, fileAuthClientKey), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600),
	)
}

func firstToken(ctx context.Context, c *config.Config) (string, error) {
	db, err := bolt.Open(c.Path(fileStore), bolt.Options{})
	if err != nil {
		return "", err
	}
	operators := access.New(access.Config{
		Update: update(db, func(tx *bolt.Tx) access.Tx { return tx }),
		View:   view(db, func(tx *bolt.Tx) access.Tx { return tx }),
	})
	secret, _, err := operators.Bootstrap(ctx, time.Now())
	return secret, errors.Join(err, db.Close())
}

// BrokerConf returns what brokerconf needs, from the settings. Paths are absolute, as this machine sees them.
func BrokerConf(c *config.Config) (brokerconf.Config, error) {
	tlsDir, err := filepath.Abs(c.Path(c.Broker.TLSDir))
	if err != nil {
		return brokerconf.Config{}, err
	}
	confDir, err := filepath.Abs(c.Path(c.Broker.ConfigDir))
	if err != nil {
		return brokerconf.Config{}, err
	}
	out := brokerconf.Config{
		MQTTAddress: c.Broker.BindAddress, MQTTPort: c.Broker.MQTTPort, FallbackPort: c.Broker.FallbackPort,
		AdminAddress: c.Broker.AdminBind, AMQPSPort: c.Broker.AMQPSPort, ManagementPort: c.Broker.MgmtPort,
		DeviceCA: filepath.Join(tlsDir, fileDeviceCA), ServerCert: filepath.Join(tlsDir, fileBrokerCert), ServerKey: filepath.Join(tlsDir, fileBrokerKey),
		Definitions: filepath.Join(confDir, brokerconf.FileDefinitions), AuthURL: c.Broker.AuthURL,
		FleetSize: c.Broker.FleetSize, DiskFreeLimit: c.Broker.DiskFreeLimit, Passwords: map[string]string{},
	}
	if c.TLS.BrokerAuth {
		out.AuthCA, out.AuthCert, out.AuthKey = filepath.Join(tlsDir, fileTrust), filepath.Join(tlsDir, fileAuthClientCert), filepath.Join(tlsDir, fileAuthClientKey)
	}
	for user, file := range map[string]string{
		brokerconf.UserMuster: c.Broker.PasswordFile, brokerconf.UserMonitor: c.Broker.MonitorFile, brokerconf.UserAdmin: c.Broker.AdminFile,
	} {
		password, err := c.Secret(file)
		if err != nil {
			return brokerconf.Config{}, err
		}
		// A salt from the password itself makes the same settings render the same text; the password has 256 random bits.
		sum := sha256.Sum256([]byte("muster broker salt " + password))
		out.Passwords[user] = brokerconf.HashPassword(password, [4]byte(sum[:4]))
	}
	return out, nil
}

// WriteBrokerConfig renders RabbitMQ's configuration into dir and returns the paths of the files.
func WriteBrokerConfig(c *config.Config, dir string) ([]string, error) {
	conf, err := BrokerConf(c)
	if err != nil {
		return nil, err
	}
	files, err := brokerconf.Render(conf)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var paths []string
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := replaceFile(path, content, 0o600); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths, nil
}

// writeNew writes a file that must not exist yet, and the folders above it.
func writeNew(path string, content []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

// replaceFile writes a file whole or not at all.
func replaceFile(path string, content []byte, mode os.FileMode) error {
	part := path + ".part"
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeNew(part, content, mode); err != nil {
		return err
	}
	return os.Rename(part, path)
}
