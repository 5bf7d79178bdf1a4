package e2e

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// Whoever knocks as a device that is barred, or that there is not, is on record by door and reason: once, however often.
func TestRefusedAttemptsAreOnRecord(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "knocking")
	ids := s.add(2)
	disabled, revoked := ids[0], ids[1]
	stranger := fleet.DeviceID(s.product + "-nobody")
	s.muster("device", "disable", string(disabled))
	s.wantAdmitted(revoked, s.front(revoked, s.kit(revoked)))
	s.muster("certs", "revoke", "--device", string(revoked), "--reason", "key-compromise")
	for _, id := range []fleet.DeviceID{disabled, revoked} {
		s.wantRefused(id, s.front(id, s.kit(id)))
		for range 2 {
			s.wantRefused(id, s.side(id, strings.TrimSpace(s.file(s.kit(id), simdev.PasswordFile))))
		}
	}
	s.wantRefused(stranger, s.side(stranger, "whatever"))
	for range 5 {
		s.curl(filepath.Join(s.dir, "sink"), s.w.Config.Public.RecoveryHTTPS, "/trust-bundle", "--user", string(disabled)+":guess")
	}
	for _, want := range []struct {
		id        fleet.DeviceID
		why, door string
	}{
		{disabled, "disabled", "vhost devices"}, {disabled, "disabled", "vhost fallback"}, {disabled, "disabled", "the device API"},
		{revoked, "certificate-unknown", "vhost devices"}, {revoked, "recovery-off", "vhost fallback"}, {stranger, "unknown-device", "vhost fallback"},
	} {
		found := func() (n int) {
			for _, e := range read[[]api.AuditEntry](s, "audit", "--limit", "0") {
				if e.What == "door.refused" && e.On == string(want.id) && strings.HasPrefix(e.Details, want.why+" at ") && strings.Contains(e.Details, want.door) {
					n++
				}
			}
			return n
		}
		s.await(string(want.id)+" "+want.why+" on record", func() bool { return found() > 0 })
		if n := found(); n != 1 {
			t.Errorf("%s %s at %s: %d lines", want.id, want.why, want.door, n)
		}
	}
	if i := slices.IndexFunc(read[[]api.AuditEntry](s, "audit", "--limit", "0"), func(e api.AuditEntry) bool { return strings.Contains(e.Details, "guess") }); i >= 0 {
		t.Error("a password is on record")
	}
}
