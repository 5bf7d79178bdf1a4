package simdev

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// partial is what has been downloaded of an image. It outlives the session, not the life: the next session goes on where
// this one ended.
type partial struct {
	sha [32]byte
	b   []byte
}

// update is a download under way in a session. The zero value is none.
type update struct {
	offer    wire.OTAOffer
	wrong    int           // downloads with a wrong hash
	progress chan int      // percent
	done     chan download // capacity 1
	cancel   context.CancelFunc
	ended    chan struct{}
}

// download is how a download ended: with all bytes of the right number, or with an error.
type download struct {
	p   partial
	err error
}

// stopUpdate ends the download, if one is under way, waits for its goroutine and keeps what came.
func (s *session) stopUpdate() {
	u := &s.update
	if u.cancel == nil {
		return
	}
	u.cancel()
	<-u.ended
	select {
	case r := <-u.done:
		s.d.partial = r.p
	default: // taken already
	}
	u.cancel, u.progress = nil, nil
}

// offered handles a message on dn/ota.
func (s *session) offered(ctx context.Context, o wire.OTAOffer) error {
	s.d.emit(Offered, "%s: %s, %d bytes", o.Job, o.Version, o.Size)
	sum := [32]byte(o.SHA256)
	if s.update.cancel != nil && s.update.offer.Job == o.Job && [32]byte(s.update.offer.SHA256) == sum {
		return nil // under way: messages come at least once
	}
	if !s.w.fallback {
		if err := s.d.confirm(); err != nil { // whoever offers an update has heard the hello
			return err
		}
	}
	reject := s.d.fault().Reject
	switch hash := fleet.HashOf(sum); {
	case hash == s.d.image:
		if s.helloed {
			return nil
		}
		s.helloed = true
		return s.hello(ctx) // that is the proof
	case reject != "":
		return s.reportStep(ctx, wire.OTAReport{Job: o.Job, Step: wire.StepRejected, Error: reject})
	case hash == s.d.boot.Failed:
		return s.reportStep(ctx, wire.OTAReport{Job: o.Job, Step: wire.StepRejected, Error: "this image was rolled back here before"})
	case o.Size > MaxImage:
		return s.reportStep(ctx, wire.OTAReport{Job: o.Job, Step: wire.StepRejected, Error: fmt.Sprintf("larger than the slot of %d bytes", MaxImage)})
	}
	s.stopUpdate()
	s.update = update{offer: o}
	if err := s.reportStep(ctx, wire.OTAReport{Job: o.Job, Step: wire.StepAccepted}); err != nil {
		return err
	}
	wait := time.Duration(o.Spread) * time.Second
	if wait > 0 {
		wait = time.Duration(s.d.rnd.Int64N(int64(wait)))
	}
	s.fetch(ctx, wait)
	return nil
}

// fetch starts the download of the offer after a while, or goes on with what is there of it. The session's end ends it.
func (s *session) fetch(ctx context.Context, wait time.Duration) {
	u := &s.update
	ctx, u.cancel = context.WithCancel(ctx)
	u.progress, u.done, u.ended = make(chan int, 8), make(chan download, 1), make(chan struct{})
	p := s.d.partial
	if p.sha != [32]byte(u.offer.SHA256) || int64(len(p.b)) > u.offer.Size {
		p = partial{sha: [32]byte(u.offer.SHA256)}
	}
	l := s.loader()
	l.offer, l.report = u.offer, u.progress
	ended, done := u.ended, u.done
	go func() {
		defer close(ended)
		if wait > 0 && !sleep(ctx, wait) {
			done <- download{p, ctx.Err()}
			return
		}
		p, err := l.load(ctx, p)
		done <- download{p, err}
	}()
}

// loader returns what a download needs, taken from the device before the goroutine starts.
func (s *session) loader() *loader {
	l := &loader{
		tries: s.d.c.Timing.OTATries, busyTries: s.d.c.Timing.BusyTries, every: s.d.c.Timing.ProgressEvery, pause: s.d.c.Timing.BackoffBase, device: s.d,
		rnd: rand.New(rand.NewPCG(s.d.rnd.Uint64(), s.d.rnd.Uint64())),
	}
	addr := s.d.endpoints.HTTPS
	var id *identity
	if s.w.fallback {
		addr, l.user, l.password = s.d.endpoints.RecoveryHTTPS, string(s.d.id), s.l.pw
	} else {
		one := s.d.ids[s.w.side]
		id = &one
	}
	l.base = "https://" + addr
	l.client = &http.Client{
		Transport: &http.Transport{
			DialContext: s.d.c.Dial, TLSClientConfig: s.d.tlsConfig(addr, id, s.w.fallback), TLSHandshakeTimeout: s.d.c.Timing.Connect,
			ResponseHeaderTimeout: s.d.c.Timing.Connect, DisableCompression: true, DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("redirects are not followed") },
	}
	return l
}

