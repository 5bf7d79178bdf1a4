// Package config reads musterd's settings: built-in defaults, then one YAML file, then the environment, then flags.
// Unknown keys, wrong types, values out of range and secrets that everybody can read are refused, a line for each.
package config

import (
	"time"
)

// Config is the whole of musterd's settings. Relative paths are below DataDir. configs/musterd.yaml explains each.
type Config struct {
	DataDir string `koanf:"data_dir"`

	Log          Log          `koanf:"log"`
	Listen       Listen       `koanf:"listen"`
	Public       Public       `koanf:"public"`
	TLS          TLS          `koanf:"tls"`
	Broker       Broker       `koanf:"broker"`
	PKI          PKI          `koanf:"pki"`
	Certificates Certificates `koanf:"certificates"`
	Recovery     Recovery     `koanf:"recovery"`
	Firmware     Firmware     `koanf:"firmware"`
	Rollouts     Rollouts     `koanf:"rollouts"`
	Uplink       Uplink       `koanf:"uplink"`
}

// Log says how much is logged and how.
type Log struct {
	Level  string `koanf:"level"`  // debug, info, warn, error
	Format string `koanf:"format"` // text, json
}

// Listen are the addresses that musterd binds, host:port.
type Listen struct {
	Devices    string `koanf:"devices"`     // HTTPS, mutual TLS
	Recovery   string `koanf:"recovery"`    // HTTPS, fallback password
	Ops        string `koanf:"ops"`         // HTTPS: REST, health, metrics
	BrokerAuth string `koanf:"broker_auth"` // HTTP for RabbitMQ; loopback, or broker_auth_tls
}

// Public are the addresses that devices are told, host:port. The hosts are in the server certificates.
type Public struct {
	MQTT          string `koanf:"mqtt"`
	FallbackMQTT  string `koanf:"fallback_mqtt"`
	HTTPS         string `koanf:"https"`
	RecoveryHTTPS string `koanf:"recovery_https"`
}

// TLS are the server certificates: PEM files, leaf first.
type TLS struct {
	DevicesCert    string `koanf:"devices_cert"`
	DevicesKey     string `koanf:"devices_key_file"`
	OpsCert        string `koanf:"ops_cert"`
	OpsKey         string `koanf:"ops_key_file"`
	BrokerAuth     bool   `koanf:"broker_auth"` // mutual TLS with the broker, for an auth listener off loopback
	BrokerAuthCert string `koanf:"broker_auth_cert"`
	BrokerAuthKey  string `koanf:"broker_auth_key_file"`
}

// Broker says how musterd reaches RabbitMQ, and what the rendered broker configuration holds.
type Broker struct {
	AMQPS         string `koanf:"amqps"`      // host:port
	Management    string `koanf:"management"` // https URL
	CAFile        string `koanf:"ca_file"`    // PEM that both are verified against
	ServerName    string `koanf:"server_name"`
	PasswordFile  string `koanf:"password_file"`         // of user muster: AMQP
	MonitorFile   string `koanf:"monitor_password_file"` // of user muster-monitor: reads connections
	AdminFile     string `koanf:"admin_password_file"`   // of user muster-admin: closes connections
	ConfigDir     string `koanf:"config_dir"`            // where broker-config writes
	TLSDir        string `koanf:"tls_dir"`               // where RabbitMQ finds its certificate, its key and the device CA
	AuthURL       string `koanf:"auth_url"`              // how RabbitMQ reaches listen.broker_auth
	MQTTPort      int    `koanf:"mqtt_port"`
	FallbackPort  int    `koanf:"fallback_port"`
	AMQPSPort     int    `koanf:"amqps_port"`
	MgmtPort      int    `koanf:"management_port"`
	BindAddress   string `koanf:"bind_address"` // of the MQTT listeners
	AdminBind     string `koanf:"admin_bind_address"`
	FleetSize     int    `koanf:"fleet_size"` // devices; limits are sized by it
	DiskFreeLimit string `koanf:"disk_free_limit"`
	Probe         bool   `koanf:"probe"` // try at start that each listener refuses what it must
}

// PKI names the folder of the CA, as musterd init makes it, and where the keys of its two intermediates are.
type PKI struct {
	Dir            string `koanf:"dir"`
	PassphraseFile string `koanf:"passphrase_file"`
	DeviceKey      string `koanf:"device_key"` // URI in a key manager; empty: an encrypted file in Dir
	ServerKey      string `koanf:"server_key"`
	AuditKey       string `koanf:"audit_key"` // that signs checkpoints of the audit trail; likewise
}

