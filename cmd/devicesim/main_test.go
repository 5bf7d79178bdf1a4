package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/simdev"
)

func TestImageCommand(t *testing.T) {
	file := filepath.Join(t.TempDir(), "app.bin")
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"image", "--version", "1.2.0", "--behaviour", "boot-loop", "--size", "5000", "-o", file}, &out, &errs); code != 0 {
		t.Fatalf("%d: %s", code, errs.String())
	}
	b, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(b, simdev.MakeImage("1.2.0", simdev.BootLoop, 5000, 1)) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if code := run(t.Context(), []string{"image", "--version", "1.2.0", "--size", "5000", "-o", "-"}, &out, &errs); code != 0 || !bytes.Equal(out.Bytes(), simdev.MakeImage("1.2.0", simdev.Good, 5000, 1)) {
		t.Fatalf("%d: %d bytes, %s", code, out.Len(), errs.String())
	}
}

func TestMistakesAreSaid(t *testing.T) {
	dir := t.TempDir()
	saveDevices(t, dir, "127.0.0.1:1", "dev-1")
	for _, c := range []struct {
		args string
		says string
	}{
		{"image --version 1 -o never.bin --behaviour explode", "behaviour is none of good"},
		{"image --version 1 -o never.bin --size -1", "--size: use 0 to"},
		{"image -o never.bin", `"version" not set`},
		{"run", `"credentials" not set`},
		{"run --credentials " + t.TempDir(), "muster device credentials"},
		{"run --credentials /does/not/exist", "no such file"},
		{"run --credentials " + dir + " --output xml", "use human or json"},
		{"run --credentials " + dir + " --fault nonsense=1", "no fault is called"},
		{"run --credentials " + dir + " --fault dev-9:silent=on", `no credentials of a device "dev-9"`},
		{"run --credentials " + dir + " --fault buffer=3", "64 or more"},
		{"run --credentials " + dir + " --firmware " + filepath.Join(dir, "dev-1", simdev.TrustFile), "the first line is not"},
		{"explode", "unknown command"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), strings.Fields(c.args), &out, &errs); code != 1 || !strings.Contains(errs.String(), c.says) || !strings.HasPrefix(errs.String(), "error: ") {
			t.Errorf("%s: %d, %s", c.args, code, errs.String())
		}
	}
}

// Two devices against a port that hangs up: they try again until the program is told to end, and it ends cleanly.
func TestRunEndsCleanly(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	dir, state := t.TempDir(), t.TempDir()
	saveDevices(t, dir, l.Addr().String(), "dev-1", "dev-2")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &watched{until: func(s string) bool { return strings.Count(s, `"unreachable"`) >= 4 }, then: cancel}
	var errs bytes.Buffer
	code := run(ctx, []string{"run", "--credentials", dir, "--state", state, "--quick", "--output", "json", "--seed", "7", "--fault", "dev-2:clock=1970", "--for", "1m"}, out, &errs)
	if code != 0 || !strings.Contains(errs.String(), "2 devices, seed 7") || !strings.Contains(errs.String(), "times unreachable") {
		t.Fatalf("%d: %s", code, errs.String())
	}
	seen := map[fleet.DeviceID]int{}
	for line := range strings.Lines(out.String()) {
		var e simdev.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		seen[e.Device]++
	}
	if len(seen) != 2 {
		t.Errorf("events of %v", seen)
	}
	if files, err := filepath.Glob(filepath.Join(state, "dev-*", "factory.0")); err != nil || len(files) != 2 {
		t.Errorf("flash of %v, %v", files, err)
	}
}

func TestHumanLinesAreAligned(t *testing.T) {
	var out bytes.Buffer
	p, err := newPrinter(options{output: "human", quiet: true}, []simdev.Credentials{{Endpoints: simdev.Endpoints{Device: "a"}}, {Endpoints: simdev.Endpoints{Device: "longer-id"}}}, &out)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 1, 12, 0, 0, 5e6, time.UTC)
	p.event(simdev.Event{At: at, Device: "a", Kind: simdev.Connected, Detail: "devices 5b"})
	p.event(simdev.Event{At: at, Device: "a", Kind: simdev.SentTelemetry, Detail: "1"})
	p.event(simdev.Event{At: at, Device: "longer-id", Kind: simdev.FallbackTaken, Detail: "x"})
	want := "12:00:00.005  a          connected       devices 5b\n12:00:00.005  longer-id  fallback-taken  x\n"
	if out.String() != want || p.failed() != nil {
		t.Errorf("%q\nwant\n%q", out.String(), want)
	}
}

// watched calls then once what was written satisfies until.
type watched struct {
	mu    sync.Mutex
	b     strings.Builder
	until func(string) bool
	then  func()
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b.Write(p)
	if w.until(w.b.String()) {
		w.then()
	}
	return len(p), nil
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

func saveDevices(t *testing.T, dir, addr string, ids ...string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		c := simdev.Credentials{
			Key: pkcs8, Chain: [][]byte{der}, Trust: [][]byte{der}, Password: "x",
			Endpoints: simdev.Endpoints{Device: fleet.DeviceID(id), MQTT: addr, FallbackMQTT: addr, HTTPS: addr, RecoveryHTTPS: addr},
		}
		if err := c.Save(filepath.Join(dir, id)); err != nil {
			t.Fatal(err)
		}
	}
}