// downloaded takes the result of a download: checks it, installs it and restarts.
func (s *session) downloaded(ctx context.Context, r download) error {
	u := &s.update
	s.stopUpdate()
	s.d.partial = r.p
	if r.err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return s.giveUp(ctx, r.err.Error())
	}
	s.d.partial = partial{}
	s.d.count(func(c *Counts) { c.Downloaded++; c.Bytes += uint64(len(r.p.b)) })
	if s.d.takeCorruption() {
		r.p.b[len(r.p.b)/2] ^= 1
	}
	if sha256.Sum256(r.p.b) != r.p.sha {
		u.wrong++
		if u.wrong >= s.d.c.Timing.OTATries {
			return s.giveUp(ctx, fmt.Sprintf("SHA-256 differs, %d times", u.wrong))
		}
		s.d.emit(Updating, "SHA-256 differs: loads it again")
		s.fetch(ctx, 0)
		return nil
	}
	if err := s.reportStep(ctx, wire.OTAReport{Job: u.offer.Job, Step: wire.StepDownloaded, Percent: 100}); err != nil {
		return err
	}
	return s.install(ctx, r.p.b)
}

// takeCorruption reports whether this download is one that a bit flips in.
func (d *Device) takeCorruption() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.faults.CorruptDownloads > 0 {
		d.faults.CorruptDownloads--
		return true
	}
	return d.faults.CorruptDownloads < 0
}

// takeCut reports whether the line breaks in this request.
func (d *Device) takeCut() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.faults.CutDownloads > 0 {
		d.faults.CutDownloads--
		return true
	}
	return d.faults.CutDownloads < 0
}

// install writes the image to the slot that does not run, selects it and restarts.
func (s *session) install(ctx context.Context, image []byte) error {
	job := s.update.offer.Job
	installed := wire.OTAReport{Job: job, Step: wire.StepInstalled}
	if s.d.fault().LieInstalled {
		return s.reportStep(ctx, installed)
	}
	fw, err := ParseImage(image)
	if err != nil {
		return s.giveUp(ctx, "not an image for this device")
	}
	if fw.SecureVersion < s.d.fuse {
		return s.giveUp(ctx, fmt.Sprintf("its secure version %d is below %d in the eFuses", fw.SecureVersion, s.d.fuse))
	}
	to := s.d.boot.Active.other()
	if err := s.d.mem.r.put(recImage+string(to), image); err != nil {
		return err
	}
	if err := s.d.mem.boot.write(bootRecord{Active: to, Verify: true, Job: job, Dark: s.d.fault().Dark.On}); err != nil {
		return err
	}
	// From here on the device starts the new image whatever happens, so a report that is lost does not matter.
	if err := s.reportStep(ctx, installed); err != nil {
		if _, lost := errors.AsType[errLost](err); !lost {
			return err
		}
	}
	return s.restart(ctx, job, "update")
}

func (s *session) giveUp(ctx context.Context, why string) error {
	if err := s.reportStep(ctx, wire.OTAReport{Job: s.update.offer.Job, Step: wire.StepFailed, Error: cut(why)}); err != nil {
		return err
	}
	return s.leave
}

// reportStep says how far the update is.
func (s *session) reportStep(ctx context.Context, r wire.OTAReport) error {
	f := s.d.fault()
	if f.Silent || f.NoReports || s.d.fw.Behaviour == NoReports || s.w.fallback { // the fallback carries hello and cert alone
		s.d.emit(Updating, "%s %d %% %s (not reported)", r.Step, r.Percent, r.Error)
		return nil
	}
	if err := s.say(ctx, wire.UpTopic(s.d.id, wire.UpOTA), wire.Encode(r)); err != nil {
		return err
	}
	s.d.emit(Updating, "%s", strings.TrimSpace(fmt.Sprintf("%s %d %% %s", r.Step, r.Percent, r.Error)))
	return nil
}

// reportRollback tells of an update that the bootloader undid, until the broker has taken it.
func (s *session) reportRollback(ctx context.Context) error {
	b := s.d.boot
	if b.Undone == "" || s.d.fault().Silent || s.d.fault().NoReports {
		return nil
	}
	if err := s.reportStep(ctx, wire.OTAReport{Job: b.Undone, Step: wire.StepRolledBack, Error: cut(b.Because)}); err != nil {
		return err
	}
	b.Undone, b.Because = "", ""
	s.d.boot = b
	return s.d.mem.boot.write(b)
}

