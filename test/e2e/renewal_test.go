package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/internal/wire"
)

// A shorter lifetime goes out in stages, under the same gates as firmware; when all have it, it is the policy.
func TestAShorterLifetimeGoesOutInStages(t *testing.T) {
	w := theFragile(t)
	s := newScene(t, w, "lifetime")
	ids := s.add(4)
	s.runAll(ids, nil)
	old := map[fleet.DeviceID]fleet.Serial{}
	for _, id := range ids {
		old[id] = s.devs.Get(id).Snapshot().Serial
	}
	before := read[api.CertificatePolicy](s, "certs", "policy", "show").Lifetime
	t.Cleanup(func() { // the scene's own time is over then
		if out, err := w.Muster(context.Background(), "certs", "policy", "set", "--lifetime", before, "--force"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	id := s.product + "-480h"
	s.muster("rollout", "create", id, "--product", s.product, "--certificates", "--lifetime", "480h", "--stage", "1", "--stage", "100%", "--verify-for", "1s", "--start")
	r := s.awaitRollout(id, api.RolloutStateCompleted)
	if r.Counts["succeeded"] != 4 || r.Mode != "renewal" || r.Stages[0].Started != 1 {
		t.Errorf("got %v, mode %s, %d in the first stage", r.Counts, r.Mode, r.Stages[0].Started)
	}
	for _, id := range ids {
		now := s.devs.Get(id).Snapshot().Serial
		c := s.certificates(id)[now]
		if now == old[id] || c.NotAfter.Sub(c.IntendedAt) > 480*time.Hour || c.NotAfter.Sub(c.IntendedAt) < 450*time.Hour {
			t.Errorf("%s connects with %s, which holds %s", id, now, c.NotAfter.Sub(c.IntendedAt))
		}
		if was := s.certificates(id)[old[id]]; was.State != api.CertificateStateSuperseded && was.State != api.CertificateStateRevoked {
			t.Errorf("the certificate before is %s", was.State)
		}
		if n := s.did(0, id, simdev.FallbackTaken); n > 0 {
			t.Errorf("%s took the fallback", id)
		}
	}
	if p := read[api.CertificatePolicy](s, "certs", "policy", "show"); p.Lifetime != "480h0m0s" {
		t.Errorf("the policy says %s", p.Lifetime)
	}
}

// The canary connects and says hello, and never sends a request: nobody else is asked.
func TestACanaryThatDoesNotRenewHaltsTheRolloutOfCertificates(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "unwilling")
	ids := s.add(3)
	s.runAll(ids[1:], nil)
	serial := s.devs.Get(ids[1]).Snapshot().Serial
	s.greet(ids[0])
	id := s.product + "-renew"
	plan := s.write("plan.yaml", fmt.Appendf(nil, "stages: [{count: 1, where: 'id == \"%s\"'}, {percent: 100}]\naccept_timeout: 2s\nverify_for: 0s\n", ids[0]))
	s.muster("rollout", "create", id, "--product", s.product, "--certificates", "--plan", plan, "--start")
	r := s.awaitRollout(id, api.RolloutStateHalted)
	if r.Counts["timed-out"] != 1 || r.Counts["pending"] != 2 {
		t.Errorf("got %v", r.Counts)
	}
	if now := s.devs.Get(ids[1]).Snapshot().Serial; now != serial {
		t.Error("a device behind the canary has renewed")
	}
	if d := s.device(ids[0]); !d.RenewSince.IsZero() {
		t.Error("the canary is still asked to renew")
	}
}

// greet connects a device that says hello and then nothing more, until the test ends.
func (s *scene) greet(id fleet.DeviceID) {
	s.Helper()
	cert, err := tls.LoadX509KeyPair(filepath.Join(s.kit(id), simdev.CertFile), filepath.Join(s.kit(id), simdev.KeyFile))
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(s.ctx)
	conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: s.w.Trust, Certificates: []tls.Certificate{cert}}}).DialContext(ctx, "tcp", s.w.Config.Public.MQTT)
	if err != nil {
		s.Fatal(err)
	}
	var once sync.Once
	c := paho.NewClient(paho.ClientConfig{Conn: packets.NewThreadSafeConn(conn)})
	s.Cleanup(func() {
		once.Do(func() { _ = c.Disconnect(&paho.Disconnect{}) })
		cancel()
		conn.Close()
	})
	if _, err := c.Connect(ctx, &paho.Connect{ClientID: string(id), CleanStart: true, KeepAlive: 30}); err != nil {
		s.Fatal(err)
	}
	hello := wire.Encode(wire.Hello{Version: "1.0.0", Image: fleet.HashOf([32]byte{1})})
	if _, err := c.Publish(ctx, &paho.Publish{Topic: wire.UpTopic(id, wire.UpHello), QoS: 1, Payload: hello}); err != nil {
		s.Fatal(err)
	}
	s.await("the hello is stored", func() bool { return s.device(id).Status.HelloAt != (time.Time{}) })
}
