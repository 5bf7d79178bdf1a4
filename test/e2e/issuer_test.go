package e2e

import (
	"strings"
	"testing"

	"muster/api"
	"muster/internal/simdev"
)

// The whole fleet of this world is revoked, so it is the one that may be broken; later scenarios bring devices of their own.
func TestEveryDeviceOfAnIssuerIsOutWithinAMeasuredTime(t *testing.T) {
	t.Parallel()
	w := theFragile(t)
	s := newScene(t, w, "distrusted")
	ids := s.add(6)
	s.runAll(ids, nil)
	issuer := read[[]api.RevocationList](s, "certs", "crl")[0].Issuer
	drill := read[api.MassRevocation](s, "certs", "revoke", "--issuer", issuer, "--drill")
	if drill.State != "drill" || drill.Total < len(ids) || drill.Connections < len(ids) || drill.Estimate == "" {
		t.Errorf("%+v", drill)
	}
	for _, id := range ids {
		if d := s.device(id); d.Current == "" || !d.Status.Online {
			t.Errorf("after the drill: %+v", d)
		}
	}
	mark := s.devs.Mark()
	done := read[api.MassRevocation](s, "certs", "revoke", "--issuer", issuer, "--yes", "--reason", "key-compromise")
	if done.State != "done" || done.Revoked < drill.Total || done.Connections < len(ids) || done.Took == "" || done.DoneAt.IsZero() {
		t.Errorf("%+v", done)
	}
	for _, id := range ids {
		s.await("thrown out and refused", func() bool { return s.did(mark, id, simdev.Disconnected) > 0 && s.did(mark, id, simdev.Refused) > 0 })
		if n := s.did(mark, id, simdev.Connected); n != 0 {
			t.Errorf("%s was let in %d times", id, n)
		}
	}
	s.await("they are on the list", func() bool {
		return read[api.RevocationList](s, "certs", "crl", "--issuer", issuer).Entries >= len(ids)
	})
	if audit := s.muster("audit", "--limit", "0"); !strings.Contains(audit, "issuer.revoked") || !strings.Contains(audit, "issuer.drill") {
		t.Errorf("the trail is %s", audit)
	}
}
