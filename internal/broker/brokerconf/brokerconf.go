// Package brokerconf renders RabbitMQ's whole configuration as muster needs it (DESIGN §5). The same text serves
// production, the demo and the tests. It does no I/O. Numbers and traps are those of rabbitmq.md §4.
package brokerconf

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"path"
	"strconv"
	"strings"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Names of the files that Render returns.
const (
	FileMain        = "rabbitmq.conf"
	FileAdvanced    = "advanced.config"
	FilePlugins     = "enabled_plugins"
	FileDefinitions = "definitions.json"
)

// Users of muster's own. No device can log in by these names: they are in the internal backend, and their passwords
// never leave the machine.
const (
	UserMuster  = "muster"         // AMQP: queues of both vhosts
	UserMonitor = "muster-monitor" // management API: reads connections
	UserAdmin   = "muster-admin"   // management API: closes connections, which RabbitMQ allows administrators only
)

// Config is what differs between installations. All fields but those said to be optional are needed. Paths are as
// RabbitMQ sees them.
type Config struct {
	MQTTAddress       string // IP that both MQTT listeners bind
	MQTTPort          int    // mutual TLS: vhost devices
	FallbackPort      int    // password over TLS: vhost fallback
	AdminAddress      string // IP that AMQPS and management bind; loopback unless musterd is elsewhere
	AMQPSPort         int
	ManagementPort    int
	DeviceCA          string // PEM: what device certificates are verified against, and nothing else
	ServerCert        string // PEM: leaf and intermediate
	ServerKey         string
	Definitions       string            // path of FileDefinitions
	AuthURL           string            // of musterd's auth backend; http on loopback, or https with the three files below
	AuthCA            string            // optional
	AuthCert, AuthKey string            // optional
	Passwords         map[string]string // user → password_hash (HashPassword), for the three users
	FleetSize         int               // devices
	DiskFreeLimit     string            // such as 2GB: RabbitMQ takes nothing new below it
}

// Bounds that RabbitMQ is given, in bytes unless said.
const (
	maxPacketBefore = 8 << 10  // of CONNECT
	maxPacket       = 64 << 10 // later; well below the AMQP frame of 128 KiB, or one message kills every consumer (§4.4)
	sessionLength   = 200      // messages that wait in a device's session
	sessionTTL      = 60_000   // ms that one waits there: muster says everything again after hello
)

// Render returns the files. Errors are of kind Invalid and name the field.
func Render(c Config) (map[string][]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	defs, err := c.definitions()
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		FileMain:        c.main(),
		FileAdvanced:    []byte(advanced),
		FilePlugins:     []byte(plugins),
		FileDefinitions: defs,
	}, nil
}

// advanced holds what the main file has no key for: a user name "vhost:user" must not choose its vhost.
const advanced = "[{rabbitmq_mqtt, [{ignore_colons_in_username, true}]}].\n"

// ErlangArgs belong into RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS of RabbitMQ: it looks at its certificate files every two seconds
// then, instead of two minutes, so that a renewed certificate is served and a new CA believed at once. Nobody can clear
// Erlang's cache of them from outside (rabbitmq.md §4.7), a setting in the files comes too late for it, and without the cache,
// which is what tells of a change, connections that stand would keep their CAs for all new ones (docs/decisions/0012).
const ErlangArgs = "-ssl ssl_pem_cache_clean 2000"

const plugins = "[rabbitmq_auth_backend_http, rabbitmq_event_exchange, rabbitmq_management, rabbitmq_mqtt].\n"