// Certificates is the policy of device certificates.
type Certificates struct {
	Lifetime      time.Duration `koanf:"lifetime"`
	MinLifetime   time.Duration `koanf:"min_lifetime"`        // an operator may not ask for less
	RenewSchedule string        `koanf:"renew_schedule"`      // cron expression of the renewal pass; empty: none
	RenewLimit    int           `koanf:"renew_limit"`         // devices asked in one pass
	Grace         time.Duration `koanf:"grace"`               // from superseded to revoked
	MaxLockOut    float64       `koanf:"max_lockout_percent"` // of the fleet, by a change of lifetime
	Sweep         time.Duration `koanf:"sweep"`               // how often expiry is enforced on live sessions
	ESTNewKeys    string        `koanf:"est_new_keys"`        // approve: by an operator; automatic: at once
	RSA           bool          `koanf:"rsa"`                 // allow RSA keys of 2048 to 4096 bits
	BlockedKeys   string        `koanf:"blocked_keys"`        // file with hashes of keys that get no certificate
}

// Recovery is the policy of the fallback.
type Recovery struct {
	NewKeys         string  `koanf:"new_keys"`          // approve: by an operator; automatic: at once
	PerDeviceHour   int     `koanf:"per_device_hour"`   // certificate requests of a device
	PerSecond       float64 `koanf:"per_second"`        // certificate requests of the whole fleet
	LoginsPerMinute int     `koanf:"logins_per_minute"` // failed password logins of one device name
}

// Rollouts is the policy for all rollouts.
type Rollouts struct {
	Approval        bool          `koanf:"approval"`         // each must be approved by somebody else than its creator
	PenaltyFailures int           `koanf:"penalty_failures"` // failed attempts of a device that bring a penalty; 0: none
	PenaltyWithin   time.Duration `koanf:"penalty_within"`   // in which they happen
	PenaltyFor      time.Duration `koanf:"penalty_for"`      // how long no rollout offers it anything
}

// Firmware bounds what may be published.
type Firmware struct {
	MaxImage       int64 `koanf:"max_image"`        // bytes
	BytesPerSecond int64 `koanf:"bytes_per_second"` // of all downloads together; 0: no limit
}

// Uplink sizes the batches of reports.
type Uplink struct {
	Batch  int           `koanf:"batch"`  // messages in one transaction
	Linger time.Duration `koanf:"linger"` // how long a batch waits for more
}

// Default returns the settings of a single machine: everything but what init writes.
func Default() Config {
	return Config{
		DataDir: "/var/lib/muster",
		Log:     Log{Level: "info", Format: "text"},
		Listen:  Listen{Devices: "0.0.0.0:8443", Recovery: "0.0.0.0:8444", Ops: "0.0.0.0:9443", BrokerAuth: "127.0.0.1:9080"},
		Public:  Public{MQTT: "localhost:8883", FallbackMQTT: "localhost:8884", HTTPS: "localhost:8443", RecoveryHTTPS: "localhost:8444"},
		TLS: TLS{
			DevicesCert: "tls/devices.crt", DevicesKey: "tls/devices.key", OpsCert: "tls/ops.crt", OpsKey: "tls/ops.key",
			BrokerAuthCert: "tls/broker-auth.crt", BrokerAuthKey: "tls/broker-auth.key",
		},
		Broker: Broker{
			AMQPS: "localhost:5671", Management: "https://localhost:15671", CAFile: "pki/trust-bundle.pem",
			PasswordFile: "secrets/broker-muster", MonitorFile: "secrets/broker-monitor", AdminFile: "secrets/broker-admin",
			ConfigDir: "broker", TLSDir: "broker/tls", AuthURL: "http://127.0.0.1:9080",
			MQTTPort: 8883, FallbackPort: 8884, AMQPSPort: 5671, MgmtPort: 15671, BindAddress: "0.0.0.0", AdminBind: "127.0.0.1",
			FleetSize: 10_000, DiskFreeLimit: "2GB", Probe: true,
		},
		PKI: PKI{Dir: "pki", PassphraseFile: "secrets/ca-passphrase"},
		Certificates: Certificates{
			Lifetime: 90 * 24 * time.Hour, MinLifetime: time.Hour, RenewSchedule: "*/10 * * * *", RenewLimit: 1000,
			Grace: 24 * time.Hour, MaxLockOut: 1, Sweep: time.Minute, ESTNewKeys: "automatic",
		},
		Recovery: Recovery{NewKeys: "approve", PerDeviceHour: 12, PerSecond: 20, LoginsPerMinute: 10},
		Firmware: Firmware{MaxImage: 16 << 20},
		Rollouts: Rollouts{PenaltyFailures: 3, PenaltyWithin: 24 * time.Hour, PenaltyFor: 24 * time.Hour},
		Uplink:   Uplink{Batch: 512, Linger: 5 * time.Millisecond},
	}
}
