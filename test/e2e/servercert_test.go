package e2e

import (
	"bytes"
	"context"
	"math/big"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// servedSerial asks openssl what is served at an address.
func servedSerial(s *scene, address string) fleet.Serial {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	shake := exec.CommandContext(ctx, "openssl", "s_client", "-connect", address, "-servername", "localhost", "-CAfile", s.w.CAFile, "-verify_return_error")
	shown, err := shake.Output()
	if !bytes.Contains(shown, []byte("BEGIN CERTIFICATE")) {
		s.Fatalf("openssl s_client %s: %v\n%s", address, err, shown)
	}
	x509 := exec.CommandContext(ctx, "openssl", "x509", "-noout", "-serial")
	x509.Stdin = bytes.NewReader(shown)
	out, err := x509.Output()
	if err != nil {
		s.Fatal(err)
	}
	m := regexp.MustCompile(`serial=([0-9A-F]+)`).FindSubmatch(out)
	if m == nil {
		s.Fatalf("%s", out)
	}
	n, _ := new(big.Int).SetString(string(m[1]), 16)
	return fleet.SerialOf(n)
}

// Every server certificate is renewed under the listeners that serve it, those of the real broker included: each port serves
// the new one at once, and a device that is connected stays so.
func TestServerCertificatesAreRenewedUnderTheFleet(t *testing.T) {
	s := newScene(t, shared, "servers")
	ids := s.add(2)
	s.runAll(ids, nil)
	before := map[string]api.ServerCertificate{}
	for _, c := range read[[]api.ServerCertificate](s, "server-certs", "list") {
		before[c.Name] = c
	}
	c := s.w.Config
	doors := map[string][]string{
		"broker":  {c.Public.MQTT, c.Public.FallbackMQTT, c.Broker.AMQPS, strings.TrimPrefix(c.Broker.Management, "https://")},
		"devices": {c.Public.HTTPS, c.Public.RecoveryHTTPS},
		"ops":     {strings.TrimPrefix(s.w.URL, "https://")},
	}
	mark := s.devs.Mark()
	for range 2 { // the first makes links of plain files, the second swaps one
		for name, addresses := range doors {
			now := read[api.ServerCertificate](s, "server-certs", "renew", name)
			if now.Serial == before[name].Serial || !now.Ours || !now.NotAfter.After(time.Now().AddDate(0, 11, 0)) {
				t.Errorf("%s: %+v", name, now)
			}
			for _, d := range now.Doors {
				if !d.Proven || d.Serial != now.Serial {
					t.Errorf("%s: not proven at %s: %+v", name, d.Name, d)
				}
			}
			for _, a := range addresses {
				if got := servedSerial(s, a); got != fleet.Serial(now.Serial) {
					t.Errorf("%s: %s serves %s, renewed is %s", name, a, got, now.Serial)
				}
			}
			before[name] = now
		}
	}
	for _, id := range ids {
		if lost := s.devs.Since(mark, id, simdev.Disconnected); len(lost) != 0 {
			t.Errorf("%s lost its connection: %v", id, lost)
		}
		if !s.device(id).Status.Online {
			t.Errorf("%s is offline", id)
		}
	}
	more := s.add(1) // who comes now meets the new certificate
	s.runAll(more, nil)
	found := map[string]bool{}
	for _, e := range read[api.ExpiryList](s, "expiries").Items {
		found[e.Kind+"/"+e.Name] = true
		if e.Alarm != api.ExpiryAlarmFine {
			t.Errorf("%+v", e)
		}
	}
	for _, want := range []string{"root/root", "root/spare-root", "intermediate/device-ca", "intermediate/server-ca", "server/devices", "server/ops", "server/broker", "served/broker-mqtt", "served/broker-management"} {
		if !found[want] {
			t.Errorf("%s is not in the table: %v", want, found)
		}
	}
}
