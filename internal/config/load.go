package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/rawbytes"
	"github.com/knadh/koanf/v2"
	"github.com/robfig/cron/v3"
)

// EnvPrefix starts the name of every setting in the environment; a dot in a key becomes two underscores:
// MUSTERD_LISTEN__OPS sets listen.ops.
const EnvPrefix = "MUSTERD_"

// MaxFile is the largest settings file that is read, in bytes.
const MaxFile = 1 << 20

// Errors is everything that is wrong with the settings, a line each.
type Errors []string

func (e Errors) Error() string { return strings.Join(e, "\n") }

// Load reads the settings: file may be empty for none; environ is os.Environ(); sets are flags of the form key=value.
// The error, if any, is of type Errors. Secrets are checked by CheckSecrets, since not every command needs them.
func Load(file string, environ, sets []string) (Config, error) {
	var errs Errors
	k := koanf.New(".")
	if file != "" {
		raw, err := readFile(file)
		if err != nil {
			return Config{}, Errors{err.Error()}
		}
		if err := k.Load(rawbytes.Provider(raw), yaml.Parser()); err != nil {
			return Config{}, Errors{fmt.Sprintf("%s: not YAML: %v", file, err)}
		}
	}
	known := keys()
	from := map[string]string{} // where a key was last set
	for _, key := range k.Keys() {
		from[key] = file
	}
	err := k.Load(env.Provider(".", env.Opt{
		Prefix: EnvPrefix, EnvironFunc: func() []string { return environ },
		TransformFunc: func(name, v string) (string, any) {
			key := strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, EnvPrefix)), "__", ".")
			from[key] = name
			return key, v
		},
	}), nil)
	if err != nil {
		return Config{}, Errors{err.Error()}
	}
	for _, s := range sets {
		key, v, ok := strings.Cut(s, "=")
		if !ok {
			errs = append(errs, fmt.Sprintf("--set %s: use key=value", s))
			continue
		}
		from[key] = "--set"
		if err := k.Set(key, v); err != nil {
			errs = append(errs, fmt.Sprintf("--set %s: %v", key, err))
		}
	}
	c := Default()
	for _, key := range k.Keys() {
		f, ok := known[key]
		if !ok {
			errs = append(errs, fmt.Sprintf("%s: unknown key %s%s", from[key], key, nearest(key, known)))
			continue
		}
		if err := assign(reflect.ValueOf(&c).Elem().FieldByIndex(f), k.Get(key)); err != nil {
			errs = append(errs, fmt.Sprintf("%s: %s: %v", from[key], key, err))
		}
	}
	if len(errs) == 0 {
		errs = c.validate()
	}
	if len(errs) > 0 {
		slices.Sort(errs)
		return Config{}, errs
	}
	return c, nil
}

func readFile(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist: name the settings file with --config, or make one with musterd init", file)
	}
	if err != nil {
		return nil, err
	}
	if info.Size() > MaxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes: it is no settings file", file, MaxFile)
	}
	return os.ReadFile(file)
}

// keys returns every key of Config with the path of its field.
func keys() map[string][]int {
	out := map[string][]int{}
	var walk func(t reflect.Type, prefix string, path []int)
	walk = func(t reflect.Type, prefix string, path []int) {
		for i := range t.NumField() {
			f := t.Field(i)
			key, at := prefix+f.Tag.Get("koanf"), append(slices.Clone(path), i)
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, key+".", at)
			} else {
				out[key] = at
			}
		}
	}
	walk(reflect.TypeFor[Config](), "", nil)
	return out
}

// nearest suggests the key that a wrong one may have meant.
func nearest(key string, known map[string][]int) string {
	last := key[strings.LastIndex(key, ".")+1:]
	var found []string
	for k := range known {
		if strings.HasSuffix(k, "."+last) || strings.HasPrefix(k, key+".") {
			found = append(found, k)
		}
	}
	if len(found) == 0 {
		return ""
	}
	slices.Sort(found)
	return " (is " + found[0] + " meant?)"
}

