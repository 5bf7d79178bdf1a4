package brokerauth

import (
	"github.com/prometheus/client_golang/prometheus"

	"muster/internal/admission"
)

// metrics counts answers. The counters are resolved once, since the set of reasons is closed.
type metrics struct {
	answers    map[admission.Kind]map[admission.Reason]prometheus.Counter
	unreported prometheus.Counter
}

// newMetrics registers the counters with reg, which may be nil.
func newMetrics(reg prometheus.Registerer, index *Index) (*metrics, error) {
	answers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "muster_broker_auth_answers_total",
		Help: "Answers to RabbitMQ's questions, by question and reason.",
	}, []string{"question", "reason"})
	m := &metrics{
		answers: map[admission.Kind]map[admission.Reason]prometheus.Counter{},
		unreported: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "muster_broker_auth_refusals_unreported_total",
			Help: "Refusals that were counted but not reported, because the reporter was behind.",
		}),
	}
	for _, k := range []admission.Kind{admission.User, admission.Vhost, admission.Resource, admission.Topic} {
		m.answers[k] = map[admission.Reason]prometheus.Counter{}
		for _, r := range admission.Reasons() {
			m.answers[k][r] = answers.WithLabelValues(string(k), string(r))
		}
	}
	if reg == nil {
		return m, nil
	}
	devices := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "muster_broker_auth_devices",
		Help: "Devices in the index that answers RabbitMQ.",
	}, func() float64 { return float64(index.Len()) })
	for _, c := range []prometheus.Collector{answers, m.unreported, devices} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) count(k admission.Kind, r admission.Reason) { m.answers[k][r].Inc() }