func (c Config) check() error {
	for name, v := range map[string]string{
		"device CA": c.DeviceCA, "server certificate": c.ServerCert, "server key": c.ServerKey, "definitions": c.Definitions,
	} {
		if !path.IsAbs(v) || strings.ContainsAny(v, "\n\r#'") {
			return fleet.Errorf(fleet.Invalid, "broker configuration: %s: want an absolute path without # and '", name)
		}
	}
	for name, v := range map[string]string{"MQTT address": c.MQTTAddress, "admin address": c.AdminAddress} {
		if net.ParseIP(v) == nil {
			return fleet.Errorf(fleet.Invalid, "broker configuration: %s: want an IP address", name)
		}
	}
	seen := map[int]bool{}
	for name, p := range map[string]int{"MQTT": c.MQTTPort, "fallback": c.FallbackPort, "AMQPS": c.AMQPSPort, "management": c.ManagementPort} {
		if p < 1 || p > 65535 || seen[p] {
			return fleet.Errorf(fleet.Invalid, "broker configuration: %s port: want 1 to 65535, each port once", name)
		}
		seen[p] = true
	}
	u, err := url.Parse(c.AuthURL)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || strings.ContainsAny(c.AuthURL, "\n\r# ") {
		return fleet.Errorf(fleet.Invalid, "broker configuration: auth URL: want http://host:port or https://host:port")
	}
	if ip := net.ParseIP(u.Hostname()); u.Scheme == "http" && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fleet.Errorf(fleet.Invalid, "broker configuration: auth URL: it carries passwords, so off loopback it must be https")
	}
	if u.Scheme == "https" && (c.AuthCA == "" || c.AuthCert == "" || c.AuthKey == "") {
		return fleet.Errorf(fleet.Invalid, "broker configuration: auth over https needs a CA, a certificate and a key")
	}
	for _, user := range []string{UserMuster, UserMonitor, UserAdmin} {
		if raw, err := base64.StdEncoding.DecodeString(c.Passwords[user]); err != nil || len(raw) != 4+sha256.Size {
			return fleet.Errorf(fleet.Invalid, "broker configuration: user %s has no password hash", user)
		}
	}
	if c.FleetSize < 1 {
		return fleet.Errorf(fleet.Invalid, "broker configuration: fleet size: want at least 1")
	}
	if c.DiskFreeLimit == "" || strings.Trim(c.DiskFreeLimit, "0123456789KMGTiB") != "" {
		return fleet.Errorf(fleet.Invalid, "broker configuration: disk free limit: want a size such as 2GB")
	}
	return nil
}

