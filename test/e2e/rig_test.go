package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/test/world"
)

// patience is how long a scenario may take: far longer than it does on an idle machine.
const patience = 90 * time.Second

// settings make happen within seconds what takes days in the field; nobody renews but the scenarios.
var settings = []string{"certificates.min_lifetime=1s", "certificates.sweep=1s", "certificates.renew_schedule="}

// shared is the muster of all scenarios that leave it standing; it runs in this process, where the race detector sees it.
var shared *world.World

// fragile is the muster of those that kill musterd or the broker: a program of its own. Scenarios use it in turns.
var fragile struct {
	sync.Mutex
	*world.World
	Binary string
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	flag.Parse()
	_ = flag.Set("test.parallel", "8") // scenarios wait more than they work
	dir, err := os.MkdirTemp("", "muster-e2e-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	fragile.Binary = filepath.Join(dir, "musterd")
	ctx := context.Background()
	if shared, err = world.Start(ctx, world.Options{Dir: filepath.Join(dir, "shared"), Set: slices.Concat(settings, []string{"broker.probe=true"}), Say: say}); err != nil {
		return fail(err)
	}
	defer func() {
		err := shared.Stop(ctx)
		if fragile.World != nil {
			err = errors.Join(err, fragile.Stop(ctx))
		}
		if err != nil {
			code = fail(err)
		}
	}()
	return m.Run()
}

func say(s string) { fmt.Fprintln(os.Stderr, s) }

func fail(err error) int {
	say("error: " + err.Error())
	return 1
}

// theFragile returns the muster that may be killed, which is the caller's until the test ends.
func theFragile(t *testing.T) *world.World {
	t.Helper()
	fragile.Lock()
	t.Cleanup(fragile.Unlock)
	if fragile.World != nil {
		return fragile.World
	}
	// Not t.Context: it outlives this test.
	out, err := exec.Command("go", "build", "-race", "-o", fragile.Binary, "muster/cmd/musterd").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Without the probe, which waits for the broker's slow refusals: this musterd starts often.
	dir := filepath.Join(filepath.Dir(fragile.Binary), "fragile")
	if fragile.World, err = world.Start(context.Background(), world.Options{Dir: dir, Set: slices.Concat(settings, []string{"broker.probe=false"}), Binary: fragile.Binary, Say: say}); err != nil {
		t.Fatal(err)
	}
	return fragile.World
}

// scene is one scenario's part of a world: a product and devices of its own.
type scene struct {
	*testing.T
	w       *world.World
	ctx     context.Context
	dir     string
	product string
	devs    *world.Devices
}

// scenes are counted, so that a second run of a scenario in the same world begins afresh.
var scenes atomic.Int64

func newScene(t *testing.T, w *world.World, name string) *scene {
	t.Helper()
	product := fmt.Sprintf("%s%d", name, scenes.Add(1))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	s := &scene{T: t, w: w, ctx: ctx, dir: t.TempDir(), product: product, devs: world.NewDevices()}
	t.Cleanup(func() {
		s.devs.Stop()
		cancel()
		if t.Failed() {
			s.tell()
		}
	})
	return s
}

// tell prints what the devices did, the newest last.
func (s *scene) tell() {
	var b strings.Builder
	events := s.devs.Since(0, "", "")
	for _, e := range events[max(0, len(events)-150):] {
		if e.Kind != simdev.SentTelemetry {
			fmt.Fprintf(&b, "%s %s %s %s\n", e.At.Format("15:04:05.000"), e.Device, e.Kind, e.Detail)
		}
	}
	s.Logf("the devices did:\n%s", &b)
}

// muster runs the operator's CLI, which must succeed.
func (s *scene) muster(args ...string) string {
	s.Helper()
	out, err := s.w.Muster(s.ctx, args...)
	if err != nil {
		s.Fatalf("%v\n%s", err, out)
	}
	return out
}

// read runs the operator's CLI and reads the JSON that it prints.
func read[T any](s *scene, args ...string) (v T) {
	s.Helper()
	out := s.muster(append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		s.Fatalf("muster %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return v
}

// add registers n devices and writes their credentials.
func (s *scene) add(n int, flags ...string) []fleet.DeviceID {
	s.Helper()
	var ids []fleet.DeviceID
	csv := "id,product\n"
	for i := range n {
		id := fmt.Sprintf("%s-%02d", s.product, i)
		ids = append(ids, fleet.DeviceID(id))
		csv += id + "," + s.product + "\n"
	}
	s.muster("device", "add", "--from", s.write("fleet.csv", []byte(csv)))
	s.muster(append([]string{"device", "credentials", "--all", "--product", s.product, "--out", filepath.Join(s.dir, "credentials")}, flags...)...)
	return ids
}

// kit is the folder with the credentials of a device.
func (s *scene) kit(id fleet.DeviceID) string { return filepath.Join(s.dir, "credentials", string(id)) }

func (s *scene) write(name string, b []byte) string {
	s.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		s.Fatal(err)
	}
	return path
}

func (s *scene) file(path ...string) string {
	s.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		s.Fatal(err)
	}
	return string(b)
}

// run switches a device on.
func (s *scene) run(id fleet.DeviceID, change func(*simdev.Config)) *simdev.Device {
	s.Helper()
	d, err := s.devs.Run(s.kit(id), change)
	if err != nil {
		s.Fatal(err)
	}
	return d
}

// runAll switches devices on and waits until muster has answered each.
func (s *scene) runAll(ids []fleet.DeviceID, change func(*simdev.Config)) {
	s.Helper()
	for _, id := range ids {
		s.run(id, change)
	}
	s.awaitAll("hello answered", ids, func(id fleet.DeviceID) bool { return s.did(0, id, simdev.Answered) > 0 })
}

// did counts events since a mark.
func (s *scene) did(mark int, id fleet.DeviceID, k simdev.Kind) int {
	return len(s.devs.Since(mark, id, k))
}

// await waits until ok.
func (s *scene) await(what string, ok func() bool) {
	s.Helper()
	if err := s.devs.Await(s.ctx, what, ok); err != nil {
		s.Fatal(err)
	}
}

func (s *scene) awaitAll(what string, ids []fleet.DeviceID, ok func(fleet.DeviceID) bool) {
	s.Helper()
	for _, id := range ids {
		s.await(fmt.Sprintf("%s: %s", id, what), func() bool { return ok(id) })
	}
}

// inFrontBy reports whether a device is connected at the front with a certificate other than not.
func (s *scene) inFrontBy(id fleet.DeviceID, not fleet.Serial) bool {
	snap := s.devs.Get(id).Snapshot()
	return snap.Connected && snap.Door == "devices" && snap.Serial != not
}

// release makes, signs and uploads an image and returns its hash.
func (s *scene) release(version, behaviour string, size int) fleet.Hash {
	s.Helper()
	key := filepath.Join(s.dir, "signing.key")
	if _, err := os.Stat(key); err != nil {
		s.muster("firmware", "keygen", "--out", key)
		s.muster("firmware", "keys", "add", key+".pub.pem", "--product", s.product)
	}
	image := s.write("image-"+version, simdev.MakeImage(version, behaviour, size, 7))
	s.muster("firmware", "sign", image, "--key", key, "--product", s.product, "--version", version)
	s.muster("firmware", "upload", image)
	return fleet.Hash(read[api.Release](s, "firmware", "show", s.product, version).ImageHash)
}

// rollout returns a rollout as it is now.
func (s *scene) rollout(id string) api.Rollout {
	s.Helper()
	return read[api.Rollout](s, "rollout", "show", id)
}

// awaitRollout waits until a rollout is in a state.
func (s *scene) awaitRollout(id string, want api.RolloutState) api.Rollout {
	s.Helper()
	var r api.Rollout
	s.await(fmt.Sprintf("rollout %s is %s", id, want), func() bool { r = s.rollout(id); return r.State == want })
	return r
}

func (s *scene) device(id fleet.DeviceID) api.Device {
	s.Helper()
	return read[api.Device](s, "device", "show", string(id))
}

// certificates of a device by serial.
func (s *scene) certificates(id fleet.DeviceID) map[fleet.Serial]api.Certificate {
	s.Helper()
	out := map[fleet.Serial]api.Certificate{}
	for _, c := range read[[]api.Certificate](s, "certs", "list", string(id)) {
		out[fleet.Serial(c.Serial)] = c
	}
	return out
}

// command runs a program that muster did not write and returns what it said and its exit code, -1 if
// it did not end. It may be called by several goroutines.
func (s *scene) command(name string, args ...string) (string, int) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		s.Errorf("%s %q did not end: %s", name, args, &out)
		return out.String(), -1
	}
	if err != nil && cmd.ProcessState == nil {
		s.Error(err)
		return "", -1
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// front are the arguments with which mosquitto's clients enter 8883 with the certificate in a folder.
func (s *scene) front(id fleet.DeviceID, dir string) []string {
	return []string{
		"-V", "mqttv311", "-h", "localhost", "-p", fmt.Sprint(s.w.Config.Broker.MQTTPort), "--cafile", filepath.Join(dir, simdev.TrustFile),
		"--cert", filepath.Join(dir, simdev.CertFile), "--key", filepath.Join(dir, simdev.KeyFile), "-i", string(id), "-q", "1",
	}
}

// side are those with which they enter 8884 with a password.
func (s *scene) side(id fleet.DeviceID, password string) []string {
	return []string{
		"-V", "mqttv311", "-h", "localhost", "-p", fmt.Sprint(s.w.Config.Broker.FallbackPort), "--cafile", s.w.CAFile,
		"-u", string(id), "-P", password, "-i", string(id), "-q", "1",
	}
}

// admitted reports whether mosquitto is let in and may say a word; said is what it printed.
func (s *scene) admitted(id fleet.DeviceID, login []string) (ok bool, said string) {
	s.Helper()
	out, code := s.command("mosquitto_sub", append(login, "-E", "-t", "d/"+string(id)+"/dn/cmd")...)
	return code == 0, out
}

// wantRefused demands that the broker answers a login with no.
func (s *scene) wantRefused(id fleet.DeviceID, login []string) {
	s.Helper()
	if ok, said := s.admitted(id, login); ok || !strings.Contains(said, "Connection Refused") {
		s.Errorf("%s: admitted %v: %s, want it refused by the broker", id, ok, said)
	}
}

func (s *scene) wantAdmitted(id fleet.DeviceID, login []string) {
	s.Helper()
	if ok, said := s.admitted(id, login); !ok {
		s.Errorf("%s is refused: %s", id, said)
	}
}

// curl fetches a path of the device API into a file and returns the HTTP status, "000" if there was none.
func (s *scene) curl(into string, addr, path string, args ...string) string {
	s.Helper()
	all := append([]string{"--silent", "--cacert", s.w.CAFile, "--output", into, "--write-out", "%{http_code}", "https://" + addr + path}, args...)
	out, _ := s.command("curl", all...)
	return out
}

// byCertificate are curl's arguments for 8443.
func byCertificate(dir string) []string {
	return []string{"--cert", filepath.Join(dir, simdev.CertFile), "--key", filepath.Join(dir, simdev.KeyFile)}
}
