// Package client speaks muster's REST API: the generated client of package api, with a token, a CA, bounded retries and
// problem documents as errors.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"iter"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"muster/api"
)

// Config of a Client. URL and Token are needed.
type Config struct {
	URL   string // https://host[:port] of musterd
	Token string // mst_…
	CA    []byte // PEM of what the server is checked against; empty: the system's CAs
	Agent string // User-Agent; empty: muster
}

// Client makes calls. Methods of the embedded api.Client return the answer of a successful call as it came; give it to
// Read. A call that was refused returns an *Error instead.
type Client struct{ *api.Client }

// Error is a call that musterd refused, or could not serve (RFC 9457).
type Error struct{ api.Problem }

func (e *Error) Error() string {
	if e.Detail != "" {
		return e.Detail
	}
	return strings.ToLower(e.Title)
}

// Unreachable is a call that got no answer, or one that did not come from musterd.
type Unreachable struct {
	URL string
	Err error
}

func (e *Unreachable) Error() string { return fmt.Sprintf("%s cannot be reached: %v", e.URL, e.Err) }

func (e *Unreachable) Unwrap() error { return e.Err }

// Limits of a call.
const (
	maxAnswer  = 64 << 20 // bytes
	maxTries   = 4
	maxWait    = 30 * time.Second
	dialWait   = 10 * time.Second
	answerWait = 150 * time.Second // a revocation waits for the broker
)

// New returns a Client. It connects with the first call.
func New(c Config) (*Client, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return nil, errors.New("the url of musterd has the form https://host:port: tokens travel over TLS only")
	}
	tc := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(c.CA) > 0 {
		tc.RootCAs = x509.NewCertPool()
		if !tc.RootCAs.AppendCertsFromPEM(c.CA) {
			return nil, errors.New("the CA file holds no certificate in PEM")
		}
	}
	if c.Agent == "" {
		c.Agent = "muster"
	}
	base := &url.URL{Scheme: "https", Host: u.Host}
	d := &doer{agent: c.Agent, token: c.Token, url: base.String(), http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: tc, DialContext: (&net.Dialer{Timeout: dialWait}).DialContext, TLSHandshakeTimeout: dialWait,
			ResponseHeaderTimeout: answerWait, ExpectContinueTimeout: dialWait, ForceAttemptHTTP2: true,
			Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: 16,
		},
		// musterd never redirects; whoever does wants the token.
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("it redirects, which musterd never does")
		},
	}}
	g, err := api.NewClient(base.String()+api.Base, api.WithHTTPClient(d))
	if err != nil {
		return nil, err
	}
	return &Client{g}, nil
}

// doer sends requests: with the token, again where that is safe, and with errors for refusals.
type doer struct {
	agent, token, url string
	http              *http.Client
}

// Do implements api.HttpRequestDoer.
func (d *doer) Do(r *http.Request) (*http.Response, error) {
	r.Header.Set("Authorization", "Bearer "+d.token)
	r.Header.Set("User-Agent", d.agent)
	omitUnset(r)
	for try := 1; ; try++ {
		res, err := d.http.Do(r)
		if err != nil {
			if ue, ok := errors.AsType[*url.Error](err); ok {
				err = ue.Err
			}
			if ctx := r.Context().Err(); ctx != nil {
				return nil, ctx
			}
			return nil, &Unreachable{d.url, err}
		}
		wait, again := retry(r, res, try)
		if !again {
			return d.check(r, res)
		}
		drain(res)
		if err := pause(r.Context(), wait); err != nil {
			return nil, err
		}
		if r.GetBody != nil {
			if r.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
		}
	}
}

// omitUnset removes the parameters that the caller left at their zero value: the generated client has no pointers and
// sends them all. No parameter of the API has a meaning when it is empty or zero.
func omitUnset(r *http.Request) {
	q := r.URL.Query()
	for name, values := range q {
		if len(values) == 1 && (values[0] == "" || values[0] == "0") {
			q.Del(name)
		}
	}
	r.URL.RawQuery = q.Encode()
	if r.Header.Get("If-Match") == "" {
		r.Header.Del("If-Match")
	}
}

