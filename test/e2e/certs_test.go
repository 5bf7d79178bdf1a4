package e2e

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// TestWholeFleetRenews is not parallel: it renews every device that there is.
func TestWholeFleetRenews(t *testing.T) {
	s := newScene(t, shared, "renewing")
	ids := s.add(6)
	s.runAll(ids, nil)
	old := map[fleet.DeviceID]fleet.Serial{}
	for _, id := range ids {
		old[id] = s.devs.Get(id).Snapshot().Serial
	}
	mark := s.devs.Mark()
	if r := read[api.RenewalReport](s, "certs", "renew", "--all"); len(r.Asked)-r.Offline != len(ids) || s.among(ids, r.Asked) != len(ids) || r.More {
		t.Errorf("asked %d, %d of them offline: %+v", len(r.Asked), r.Offline, r)
	}
	s.awaitAll("connects with a new certificate", ids, func(id fleet.DeviceID) bool { return s.inFrontBy(id, old[id]) })
	for _, id := range ids {
		now := s.devs.Get(id).Snapshot().Serial
		s.await(string(id)+": the old certificate is superseded", func() bool {
			cs := s.certificates(id)
			return cs[old[id]].State == api.CertificateStateSuperseded && cs[now].State == api.CertificateStateActive
		})
		s.oneReconnect(mark, id)
		if d := s.device(id); fleet.Serial(d.Current) != now || d.Next != "" || !d.RenewSince.IsZero() {
			t.Errorf("%s: current %s, next %q, asked since %v; it uses %s", id, d.Current, d.Next, d.RenewSince, now)
		}
	}
	sink := filepath.Join(s.dir, "sink")
	var refusals sync.WaitGroup // the broker takes three seconds for a refusal
	for _, id := range ids {
		refusals.Go(func() { s.wantRefused(id, s.front(id, s.kit(id))) })
		if got := s.curl(sink, s.w.Config.Public.HTTPS, "/trust-bundle", byCertificate(s.kit(id))...); got == "200" {
			t.Errorf("%s: 8443 lets the old certificate in", id)
		}
	}
	refusals.Wait()
	if r := read[api.RenewalReport](s, "certs", "renew"); s.among(ids, r.Asked) != 0 {
		t.Errorf("a pass after that asks %v", r.Asked)
	}
}

// among counts those of ids that are among names.
func (s *scene) among(ids []fleet.DeviceID, names []string) (n int) {
	for _, id := range ids {
		if slices.Contains(names, string(id)) {
			n++
		}
	}
	return n
}

// oneReconnect demands that a device has left once and was let in at once since mark.
func (s *scene) oneReconnect(mark int, id fleet.DeviceID) {
	s.Helper()
	if n := s.did(mark, id, simdev.Refused) + s.did(mark, id, simdev.Unreachable) + s.did(mark, id, simdev.FallbackTaken); n > 0 {
		s.Errorf("%s failed to connect %d times", id, n)
	}
	left, came := s.devs.Since(mark, id, simdev.Disconnected), s.devs.Since(mark, id, simdev.Connected)
	if len(left) != 1 || len(came) != 1 {
		s.Errorf("%s left %d times and came %d times", id, len(left), len(came))
	} else if gap := came[0].At.Sub(left[0].At); gap > 5*time.Second {
		s.Errorf("%s was away for %s", id, gap)
	}
}

// TestBothCertificatesRuleUntilTheNewOneIsUsed renews with openssl and mosquitto alone.
func TestBothCertificatesRuleUntilTheNewOneIsUsed(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "slots")
	id := s.add(1)[0]
	s.wantAdmitted(id, s.front(id, s.kit(id)))
	s.await("the first certificate in use", func() bool { return s.device(id).Current != "" })
	first := s.device(id).Current

	next := t.TempDir()
	der, cert := filepath.Join(next, "request.der"), filepath.Join(next, simdev.CertFile)
	if out, code := s.command("openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN="+string(id),
		"-keyout", filepath.Join(next, simdev.KeyFile), "-outform", "DER", "-out", der); code != 0 {
		t.Fatal(out)
	}
	s.muster("certs", "renew", "--device", string(id))
	csr := `{"csr":"` + base64.StdEncoding.EncodeToString([]byte(s.file(der))) + `"}`
	out, code := s.command("mosquitto_rr", append(s.front(id, s.kit(id)), "-t", "d/"+string(id)+"/up/cert", "-e", "d/"+string(id)+"/dn/cert", "-m", csr, "-W", "15")...)
	if code != 0 {
		t.Fatalf("no answer to a request: exit code %d, %s", code, out)
	}
	s.await("the next certificate", func() bool { return s.device(id).Next != "" })
	serial := s.device(id).Next
	pem := s.muster("certs", "show", serial, "--pem")
	if err := os.WriteFile(cert, []byte(pem), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(next, simdev.TrustFile), []byte(s.file(s.w.CAFile)), 0o600); err != nil {
		t.Fatal(err)
	}
	s.wantAdmitted(id, s.front(id, s.kit(id))) // the new one is there, but unused
	if d := s.device(id); d.Current != first || d.Next != serial {
		t.Errorf("current %s, next %s before the new one was used", d.Current, d.Next)
	}
	s.wantAdmitted(id, s.front(id, next))
	s.await("promotion", func() bool { d := s.device(id); return d.Current == serial && d.Next == "" })
	// The broker's index follows the commit, which REST may have shown a moment before.
	s.await("the old one is refused", func() bool { ok, _ := s.admitted(id, s.front(id, s.kit(id))); return !ok })
	s.wantRefused(id, s.front(id, s.kit(id)))
	s.wantAdmitted(id, s.front(id, next))
}

