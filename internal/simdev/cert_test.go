package simdev_test

import (
	"fmt"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/internal/wire"
)

const (
	month = 30 * 24 * time.Hour
	year  = 365 * 24 * time.Hour
)

func TestRenewal(t *testing.T) {
	for _, plain := range []bool{true, false} {
		t.Run(fmt.Sprintf("whole=%v", plain), func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.set(func() { w.pushPlain = plain })
				d, _ := w.device(nil)
				w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
				old := d.Snapshot().Serial
				w.set(func() { w.renew = true })
				w.tell(wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertRenew}))
				w.eventually(10*time.Second, "a promotion", func() bool { return w.saw(simdev.Promoted, "") == 1 })
				now := d.Snapshot()
				if now.Serial == old || !now.Connected {
					t.Fatalf("%+v, before %s", now, old)
				}
				w.set(func() {
					if n := len(w.certs); n != 2 || w.certs[0].CSR == nil || w.certs[1].Have != now.Serial {
						t.Errorf("the device said %d things about certificates: %+v", n, w.certs)
					}
				})
				if c := d.Counts(); c.Connects != 2 || c.Refusals != 0 || c.Fallbacks != 0 {
					t.Errorf("%+v", c)
				}
				if gap := time.Duration(d.Counts().LongestGapMS) * time.Millisecond; gap > 5*time.Second {
					t.Errorf("away for %s", gap)
				}
			})
		})
	}
}

// The broker does not take the new certificate: the device goes back to the old one, and does not go round for ever.
func TestNewCertificateIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.renew, w.denyNew = true, true })
		d, _ := w.device(nil)
		old := fleet.Serial("1001")
		w.eventually(30*time.Second, "back with the old certificate", func() bool {
			return w.saw(simdev.SlotSwitched, "") > 0 && d.Snapshot().Connected && d.Snapshot().Serial == old
		})
		time.Sleep(20 * time.Second)
		if n := w.saw(simdev.Refused, ""); n > 3 {
			t.Errorf("tried the new one %d times", n)
		}
		if w.saw(simdev.FallbackTaken, "") > 0 || !d.Snapshot().Connected {
			t.Errorf("%+v", d.Snapshot())
		}
		w.set(func() { w.denyNew = false })
		w.eventually(time.Minute, "the new one after all, though nobody pushed it again", func() bool { return d.Snapshot().Connected && d.Snapshot().Serial != old })
	})
}

func TestCertificatesThatADeviceDoesNotStore(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d, _ := w.device(nil)
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		key := newKey(t)
		stranger := newCA(t)
		other := w.ca.device(t, "dev-2", &key.PublicKey, month)
		foreignKey := w.ca.device(t, deviceID, &key.PublicKey, month)
		for _, o := range []wire.CertOrder{other, foreignKey, {Op: wire.CertPush, Serial: "77", Chain: [][]byte{{1, 2, 3}}}} {
			w.tell(wire.DownCert, wire.Encode(o))
		}
		w.eventually(5*time.Second, "three refusals", func() bool { return w.saw(simdev.CertRejected, "") == 3 })
		// For a key of its own, but not from whom it trusts, or made out to somebody else, or with another serial.
		w.set(func() { w.silent = true })
		own := publicKeyOf(t, w)
		forged := stranger.device(t, deviceID, own, month)
		forged.Chain[1] = w.ca.root.Raw
		wrongName := w.ca.device(t, "dev-2", own, month)
		wrongSerial := w.ca.device(t, deviceID, own, month)
		wrongSerial.Serial = "abc"
		for _, o := range []wire.CertOrder{forged, wrongName, wrongSerial} {
			w.tell(wire.DownCert, wire.Encode(o))
		}
		w.eventually(5*time.Second, "six refusals", func() bool { return w.saw(simdev.CertRejected, "") == 6 })
		if c := d.Counts(); c.CertsStored != 0 || c.Connects != 1 {
			t.Errorf("%+v", c)
		}
		w.set(func() {
			for _, r := range w.certs {
				if r.Error == "" {
					t.Errorf("the device said %+v", r)
				}
			}
		})
	})
}

// expire lets the device's certificate run out and throws it out.
func (w *world) expire() {
	time.Sleep(w.life + time.Minute)
	w.kick()
}

func TestExpiredDeviceComesBackThroughTheFallback(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.life = 10 * time.Minute; w.wait = 2 })
		d, _ := w.device(nil)
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		for round := 1; round <= 3; round++ {
			w.expire()
			w.eventually(2*time.Minute, fmt.Sprintf("back, round %d", round), func() bool {
				return w.saw(simdev.FallbackLeft, "") == round && d.Snapshot().Connected && d.Snapshot().Door == wire.VhostDevices
			})
			if got := get(w, func() []string { return w.password }); len(got) != 1 || got[0] == "first-password" {
				t.Fatalf("round %d: passwords that work: %q", round, got)
			}
		}
		if n := w.saw(simdev.Requested, "for a known key"); n != 3+2 {
			t.Errorf("%d requests for a known key", n)
		}
		if w.saw(simdev.Requested, "for a new key") != 0 || w.saw(simdev.Waiting, "wait") != 2 {
			t.Error("asked for a new key, or did not wait")
		}
		for _, e := range w.seen() {
			if e.Kind == simdev.FallbackTaken && e.Detail != "no certificate is accepted" {
				t.Errorf("fallback because: %s", e.Detail)
			}
		}
	})
}

