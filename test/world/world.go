// Package world puts up everything that muster needs on one machine, for scenarios, the demo and benchmarks: a private
// RabbitMQ with the production configuration, a musterd made by init, an operator with the CLI, and simulated devices.
package world

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"muster/internal/app"
	"muster/internal/cli"
	"muster/internal/config"
	"muster/internal/devbroker"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// Options of Start.
type Options struct {
	Dir    string       // absolute; new
	Set    []string     // settings of musterd, key=value
	Binary string       // musterd program; empty: in this process, where the race detector sees it
	Say    func(string) // told what takes time; nil for silence
}

// World is a running muster with its broker.
type World struct {
	Dir    string
	Config config.Config
	Broker *devbroker.Broker
	URL    string // of the ops API
	CAFile string
	Token  string
	Trust  *x509.CertPool

	binary string
	app    *app.App
	proc   *exec.Cmd
	exited chan struct{}
}

// Start puts up a world and waits until musterd is ready. Stop it with Stop.
func Start(ctx context.Context, o Options) (_ *World, err error) {
	w := &World{Dir: o.Dir, binary: o.Binary}
	if w.Config, err = settings(o); err != nil {
		return nil, err
	}
	made, err := app.Init(ctx, w.Config, nil)
	if err != nil {
		return nil, err
	}
	w.Token = made.Token
	w.URL = "https://" + localhost(w.Config.Listen.Ops)
	w.CAFile = filepath.Join(w.Config.Path(w.Config.PKI.Dir), "trust-bundle.pem")
	pem, err := os.ReadFile(w.CAFile)
	if err != nil {
		return nil, err
	}
	w.Trust = x509.NewCertPool()
	w.Trust.AppendCertsFromPEM(pem)
	conf, err := app.BrokerConf(&w.Config)
	if err != nil {
		return nil, err
	}
	brokerDir := filepath.Join(o.Dir, "rabbitmq")
	conf.Definitions = filepath.Join(brokerDir, "conf", "definitions.json")
	w.Broker, err = devbroker.Start(ctx, devbroker.Options{Dir: brokerDir, Conf: conf, Bind: []string{w.Config.Path(w.Config.Broker.TLSDir)}, Say: o.Say})
	if err != nil {
		return nil, err
	}
	if err := w.StartMusterd(ctx); err != nil {
		return nil, errors.Join(err, w.Stop(context.Background()))
	}
	return w, nil
}

// settings returns musterd's settings on free ports of the loopback.
func settings(o Options) (config.Config, error) {
	var ports [8]int
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return config.Config{}, err
		}
		defer l.Close() // held until all are drawn, so that they differ
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	at := func(host string, i int) string { return fmt.Sprintf("%s:%d", host, ports[i]) }
	sets := []string{
		"data_dir=" + filepath.Join(o.Dir, "muster"),
		"listen.ops=" + at("127.0.0.1", 0), "listen.devices=" + at("127.0.0.1", 1), "listen.recovery=" + at("127.0.0.1", 2), "listen.broker_auth=" + at("127.0.0.1", 3),
		"broker.auth_url=http://" + at("127.0.0.1", 3),
		fmt.Sprintf("broker.mqtt_port=%d", ports[4]), fmt.Sprintf("broker.fallback_port=%d", ports[5]),
		fmt.Sprintf("broker.amqps_port=%d", ports[6]), fmt.Sprintf("broker.management_port=%d", ports[7]),
		"broker.bind_address=127.0.0.1", "broker.amqps=" + at("localhost", 6), "broker.management=https://" + at("localhost", 7),
		"public.mqtt=" + at("localhost", 4), "public.fallback_mqtt=" + at("localhost", 5), "public.https=" + at("localhost", 1), "public.recovery_https=" + at("localhost", 2),
		"broker.disk_free_limit=50MB", "broker.fleet_size=1000",
	}
	return config.Load("", nil, append(sets, o.Set...))
}

func localhost(addr string) string {
	_, port, _ := strings.Cut(addr, ":")
	return "localhost:" + port
}

// StartMusterd starts musterd, again after KillMusterd or StopMusterd, and waits until it is ready.
func (w *World) StartMusterd(ctx context.Context) error {
	if w.binary == "" {
		log, err := w.openLog()
		if err != nil {
			return err
		}
		w.app, err = app.New(w.Config, "test", slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		if err != nil {
			return err
		}
		if err := w.app.Start(); err != nil {
			return err
		}
	} else if err := w.spawn(); err != nil {
		return err
	}
	return w.awaitReady(ctx)
}

// LogFile is musterd's log.
func (w *World) LogFile() string { return filepath.Join(w.Dir, "musterd.log") }

func (w *World) openLog() (*os.File, error) {
	return os.OpenFile(w.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

func (w *World) spawn() error {
	log, err := w.openLog()
	if err != nil {
		return err
	}
	defer log.Close()
	w.proc = exec.Command(w.binary, "serve", "--config", filepath.Join(w.Config.DataDir, app.FileConfig))
	w.proc.Stdout, w.proc.Stderr = log, log
	w.proc.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	w.exited = make(chan struct{})
	if err := w.proc.Start(); err != nil {
		return err
	}
	go func(p *exec.Cmd, exited chan struct{}) {
		defer close(exited)
		_ = p.Wait()
	}(w.proc, w.exited)
	return nil
}

// Client returns an HTTP client that trusts this muster.
func (w *World) Client() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.Trust}, DisableKeepAlives: true}}
}

