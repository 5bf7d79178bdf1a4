package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"muster/internal/config"
)

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "musterd.yaml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLaterSourcesWin(t *testing.T) {
	file := write(t, "listen:\n  ops: 127.0.0.1:1\n  devices: 127.0.0.1:2\nlog:\n  level: warn\nuplink:\n  linger: 7ms\n")
	c, err := config.Load(file, []string{"MUSTERD_LISTEN__OPS=127.0.0.1:3", "MUSTERD_BROKER__FLEET_SIZE=77", "HOME=/root", "MUSTER_URL=x"}, []string{"listen.ops=127.0.0.1:4", "broker.probe=false"})
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen.Ops != "127.0.0.1:4" || c.Listen.Devices != "127.0.0.1:2" || c.Log.Level != "warn" || c.Uplink.Linger != 7*time.Millisecond ||
		c.Broker.FleetSize != 77 || c.Broker.Probe || c.Log.Format != "text" {
		t.Errorf("%+v", c)
	}
}

// Everything that is wrong is said at once, a line each, with where it was set and what is wanted.
func TestEveryMistakeGetsALine(t *testing.T) {
	file := write(t, `
listen: {opps: 127.0.0.1:1}
log: {level: 3}
certificates: {lifetime: 90}
broker: {fleet_size: many}
ops: x
`)
	_, err := config.Load(file, []string{"MUSTERD_BROKER__PROBE=maybe", "MUSTERD_TYPO=1"}, []string{"nonsense", "uplink.batch=1.5"})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		"unknown key listen.opps", "unknown key ops (is listen.ops meant?)", "log.level: wants a text", "certificates.lifetime: wants a duration",
		"broker.fleet_size: wants a whole number", "MUSTERD_BROKER__PROBE: broker.probe: wants true or false", "MUSTERD_TYPO: unknown key typo",
		"--set nonsense: use key=value", "--set: uplink.batch: wants a whole number",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in:\n%v", want, err)
		}
	}
	if n := len(err.(config.Errors)); n != 9 {
		t.Errorf("%d lines:\n%v", n, err)
	}
}

func TestValuesOutOfRangeAreRefused(t *testing.T) {
	for _, set := range []string{
		"data_dir=", "log.level=loud", "log.format=xml", "listen.ops=9443", "listen.ops=:9443", "public.mqtt=host:70000",
		"listen.broker_auth=0.0.0.0:9080", "broker.management=ftp://x", "broker.management=https://u:p@x", "broker.mqtt_port=0", "broker.mqtt_port=8884",
		"broker.fleet_size=0", "certificates.lifetime=1s", "certificates.lifetime=999999h", "certificates.sweep=0s", "certificates.renew_schedule=often",
		"certificates.renew_schedule=* * * * * *", "recovery.new_keys=maybe", "recovery.per_second=0", "recovery.per_second=-1", "firmware.max_image=1",
		"uplink.batch=0", "uplink.linger=-1s", "certificates.grace=-1h", "certificates.renew_limit=0", "tls.broker_auth=true",
		"rollouts.penalty_failures=-1", "rollouts.penalty_failures=101", "rollouts.penalty_within=0s", "rollouts.penalty_for=9999h", "rollouts.approval=maybe",
	} {
		if _, err := config.Load("", nil, []string{set}); err == nil {
			t.Errorf("%s was accepted", set)
		}
	}
	if _, err := config.Load("", nil, nil); err != nil {
		t.Errorf("the defaults: %v", err)
	}
}

func TestAnUnreadableFileIsExplained(t *testing.T) {
	for text, want := range map[string]string{"a: [": "not YAML", "- a": "not YAML", strings.Repeat("#", config.MaxFile+1): "no settings file"} {
		if _, err := config.Load(write(t, text), nil, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	if _, err := config.Load("/nonexistent/musterd.yaml", nil, nil); err == nil || !strings.Contains(err.Error(), "musterd init") {
		t.Errorf("a missing file: %v", err)
	}
}

// What config check prints is a settings file with the same meaning.
func TestShowIsReadBack(t *testing.T) {
	c, err := config.Load("", nil, []string{"listen.ops=127.0.0.1:7", "certificates.lifetime=100h", "broker.disk_free_limit=50MB", "recovery.per_second=2.5"})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	c.Show(&b)
	again, err := config.Load(write(t, b.String()), nil, nil)
	if err != nil || again != c {
		t.Errorf("%v\n%s", err, b.String())
	}
	if !strings.Contains(b.String(), `passphrase_file: "secrets/ca-passphrase"  # a secret: not shown`) {
		t.Errorf("got\n%s", b.String())
	}
}

func TestSecretsThatEverybodyCanReadAreRefused(t *testing.T) {
	dir := t.TempDir()
	c, err := config.Load("", nil, []string{"data_dir=" + dir})
	if err != nil {
		t.Fatal(err)
	}
	err = c.CheckSecrets()
	if err == nil || len(err.(config.Errors)) != 6 {
		t.Fatalf("missing secrets: %v", err)
	}
	for _, p := range []string{c.TLS.DevicesKey, c.TLS.OpsKey, c.Broker.PasswordFile, c.Broker.MonitorFile, c.Broker.AdminFile, c.PKI.PassphraseFile} {
		if err := os.MkdirAll(filepath.Dir(c.Path(p)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.Path(p), []byte("s3cret\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.CheckSecrets(); err != nil {
		t.Fatal(err)
	}
	if s, err := c.Secret(c.PKI.PassphraseFile); s != "s3cret" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	if err := os.Chmod(c.Path(c.PKI.PassphraseFile), 0o644); err != nil {
		t.Fatal(err)
	}
	err = c.CheckSecrets()
	if err == nil || !strings.Contains(err.Error(), "pki.passphrase_file: everybody may read") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("got %v", err)
	}
}