// assign stores v, as YAML or a text gave it, in field, without guessing: a number is no text, and a text is a number
// only where it came from the environment or a flag.
func assign(field reflect.Value, v any) error {
	s, isText := v.(string)
	switch {
	case field.Type() == reflect.TypeFor[time.Duration]():
		d, err := time.ParseDuration(s)
		if !isText || err != nil {
			return fmt.Errorf("wants a duration such as 90s, 10m or 2160h")
		}
		field.SetInt(int64(d))
	case field.Kind() == reflect.String:
		if !isText {
			return fmt.Errorf("wants a text, in quotes if it looks like a number")
		}
		field.SetString(s)
	case field.Kind() == reflect.Bool:
		b, ok := v.(bool)
		if !ok {
			var err error
			if b, err = strconv.ParseBool(s); !isText || err != nil {
				return fmt.Errorf("wants true or false")
			}
		}
		field.SetBool(b)
	case field.Kind() == reflect.Float64:
		switch n := v.(type) {
		case float64:
			field.SetFloat(n)
		case int:
			field.SetFloat(float64(n))
		default:
			f, err := strconv.ParseFloat(s, 64)
			if !isText || err != nil {
				return fmt.Errorf("wants a number")
			}
			field.SetFloat(f)
		}
	case field.CanInt():
		n, ok := v.(int)
		if !ok {
			var err error
			if n, err = strconv.Atoi(s); !isText || err != nil {
				return fmt.Errorf("wants a whole number")
			}
		}
		field.SetInt(int64(n))
	default:
		return fmt.Errorf("cannot be set")
	}
	return nil
}

