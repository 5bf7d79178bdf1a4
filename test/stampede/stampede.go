// Command stampede shows what an outage of muster's auth backend does to a connected fleet (DESIGN §9): all devices lose
// their sessions, because the broker can ask nobody, and are told "bad user name or password" until it is back. No device may
// take that for the end of its certificate and go to the fallback, none may be lost, and they must not all come back at once.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/test/world"
)

// Options of Run.
type Options struct {
	Dir     string        // absolute; new
	Binary  string        // musterd; empty: in this process
	Devices int           // how many
	Outage  time.Duration // how long nobody answers the broker
	Timing  simdev.Timing // of the devices
	Say     func(string)
}

// Report is what came of it. Times are counted from the moment when the backend was back.
type Report struct {
	Devices   int
	Thrown    int              // sessions that ended during the outage
	Refused   int              // attempts that the broker answered with no, from the outage on
	Fallbacks int              // devices that went to the fallback: must be none
	Lost      []fleet.DeviceID // devices that are not back: must be none
	Back      []time.Duration  // when each device that had been thrown out was back, sorted
}

// patience is how long after the outage a device may take: its back-off, and what the broker takes to let everybody in.
func (o Options) patience() time.Duration { return 2*o.Timing.BackoffCap + time.Minute }

// Run puts up a world, connects the devices, takes the backend away, brings it back and waits for the devices.
func Run(ctx context.Context, o Options) (r Report, err error) {
	front, err := newProxy()
	if err != nil {
		return r, err
	}
	defer front.Close()
	o.Say("starting RabbitMQ and musterd")
	w, err := world.Start(ctx, world.Options{Dir: o.Dir, Binary: o.Binary, Say: o.Say, Set: []string{
		"listen.broker_auth=" + front.behind, "broker.auth_url=http://" + front.addr, "broker.probe=false",
		fmt.Sprintf("broker.fleet_size=%d", max(o.Devices, 1000)), "certificates.renew_schedule=",
	}})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, w.Stop(context.WithoutCancel(ctx))) }()

	o.Say(fmt.Sprintf("making %d devices", o.Devices))
	ds, err := fleetOf(ctx, w, o)
	if err != nil {
		return r, err
	}
	live, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	for _, d := range ds.all {
		running.Go(func() { _ = d.Run(live) })
	}
	o.Say("connecting them")
	if err := ds.await(ctx, o.Timing.Spread+2*time.Minute, func(k known) bool { return k.answered }); err != nil {
		return r, fmt.Errorf("before the outage: %w", err)
	}

	o.Say(fmt.Sprintf("the auth backend goes away for %s", o.Outage))
	ds.mark()
	front.Away()
	select {
	case <-ctx.Done():
		return r, ctx.Err()
	case <-time.After(o.Outage):
	}
	r.Thrown = ds.count(func(k known) bool { return k.thrown > 0 })
	if err := front.Back(); err != nil {
		return r, err
	}
	back := time.Now()
	o.Say(fmt.Sprintf("it is back; %d devices had been thrown out", r.Thrown))
	err = ds.await(ctx, o.patience(), func(k known) bool { return k.connected && k.front })
	if ctx.Err() != nil {
		return r, ctx.Err()
	}
	ds.tell(&r, back)
	return r, nil
}

// fleetOf registers devices and makes them. They do not run yet.
func fleetOf(ctx context.Context, w *world.World, o Options) (*herd, error) {
	var csv strings.Builder
	csv.WriteString("id,product\n")
	for i := range o.Devices {
		fmt.Fprintf(&csv, "cow-%05d,cow\n", i)
	}
	list, kits := filepath.Join(o.Dir, "fleet.csv"), filepath.Join(o.Dir, "credentials")
	if err := os.WriteFile(list, []byte(csv.String()), 0o600); err != nil {
		return nil, err
	}
	for _, args := range [][]string{{"device", "add", "--from", list}, {"device", "credentials", "--all", "--out", kits}} {
		if _, err := w.Muster(ctx, args...); err != nil {
			return nil, err
		}
	}
	h := &herd{known: map[fleet.DeviceID]*known{}}
	for i := range o.Devices {
		c, err := simdev.LoadCredentials(filepath.Join(kits, fmt.Sprintf("cow-%05d", i)))
		if err != nil {
			return nil, err
		}
		d, err := simdev.New(simdev.Config{Credentials: c, Timing: o.Timing, Seed: uint64(i), OnEvent: h.note})
		if err != nil {
			return nil, err
		}
		h.known[d.ID()] = &known{}
		h.all = append(h.all, d)
	}
	return h, nil
}

// herd is the devices and what was seen of them.
type herd struct {
	all []*simdev.Device

	mu      sync.Mutex
	known   map[fleet.DeviceID]*known // guarded by mu, but for its keys
	refused int                       // guarded by mu; since mark
}

// known is what was seen of a device, and since mark.
type known struct {
	answered, connected, front bool
	thrown, fallbacks          int
	backAt                     time.Time // of the newest session at the front
}

func (h *herd) note(e simdev.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	k := h.known[e.Device]
	switch e.Kind {
	case simdev.Answered:
		k.answered = true
	case simdev.Connected:
		k.connected, k.front = true, strings.HasPrefix(e.Detail, "devices")
		if k.front {
			k.backAt = e.At
		}
	case simdev.Disconnected:
		k.connected = false
		k.thrown++
	case simdev.FallbackTaken:
		k.fallbacks++
	case simdev.Refused:
		h.refused++
	}
}

// mark starts counting afresh.
func (h *herd) mark() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = 0
	for _, k := range h.known {
		k.thrown, k.fallbacks = 0, 0
	}
}