func TestExpiredDeviceComesBackThroughTheFallback(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "expiring")
	id := s.add(1, "--lifetime", "10s")[0]
	oldPassword := s.file(s.kit(id), simdev.PasswordFile)
	flash := &simdev.MemFlash{}
	s.run(id, func(c *simdev.Config) { c.Flash = flash })
	s.await("hello answered", func() bool { return s.did(0, id, simdev.Answered) > 0 })
	old := s.devs.Get(id).Snapshot().Serial
	key := s.certificates(id)[old].KeySHA256
	end := s.certificates(id)[old].NotAfter

	s.await("thrown out", func() bool { return s.did(0, id, simdev.Disconnected) > 0 })
	if out := s.devs.Since(0, id, simdev.Disconnected)[0]; out.At.Before(end) || out.At.Sub(end) > 10*time.Second {
		t.Errorf("thrown out at %v, the certificate ended at %v", out.At, end)
	}
	s.await("the fallback", func() bool { return s.did(0, id, simdev.FallbackTaken) > 0 })
	s.await("back at the front", func() bool { return s.inFrontBy(id, old) })
	now := s.devs.Get(id).Snapshot().Serial
	s.await("certificate "+string(now)+" in use", func() bool { return s.device(id).Current == string(now) })
	if c := s.certificates(id)[now]; c.KeySHA256 != key || c.Via != "recovery" {
		t.Errorf("the new certificate is for another key, or came another way: %+v", c)
	}
	if n := s.did(0, id, simdev.Waiting); n != 0 {
		t.Errorf("a known key waited %d times", n)
	}
	newPassword := passwordOtherThan(t, flash, oldPassword)
	// The answer to the hello over the new certificate closed the old password: it proved the new certificate.
	s.await("the old password is closed", func() bool { return s.device(id).FallbackPasswords == 1 })
	s.wantRefused(id, s.side(id, oldPassword))
	s.wantAdmitted(id, s.side(id, newPassword))
}

// passwordOtherThan finds a device's newer password where the device keeps it.
func passwordOtherThan(t *testing.T, flash simdev.Flash, old string) string {
	t.Helper()
	for _, name := range []string{"password.a", "password.b"} {
		b, err := flash.Read(name)
		if err != nil {
			continue
		}
		if m := regexp.MustCompile(`"password":"([^"]+)"`).FindSubmatch(b); m != nil && string(m[1]) != strings.TrimSpace(old) {
			return string(m[1])
		}
	}
	t.Fatal("the device holds no new password")
	return ""
}

func TestLostKeysWaitForAnOperator(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "amnesic")
	ids := s.add(2)
	for _, id := range ids {
		s.run(id, func(c *simdev.Config) { c.Faults.LoseKeys = true })
	}
	good, bad := ids[0], ids[1]
	lost := s.device(bad).Next // its certificate from the factory, whose key is gone
	s.awaitAll("told to wait", ids, func(id fleet.DeviceID) bool { return s.did(0, id, simdev.Waiting) > 0 })
	for _, id := range ids {
		if s.did(0, id, simdev.CertStored) > 0 {
			t.Errorf("%s has a certificate that nobody approved", id)
		}
	}
	request := s.request(good, api.RecoveryStateWaiting)
	s.muster("recovery", "approve", request.ID)
	s.muster("recovery", "deny", s.request(bad, api.RecoveryStateWaiting).ID)
	s.await("back at the front", func() bool { return s.inFrontBy(good, "") })
	if c := s.certificates(good)[s.devs.Get(good).Snapshot().Serial]; c.KeySHA256 != request.KeySHA256 {
		t.Errorf("the certificate is for key %s, approved was %s", c.KeySHA256, request.KeySHA256)
	}
	if q := s.request(good, api.RecoveryStateApproved); q.By == "" || q.DecidedAt.IsZero() {
		t.Errorf("nobody approved it: %+v", q)
	}
	s.await("told no", func() bool {
		said := s.devs.Since(0, bad, simdev.Waiting)
		return strings.HasPrefix(said[len(said)-1].Detail, "denied")
	})
	s.request(bad, api.RecoveryStateDenied)
	if s.did(0, bad, simdev.CertStored) > 0 || s.device(bad).Next != lost || len(s.certificates(bad)) != 1 {
		t.Error("a denied key has a certificate")
	}
}

// request returns the recovery request of a device, which must be in a state.
func (s *scene) request(id fleet.DeviceID, state api.RecoveryState) api.RecoveryRequest {
	s.Helper()
	args := []string{"recovery", "list"}
	if state != api.RecoveryStateWaiting {
		args = append(args, "--all")
	}
	for _, q := range read[[]api.RecoveryRequest](s, args...) {
		if q.Device == string(id) && q.State == state {
			return q
		}
	}
	s.Fatalf("no request of %s is %s", id, state)
	return api.RecoveryRequest{}
}
