package httpapi_test

import (
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
)

func TestServerCertificatesAreShownAndRenewed(t *testing.T) {
	w := open(t)
	w.now = time.Now()
	var before, after api.ServerCertificateList
	w.send(access.Viewer, "GET", "/server-certificates", nil).decode(t, &before)
	if len(before.Items) != 2 || before.Items[0].Name != "ops" || !before.Items[0].Ours || before.Items[0].RenewsAt.IsZero() || len(before.Items[0].Names) != 1 {
		t.Fatalf("%+v", before)
	}
	if b := before.Items[1]; b.File != "" || len(b.Doors) != 1 || b.Doors[0].Serial == "" || b.Doors[0].Proven {
		t.Errorf("a broker elsewhere: %+v", b)
	}
	for _, c := range []struct {
		who    access.Role
		name   string
		status int
	}{{access.Operator, "ops", 403}, {access.Admin, "none", 404}, {access.Admin, "broker", 409}} {
		if r := w.send(c.who, "POST", "/server-certificates/"+c.name+"/renewal", nil); r.problem(t).Status != c.status {
			t.Errorf("%s renews %s: %d %s", c.who, c.name, r.StatusCode, r.body)
		}
	}
	var now api.ServerCertificate
	w.send(access.Admin, "POST", "/server-certificates/ops/renewal", nil).decode(t, &now)
	w.send(access.Viewer, "GET", "/server-certificates", nil).decode(t, &after)
	if now.Serial == before.Items[0].Serial || after.Items[0].Serial != now.Serial {
		t.Errorf("renewed %s, shown %s, before %s", now.Serial, after.Items[0].Serial, before.Items[0].Serial)
	}
}

func TestWhatExpiresIsListedSoonestFirst(t *testing.T) {
	w := open(t)
	w.now = time.Now()
	var l api.ExpiryList
	w.send(access.Viewer, "GET", "/expiries", nil).decode(t, &l)
	if len(l.Items) != 3 || l.Incomplete != "" {
		t.Fatalf("%+v", l)
	}
	if e := l.Items[0]; e.Kind != "token" || e.Alarm != api.ExpiryAlarmEnded || e.LeftPercent != 0 || e.Fix == "" {
		t.Errorf("%+v", e)
	}
	if e := l.Items[1]; e.Alarm != api.ExpiryAlarmFine || e.LeftPercent < 98 {
		t.Errorf("%+v", e)
	}
}
