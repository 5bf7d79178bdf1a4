package e2e

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

func TestImageIsForDevicesWithAGrant(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "fetching")
	ids := s.add(2)
	granted, other := ids[0], ids[1]
	s.release("1.1.0", simdev.Good, 300_000)
	image := s.file(s.dir, "image-1.1.0")
	rel := read[api.Release](s, "firmware", "show", s.product, "1.1.0")
	path, sink := "/fw/"+rel.SHA256[:16], filepath.Join(s.dir, "sink")
	front, side := s.w.Config.Public.HTTPS, s.w.Config.Public.RecoveryHTTPS
	if got := s.curl(sink, front, path, byCertificate(s.kit(granted))...); got != "404" {
		t.Errorf("without a grant: %s", got)
	}

	s.muster("rollout", "create", s.product+"-110", "--product", s.product, "--version", "1.1.0", "--device", string(granted), "--stage", "1", "--verify-for", "0s", "--start")
	topic := "d/" + string(granted)
	line, code := s.command("mosquitto_rr", append(s.front(granted, s.kit(granted)), "-t", topic+"/up/hello", "-e", topic+"/dn/ota", "-W", "15",
		"-m", `{"v":"1.0.0","img":"`+strings.Repeat("0a", 32)+`"}`)...)
	var offer struct {
		Path    string `json:"p"`
		Size    int    `json:"n"`
		SHA256  string `json:"sha"`
		Job     string `json:"job"`
		Version string `json:"v"`
	}
	if err := json.Unmarshal([]byte(line), &offer); err != nil || code != 0 {
		t.Fatalf("no offer came: exit code %d, %v: %s", code, err, line)
	}
	sum := sha256.Sum256([]byte(image))
	if offer.Path != path || offer.Size != len(image) || offer.SHA256 != base64.StdEncoding.EncodeToString(sum[:]) || offer.Job != s.product+"-110" {
		t.Errorf("offer %+v, want %s of %d bytes", offer, path, len(image))
	}

	mine := byCertificate(s.kit(granted))
	if got := s.curl(sink, front, path, mine...); got != "200" || s.file(sink) != image {
		t.Errorf("whole: %s, %d bytes", got, len(s.file(sink)))
	}
	if got := s.curl(sink, front, path, append(mine, "--range", "1000-1999")...); got != "206" || s.file(sink) != image[1000:2000] {
		t.Errorf("range: %s, %d bytes", got, len(s.file(sink)))
	}
	if got := s.curl(sink, front, path, append(mine, "--range", "400000-")...); got != "416" {
		t.Errorf("range beyond the end: %s", got)
	}
	half := s.write("half", []byte(image[:123_456]))
	if got := s.curl(half, front, path, append(mine, "--continue-at", "-")...); got != "206" || s.file(half) != image {
		t.Errorf("resumed: %s, %d bytes", got, len(s.file(half)))
	}
	user := func(id fleet.DeviceID, password string) []string {
		return []string{"--user", string(id) + ":" + password}
	}
	if got := s.curl(sink, side, path, user(granted, s.file(s.kit(granted), simdev.PasswordFile))...); got != "200" || s.file(sink) != image {
		t.Errorf("8444: %s", got)
	}

	refusals := []struct {
		what, addr string
		args       []string
		want       string
	}{
		{"another device's certificate", front, byCertificate(s.kit(other)), "404"},
		{"another device's password", side, user(other, s.file(s.kit(other), simdev.PasswordFile)), "404"},
		{"a wrong password", side, user(granted, "wrong"), "401"},
		{"no password", side, nil, "401"},
		{"no certificate", front, nil, "000"},
		{"the granted device's name with another's certificate", front, append(byCertificate(s.kit(other)), user(granted, "none")...), "404"},
	}
	for _, tt := range refusals {
		_ = os.Remove(sink)
		if got := s.curl(sink, tt.addr, path, tt.args...); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.what, got, tt.want)
		}
	}
	s.muster("rollout", "abort", s.product+"-110")
	if got := s.curl(sink, front, path, mine...); got != "404" {
		t.Errorf("after the rollout was aborted: %s", got)
	}
}
