package app

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"muster/internal/access"
	"muster/internal/ca"
	"muster/internal/expiry"
	"muster/internal/obs"
	"muster/internal/pki"
)

// expiries is the alarm table of everything that ends. Whoever has something that ends adds a source.
type expiries struct {
	log    *slog.Logger
	health *obs.Health

	mu      sync.Mutex
	sources []expirySource
	watch   expiry.Watch
	items   []expiry.Item // as of the last look
}

type expirySource struct {
	name string
	list func(context.Context, time.Time) ([]expiry.Item, error)
}

// add puts a source into the table. It is asked at each look, every five minutes and for each GET /expiries.
func (e *expiries) add(name string, list func(context.Context, time.Time) ([]expiry.Item, error)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sources = append(e.sources, expirySource{name, list})
}

// List returns the table at that time, what ends first first. What a source cannot say is missing, and the error tells.
func (e *expiries) List(ctx context.Context, at time.Time) (items []expiry.Item, err error) {
	e.mu.Lock()
	sources := e.sources
	e.mu.Unlock()
	var errs []error
	for _, s := range sources {
		more, err := s.list(ctx, at)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
		}
		items = append(items, more...)
	}
	expiry.Sort(items)
	return items, errors.Join(errs...)
}

// lookEvery is how often the table is looked at.
const lookEvery = 5 * time.Minute

// Run raises the alarms until ctx ends.
func (e *expiries) Run(ctx context.Context) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		e.look(ctx, time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// look logs what is due, and says in /readyz what is urgent. Only what has ended and stops devices or operators makes muster
// not ready: a root that ends in two years is no reason to take a machine out of service.
func (e *expiries) look(ctx context.Context, at time.Time) {
	items, err := e.List(ctx, at)
	if err != nil && ctx.Err() == nil {
		e.log.Error("what expires cannot be listed in full", "error", err)
	}
	e.mu.Lock()
	notices := e.watch.Notices(at, items)
	e.items = items
	e.mu.Unlock()
	for _, n := range notices {
		level := slog.LevelInfo
		switch {
		case n.Level >= expiry.Tenth:
			level = slog.LevelError
		case n.Level == expiry.Quarter:
			level = slog.LevelWarn
		}
		e.log.Log(ctx, level, "expires", "kind", n.Kind, "name", n.Name, "left_percent", int(100*n.Left(at)), "alarm", n.Level.String(), "ends", n.NotAfter, "fix", n.Fix)
	}
	fault, remark := expiry.Summary(at, items)
	if fault != "" {
		e.health.Set("expiries", errors.New(fault))
	} else {
		e.health.Set("expiries", nil)
	}
	e.health.Remark("expiries", remark)
}

var (
	expiresDesc = prometheus.NewDesc("muster_expires_seconds", "Seconds until something ends; negative once it has.", []string{"kind", "name"}, nil)
	alarmDesc   = prometheus.NewDesc("muster_expiry_alarm", "1 at the alarm that an end raises: level 50, 25 or 10 percent of its life left, or ended.", []string{"kind", "name", "level"}, nil)
)

// Describe implements prometheus.Collector.
func (e *expiries) Describe(ch chan<- *prometheus.Desc) { ch <- expiresDesc; ch <- alarmDesc }

// Collect implements prometheus.Collector, from the last look.
func (e *expiries) Collect(ch chan<- prometheus.Metric) {
	e.mu.Lock()
	items := e.items
	e.mu.Unlock()
	at := time.Now()
	seen := map[[2]string]bool{}
	for _, i := range items {
		if key := [2]string{i.Kind, i.Name}; seen[key] { // the soonest counts
			continue
		} else {
			seen[key] = true
		}
		ch <- prometheus.MustNewConstMetric(expiresDesc, prometheus.GaugeValue, i.NotAfter.Sub(at).Seconds(), i.Kind, i.Name)
		for _, l := range expiry.Levels {
			on := 0.0
			if i.Level(at) == l {
				on = 1
			}
			ch <- prometheus.MustNewConstMetric(alarmDesc, prometheus.GaugeValue, on, i.Kind, i.Name, l.String())
		}
	}
}

type expiringCA struct {
	expiry.Item
	cert *x509.Certificate
}

// expiringCAs are the CAs of a hierarchy.
func expiringCAs(h *ca.Hierarchy) []expiringCA {
	item := func(name, kind, fix string, stops bool, c *x509.Certificate) expiringCA {
		return expiringCA{expiry.Item{Name: name, Kind: kind, NotBefore: c.NotBefore, NotAfter: c.NotAfter, Fix: fix, Stops: stops}, c}
	}
	rotate := func(kind pki.RotationKind) string {
		return "muster rotation start " + string(kind) + ", well before: devices must learn to trust the new one first (docs/certificates.md)"
	}
	return []expiringCA{
		item("root", "root", rotate(pki.RotateRoot), true, h.Root.Cert), item("spare-root", "root", rotate(pki.RotateRoot), false, h.Spare.Cert),
		item("device-ca", "intermediate", rotate(pki.RotateDeviceCA), true, h.Device.Cert), item("server-ca", "intermediate", rotate(pki.RotateServerCA), true, h.Server.Cert),
	}
}

// expiringTokens are the operators' tokens that end.
func expiringTokens(list func(context.Context) ([]access.Token, error)) func(context.Context, time.Time) ([]expiry.Item, error) {
	return func(ctx context.Context, _ time.Time) (out []expiry.Item, err error) {
		tokens, err := list(ctx)
		for _, t := range tokens {
			if !t.ExpiresAt.IsZero() {
				out = append(out, expiry.Item{Name: t.Name, Kind: "token", NotBefore: t.CreatedAt, NotAfter: t.ExpiresAt, Fix: "muster token create, then delete this one"})
			}
		}
		return out, err
	}
}
