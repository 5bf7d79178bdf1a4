package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// arduino is a device that speaks no MQTT: curl plays its HTTPUpdate, with the certificate of the device.
type arduino struct {
	*scene
	id      fleet.DeviceID
	image   fleet.Hash // that runs
	version string
}

// update asks as HTTPUpdate of core 3 does (vectors 09_http), and returns the status, x-MD5 and the body.
func (a *arduino) update(free int) (status, md5 string, body []byte) {
	a.Helper()
	out := filepath.Join(a.dir, string(a.id)+".bin")
	_ = os.Remove(out)
	kit := a.kit(a.id)
	c := exec.CommandContext(a.ctx, "curl", "--silent", "--show-error", "--http1.0", "--tls-max", "1.2", "--cacert", filepath.Join(kit, simdev.TrustFile),
		"--cert", filepath.Join(kit, simdev.CertFile), "--key", filepath.Join(kit, simdev.KeyFile), "--output", out, "--write-out", "%{http_code} %header{x-md5}",
		"-A", "ESP32-http-Update", "-H", "Accept:", "-H", "Connection: close", "-H", "Cache-Control: no-cache", "-H", "x-ESP32-mode: sketch",
		"-H", "x-ESP32-STA-MAC: 24:0A:C4:00:00:01", "-H", fmt.Sprint("x-ESP32-free-space: ", free), "-H", "x-ESP32-sketch-sha256: "+strings.ToUpper(string(a.image)),
		"-H", "x-ESP32-version: "+a.version, "https://"+a.w.Config.Public.HTTPS+"/update?product=ignored")
	said, err := c.CombinedOutput()
	if err != nil {
		a.Fatalf("curl: %v: %s", err, said)
	}
	status, md5, _ = strings.Cut(string(said), " ")
	body, _ = os.ReadFile(out)
	return status, strings.TrimSpace(md5), body
}

// Devices that poll are under the same stages and gates as those that are rung: the canary first, nobody else before it has
// proven itself, and whoever runs the image is told that there is nothing to do.
func TestDevicesThatPollGoThroughTheSameGates(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "polling")
	ids := s.add(3)
	image := s.release("1.1.0", simdev.Good, 40_000)
	file, err := os.ReadFile(filepath.Join(s.dir, "image-1.1.0"))
	if err != nil {
		t.Fatal(err)
	}
	var as []*arduino
	for _, id := range ids {
		as = append(as, &arduino{scene: s, id: id, image: fleet.HashOf([32]byte{1}), version: "1.0.0"})
	}
	ask := func(a *arduino) string { st, _, _ := a.update(1 << 20); return st }
	if st := ask(as[0]); st != "304" {
		t.Fatalf("without a rollout: %s", st)
	}
	s.start(s.product+"-110", "1.1.0", map[string]any{"stages": []map[string]any{{"count": 1}, {"percent": 100}}, "verify_for": "0s", "max_failures": 1})
	var canary *arduino
	s.await("the canary is served", func() bool {
		for _, a := range as {
			st, md5, body := a.update(1 << 20)
			if st == "200" {
				if canary = a; !bytes.Equal(body, file) || len(md5) != 32 {
					t.Fatalf("%d bytes, x-MD5 %q", len(body), md5)
				}
				return true
			}
		}
		return false
	})
	for _, a := range as {
		if st := ask(a); a != canary && st != "304" {
			t.Errorf("%s is served before the canary has proven itself: %s", a.id, st)
		}
	}
	if j := s.jobs(s.product + "-110")[canary.id]; j.State != "downloaded" {
		t.Errorf("the canary is %s", j.State)
	}
	canary.image, canary.version = image, "1.1.0" // it restarted
	if st := ask(canary); st != "304" {
		t.Errorf("the canary runs it, and is served again: %s", st)
	}
	for _, a := range as {
		if a == canary {
			continue
		}
		s.await(string(a.id)+" is served", func() bool { return ask(a) == "200" })
		a.image, a.version = image, "1.1.0"
		if st := ask(a); st != "304" {
			t.Errorf("%s: %s", a.id, st)
		}
	}
	r := s.awaitRollout(s.product+"-110", api.RolloutStateCompleted)
	if r.Counts["succeeded"] != 3 {
		t.Errorf("counts %v", r.Counts)
	}
}

