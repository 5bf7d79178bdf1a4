// Command demo shows a fleet live: RabbitMQ, musterd and 25 simulated devices on this machine. Each step is a line with
// a measured time. It ends with an exit code other than 0 if any of them fails. Then it stays up until Ctrl-C, or ends by
// itself with ONCE=1.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/test/world"
)

func main() { os.Exit(run()) }

// demo is what the steps share.
type demo struct {
	ctx     context.Context
	w       *world.World
	devices *world.Devices
	ids     []fleet.DeviceID
	dir     string
	out     screen
}

func run() int {
	bin := flag.String("bin", "bin", "folder with musterd")
	n := flag.Int("devices", 25, "simulated devices")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	d := &demo{ctx: ctx, out: screen{color: term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == ""}}
	err := d.show(*bin, *n)
	d.takeDown(err != nil && ctx.Err() == nil)
	switch {
	case ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)):
		fmt.Println("\nstopped; nothing is left running")
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "\nerror:", err)
		return 1
	}
	fmt.Println("\nall steps passed; nothing is left running")
	return 0
}

func (d *demo) show(bin string, n int) error {
	if n < 8 {
		return fmt.Errorf("-devices: the stages want at least 8")
	}
	binary, err := filepath.Abs(filepath.Join(bin, "musterd"))
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "muster-demo-"); err != nil {
		return err
	}
	d.devices = world.NewDevices()
	d.out.title("muster: a fleet of %d devices on this machine", n)

	err = d.step("RabbitMQ and musterd are up", func() (string, error) {
		d.w, err = world.Start(d.ctx, world.Options{
			Dir: d.dir, Binary: binary, Say: d.out.note,
			Set: []string{"certificates.min_lifetime=1s", "certificates.sweep=1s", "certificates.renew_schedule=", "log.level=debug"},
		})
		return "CA, certificates, broker configuration, first token", err
	})
	if err != nil {
		return err
	}
	for _, s := range []func(int) error{
		d.enrolment, d.telemetry, d.goodRelease, d.badRelease, d.renewal, d.expiry, d.revocation,
	} {
		if err := s(n); err != nil {
			return err
		}
	}
	if os.Getenv("ONCE") != "" {
		return nil
	}
	d.lookAround()
	<-d.ctx.Done()
	return nil
}

// takeDown ends everything, whatever happened. After a failure the files stay, to be looked at.
func (d *demo) takeDown(keep bool) {
	if d.devices != nil {
		d.devices.Stop()
	}
	if d.w != nil {
		if err := d.w.Stop(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "while stopping:", err)
		}
	}
	switch {
	case d.dir == "":
	case keep:
		fmt.Fprintln(os.Stderr, "logs and data are kept in", d.dir)
	default:
		_ = os.RemoveAll(d.dir)
	}
}

// step runs one step and prints its line.
func (d *demo) step(what string, f func() (detail string, err error)) error {
	d.out.begin(what)
	began := time.Now()
	detail, err := f()
	if err != nil {
		d.out.failed(what)
		return fmt.Errorf("%s: %w", what, err)
	}
	d.out.done(what, time.Since(began), detail)
	return nil
}

// await waits for ok, at most limit.
func (d *demo) await(limit time.Duration, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(d.ctx, limit)
	defer cancel()
	return d.devices.Await(ctx, "waiting for "+what, ok)
}

func (d *demo) muster(args ...string) (string, error) { return d.w.Muster(d.ctx, args...) }

// ask runs the CLI and reads its JSON.
func ask[T any](d *demo, args ...string) (v T, err error) {
	out, err := d.muster(append(args, "--output", "json")...)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal([]byte(out), &v)
}

func (d *demo) credentials(id fleet.DeviceID) string {
	return filepath.Join(d.dir, "credentials", string(id))
}

func (d *demo) enrolment(n int) error {
	return d.step(fmt.Sprintf("%d devices enrolled", n), func() (string, error) {
		csv := "id,product,hardware,label:site\n"
		for i := range n {
			id := fleet.DeviceID(fmt.Sprintf("lamp-%02d", i+1))
			d.ids = append(d.ids, id)
			csv += fmt.Sprintf("%s,lamp,rev-b,%s\n", id, []string{"hull", "york"}[i%2])
		}
		file := filepath.Join(d.dir, "fleet.csv")
		if err := os.WriteFile(file, []byte(csv), 0o600); err != nil {
			return "", err
		}
		if out, err := d.muster("device", "add", "--from", file); err != nil {
			return out, err
		}
		began := time.Now()
		if out, err := d.muster("device", "credentials", "--all", "--out", filepath.Join(d.dir, "credentials")); err != nil {
			return out, err
		}
		return fmt.Sprintf("keys made locally, %.0f certificates a second", float64(n)/time.Since(began).Seconds()), nil
	})
}