func (c Config) main() []byte {
	var b bytes.Buffer
	section := func(title string) { fmt.Fprintf(&b, "\n# %s\n", title) }
	set := func(key string, v any) { fmt.Fprintf(&b, "%s = %v\n", key, v) }
	addr := func(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

	b.WriteString("# Rendered by musterd broker-config: change musterd's settings, not this file.\n")

	section("Listeners: TLS only. The port decides the vhost (definitions.json).")
	set("listeners.tcp", "none")
	set("listeners.ssl.1", addr(c.AdminAddress, c.AMQPSPort))
	set("mqtt.listeners.tcp", "none")
	set("mqtt.listeners.ssl.1", addr(c.MQTTAddress, c.MQTTPort))
	set("mqtt.listeners.ssl.2", addr(c.MQTTAddress, c.FallbackPort))
	set("ssl_handshake_timeout", 5000)

	section("One TLS block for all of them: a certificate is verified if there is one; the auth backend demands it on the first port.")
	set("ssl_options.cacertfile", c.DeviceCA)
	set("ssl_options.certfile", c.ServerCert)
	set("ssl_options.keyfile", c.ServerKey)
	set("ssl_options.verify", "verify_peer")
	set("ssl_options.fail_if_no_peer_cert", "false")
	set("ssl_options.depth", 2)
	set("ssl_options.versions.1", "tlsv1.3")
	set("ssl_options.versions.2", "tlsv1.2")
	set("ssl_options.reuse_sessions", "false")
	set("ssl_options.client_renegotiation", "false")

	section("Identity: the user name is the URI of the certificate, the client id must be its DNS name.")
	set("mqtt.ssl_cert_login", "true")
	set("ssl_cert_login_from", "subject_alternative_name")
	set("ssl_cert_login_san_type", "uri")
	set("ssl_cert_login_san_index", 0)
	set("mqtt.ssl_cert_client_id_from", "subject_alternative_name")
	set("mqtt.ssl_cert_login_san_type", "dns")
	set("mqtt.ssl_cert_login_san_index", 0)
	set("mqtt.allow_anonymous", "false")
	set("anonymous_login_user", "none")
	set("mqtt.vhost", wire.VhostDevices)
	set("mqtt.disconnect_on_unauthorized", "true")

	section("Who may do what: muster's own users here, every device by musterd. No cache: it would let a revoked certificate back in.")
	set("auth_backends.1", "internal")
	set("auth_backends.2", "http")
	set("auth_http.http_method", "post")
	for _, q := range []string{"user", "vhost", "resource", "topic"} {
		set("auth_http."+q+"_path", strings.TrimSuffix(c.AuthURL, "/")+"/"+q)
	}
	set("auth_http.request_timeout", 5000)
	set("auth_http.connection_timeout", 2000)
	if strings.HasPrefix(c.AuthURL, "https:") {
		set("auth_http.ssl_options.verify", "verify_peer")
		set("auth_http.ssl_options.cacertfile", c.AuthCA)
		set("auth_http.ssl_options.certfile", c.AuthCert)
		set("auth_http.ssl_options.keyfile", c.AuthKey)
	}
	if ip := net.ParseIP(c.AdminAddress); ip.IsLoopback() {
		set("loopback_users."+UserAdmin, "true")
	} else {
		set("loopback_users", "none")
	}

	section("Limits.")
	set("mqtt.max_packet_size_unauthenticated", maxPacketBefore)
	set("mqtt.max_packet_size_authenticated", maxPacket)
	set("mqtt.max_session_expiry_interval_seconds", 3600)
	set("mqtt.mailbox_soft_limit", 200)
	set("mqtt.prefetch", 10)
	set("mqtt.topic_alias_maximum", 16)
	set("max_message_size", 1<<20)
	set("vm_memory_high_watermark.relative", "0.6")
	set("disk_free_limit.absolute", c.DiskFreeLimit)
	// A take-over needs room beside the session that it replaces, and half-open connections count until they time out.
	for i, vhost := range []string{wire.VhostDevices, wire.VhostFallback} {
		set(fmt.Sprintf("default_limits.vhosts.%d.pattern", i+1), "^"+vhost+"$")
		set(fmt.Sprintf("default_limits.vhosts.%d.max_connections", i+1), 2*c.FleetSize+100)
		set(fmt.Sprintf("default_limits.vhosts.%d.max_queues", i+1), 4*c.FleetSize+100)
	}

	section("Management: for musterd and people on this machine.")
	set("management.ssl.ip", c.AdminAddress)
	set("management.ssl.port", c.ManagementPort)
	set("management.ssl.certfile", c.ServerCert)
	set("management.ssl.keyfile", c.ServerKey)
	set("management.ssl.versions.1", "tlsv1.3")
	set("management.ssl.versions.2", "tlsv1.2")
	set("management.http.max_body_size", 1<<20)
	set("load_definitions", c.Definitions)

	section("When a message came is the broker's word, and the same however often it is delivered.")
	set("message_interceptors.incoming.set_header_timestamp.overwrite", "true")

	section("Presence: muster consumes the events of this vhost.")
	set("event_exchange.vhost", wire.VhostDevices)

	section("Logging.")
	set("log.console", "true")
	set("log.console.level", "info")
	set("log.file", "false")
	set("log.connection.level", "warning")
	return b.Bytes()
}

// definitions holds users, vhosts, permissions, the mapping of ports to vhosts and policies, in RabbitMQ's own format.
func (c Config) definitions() ([]byte, error) {
	type object = map[string]any
	user := func(name string, tags ...string) object {
		return object{"name": name, "password_hash": c.Passwords[name], "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": append([]string{}, tags...)}
	}
	var permissions, policies []object
	for _, vhost := range []string{wire.VhostDevices, wire.VhostFallback} {
		permissions = append(permissions,
			object{"user": UserMuster, "vhost": vhost, "configure": ".*", "write": ".*", "read": ".*"},
			object{"user": UserMonitor, "vhost": vhost, "configure": "^$", "write": "^$", "read": "^$"},
			object{"user": UserAdmin, "vhost": vhost, "configure": "^$", "write": "^$", "read": "^$"},
		)
		// A message that a device's buffer cannot take would otherwise block its session for ever (esp32.md §0.8).
		policies = append(policies, object{
			"vhost": vhost, "name": "device-sessions", "pattern": "^mqtt-subscription-", "apply-to": "queues", "priority": 1,
			"definition": object{"message-ttl": sessionTTL, "max-length": sessionLength, "overflow": "drop-head"},
		})
	}
	return json.MarshalIndent(object{
		"users":       []object{user(UserMuster), user(UserMonitor, "monitoring"), user(UserAdmin, "administrator")},
		"vhosts":      []object{{"name": wire.VhostDevices}, {"name": wire.VhostFallback}},
		"permissions": permissions,
		"policies":    policies,
		"global_parameters": []object{{
			"name":  "mqtt_port_to_vhost_mapping",
			"value": object{strconv.Itoa(c.MQTTPort): wire.VhostDevices, strconv.Itoa(c.FallbackPort): wire.VhostFallback},
		}},
	}, "", "  ")
}

// HashPassword returns password in the form in which RabbitMQ keeps it: base64 of salt and SHA-256(salt ‖ password). The
// passwords that muster makes have 256 random bits, so a fast hash gives nothing away.
func HashPassword(password string, salt [4]byte) string {
	sum := sha256.Sum256(append(salt[:], password...))
	return base64.StdEncoding.EncodeToString(append(salt[:], sum[:]...))
}
