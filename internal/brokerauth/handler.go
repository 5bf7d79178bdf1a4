package brokerauth

import (
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"sync"
	"time"

	"muster/internal/admission"
	"muster/internal/wire"
)

// Paths of the four questions. The broker's configuration names them (brokerconf).
const (
	UserPath     = "/user"
	VhostPath    = "/vhost"
	ResourcePath = "/resource"
	TopicPath    = "/topic"
)

// Refusal is a question that was answered with deny.
type Refusal struct {
	admission.Decision
	Kind  admission.Kind
	Vhost string // devices, fallback, or empty if it was another
	Peer  string // address of the MQTT client; the broker tells it in admission.Vhost questions only
	At    time.Time
}

const formType = "application/x-www-form-urlencoded"

// ServeHTTP answers one question of the broker.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, ok := kindOf(r.URL.Path)
	switch {
	case !ok:
		http.Error(w, "not a path of RabbitMQ's http auth backend", http.StatusNotFound)
		return
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "set auth_http.http_method = post: a GET puts passwords into URLs and logs", http.StatusMethodNotAllowed)
		return
	case r.URL.RawQuery != "" || !isForm(r.Header.Get("Content-Type")):
		http.Error(w, "send the question in the body, as "+formType, http.StatusBadRequest)
		return
	}
	a := answers[s.decide(kind, r, time.Now()).Reason]
	h := w.Header()
	h["Content-Type"] = plainText
	h["Content-Length"] = a.length
	_, _ = w.Write(a.body) // if the broker has gone there is nobody to tell
}

func kindOf(path string) (admission.Kind, bool) {
	switch path {
	case UserPath:
		return admission.User, true
	case VhostPath:
		return admission.Vhost, true
	case ResourcePath:
		return admission.Resource, true
	case TopicPath:
		return admission.Topic, true
	}
	return "", false
}

func isForm(contentType string) bool {
	if contentType == formType {
		return true
	}
	t, _, err := mime.ParseMediaType(contentType)
	return err == nil && t == formType
}

// answer is a body and its length, made once for each reason.
type answer struct {
	body   []byte
	length []string
}

var (
	plainText = []string{"text/plain; charset=utf-8"}
	answers   = makeAnswers()
)

func makeAnswers() map[admission.Reason]answer {
	m := map[admission.Reason]answer{}
	for _, r := range admission.Reasons() {
		body := "deny " + string(r)
		if r == admission.Allowed {
			body = "allow"
		}
		m[r] = answer{[]byte(body), []string{strconv.Itoa(len(body))}}
	}
	return m
}

// decide reads the question of r, answers it, counts the answer and reports a refusal.
func (s *Server) decide(kind admission.Kind, r *http.Request, at time.Time) admission.Decision {
	q, peer, d := s.read(kind, r)
	silent := false
	if d.Reason == "" {
		d = s.index.Decide(q, at)
		if kind == admission.User && q.Vhost == wire.VhostFallback {
			silent = s.limit(&d, at)
		}
	}
	s.metrics.count(kind, d.Reason)
	if !d.Allow && !silent {
		if d.Device != "" {
			s.index.note(d.Device, d.Reason, at)
			s.index.noteLogin(kind, d, at)
		}
		vhost := q.Vhost
		if vhost != wire.VhostDevices && vhost != wire.VhostFallback {
			vhost = ""
		}
		s.report(Refusal{Decision: d, Kind: kind, Vhost: vhost, Peer: peer, At: at})
	}
	return d
}

// limit puts a fallback login under the limits (see Limiter). It reports true if nobody needs to hear of it: one more
// wrong password, over the budget.
func (s *Server) limit(d *admission.Decision, at time.Time) bool {
	switch {
	case d.Allow && !s.limiter.Login(d.Device, at):
		d.Allow, d.Reason = false, admission.Rate
	case d.Reason == admission.PasswordWrong && !s.limiter.Failure(d.Device, at):
		d.Reason = admission.Rate
		return true
	}
	return false
}

// bodies holds buffers for questions; one byte more than a question may have tells that it is too long.
var bodies = sync.Pool{New: func() any { return new([MaxBody + 1]byte) }}

// read returns the question in the body of r, or a decision that has a Reason. The body is wiped, since it may hold a
// password.
func (s *Server) read(kind admission.Kind, r *http.Request) (admission.Question, string, admission.Decision) {
	if r.ContentLength > MaxBody {
		return admission.Question{}, "", admission.Decision{Reason: admission.Oversized}
	}
	buf := bodies.Get().(*[MaxBody + 1]byte)
	n, err := io.ReadFull(r.Body, buf[:])
	defer func() {
		clear(buf[:n])
		bodies.Put(buf)
	}()
	switch {
	case err == nil:
		return admission.Question{}, "", admission.Decision{Reason: admission.Oversized}
	case !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF), r.ContentLength >= 0 && int64(n) != r.ContentLength:
		return admission.Question{}, "", admission.Decision{Reason: admission.Malformed} // cut off half-way
	}
	q, peer, err := parse(kind, buf[:n])
	if err != nil {
		s.complain(kind, err)
		return admission.Question{}, "", admission.Decision{Reason: admission.Malformed}
	}
	return q, peer, admission.Decision{}
}