func (w *World) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client := w.Client()
	var last string
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.URL+"/readyz", nil)
		if err != nil {
			return err
		}
		res, err := client.Do(req)
		if err == nil {
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if last = string(body); res.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			log, _ := os.ReadFile(w.LogFile())
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			return fmt.Errorf("musterd is not ready: %s (%v)\n%s", last, err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
		case <-w.gone():
			log, _ := os.ReadFile(w.LogFile())
			return fmt.Errorf("musterd ended: %s", log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// gone is closed when the musterd process has ended; nil if it runs in this process.
func (w *World) gone() chan struct{} { return w.exited }

// KillMusterd ends the musterd process as a power cut would.
func (w *World) KillMusterd() error {
	if err := w.proc.Process.Kill(); err != nil {
		return err
	}
	<-w.exited
	return nil
}

// StopMusterd ends musterd in order.
func (w *World) StopMusterd(ctx context.Context) error {
	if w.app != nil {
		defer func() { w.app = nil }()
		return w.app.Stop(ctx)
	}
	if w.proc == nil {
		return nil
	}
	if err := w.proc.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-w.exited:
	case <-ctx.Done():
		_ = w.proc.Process.Kill()
		<-w.exited
	}
	w.proc = nil
	return nil
}

// Stop ends everything.
func (w *World) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := w.StopMusterd(ctx)
	if w.Broker != nil {
		err = errors.Join(err, w.Broker.Stop(ctx))
	}
	return err
}

// Muster runs the operator's CLI and returns what it printed.
func (w *World) Muster(ctx context.Context, args ...string) (string, error) {
	var out, errs bytes.Buffer
	env := map[string]string{"MUSTER_URL": w.URL, "MUSTER_CA": w.CAFile, "MUSTER_TOKEN": w.Token, "HOME": w.Dir, "NO_COLOR": "1"}
	code := cli.Run(ctx, cli.Env{Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Getenv: func(k string) string { return env[k] }})
	if code != 0 {
		return out.String(), fmt.Errorf("muster %s: exit code %d: %s", strings.Join(args, " "), code, errs.String())
	}
	return out.String(), nil
}

// Devices runs simulated devices and remembers what they do.
type Devices struct {
	mu      sync.Mutex
	byID    map[fleet.DeviceID]*simdev.Device
	events  []simdev.Event
	changed chan struct{} // closed and replaced at each event
	cancel  context.CancelFunc
	done    sync.WaitGroup
	ctx     context.Context
}

// NewDevices returns an empty set of devices.
func NewDevices() *Devices {
	ctx, cancel := context.WithCancel(context.Background())
	return &Devices{byID: map[fleet.DeviceID]*simdev.Device{}, changed: make(chan struct{}), ctx: ctx, cancel: cancel}
}

// Run starts a device with the credentials in a folder. change may alter its configuration.
func (d *Devices) Run(dir string, change func(*simdev.Config)) (*simdev.Device, error) {
	c, err := simdev.LoadCredentials(dir)
	if err != nil {
		return nil, err
	}
	conf := simdev.Config{Credentials: c, Timing: simdev.QuickTiming(), OnEvent: d.note}
	if change != nil {
		change(&conf)
	}
	dev, err := simdev.New(conf)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.byID[dev.ID()] = dev
	d.mu.Unlock()
	d.done.Go(func() { _ = dev.Run(d.ctx) })
	return dev, nil
}

// Stop ends all devices.
func (d *Devices) Stop() {
	d.cancel()
	d.done.Wait()
}

func (d *Devices) note(e simdev.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = append(d.events, e)
	close(d.changed)
	d.changed = make(chan struct{})
}

// Get returns a device, nil if there is none.
func (d *Devices) Get(id fleet.DeviceID) *simdev.Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.byID[id]
}

// All returns the devices.
func (d *Devices) All() []*simdev.Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []*simdev.Device
	for _, dev := range d.byID {
		out = append(out, dev)
	}
	return out
}

// Mark returns a place in the history of events.
func (d *Devices) Mark() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.events)
}

// Since returns the events after a mark that match; an empty id or kind matches all.
func (d *Devices) Since(mark int, id fleet.DeviceID, kind simdev.Kind) (out []simdev.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.events[mark:] {
		if (id == "" || e.Device == id) && (kind == "" || e.Kind == kind) {
			out = append(out, e)
		}
	}
	return out
}

// Await waits until ok, which is asked after each event and every so often, or ctx ends.
func (d *Devices) Await(ctx context.Context, what string, ok func() bool) error {
	for {
		d.mu.Lock()
		changed := d.changed
		d.mu.Unlock()
		if ok() {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		case <-changed:
		case <-time.After(100 * time.Millisecond):
		}
	}
}
