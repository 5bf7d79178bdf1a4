// Package devbroker runs a private RabbitMQ for development, the demo and the tests: with the production configuration
// (brokerconf), on free ports of the loopback, gone without a trace when it is stopped or whoever started it dies.
package devbroker

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"muster/internal/broker/brokerconf"
)

//go:embed supervise.sh
var supervise string

// Options of Start.
type Options struct {
	// Dir holds what the broker keeps: configuration, data, log. It must be absolute and may hold data of an earlier run.
	Dir string
	// Conf is the broker's configuration. Addresses that are empty become the loopback's, ports that are 0 free ones.
	Conf brokerconf.Config
	// Bind are further folders whose files Conf names (certificates). They are shown to the broker read-only.
	Bind []string
	// Say is told what is done that takes time, in a sentence; nil for silence.
	Say func(string)
}

// Broker is a running RabbitMQ.
type Broker struct {
	Conf brokerconf.Config // with every port filled in

	dir   string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when the supervisor is gone
}

// StartTimeout is how long a start may take.
const StartTimeout = 60 * time.Second

// Start starts a RabbitMQ and waits until it is ready. Stop it with Stop.
func Start(ctx context.Context, o Options) (*Broker, error) {
	if !filepath.IsAbs(o.Dir) {
		return nil, fmt.Errorf("devbroker: Dir must be absolute")
	}
	if o.Say == nil {
		o.Say = func(string) {}
	}
	src, err := find(ctx, o.Say)
	if err != nil {
		return nil, err
	}
	epmd, err := fillIn(&o.Conf)
	if err != nil {
		return nil, err
	}
	confDir := filepath.Join(o.Dir, "conf")
	for _, d := range []string{confDir, filepath.Join(o.Dir, "data"), filepath.Join(o.Dir, "home")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	if o.Conf.Definitions == "" {
		o.Conf.Definitions = filepath.Join(confDir, brokerconf.FileDefinitions)
	}
	files, err := brokerconf.Render(o.Conf)
	if err != nil {
		return nil, err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(confDir, name), content, 0o600); err != nil {
			return nil, err
		}
	}
	b := &Broker{Conf: o.Conf, dir: o.Dir, done: make(chan struct{})}
	if err := b.supervise(src, o.Bind, epmd); err != nil {
		return nil, err
	}
	if err := b.Boot(ctx); err != nil {
		b.end()
		return nil, err
	}
	return b, nil
}

// fillIn gives every address and port a value. It returns the ports of the Erlang distribution: epmd's and the node's.
func fillIn(c *brokerconf.Config) (epmd [2]int, err error) {
	if c.MQTTAddress == "" {
		c.MQTTAddress = "127.0.0.1"
	}
	if c.AdminAddress == "" {
		c.AdminAddress = "127.0.0.1"
	}
	for _, p := range []*int{&c.MQTTPort, &c.FallbackPort, &c.AMQPSPort, &c.ManagementPort, &epmd[0], &epmd[1]} {
		if *p == 0 {
			if *p, err = freePort(); err != nil {
				return epmd, err
			}
		}
	}
	if c.FleetSize == 0 {
		c.FleetSize = 1000
	}
	if c.DiskFreeLimit == "" {
		c.DiskFreeLimit = "50MB" // a developer's disk is no broker's
	}
	return epmd, nil
}

// freePort returns a TCP port that nobody listens on. Somebody else may take it before the broker does; then its start
// fails and says so.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// supervise starts the script that owns the broker.
func (b *Broker) supervise(src source, bind []string, ports [2]int) error {
	var nonce [4]byte
	_, _ = rand.Read(nonce[:])
	name := "muster-" + hex.EncodeToString(nonce[:])
	conf := filepath.Join(b.dir, "conf")
	env := []string{
		"HOME=" + filepath.Join(b.dir, "home"), "LANG=C.UTF-8",
		"RABBITMQ_CONFIG_FILE=" + filepath.Join(conf, brokerconf.FileMain),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + filepath.Join(conf, brokerconf.FileAdvanced),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(conf, brokerconf.FilePlugins),
		"RABBITMQ_MNESIA_BASE=" + filepath.Join(b.dir, "data"), "RABBITMQ_LOG_BASE=" + filepath.Join(b.dir, "data"),
		"RABBITMQ_CONF_ENV_FILE=/dev/null", "RABBITMQ_LOG=-color",
		// Data belongs to the node's name, so a folder keeps its name from run to run.
		"RABBITMQ_NODENAME=muster@localhost",
		"ERL_EPMD_ADDRESS=127.0.0.1", fmt.Sprintf("ERL_EPMD_PORT=%d", ports[0]), fmt.Sprintf("RABBITMQ_DIST_PORT=%d", ports[1]),
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1} " + brokerconf.ErlangArgs,
	}
	args := []string{"--pid", "--mount", "--fork", "--mount-proc", "--kill-child=SIGKILL", "bash", "-c", supervise}
	if os.Geteuid() != 0 {
		args = append([]string{"--user", "--map-root-user"}, args...)
	}
	b.cmd = exec.Command("unshare", args...)
	b.cmd.Env = append(os.Environ(), "KIND="+src.kind, "ROOT="+src.root, "SERVER="+src.server, "IMAGE="+src.image,
		"NAME="+name, "DIR="+b.dir, "BIND="+strings.Join(bind, " "), "BROKER_ENV="+strings.Join(env, "\n"))
	// Its own group: Ctrl-C in a terminal is for the program, which then stops the broker in order.
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said bytes.Buffer
	b.cmd.Stderr = &said
	var err error
	if b.stdin, err = b.cmd.StdinPipe(); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(b.dir, "status")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := b.cmd.Start(); err != nil {
		return fmt.Errorf("devbroker: unshare cannot be run (Debian package util-linux): %w", err)
	}
	go func() {
		defer close(b.done)
		_ = b.cmd.Wait()
	}()
	return nil
}