// loader fetches an image over HTTPS. It belongs to one goroutine.
type loader struct {
	client   *http.Client
	base     string
	user     string // with the password: HTTP Basic, on the recovery port
	password string
	offer    wire.OTAOffer
	report   chan<- int
	every    int // percent between two reports
	said     int
	tries    int
	pause    time.Duration
	device   *Device
	rnd      *rand.Rand

	busyTries int
}

// errBusy is an answer of 429 or 503: the server wants the download later (RFC 6585 §4, RFC 9110 §15.6.4).
type errBusy struct{ status string }

func (e errBusy) Error() string { return "the server answers " + e.status }

// load fetches what is missing of p. Where the line breaks it goes on with what is there; it gives up after some attempts
// in a row that brought nothing. A busy server is no failure: there it gives up only after many answers in a row.
func (l *loader) load(ctx context.Context, p partial) (partial, error) {
	for failures, busy := 0, 0; ; {
		before := len(p.b)
		wait, err := l.once(ctx, &p)
		if err == nil {
			return p, nil
		}
		if len(p.b) > before {
			failures, busy = 0, 0
		}
		if _, is := errors.AsType[errBusy](err); is {
			busy++
			l.device.count(func(c *Counts) { c.Busy++ })
		} else {
			failures++
		}
		if failures >= l.tries || busy >= l.busyTries {
			return p, err
		}
		l.device.emit(Updating, "download interrupted at %d of %d bytes: %v", len(p.b), l.offer.Size, err)
		if !sleep(ctx, l.jitter(max(wait, min(l.pause<<min(failures+busy, 16), time.Minute)))) {
			return p, ctx.Err()
		}
	}
}

// jitter adds up to half as much at random, so that those that were sent away together do not come back together. It comes
// after all limits: a limit would make equal what jitter made different.
func (l *loader) jitter(d time.Duration) time.Duration {
	return d + time.Duration(l.rnd.Int64N(int64(d)/2+1))
}

// once makes one request. After an error it returns how long the server asks to wait, if it does.
func (l *loader) once(ctx context.Context, p *partial) (time.Duration, error) {
	if int64(len(p.b)) == l.offer.Size {
		return 0, nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.base+l.offer.Path, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("User-Agent", "muster-devicesim")
	if l.user != "" {
		req.SetBasicAuth(l.user, l.password)
	}
	if len(p.b) > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", len(p.b)))
	}
	res, err := l.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	wait := retryAfter(res.Header)
	switch {
	case res.StatusCode == http.StatusOK:
		p.b = p.b[:0]
	case res.StatusCode == http.StatusPartialContent && strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", len(p.b))):
	case res.StatusCode == http.StatusTooManyRequests || res.StatusCode == http.StatusServiceUnavailable:
		return wait, errBusy{res.Status}
	default:
		return wait, fmt.Errorf("the server answers %s", res.Status)
	}
	if want := l.offer.Size - int64(len(p.b)); res.ContentLength != want {
		return wait, fmt.Errorf("the server has %d bytes more, not %d", res.ContentLength, want)
	}
	return wait, l.read(ctx, res.Body, p)
}

// read takes the body and reports progress. A report that the session has no time for is left out.
func (l *loader) read(ctx context.Context, body io.Reader, p *partial) error {
	if cap(p.b) < int(l.offer.Size) {
		p.b = append(make([]byte, 0, l.offer.Size), p.b...)
	}
	f := l.device.fault()
	end := l.offer.Size
	if l.device.takeCut() {
		end = (int64(len(p.b)) + end) / 2
	}
	for int64(len(p.b)) < l.offer.Size {
		if int64(len(p.b)) >= end {
			return errors.New("the line breaks")
		}
		n, err := body.Read(p.b[len(p.b):min(int(end), len(p.b)+16<<10)])
		p.b = p.b[:len(p.b)+n]
		if f.SlowDownload > 0 && !sleep(ctx, time.Duration(n)*time.Second/time.Duration(f.SlowDownload)) {
			return ctx.Err()
		}
		if pct := int(100 * int64(len(p.b)) / l.offer.Size); pct >= l.said+l.every && pct < 100 {
			l.said = pct
			select {
			case l.report <- pct:
			default:
			}
		}
		switch {
		case int64(len(p.b)) == l.offer.Size:
			return nil
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
	return nil
}

// retryAfter reads the header in seconds (RFC 9110 §10.2.3), at most an hour.
func retryAfter(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(n)*time.Second, time.Hour)
}
