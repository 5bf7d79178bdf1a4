package app

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"muster/internal/access"
	"muster/internal/ca"
	"muster/internal/expiry"
	"muster/internal/obs"
)

// A root of 25 years is not worth a 503 before it has ended; an alarm comes at each level, in the log and as a metric.
func TestTheAlarmTable(t *testing.T) {
	start := time.Now()
	h, err := ca.Create(ca.CreateOptions{At: start})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	metrics, health := obs.NewMetrics(), obs.NewHealth()
	e := &expiries{log: slog.New(slog.NewTextHandler(&log, nil)), health: health}
	metrics.Registry().MustRegister(e)
	e.add("CAs", func(context.Context, time.Time) ([]expiry.Item, error) { return plainItems(expiringCAs(h)), nil })
	e.add("tokens", expiringTokens(func(context.Context) ([]access.Token, error) {
		return []access.Token{{Name: "for ever", CreatedAt: start}, {Name: "cron", CreatedAt: start, ExpiresAt: start.Add(24 * time.Hour)}}, nil
	}))
	e.add("lists", func(context.Context, time.Time) ([]expiry.Item, error) { return nil, errors.New("the disk is away") })
	const year = 365 * 24 * time.Hour
	for _, c := range []struct {
		after  time.Duration
		ready  bool
		remark string // in /readyz
		logged string // new lines
	}{
		{0, true, "", "the disk is away"},
		{13 * time.Hour, true, "", `name=cron left_percent=45 alarm=50`},
		{22 * time.Hour, true, "token cron ends", `name=cron left_percent=8 alarm=10`},
		{48 * time.Hour, true, "token cron ended", `name=cron left_percent=0 alarm=ended`},
		{47 * year / 10, true, "intermediate device-ca ends", `name=device-ca left_percent=5 alarm=10`},
		{5*year + time.Hour, false, "token cron ended", `name=server-ca left_percent=0 alarm=ended`},
	} {
		log.Reset()
		e.look(t.Context(), start.Add(c.after))
		reports, ready := health.Reports()
		if ready != c.ready || len(reports) != 1 || !strings.Contains(reports[0].Remark, c.remark) || (c.remark == "") != (reports[0].Remark == "") {
			t.Errorf("after %s: ready %v, %+v", c.after, ready, reports)
		}
		if !strings.Contains(log.String(), c.logged) {
			t.Errorf("after %s: %q is not in\n%s", c.after, c.logged, &log)
		}
	}
	out := httptest.NewRecorder()
	metrics.Handler().ServeHTTP(out, httptest.NewRequest("GET", "/metrics", nil))
	for _, line := range []string{
		`muster_expires_seconds{kind="root",name="spare-root"} `, `muster_expiry_alarm{kind="root",level="50",name="root"} 0`, `muster_expires_seconds{kind="token",name="cron"} `,
	} {
		if !strings.Contains(out.Body.String(), line) {
			t.Errorf("no metric %s in\n%s", line, out.Body)
		}
	}
	items, err := e.List(t.Context(), start)
	if err == nil || len(items) != 5 || items[0].Name != "cron" {
		t.Errorf("%v, %+v", err, items)
	}
}

func plainItems(list []expiringCA) (out []expiry.Item) {
	for _, i := range list {
		out = append(out, i.Item)
	}
	return out
}