// An image that does not fit the device's partition is not sent, and the rollout knows why.
func TestAnImageThatDoesNotFitIsNotSent(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "tight")
	ids := s.add(1)
	s.release("1.1.0", simdev.Good, 40_000)
	s.start(s.product+"-110", "1.1.0", map[string]any{"stages": everyone(), "verify_for": "0s", "max_failures": 1})
	a := &arduino{scene: s, id: ids[0], image: fleet.HashOf([32]byte{1}), version: "1.0.0"}
	s.await("the rollout has judged it", func() bool {
		if st, _, _ := a.update(30_000); st != "304" {
			t.Fatalf("served: %s", st)
		}
		return s.jobs(s.product + "-110")[ids[0]].State == "rejected"
	})
	if why := s.muster("rollout", "devices", s.product+"-110"); !strings.Contains(why, "next OTA partition 30000") {
		t.Errorf("got %s", why)
	}
}

// esp32FOTA reads one entry of JSON, with a version of three numbers.
func TestESP32FOTAGetsOneEntry(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "fota")
	ids := s.add(1)
	image := s.release("1.1.0", simdev.Good, 4_000)
	kit := s.kit(ids[0])
	get := func(query string) (m struct{ Type, Version, URL string }) {
		out, err := exec.CommandContext(s.ctx, "curl", "--silent", "--show-error", "--cacert", filepath.Join(kit, simdev.TrustFile), "--cert", filepath.Join(kit, simdev.CertFile),
			"--key", filepath.Join(kit, simdev.KeyFile), "https://"+s.w.Config.Public.HTTPS+"/fota.json?type=thermo&"+query).Output()
		if err != nil || len(out) > 1024 {
			t.Fatalf("%d bytes, %v", len(out), err)
		}
		if err := json.Unmarshal(out, &m); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return m
	}
	old := "v=1.0.0&img=" + string(fleet.HashOf([32]byte{1}))
	if m := get(old); m.Version != "0.0.0" || m.Type != "thermo" {
		t.Errorf("nothing to do: %+v", m)
	}
	s.start(s.product+"-110", "1.1.0", map[string]any{"stages": everyone(), "verify_for": "0s"})
	var m struct{ Type, Version, URL string }
	s.await("an entry", func() bool { m = get(old); return m.Version == "1.1.0" })
	out, err := exec.CommandContext(s.ctx, "curl", "--silent", "--fail", "--cacert", filepath.Join(kit, simdev.TrustFile), "--cert", filepath.Join(kit, simdev.CertFile),
		"--key", filepath.Join(kit, simdev.KeyFile), m.URL).Output()
	if err != nil || len(out) != 4_000 {
		t.Errorf("%s: %d bytes, %v", m.URL, len(out), err)
	}
	// A sketch that checks signatures: none is there, then one is.
	kept := filepath.Join(s.dir, "image-1.1.0")
	s.muster("firmware", "sign", kept, "--esp32fota", fotaKey(t, s.dir))
	s.muster("firmware", "esp32fota", s.product, "1.1.0", "--signature", kept+".esp32fota")
	if m = get(old); !strings.Contains(m.URL, "/fota/") {
		t.Errorf("with a signature: %+v", m)
	}
	out, err = exec.CommandContext(s.ctx, "curl", "--silent", "--fail", "--cacert", filepath.Join(kit, simdev.TrustFile), "--cert", filepath.Join(kit, simdev.CertFile),
		"--key", filepath.Join(kit, simdev.KeyFile), m.URL).Output()
	raw, _ := os.ReadFile(kept)
	if err != nil || len(out) != 256+4_000 || !bytes.Equal(out[256:], raw) {
		t.Errorf("%s: %d bytes, %v", m.URL, len(out), err)
	}
	if m := get("v=1.1.0&img=" + string(image)); m.Version != "0.0.0" {
		t.Errorf("it runs it: %+v", m)
	}
	s.awaitRollout(s.product+"-110", api.RolloutStateCompleted)
}

// fotaKey makes a key that signs for esp32FOTA.
func fotaKey(t *testing.T, dir string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "fota.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
