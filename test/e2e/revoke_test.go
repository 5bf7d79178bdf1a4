package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"muster/api"
	"muster/internal/simdev"
)

func TestRevokedDeviceIsThrownOutAndRefusedAtEveryDoor(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "stolen")
	ids := s.add(2)
	s.runAll(ids, nil)
	id, neighbour := ids[0], ids[1]
	kit, sink := s.kit(id), filepath.Join(s.dir, "sink")
	password := s.file(kit, simdev.PasswordFile)
	front, side := s.w.Config.Public.HTTPS, s.w.Config.Public.RecoveryHTTPS
	asUser := []string{"--user", string(id) + ":" + password}
	if got := s.curl(sink, front, "/trust-bundle", byCertificate(kit)...); got != "200" {
		t.Fatalf("8443 before: %s", got)
	}
	if got := s.curl(sink, side, "/trust-bundle", asUser...); got != "200" {
		t.Fatalf("8444 before: %s", got)
	}
	mark := s.devs.Mark()
	begin := time.Now()
	rs := read[[]api.RevocationReport](s, "certs", "revoke", "--device", string(id), "--reason", "key-compromise")
	if len(rs) != 1 {
		t.Fatalf("%d certificates revoked", len(rs))
	}
	r := rs[0]
	if !r.Clean || r.Connections != 1 || r.Certificate.State != api.CertificateStateRevoked || r.Certificate.Reason != "key-compromise" {
		t.Errorf("report %+v", r)
	}
	for what, text := range map[string]string{"stored": r.StoredAfter, "closed": r.ClosedAfter, "verified": r.VerifiedAfter} {
		if d, err := time.ParseDuration(text); err != nil || d <= 0 || d > time.Since(begin) {
			t.Errorf("%s after %q", what, text)
		}
	}
	if r.StoredAt.Before(begin.Add(-time.Minute)) || r.ClosedAt.Before(r.StoredAt) || r.RefusedAt.Before(r.StoredAt) || r.RefusedWhy == "" {
		t.Errorf("evidence: stored %s, closed %s, refused %s because %q", r.StoredAt, r.ClosedAt, r.RefusedAt, r.RefusedWhy)
	}
	if r.EndedAt.Before(r.StoredAt.Add(-time.Second)) || r.LastLook.Sub(r.ClosedAt) != time.Minute {
		t.Errorf("evidence: the session ended %s, the last look is at %s", r.EndedAt, r.LastLook)
	}
	s.await("thrown out", func() bool { return s.did(mark, id, simdev.Disconnected) > 0 })
	s.await("refused", func() bool { return s.did(mark, id, simdev.Refused) > 0 })
	s.wantRefused(id, s.front(id, kit))
	s.wantRefused(id, s.side(id, password))
	if got := s.curl(sink, front, "/trust-bundle", byCertificate(kit)...); got != "403" && got != "401" && got != "000" {
		t.Errorf("8443 answers %s", got)
	}
	if got := s.curl(sink, side, "/trust-bundle", asUser...); got != "401" && got != "403" {
		t.Errorf("8444 answers %s", got)
	}
	if n := s.did(mark, id, simdev.Connected); n != 0 {
		t.Errorf("it was let in %d times", n)
	}
	if n := s.did(mark, neighbour, simdev.Disconnected); n != 0 || !s.device(neighbour).Status.Online {
		t.Errorf("its neighbour was disconnected %d times", n)
	}
	if d := s.device(id); d.Status.Online {
		t.Errorf("muster takes it for online: %+v", d.Status)
	}
	// The world outside can see it, too.
	lists := read[[]api.RevocationList](s, "certs", "crl")
	s.await("it is on the list", func() bool {
		l := read[api.RevocationList](s, "certs", "crl", "--issuer", lists[0].Issuer, "--out", filepath.Join(s.dir, "list.pem"))
		out, _ := s.command("openssl", "crl", "-in", filepath.Join(s.dir, "list.pem"), "-noout", "-text")
		return l.Entries > 0 && strings.Contains(strings.ToLower(out), string(r.Certificate.Serial))
	})
	chain := s.write("chain.pem", []byte(s.muster("certs", "show", "--pem", string(r.Certificate.Serial))))
	issuer := s.write("issuer.pem", []byte(secondBlock(s.file(chain))))
	if said, code := s.command("openssl", "ocsp", "-issuer", issuer, "-cert", chain, "-CAfile", s.w.CAFile, "-url", s.w.URL+"/ocsp"); code != 0 || !strings.Contains(said, "revoked") || !strings.Contains(said, "verify OK") {
		t.Errorf("OCSP: %d %s", code, said)
	}
	if got := s.curl(sink, front, "/crl/"+lists[0].Issuer+".crl", byCertificate(s.kit(neighbour))...); got != "200" {
		t.Errorf("the list on 8443: %s", got)
	} else if said, code := s.command("openssl", "crl", "-inform", "DER", "-in", sink, "-noout", "-issuer"); code != 0 || !strings.Contains(said, "devices 1") {
		t.Errorf("the list on 8443: %s", said)
	}
	again := s.muster("certs", "revoke", string(r.Certificate.Serial))
	if !strings.Contains(again, "refused after") {
		t.Errorf("revoking it again prints %q", again)
	}
}