// tell gives the supervisor a word.
func (b *Broker) tell(format string, a ...any) error {
	_, err := fmt.Fprintf(b.stdin, format+"\n", a...)
	return err
}

// Log returns the path of the broker's log.
func (b *Broker) Log() string { return filepath.Join(b.dir, "rabbitmq.log") }

// exits returns how often the broker has ended so far.
func (b *Broker) exits() int {
	raw, _ := os.ReadFile(filepath.Join(b.dir, "status"))
	return bytes.Count(raw, []byte("exited"))
}

// Boot starts the broker after Kill or Halt and waits until it is ready.
func (b *Broker) Boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, StartTimeout)
	defer cancel()
	before, exits := logSize(b.Log()), b.exits()
	if err := b.tell("start"); err != nil {
		return b.failed("the supervisor is gone", before)
	}
	for {
		if strings.Contains(logFrom(b.Log(), before), "Server startup complete") {
			return nil
		}
		if b.exits() > exits {
			return b.failed("it ended while starting", before)
		}
		select {
		case <-ctx.Done():
			return b.failed("it did not get ready in time", before)
		case <-b.done:
			return b.failed("its namespaces could not be made: this needs root, or unprivileged user namespaces", before)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (b *Broker) failed(why string, from int64) error {
	lines := strings.Split(strings.TrimSpace(logFrom(b.Log(), from)), "\n")
	return fmt.Errorf("devbroker: RabbitMQ did not start: %s; the end of %s:\n%s", why, b.Log(), strings.Join(lines[max(0, len(lines)-15):], "\n"))
}

func logSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

func logFrom(path string, offset int64) string {
	raw, err := os.ReadFile(path)
	if err != nil || int64(len(raw)) < offset {
		return ""
	}
	return string(raw[offset:])
}

// Signal sends a signal (TERM, KILL, STOP, CONT) to the broker's process.
func (b *Broker) Signal(name string) error { return b.tell("signal %s", name) }

// Kill ends the broker as a power cut would (SIGKILL) and waits until it is gone. Boot brings it back.
func (b *Broker) Kill(ctx context.Context) error { return b.halt(ctx, "KILL") }

// Halt ends the broker in order (SIGTERM) and waits until it is gone. Boot brings it back.
func (b *Broker) Halt(ctx context.Context) error { return b.halt(ctx, "TERM") }

func (b *Broker) halt(ctx context.Context, signal string) error {
	exits := b.exits()
	if err := b.Signal(signal); err != nil {
		return err
	}
	for b.exits() == exits {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.done:
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// Stop ends the broker in order, or by force when ctx ends, and waits until every process of it is gone.
func (b *Broker) Stop(ctx context.Context) error {
	err := b.Halt(ctx)
	b.end()
	return err
}

// end closes the supervisor's standard input, at which its namespaces end with all that is in them.
func (b *Broker) end() {
	b.stdin.Close()
	select {
	case <-b.done:
	case <-time.After(10 * time.Second):
		_ = b.cmd.Process.Kill()
		<-b.done
	}
}

// Ctl runs rabbitmqctl against the broker and returns what it printed.
func (b *Broker) Ctl(ctx context.Context, args ...string) (string, error) {
	if slices.ContainsFunc(args, func(a string) bool { return strings.ContainsAny(a, " \n") }) {
		return "", fmt.Errorf("devbroker: arguments of rabbitmqctl must not hold blanks")
	}
	var nonce [4]byte
	_, _ = rand.Read(nonce[:])
	out := filepath.Join(b.dir, "ctl-"+hex.EncodeToString(nonce[:]))
	defer os.Remove(out)
	if err := b.tell("ctl %s %s", out, strings.Join(args, " ")); err != nil {
		return "", err
	}
	for {
		raw, err := os.ReadFile(out)
		if err == nil {
			text, code, _ := strings.Cut(string(raw), "exit ")
			if i := strings.LastIndex(string(raw), "exit "); i >= 0 {
				text, code = string(raw[:i]), strings.TrimSpace(string(raw[i+5:]))
			}
			if code != "0" {
				return text, fmt.Errorf("devbroker: rabbitmqctl ended with %s: %s", code, text)
			}
			return text, nil
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-b.done:
			return "", fmt.Errorf("devbroker: the broker is gone")
		case <-time.After(20 * time.Millisecond):
		}
	}
}