func (h *herd) count(ok func(known) bool) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range h.known {
		if ok(*k) {
			n++
		}
	}
	return n
}

// await waits until all devices are ok.
func (h *herd) await(ctx context.Context, limit time.Duration, ok func(known) bool) error {
	end := time.After(limit)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		n := h.count(ok)
		if n == len(h.all) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end:
			return fmt.Errorf("%d of %d devices after %s", n, len(h.all), limit)
		case <-tick.C:
		}
	}
}

// tell fills the report.
func (h *herd) tell(r *Report, back time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Devices, r.Refused = len(h.all), h.refused
	for id, k := range h.known {
		if k.fallbacks > 0 {
			r.Fallbacks++
		}
		switch {
		case !k.connected || !k.front:
			r.Lost = append(r.Lost, id)
		case k.thrown > 0:
			r.Back = append(r.Back, max(k.backAt.Sub(back), 0))
		}
	}
	slices.Sort(r.Lost)
	slices.Sort(r.Back)
}

// Crowd returns the share of the devices that came back within the busiest tenth of a span, 0 to 1. Had they all come at
// once it would be 1; evenly spread, a tenth.
func (r Report) Crowd(span time.Duration) float64 {
	most, first := 0, 0
	for i, at := range r.Back {
		for at-r.Back[first] > span/10 {
			first++
		}
		most = max(most, i-first+1)
	}
	return float64(most) / float64(max(len(r.Back), 1))
}

// Print writes the report with a histogram of the returns.
func (r Report) Print(w io.Writer, span time.Duration) {
	fmt.Fprintf(w, "devices                 %d\nthrown out              %d\nrefused meanwhile       %d times\nwent to the fallback    %d\nlost                    %d\n",
		r.Devices, r.Thrown, r.Refused, r.Fallbacks, len(r.Lost))
	if len(r.Back) == 0 {
		return
	}
	at := func(share float64) time.Duration {
		return r.Back[int(share*float64(len(r.Back)-1))].Round(time.Millisecond)
	}
	fmt.Fprintf(w, "back, median            %s\nback, 95 of 100         %s\nback, last              %s\nin the busiest tenth    %.0f %%\n",
		at(0.5), at(0.95), at(1), 100*r.Crowd(span))
	const rows = 20
	width := max(r.Back[len(r.Back)-1]/rows, time.Millisecond)
	for row, i := 0, 0; i < len(r.Back); row++ {
		n := 0
		for ; i < len(r.Back) && r.Back[i] < time.Duration(row+1)*width; i++ {
			n++
		}
		if row >= rows && i < len(r.Back) {
			n, i = n+len(r.Back)-i, len(r.Back)
		}
		fmt.Fprintf(w, "%10s %5d %s\n", (time.Duration(row) * width).Round(time.Millisecond), n, strings.Repeat("#", (60*n+len(r.Back)-1)/len(r.Back)))
	}
}

// Check returns an error that says what must not have happened.
func (r Report) Check(span time.Duration) error {
	var errs []error
	if r.Thrown < r.Devices/2 {
		errs = append(errs, fmt.Errorf("only %d of %d devices were thrown out: the outage was too short to show anything", r.Thrown, r.Devices))
	}
	if r.Fallbacks > 0 {
		errs = append(errs, fmt.Errorf("%d devices went to the fallback", r.Fallbacks))
	}
	if len(r.Lost) > 0 {
		errs = append(errs, fmt.Errorf("%d devices are lost, such as %s", len(r.Lost), r.Lost[0]))
	}
	if c := r.Crowd(span); c > 0.5 {
		errs = append(errs, fmt.Errorf("%.0f %% of the devices came back within a tenth of the back-off's limit", 100*c))
	}
	return errors.Join(errs...)
}

// proxy stands between the broker and the auth backend, and can go away.
type proxy struct {
	addr, behind string // host:port of itself, and of the backend

	mu    sync.Mutex
	l     net.Listener          // guarded by mu; nil while it is away
	conns map[net.Conn]struct{} // guarded by mu
	wg    sync.WaitGroup
}

// newProxy listens, and picks a free address for the backend.
func newProxy() (*proxy, error) {
	p := &proxy{conns: map[net.Conn]struct{}{}, addr: "127.0.0.1:0"}
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return nil, err
	}
	p.behind = l.Addr().String()
	err = p.Back()
	return p, errors.Join(err, l.Close())
}

// Back listens again.
func (p *proxy) Back() error {
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.l, p.addr = l, l.Addr().String()
	p.mu.Unlock()
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.carry(c) })
		}
	})
	return nil
}

// carry joins a connection to the backend.
func (p *proxy) carry(c net.Conn) {
	defer c.Close()
	far, err := net.Dial("tcp", p.behind)
	if err != nil {
		return
	}
	defer far.Close()
	p.mu.Lock()
	here := p.l != nil
	if here {
		p.conns[c], p.conns[far] = struct{}{}, struct{}{}
	}
	p.mu.Unlock()
	if !here {
		return
	}
	var one sync.WaitGroup
	one.Go(func() {
		_, _ = io.Copy(far, c) // the end of either is the end of both
		far.Close()
	})
	_, _ = io.Copy(c, far)
	c.Close()
	one.Wait()
	p.mu.Lock()
	delete(p.conns, c)
	delete(p.conns, far)
	p.mu.Unlock()
}

// Away stops listening and cuts what is connected: the broker's questions are refused by the operating system.
func (p *proxy) Away() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.l != nil {
		p.l.Close()
		p.l = nil
	}
	for c := range p.conns {
		c.Close()
	}
}

// Close ends the proxy.
func (p *proxy) Close() {
	p.Away()
	p.wg.Wait()
}
