package devbroker_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"muster/internal/broker/brokerconf"
	"muster/internal/devbroker"
)

func TestABrokerStartsAnswersAndLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	b := start(t, ctx, dir)
	for _, port := range []int{b.Conf.MQTTPort, b.Conf.FallbackPort, b.Conf.AMQPSPort, b.Conf.ManagementPort} {
		c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Errorf("port %d: %v", port, err)
			continue
		}
		c.Close()
	}
	out, err := b.Ctl(ctx, "list_vhosts", "--quiet")
	if err != nil || !strings.Contains(out, "devices") || !strings.Contains(out, "fallback") {
		t.Errorf("vhosts: %q, %v", out, err)
	}
	out, err = b.Ctl(ctx, "list_users", "--quiet")
	if err != nil || strings.Contains(out, "guest") || !strings.Contains(out, brokerconf.UserMuster) {
		t.Errorf("users: %q, %v", out, err)
	}
	if out, err = b.Ctl(ctx, "list_exchanges", "--vhost", "devices", "--quiet"); err != nil || !strings.Contains(out, "amq.rabbitmq.event") {
		t.Errorf("exchanges: %q, %v", out, err)
	}
	if err := b.Stop(ctx); err != nil {
		t.Error(err)
	}
	if left := traces(t, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func start(t *testing.T, ctx context.Context, dir string) *devbroker.Broker {
	t.Helper()
	tlsDir := t.TempDir()
	certificates(t, tlsDir)
	hash := brokerconf.HashPassword("secret", [4]byte{1, 2, 3, 4})
	b, err := devbroker.Start(ctx, devbroker.Options{
		Dir: dir, Bind: []string{tlsDir}, Say: func(s string) { t.Log(s) },
		Conf: brokerconf.Config{
			DeviceCA: filepath.Join(tlsDir, "ca.pem"), ServerCert: filepath.Join(tlsDir, "server.pem"), ServerKey: filepath.Join(tlsDir, "server.key"),
			AuthURL:   "http://127.0.0.1:1",
			Passwords: map[string]string{brokerconf.UserMuster: hash, brokerconf.UserMonitor: hash, brokerconf.UserAdmin: hash},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// traces returns processes and mounts of this machine that mention dir.
func traces(t *testing.T, dir string) (left []string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			left = append(left, "mount "+line)
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		env, err := os.ReadFile(p)
		if err == nil && strings.Contains(string(env), dir) && !strings.Contains(p, fmt.Sprint("/", os.Getpid(), "/")) {
			left = append(left, p)
		}
	}
	return left
}

// A power cut of the broker keeps its data; its ports stay the same.
func TestAKilledBrokerComesBackWithItsData(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	b := start(t, ctx, t.TempDir())
	defer b.Stop(ctx)
	if out, err := b.Ctl(ctx, "add_vhost", "extra"); err != nil {
		t.Fatal(out, err)
	}
	if err := b.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", b.Conf.MQTTPort), &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("a killed broker answers")
	}
	if err := b.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	if out, err := b.Ctl(ctx, "list_vhosts", "--quiet"); err != nil || !strings.Contains(out, "extra") {
		t.Errorf("after the power cut: %q, %v", out, err)
	}
}

const envVictim = "MUSTER_TEST_VICTIM_DIR"

// The victim starts a broker and waits to be killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(envVictim); dir != "" {
		t := &testing.T{}
		b := start(t, context.Background(), dir)
		fmt.Println("ready", b.Conf.MQTTPort)
		select {}
	}
	os.Exit(m.Run())
}

// Whoever started the broker may die without a word: SIGKILL, a panic, the OOM killer, Ctrl-C twice.
func TestNothingIsLeftWhenTheStarterIsKilled(t *testing.T) {
	tmp := t.TempDir()
	dir := filepath.Join(tmp, "broker")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envVictim+"="+dir, "TMPDIR="+tmp)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready") {
		t.Fatalf("%q, %v", line, err)
	}
	if len(traces(t, dir)) == 0 {
		t.Fatal("the broker cannot be seen: this test would prove nothing")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	var left []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if left = traces(t, dir); len(left) == 0 {
			return
		}
		<-time.After(20 * time.Millisecond)
	}
	t.Errorf("left behind: %q", left)
}

func TestAnOldServerIsRefused(t *testing.T) {
	dir := t.TempDir()
	for name, script := range map[string]string{"rabbitmq-server": "exit 0", "rabbitmqctl": "echo 3.10.8"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(devbroker.EnvServer, filepath.Join(dir, "rabbitmq-server"))
	_, err := devbroker.Start(t.Context(), devbroker.Options{Dir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "want a rabbitmq-server of 4.2 or newer") {
		t.Errorf("got %v", err)
	}
}