// retry says whether to send r again after res, and when. 429 means that nothing was done; after a 503 only what may be
// done twice is repeated.
func retry(r *http.Request, res *http.Response, try int) (time.Duration, bool) {
	safe := r.Method == http.MethodGet || r.Method == http.MethodDelete
	if try >= maxTries || r.Header.Get("Accept") == eventType || r.Body != nil && r.Body != http.NoBody && r.GetBody == nil {
		return 0, false
	}
	if res.StatusCode != http.StatusTooManyRequests && (res.StatusCode != http.StatusServiceUnavailable || !safe) {
		return 0, false
	}
	secs, err := strconv.Atoi(res.Header.Get("Retry-After"))
	if err != nil || secs < 0 {
		secs = 1 << (try - 1)
	}
	return min(time.Duration(secs)*time.Second, maxWait), true
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func drain(res *http.Response) {
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
	_ = res.Body.Close()
}

// check turns refusals into errors, and so what is not an answer of musterd.
func (d *doer) check(r *http.Request, res *http.Response) (*http.Response, error) {
	mt, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if res.StatusCode >= 200 && res.StatusCode < 300 {
		if res.StatusCode == http.StatusNoContent || slices.Contains(answers, mt) {
			return res, nil
		}
		drain(res)
		return nil, &Unreachable{d.url, errors.New("the answer did not come from musterd: is the url right?")}
	}
	defer drain(res)
	var p api.Problem
	if mt != "application/problem+json" || json.UnmarshalRead(io.LimitReader(res.Body, 1<<20), &p) != nil || p.Status != res.StatusCode {
		return nil, &Unreachable{d.url, fmt.Errorf("status %d, and not from musterd: is the url right?", res.StatusCode)}
	}
	return nil, &Error{p}
}

// answers are the media types of what musterd answers.
var answers = []string{"application/json", "application/vnd.oai.openapi", "application/x-ndjson", eventType}

// Read decodes the answer of a call: device, err := client.Read[api.Device](c.GetDevice(ctx, id)).
func Read[T any](res *http.Response, err error) (T, error) {
	var v T
	if err != nil {
		return v, err
	}
	defer drain(res)
	if err := json.UnmarshalRead(io.LimitReader(res.Body, maxAnswer), &v); err != nil {
		return v, fmt.Errorf("the answer of musterd cannot be read, is it another version? %w", err)
	}
	return v, nil
}

// Done ends a call whose answer has no body.
func Done(res *http.Response, err error) error {
	if err != nil {
		return err
	}
	drain(res)
	return nil
}

// Items yields the items of all pages. fetch returns one page and the cursor of the next, empty after the last.
func Items[T any](fetch func(cursor string) (items []T, next string, err error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for cursor := ""; ; {
			items, next, err := fetch(cursor)
			if err != nil {
				var zero T
				yield(zero, err)
				return
			}
			for _, it := range items {
				if !yield(it, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			cursor = next
		}
	}
}

// Upload publishes a release: a signed manifest and size bytes of image. sent, if not nil, is told how many bytes have
// been taken so far. It reports whether the release is new.
func (c *Client) Upload(ctx context.Context, p api.UploadReleaseParams, image io.Reader, size int64, sent func(int64)) (api.Release, bool, error) {
	body := &counter{r: image, sent: sent}
	edit := func(_ context.Context, r *http.Request) error {
		r.ContentLength = size
		r.Header.Set("Expect", "100-continue") // a refused manifest costs no upload
		return nil
	}
	res, err := c.UploadReleaseWithBody(ctx, &p, "application/octet-stream", body, edit)
	if err != nil {
		return api.Release{}, false, err
	}
	rel, err := Read[api.Release](res, nil)
	return rel, res.StatusCode == http.StatusCreated, err
}

type counter struct {
	r    io.Reader
	n    int64
	sent func(int64)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.sent != nil && n > 0 {
		c.sent(c.n)
	}
	return n, err
}