// secondBlock returns the second PEM block of a text.
func secondBlock(text string) string {
	const end = "-----END CERTIFICATE-----\n"
	_, rest, _ := strings.Cut(text, end)
	return rest
}

func TestDisabledDeviceComesBackWhenItIsEnabled(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "switched")
	id := s.add(1)[0]
	s.run(id, func(c *simdev.Config) { c.Timing.BackoffCap = time.Second })
	s.await("hello answered", func() bool { return s.did(0, id, simdev.Answered) > 0 })
	password := s.file(s.kit(id), simdev.PasswordFile)
	mark := s.devs.Mark()
	if out := read[[]api.ShutOut](s, "device", "disable", string(id)); len(out) != 1 || !out[0].Clean || out[0].Connections != 1 || out[0].ClosedAfter == "" || out[0].EndedAt.IsZero() || out[0].RefusedWhy == "" {
		t.Errorf("evidence: %+v", out)
	}
	s.await("thrown out", func() bool { return s.did(mark, id, simdev.Disconnected) > 0 })
	s.await("refused", func() bool { return s.did(mark, id, simdev.Refused) > 0 })
	s.wantRefused(id, s.side(id, password))
	if got := s.curl(filepath.Join(s.dir, "sink"), s.w.Config.Public.HTTPS, "/trust-bundle", byCertificate(s.kit(id))...); got == "200" {
		t.Error("8443 lets it in")
	}
	if n := s.did(mark, id, simdev.Connected); n != 0 {
		t.Errorf("it was let in %d times", n)
	}
	mark = s.devs.Mark()
	s.muster("device", "enable", string(id))
	s.await("back at the front", func() bool { return s.did(mark, id, simdev.Answered) > 0 && s.inFrontBy(id, "") })
}

func TestRemovedDeviceIsGoneAndItsCertificateStaysRevoked(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "scrapped")
	ids := s.add(2)
	s.runAll(ids, nil)
	id, neighbour := ids[0], ids[1]
	serial, kit, password := s.device(id).Current, s.kit(id), s.file(s.kit(id), simdev.PasswordFile)
	mark := s.devs.Mark()
	out := read[[]api.ShutOut](s, "device", "remove", string(id), "--yes")
	if len(out) != 1 || !out[0].Clean || out[0].Connections != 1 || out[0].RefusedAt.Before(out[0].StoredAt) || out[0].RefusedWhy == "" {
		t.Errorf("evidence: %+v", out)
	}
	s.await("thrown out", func() bool { return s.did(mark, id, simdev.Disconnected) > 0 })
	s.wantRefused(id, s.front(id, kit))
	s.wantRefused(id, s.side(id, password))
	if list := s.muster("device", "list", "--product", s.product); strings.Contains(list, string(id)) || !strings.Contains(list, string(neighbour)) {
		t.Errorf("the list is %s", list)
	}
	if c := read[api.Certificate](s, "certs", "show", serial); c.State != api.CertificateStateRevoked || c.Reason != "cessation-of-operation" {
		t.Errorf("its certificate: %+v", c)
	}
	if again := s.muster("device", "remove", string(id), "--yes"); !strings.Contains(again, "removed "+string(id)) {
		t.Errorf("again: %s", again)
	}
	if n := s.did(mark, neighbour, simdev.Disconnected); n != 0 {
		t.Error("its neighbour was disconnected")
	}
}