func TestLostKeysNeedANewOne(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d, _ := w.device(func(c *simdev.Config) { c.Faults.LoseKeys = true })
		w.eventually(time.Minute, "back", func() bool { return d.Snapshot().Connected && d.Snapshot().Door == wire.VhostDevices })
		if w.saw(simdev.Requested, "for a new key") != 1 {
			t.Error("no request for a new key")
		}
		d.Reboot()
		w.eventually(time.Minute, "up again with the new key", func() bool {
			return w.saw(simdev.Booted, "button") == 1 && d.Snapshot().Connected && d.Snapshot().Door == wire.VhostDevices
		})
		if n := w.saw(simdev.Requested, ""); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

// An outage of muster looks like "bad user name or password" to the whole fleet.
func TestOutageDoesNotSendTheFleetToTheFallback(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d, _ := w.device(func(c *simdev.Config) {
			c.Timing.BackoffCap = time.Minute
			c.Timing.Fallback = simdev.Policy{Refusals: 5, After: time.Hour}
		})
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		w.set(func() { w.deny = true })
		w.kick()
		time.Sleep(55 * time.Minute)
		if n := w.saw(simdev.Refused, "0x86"); n < 20 || get(w, func() int { return w.dials[ends.FallbackMQTT] }) != 0 {
			t.Errorf("%d refusals, %d visits to the fallback", n, w.dials[ends.FallbackMQTT])
		}
		w.set(func() { w.deny = false })
		w.eventually(2*time.Minute, "back", func() bool { return d.Snapshot().Connected })
		w.set(func() { w.deny = true })
		w.kick()
		time.Sleep(70 * time.Minute)
		if get(w, func() int { return w.dials[ends.FallbackMQTT] }) == 0 {
			t.Error("never asked at the fallback")
		}
	})
}

// Nobody listens, and later nobody answers: full jitter, a cap, and it never gives up.
func TestBackoff(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.down[ends.MQTT] = true })
		d, _ := w.device(func(c *simdev.Config) { c.Timing.BackoffBase, c.Timing.BackoffCap = time.Second, 5*time.Minute })
		time.Sleep(6 * time.Hour)
		dials := get(w, func() int { return w.dials[ends.MQTT] })
		if dials < 100 || dials > 250 { // on average one in 2.5 minutes: 144
			t.Errorf("%d dials in 6 hours", dials)
		}
		if get(w, func() int { return w.dials[ends.FallbackMQTT] }) != 0 {
			t.Error("a dead broker is no reason for the fallback")
		}
		w.set(func() { w.down[ends.MQTT] = false })
		w.eventually(5*time.Minute+time.Second, "back", func() bool { return d.Snapshot().Connected })
	})
}

func TestRevokedIsRefusedAtEveryDoorAndKeepsAsking(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d, _ := w.device(nil)
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		serial := d.Snapshot().Serial
		w.set(func() { w.revoked[serial] = true; w.password = nil })
		w.kick()
		time.Sleep(5 * time.Minute)
		front, back := w.saw(simdev.Refused, "devices with"), w.saw(simdev.Refused, "fallback")
		if front < 10 || back < 10 || front+back > 400 || d.Snapshot().Connected {
			t.Errorf("%d refusals at the front, %d at the fallback", front, back)
		}
		w.set(func() { w.revoked[serial] = false })
		w.eventually(30*time.Second, "back by certificate once it is accepted", func() bool { return d.Snapshot().Connected && d.Snapshot().Door == wire.VhostDevices })
	})
}

func TestDeviceWithoutAClock(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.life = 10 * time.Minute })
		d, _ := w.device(func(c *simdev.Config) { c.Faults.Clock1970 = true })
		w.eventually(5*time.Second, "an answered hello in 1970", func() bool { return w.saw(simdev.Answered, "") == 1 })
		d.Reboot()
		w.eventually(5*time.Second, "and after a reboot", func() bool { return w.saw(simdev.Answered, "") == 2 })
		w.expire()
		w.eventually(time.Minute, "back through the fallback", func() bool { return w.saw(simdev.FallbackLeft, "") == 1 })
	})
}

