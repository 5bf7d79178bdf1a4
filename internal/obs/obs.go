// Package obs is how muster is watched: the log, the health that /livez and /readyz report, and the metrics registry.
package obs

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Logger returns a logger of a level (debug, info, warn, error) and a format (text, json), as config has checked them.
func Logger(w io.Writer, level, format string) *slog.Logger {
	var l slog.Level
	_ = l.UnmarshalText([]byte(level)) // an unknown level stays info
	o := &slog.HandlerOptions{Level: l, ReplaceAttr: redact}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// redact is the last line of defence: nothing in muster logs a secret, and a field that is named like one stays empty
// should somebody try.
func redact(_ []string, a slog.Attr) slog.Attr {
	key := strings.ToLower(a.Key)
	for _, word := range []string{"password", "passphrase", "secret", "token", "authorization", "private_key"} {
		if strings.Contains(key, word) && a.Value.Kind() != slog.KindGroup {
			return slog.String(a.Key, "***")
		}
	}
	return a
}

// Health collects what the parts of muster say about themselves. The zero value is not ready; use NewHealth.
type Health struct {
	mu    sync.Mutex
	parts map[string]part
}

type part struct {
	err    error
	since  time.Time
	remark string
}

// NewHealth returns a Health in which the named parts are not ready yet.
func NewHealth(names ...string) *Health {
	h := &Health{parts: map[string]part{}}
	for _, n := range names {
		h.parts[n] = part{err: errStarting, since: time.Now()}
	}
	return h
}

type starting struct{}

func (starting) Error() string { return "starting" }

var errStarting = starting{}

// Set says how a part is: nil is well.
func (h *Health) Set(name string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, ok := h.parts[name]
	if ok && (old.err == nil) == (err == nil) {
		h.parts[name] = part{err, old.since, old.remark}
		return
	}
	h.parts[name] = part{err, time.Now(), old.remark}
}

// Remark says something about a part that somebody should see to, and that does not make it not ready; empty is nothing.
func (h *Health) Remark(name, words string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.parts[name]
	if !ok {
		p.since = time.Now()
	}
	p.remark = words
	h.parts[name] = p
}

// Report is what /readyz shows of a part.
type Report struct {
	Part  string    `json:"part"`
	OK    bool      `json:"ok"`
	Since time.Time `json:"since"`
	Error string    `json:"error,omitempty"`
	// Remark is what somebody should see to, although the part is well.
	Remark string `json:"remark,omitempty"`
}

// Reports returns every part in name order, and whether all are well.
func (h *Health) Reports() (rs []Report, ready bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ready = true
	for name, p := range h.parts {
		r := Report{Part: name, OK: p.err == nil, Since: p.since.UTC(), Remark: p.remark}
		if p.err != nil {
			r.Error, ready = p.err.Error(), false
		}
		rs = append(rs, r)
	}
	slices.SortFunc(rs, func(a, b Report) int { return strings.Compare(a.Part, b.Part) })
	return rs, ready
}

// Livez answers as long as the process can answer at all.
func Livez(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, "ok\n")
}

// Readyz answers 200 if every part is well, else 503, and lists the parts.
func (h *Health) Readyz(w http.ResponseWriter, _ *http.Request) {
	rs, ready := h.Reports()
	w.Header().Set("Content-Type", "application/json")
	if !ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"ready": ready, "parts": rs})
}

// Metrics is the registry of one muster, so that several can live in one test process.
type Metrics struct{ reg *prometheus.Registry }

// NewMetrics returns a registry that holds the runtime's own metrics.
func NewMetrics() *Metrics {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &Metrics{reg}
}

// Counter registers a counter that f reads. Names start with muster_ and end with _total.
func (m *Metrics) Counter(name, help string, f func() float64) {
	m.reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, f))
}

// Gauge registers a gauge that f reads. Names start with muster_.
func (m *Metrics) Gauge(name, help string, f func() float64) {
	m.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
}

// CounterVec registers a counter with labels that the caller raises.
func (m *Metrics) CounterVec(name, help string, labels ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	m.reg.MustRegister(v)
	return v
}

// Registry returns the registry for parts that register their own metrics.
func (m *Metrics) Registry() prometheus.Registerer { return m.reg }

// Handler serves the registry in Prometheus' text format.
func (m *Metrics) Handler() http.Handler { return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{}) }