func (d *demo) telemetry(n int) error {
	return d.step("first telemetry of every device", func() (string, error) {
		for _, id := range d.ids {
			if _, err := d.devices.Run(d.credentials(id), func(c *simdev.Config) {
				c.Hardware, c.Chip = "rev-b", "esp32"
				c.Timing.TelemetryEvery = time.Second
			}); err != nil {
				return "", err
			}
		}
		err := d.await(time.Minute, "telemetry", func() bool { return len(d.distinct(0, simdev.SentTelemetry)) == n })
		return "MQTT over mutual TLS, acknowledged by RabbitMQ", err
	})
}

// distinct returns the devices with an event of a kind since a mark.
func (d *demo) distinct(mark int, kind simdev.Kind) map[fleet.DeviceID]bool {
	out := map[fleet.DeviceID]bool{}
	for _, e := range d.devices.Since(mark, "", kind) {
		out[e.Device] = true
	}
	return out
}

// publish signs and uploads a simulated image.
func (d *demo) publish(version, behaviour string) error {
	key := filepath.Join(d.dir, "release.pem")
	if _, err := os.Stat(key); err != nil {
		if out, err := d.muster("firmware", "keygen", "--out", key); err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		if out, err := d.muster("firmware", "keys", "add", strings.TrimSuffix(key, ".pem")+".pub.pem"); err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
	}
	image := filepath.Join(d.dir, "lamp-"+version+".bin")
	if err := os.WriteFile(image, simdev.MakeImage(version, behaviour, 256<<10, 1), 0o600); err != nil {
		return err
	}
	if out, err := d.muster("firmware", "sign", image, "--key", key, "--product", "lamp", "--version", version); err != nil {
		return fmt.Errorf("%s: %w", out, err)
	}
	out, err := d.muster("firmware", "upload", image)
	if err != nil {
		return fmt.Errorf("%s: %w", out, err)
	}
	return nil
}

// follow polls a rollout until it ends or halts; at each new stage, opened is called.
func (d *demo) follow(id string, limit time.Duration, opened func(stage int, p api.Rollout)) (p api.Rollout, err error) {
	stage := 0
	err = d.await(limit, "rollout "+id, func() bool {
		p, err = ask[api.Rollout](d, "rollout", "show", id)
		if err != nil {
			return true
		}
		for stage < p.Stage {
			stage++
			opened(stage, p)
		}
		return string(p.State) == "completed" || string(p.State) == "halted" || string(p.State) == "aborted"
	})
	return p, err
}

func (d *demo) goodRelease(n int) error {
	return d.step("rollout of 1.1.0: 1 device, 25 %, all", func() (string, error) {
		if err := d.publish("1.1.0", simdev.Good); err != nil {
			return "", err
		}
		began := time.Now()
		if out, err := d.muster("rollout", "create", "lamp-1-1-0", "--product", "lamp", "--version", "1.1.0", "--stage", "1", "--stage", "25%", "--stage", "100%", "--soak", "1s", "--verify-for", "0s", "--timeout", "1m", "--start"); err != nil {
			return out, err
		}
		p, err := d.follow("lamp-1-1-0", 90*time.Second, func(stage int, p api.Rollout) {
			d.out.note(fmt.Sprintf("stage %d open after %.1f s, %d devices done", stage, time.Since(began).Seconds(), p.Counts["succeeded"]))
		})
		if err == nil && (string(p.State) != "completed" || p.Counts["succeeded"] != n) {
			err = fmt.Errorf("%s (%s): %+v", string(p.State), p.Reason, p.Counts)
		}
		return fmt.Sprintf("signed, %d of %d proved the new image by hello", p.Counts["succeeded"], n), err
	})
}

func (d *demo) badRelease(n int) error {
	return d.step("rollout of 1.2.0, whose image boot-loops", func() (string, error) {
		if err := d.publish("1.2.0", simdev.BootLoop); err != nil {
			return "", err
		}
		mark := d.devices.Mark()
		if out, err := d.muster("rollout", "create", "lamp-1-2-0", "--product", "lamp", "--version", "1.2.0", "--stage", "1", "--stage", "25%", "--stage", "100%", "--verify-for", "0s", "--timeout", "1m", "--start"); err != nil {
			return out, err
		}
		p, err := d.follow("lamp-1-2-0", time.Minute, func(int, api.Rollout) {})
		if err != nil {
			return "", err
		}
		touched := d.distinct(mark, simdev.Offered)
		if string(p.State) != "halted" || len(touched) != 1 || p.Counts["pending"] != n-1 {
			return "", fmt.Errorf("%s (%s), %d devices touched: %+v", string(p.State), p.Reason, len(touched), p.Counts)
		}
		for _, dev := range d.devices.All() {
			if v := dev.Snapshot().Version; v != "1.1.0" {
				return "", fmt.Errorf("%s runs %s", dev.ID(), v)
			}
		}
		return fmt.Sprintf("halted at its canary, which went back to 1.1.0; %d others untouched", n-1), nil
	})
}

