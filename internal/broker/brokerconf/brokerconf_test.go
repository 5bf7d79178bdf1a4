package brokerconf_test

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/broker/brokerconf"
	"muster/internal/fleet"
)

var update = flag.Bool("update", false, "write testdata afresh; read the diff before you commit it")

func config() brokerconf.Config {
	hash := brokerconf.HashPassword("secret", [4]byte{1, 2, 3, 4})
	return brokerconf.Config{
		MQTTAddress: "0.0.0.0", MQTTPort: 8883, FallbackPort: 8884, AdminAddress: "127.0.0.1", AMQPSPort: 5671, ManagementPort: 15671,
		DeviceCA: "/tls/device-ca.pem", ServerCert: "/tls/broker.crt", ServerKey: "/tls/broker.key", Definitions: "/conf/definitions.json",
		AuthURL:   "http://127.0.0.1:9080",
		Passwords: map[string]string{brokerconf.UserMuster: hash, brokerconf.UserMonitor: hash, brokerconf.UserAdmin: hash},
		FleetSize: 1000, DiskFreeLimit: "2GB",
	}
}

func TestTheRenderedFilesAreTheApprovedOnes(t *testing.T) {
	files, err := brokerconf.Render(config())
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 {
		t.Errorf("%d files", len(files))
	}
	for name, got := range files {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil || string(got) != string(want) {
			t.Errorf("%s differs from the approved text (go test -update, then read the diff): %v", name, err)
		}
	}
}

// Each of these lines keeps somebody out; the reason stands beside it.
func TestTheLinesThatKeepStrangersOut(t *testing.T) {
	files, err := brokerconf.Render(config())
	if err != nil {
		t.Fatal(err)
	}
	main := string(files[brokerconf.FileMain])
	for line, why := range map[string]string{
		"listeners.tcp = none":                                    "no AMQP in clear",
		"mqtt.listeners.tcp = none":                               "no MQTT in clear",
		"ssl_options.verify = verify_peer":                        "a certificate that is presented must be ours",
		"ssl_cert_login_from = subject_alternative_name":          "the user name is the URI, not a name that anybody may carry",
		"ssl_cert_login_san_type = uri":                           "it names the very certificate",
		"mqtt.ssl_cert_client_id_from = subject_alternative_name": "no client id of another device",
		"mqtt.allow_anonymous = false":                            "no login without credentials",
		"anonymous_login_user = none":                             "nor by SASL ANONYMOUS",
		"auth_http.http_method = post":                            "passwords stay out of URLs",
		"mqtt.max_packet_size_authenticated = 65536":              "one large message kills every AMQP consumer",
		"mqtt.max_packet_size_unauthenticated = 8192":             "no memory for strangers",
		"loopback_users.muster-admin = true":                      "who may close connections comes from this machine",
	} {
		if !strings.Contains(main, "\n"+line+"\n") {
			t.Errorf("%q is missing: %s", line, why)
		}
	}
	if strings.Contains(main, "cache") && strings.Contains(main, "auth_cache") {
		t.Error("an auth cache would let a revoked certificate back in")
	}
	if !strings.Contains(string(files[brokerconf.FileAdvanced]), "{ignore_colons_in_username, true}") {
		t.Error("a user name vhost:user could choose its vhost")
	}
	var defs struct {
		Users []struct {
			Name         string   `json:"name"`
			Tags         []string `json:"tags"`
			PasswordHash string   `json:"password_hash"`
		} `json:"users"`
	}
	if err := json.Unmarshal(files[brokerconf.FileDefinitions], &defs); err != nil || len(defs.Users) != 3 {
		t.Fatalf("%+v, %v", defs, err)
	}
	for name, content := range files {
		if strings.Contains(string(content), "secret") {
			t.Errorf("%s holds a password", name)
		}
	}
}

func TestWhatCannotWorkIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(*brokerconf.Config){
		"relative path":                   func(c *brokerconf.Config) { c.ServerKey = "broker.key" },
		"newline in a path":               func(c *brokerconf.Config) { c.DeviceCA = "/a\nlisteners.tcp.1 = 0.0.0.0:5672" },
		"one port twice":                  func(c *brokerconf.Config) { c.FallbackPort = 8883 },
		"port 0":                          func(c *brokerconf.Config) { c.AMQPSPort = 0 },
		"host name for an address":        func(c *brokerconf.Config) { c.AdminAddress = "localhost" },
		"passwords in clear over the net": func(c *brokerconf.Config) { c.AuthURL = "http://10.0.0.1:9080" },
		"https without a CA":              func(c *brokerconf.Config) { c.AuthURL = "https://10.0.0.1:9080" },
		"no password hash":                func(c *brokerconf.Config) { delete(c.Passwords, brokerconf.UserAdmin) },
		"a password, not a hash":          func(c *brokerconf.Config) { c.Passwords[brokerconf.UserAdmin] = "secret" },
		"nobody":                          func(c *brokerconf.Config) { c.FleetSize = 0 },
		"no size":                         func(c *brokerconf.Config) { c.DiskFreeLimit = "much" },
	} {
		c := config()
		spoil(&c)
		if _, err := brokerconf.Render(c); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The value is the example of RabbitMQ's documentation of password hashing.
func TestHashPassword(t *testing.T) {
	if got := brokerconf.HashPassword("test12", [4]byte{0x90, 0x8d, 0xc6, 0x0a}); got != "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR" {
		t.Errorf("got %s", got)
	}
}