// validate returns a line for every value that is out of range.
func (c *Config) validate() Errors {
	var errs Errors
	say := func(ok bool, key, want string) {
		if !ok {
			errs = append(errs, key+": "+want)
		}
	}
	oneOf := func(v, key string, of ...string) {
		say(slices.Contains(of, v), key, "wants one of "+strings.Join(of, ", "))
	}
	between := func(d, lo, hi time.Duration, key string) {
		say(d >= lo && d <= hi, key, fmt.Sprintf("wants %v to %v", lo, hi))
	}
	say(c.DataDir != "", "data_dir", "must be set")
	oneOf(c.Log.Level, "log.level", "debug", "info", "warn", "error")
	oneOf(c.Log.Format, "log.format", "text", "json")
	for key, addr := range map[string]string{
		"listen.devices": c.Listen.Devices, "listen.recovery": c.Listen.Recovery, "listen.ops": c.Listen.Ops, "listen.broker_auth": c.Listen.BrokerAuth,
		"public.mqtt": c.Public.MQTT, "public.fallback_mqtt": c.Public.FallbackMQTT, "public.https": c.Public.HTTPS,
		"public.recovery_https": c.Public.RecoveryHTTPS, "broker.amqps": c.Broker.AMQPS,
	} {
		host, port, err := net.SplitHostPort(addr)
		n, portErr := strconv.Atoi(port)
		say(err == nil && host != "" && portErr == nil && n >= 0 && n <= 65535, key, "wants host:port")
	}
	if host, _, err := net.SplitHostPort(c.Listen.BrokerAuth); err == nil {
		ip := net.ParseIP(host)
		say(c.TLS.BrokerAuth || host == "localhost" || ip != nil && ip.IsLoopback(), "listen.broker_auth",
			"anyone who reaches it could probe passwords: bind it to loopback, or set tls.broker_auth")
	}
	for key, raw := range map[string]string{"broker.management": c.Broker.Management, "broker.auth_url": c.Broker.AuthURL} {
		u, err := url.Parse(raw)
		say(err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http") && u.User == nil, key, "wants a URL without user or password")
	}
	if c.TLS.BrokerAuth {
		say(strings.HasPrefix(c.Broker.AuthURL, "https://"), "broker.auth_url", "wants https with tls.broker_auth")
	}
	for key, p := range map[string]int{
		"broker.mqtt_port": c.Broker.MQTTPort, "broker.fallback_port": c.Broker.FallbackPort, "broker.amqps_port": c.Broker.AMQPSPort, "broker.management_port": c.Broker.MgmtPort,
	} {
		say(p >= 1 && p <= 65535, key, "wants 1 to 65535")
	}
	say(c.Broker.MQTTPort != c.Broker.FallbackPort, "broker.fallback_port", "must differ from broker.mqtt_port: the port decides the vhost")
	say(c.Broker.FleetSize >= 1 && c.Broker.FleetSize <= 10_000_000, "broker.fleet_size", "wants 1 to 10000000 devices")
	say(c.PKI.DeviceKey == "" || c.PKI.DeviceKey != c.PKI.ServerKey, "pki.server_key", "must differ from pki.device_key: each intermediate has a key of its own")
	say(c.PKI.AuditKey == "" || c.PKI.AuditKey != c.PKI.DeviceKey && c.PKI.AuditKey != c.PKI.ServerKey, "pki.audit_key", "must differ from the keys of the CA: it has one purpose")
	between(c.Certificates.MinLifetime, time.Second, 10*365*24*time.Hour, "certificates.min_lifetime")
	between(c.Certificates.Lifetime, c.Certificates.MinLifetime, 10*365*24*time.Hour, "certificates.lifetime")
	between(c.Certificates.Grace, 0, 365*24*time.Hour, "certificates.grace")
	say(c.Certificates.MaxLockOut > 0 && c.Certificates.MaxLockOut <= 100, "certificates.max_lockout_percent", "wants more than 0, at most 100")
	between(c.Certificates.Sweep, time.Second, time.Hour, "certificates.sweep")
	say(c.Certificates.RenewLimit >= 1, "certificates.renew_limit", "wants at least 1")
	if c.Certificates.RenewSchedule != "" {
		_, err := cron.ParseStandard(c.Certificates.RenewSchedule)
		say(err == nil, "certificates.renew_schedule", "wants a cron expression of five fields, such as */10 * * * *")
	}
	oneOf(c.Certificates.ESTNewKeys, "certificates.est_new_keys", "approve", "automatic")
	oneOf(c.Recovery.NewKeys, "recovery.new_keys", "approve", "automatic")
	say(c.Recovery.PerDeviceHour >= 1, "recovery.per_device_hour", "wants at least 1")
	say(c.Recovery.PerSecond > 0, "recovery.per_second", "wants more than 0")
	say(c.Recovery.LoginsPerMinute >= 1, "recovery.logins_per_minute", "wants at least 1")
	say(c.Firmware.MaxImage >= 1024 && c.Firmware.MaxImage <= 1<<30, "firmware.max_image", "wants 1024 to 1073741824 bytes")
	say(c.Firmware.BytesPerSecond == 0 || c.Firmware.BytesPerSecond >= 4096, "firmware.bytes_per_second", "wants 0 (no limit), or at least 4096")
	say(c.Rollouts.PenaltyFailures >= 0 && c.Rollouts.PenaltyFailures <= 100, "rollouts.penalty_failures", "wants 0 (no penalty) to 100")
	between(c.Rollouts.PenaltyWithin, time.Minute, 90*24*time.Hour, "rollouts.penalty_within")
	between(c.Rollouts.PenaltyFor, time.Minute, 90*24*time.Hour, "rollouts.penalty_for")
	say(c.Uplink.Batch >= 1 && c.Uplink.Batch <= 10_000, "uplink.batch", "wants 1 to 10000")
	between(c.Uplink.Linger, 0, time.Second, "uplink.linger")
	return errs
}

// Path returns p below the data directory, or p itself if it is absolute.
func (c *Config) Path(p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(c.DataDir, p)
}

// secretFiles returns the settings that name a file which must not be everybody's to read.
func (c *Config) secretFiles() map[string]string {
	files := map[string]string{
		"tls.devices_key_file": c.TLS.DevicesKey, "tls.ops_key_file": c.TLS.OpsKey,
		"broker.password_file": c.Broker.PasswordFile, "broker.monitor_password_file": c.Broker.MonitorFile,
		"broker.admin_password_file": c.Broker.AdminFile, "pki.passphrase_file": c.PKI.PassphraseFile,
	}
	if c.TLS.BrokerAuth {
		files["tls.broker_auth_key_file"] = c.TLS.BrokerAuthKey
	}
	return files
}

// CheckSecrets returns a line for every secret that is missing, not a regular file, or readable by everybody.
func (c *Config) CheckSecrets() error {
	var errs Errors
	for key, p := range c.secretFiles() {
		path := c.Path(p)
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			errs = append(errs, fmt.Sprintf("%s: %s does not exist: run musterd init, or restore it", key, path))
		case err != nil:
			errs = append(errs, fmt.Sprintf("%s: %v", key, err))
		case !info.Mode().IsRegular():
			errs = append(errs, fmt.Sprintf("%s: %s is not a regular file", key, path))
		case info.Mode().Perm()&0o007 != 0:
			errs = append(errs, fmt.Sprintf("%s: everybody may read or write %s (%#o): chmod 600 it, and replace the secret if others had access", key, path, info.Mode().Perm()))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	slices.Sort(errs)
	return errs
}

// Secret reads a one-line secret file.
func (c *Config) Secret(p string) (string, error) {
	raw, err := os.ReadFile(c.Path(p))
	if err != nil {
		return "", err
	}
	s := strings.TrimSpace(string(raw))
	if s == "" || len(s) > 4096 || strings.ContainsAny(s, "\n\r") {
		return "", fmt.Errorf("%s does not hold one line with a secret", c.Path(p))
	}
	return s, nil
}