func (d *demo) renewal(n int) error {
	return d.step("certificates of the whole fleet renewed", func() (string, error) {
		before := map[fleet.DeviceID]fleet.Serial{}
		connects := map[fleet.DeviceID]uint64{}
		for _, dev := range d.devices.All() {
			before[dev.ID()], connects[dev.ID()] = dev.Snapshot().Serial, dev.Counts().Connects
		}
		if out, err := d.muster("certs", "renew", "--all"); err != nil {
			return out, err
		}
		renewed := func() (left int) {
			for _, dev := range d.devices.All() {
				if s := dev.Snapshot(); !s.Connected || s.Serial == before[dev.ID()] {
					left++
				}
			}
			return left
		}
		if err := d.await(time.Minute, "new certificates", func() bool { return renewed() == 0 }); err != nil {
			return "", fmt.Errorf("%w: %d devices left", err, renewed())
		}
		var most uint64
		for _, dev := range d.devices.All() {
			most = max(most, dev.Counts().Connects-connects[dev.ID()])
		}
		if most > 1 {
			return "", fmt.Errorf("a device reconnected %d times", most)
		}
		return fmt.Sprintf("%d new keys, each device off for one reconnect", n), nil
	})
}

func (d *demo) expiry(int) error {
	id := fleet.DeviceID("lamp-late")
	return d.step("a device whose certificate expired comes back", func() (string, error) {
		if out, err := d.muster("device", "add", string(id), "--product", "lamp"); err != nil {
			return out, err
		}
		if out, err := d.muster("device", "credentials", string(id), "--lifetime", "4s", "--out", d.credentials(id)); err != nil {
			return out, err
		}
		dev, err := d.devices.Run(d.credentials(id), nil)
		if err != nil {
			return "", err
		}
		first := fleet.Serial("")
		if err := d.await(30*time.Second, "its first session", func() bool {
			s := dev.Snapshot()
			first = s.Serial
			return s.Connected && len(d.devices.Since(0, id, simdev.Answered)) > 0
		}); err != nil {
			return "", err
		}
		d.out.note("connected with a certificate that holds four seconds")
		if err := d.await(40*time.Second, "the fallback", func() bool { return len(d.devices.Since(0, id, simdev.FallbackTaken)) > 0 }); err != nil {
			return "", err
		}
		fell := time.Now()
		d.out.note("thrown out at its end, refused at the door: goes to the fallback vhost")
		if err := d.await(40*time.Second, "its return", func() bool {
			s := dev.Snapshot()
			return s.Connected && s.Door == "devices" && s.Serial != first
		}); err != nil {
			return "", err
		}
		return fmt.Sprintf("new certificate and password in %.1f s, known key, no operator", time.Since(fell).Seconds()), nil
	})
}

func (d *demo) revocation(int) error {
	id := d.ids[len(d.ids)-1]
	return d.step("a revoked device is thrown out and stays out", func() (string, error) {
		dev := d.devices.Get(id)
		mark := d.devices.Mark()
		began := time.Now()
		revoked := make(chan error, 1)
		go func() {
			out, err := d.muster("certs", "revoke", "--device", string(id), "--reason", "key-compromise")
			if err != nil {
				err = fmt.Errorf("%s: %w", out, err)
			}
			revoked <- err
		}()
		gone := func() bool { return len(d.devices.Since(mark, id, simdev.Disconnected)) > 0 }
		if err := d.await(20*time.Second, "the end of its session", func() bool { return gone() || len(revoked) > 0 }); err != nil {
			return "", err
		}
		closed := time.Since(began)
		if err := <-revoked; err != nil {
			return "", err
		}
		if !gone() {
			return "", fmt.Errorf("%s keeps its session", id)
		}
		if err := d.await(40*time.Second, "refusals at both doors", func() bool {
			return len(d.devices.Since(mark, id, simdev.FallbackTaken)) > 0 && len(d.devices.Since(mark, id, simdev.Refused)) > 2
		}); err != nil {
			return "", err
		}
		if dev.Snapshot().Connected || len(d.devices.Since(mark, id, simdev.Connected)) > 0 {
			return "", fmt.Errorf("%s came in again", id)
		}
		if err := d.refusedByHTTPS(id); err != nil {
			return "", err
		}
		return fmt.Sprintf("live session closed after %.0f ms; refused on 8883, 8884, 8443 and 8444", closed.Seconds()*1000), nil
	})
}

func (d *demo) lookAround() {
	c := d.w.Config
	fmt.Printf(`
The fleet stays up until Ctrl-C. Look around, in another terminal:

  export MUSTER_URL=%s MUSTER_CA=%s MUSTER_TOKEN=%s
  bin/muster device list
  bin/muster device show lamp-01
  bin/muster rollout show lamp-1-2-0
  bin/muster rollout history lamp-1-2-0
  bin/muster certs status
  bin/muster audit
  curl --cacert $MUSTER_CA %s/readyz

  MQTT %s (mutual TLS)   fallback %s   devices https://%s   log %s
`, d.w.URL, d.w.CAFile, d.w.Token, d.w.URL, c.Public.MQTT, c.Public.FallbackMQTT, c.Public.HTTPS, d.w.LogFile())
}