// A device without a clock that was told the time knows, until it restarts, that a server certificate has run out. After
// the restart it knows only how late it was when it was told, and must let the server in.
func TestToldTimeCounts(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.srv = w.ca.server(t, 10*time.Minute, "broker.test") })
		d, _ := w.device(func(c *simdev.Config) { c.Faults.Clock1970 = true })
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		time.Sleep(20 * time.Minute)
		w.kick()
		time.Sleep(time.Minute)
		if n := w.saw(simdev.Unreachable, "expired"); n < 5 || d.Snapshot().Connected {
			t.Errorf("the expired server was refused %d times: %+v", n, d.Snapshot())
		}
		d.Reboot()
		w.eventually(time.Minute, "connected after the restart", func() bool { return d.Snapshot().Connected })

		time.Sleep(3 * time.Hour)
		w.tell(wire.DownCmd, wire.HelloAnswer(time.Now()))
		time.Sleep(time.Second)
		w.set(func() { w.srv = w.ca.server(t, -time.Minute, "broker.test") })
		before := w.saw(simdev.Unreachable, "expired")
		d.Reboot()
		time.Sleep(time.Minute)
		if n := w.saw(simdev.Unreachable, "expired") - before; n < 5 || d.Snapshot().Connected {
			t.Errorf("a server that had expired before the time last heard was refused %d times: %+v", n, d.Snapshot())
		}
	})
}

// A server certificate that has run out is no reason to send credentials to it at the front.
func TestExpiredServerIsNotBelieved(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d, _ := w.device(nil)
		w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") == 1 })
		w.set(func() { w.srv = newCA(t).server(t, 10*year, "broker.test") })
		w.kick()
		time.Sleep(time.Minute)
		w.set(func() { w.srv = w.ca.server(t, 10*year, "other.test") })
		time.Sleep(time.Minute)
		if n := w.saw(simdev.Unreachable, "certificate"); n < 10 || w.saw(simdev.FallbackTaken, "") != 0 || w.saw(simdev.Connected, "") != 1 {
			t.Errorf("%d times not believed, connected %d times", n, w.saw(simdev.Connected, ""))
		}
		w.set(func() { w.srv = w.ca.server(t, 10*year, "broker.test", "ota.test") })
		w.eventually(time.Minute, "back", func() bool { return d.Snapshot().Connected })
	})
}

// The power goes at every write of a renewal, before, in the middle of and after it: the device always comes back, with
// the new certificate in the end, and without the fallback.
func TestPowerCutInEveryWriteOfARenewal(t *testing.T) {
	atEveryWrite(t, func(t *testing.T, w *world, cut simdev.Cut) bool {
		d, _ := w.device(func(c *simdev.Config) { c.Faults.PowerCut = cut })
		w.eventually(time.Minute, "an answered hello", func() bool { return w.saw(simdev.Answered, "") >= 1 })
		w.set(func() { w.renew = true })
		w.tell(wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertRenew}))
		w.eventually(3*time.Minute, "connected with the new certificate", func() bool {
			s := d.Snapshot()
			return s.Connected && s.Serial != "1001" && w.saw(simdev.Answered, "") >= 2
		})
		time.Sleep(time.Minute)
		if w.saw(simdev.FallbackTaken, "") != 0 || !d.Snapshot().Connected {
			t.Errorf("went to the fallback, or away: %+v", d.Snapshot())
		}
		if d.Counts().PowerCuts == 0 {
			return false
		}
		second := d.Snapshot().Serial
		w.tell(wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertRenew}))
		w.eventually(time.Minute, "a further renewal, with a key of its own", func() bool { s := d.Snapshot(); return s.Connected && s.Serial != second })
		return true
	})
}

// The same for a recovery: it always comes back, and is able to come back a second time with the password that it then
// holds.
func TestPowerCutInEveryWriteOfARecovery(t *testing.T) {
	atEveryWrite(t, func(t *testing.T, w *world, cut simdev.Cut) bool {
		w.set(func() { w.life = 3 * time.Minute })
		d, _ := w.device(func(c *simdev.Config) { c.Faults.PowerCut = cut })
		back := func() bool {
			s := d.Snapshot()
			return s.Connected && s.Door == wire.VhostDevices
		}
		w.eventually(time.Minute, "an answered hello", func() bool { return w.saw(simdev.Answered, "") >= 1 && back() })
		for round := range 2 {
			w.expire()
			before := w.saw(simdev.FallbackTaken, "")
			w.eventually(3*time.Minute, fmt.Sprintf("gone to the fallback and back, round %d", round), func() bool {
				return (before > round || w.saw(simdev.FallbackTaken, "") > before) && back()
			})
			if s := d.Snapshot(); s.Serial == "1001" {
				t.Errorf("round %d: %+v", round, s)
			}
		}
		return d.Counts().PowerCuts == 1
	})
}

// atEveryWrite runs a scenario with a power cut at write 1, 2, 3… and at each point of it, until there is no such write.
func atEveryWrite(t *testing.T, scenario func(*testing.T, *world, simdev.Cut) bool) {
	t.Helper()
	for _, point := range []simdev.CutPoint{simdev.CutBefore, simdev.CutMiddle, simdev.CutAfter} {
		cuts := 0
		for n := uint64(1); ; n++ {
			happened := false
			t.Run(fmt.Sprintf("%s write %d", point, n), func(t *testing.T) {
				bubble(t, func(t *testing.T, w *world) { happened = scenario(t, w, simdev.Cut{Write: n, Point: point}) })
			})
			if !happened || t.Failed() {
				break
			}
			cuts++
		}
		if cuts < 9 {
			t.Errorf("only %d writes were cut", cuts)
		}
	}
}
