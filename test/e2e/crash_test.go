package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"
	"github.com/go-json-experiment/json"

	"muster/api"
	"muster/internal/app"
	"muster/internal/fleet"
	"muster/internal/simdev"
	"muster/test/world"
)

// kills is how often musterd dies during a rollout.
const kills = 5

func TestRolloutSurvivesKillsOfMusterd(t *testing.T) {
	w := theFragile(t)
	s := newScene(t, w, "surviving")
	ids := s.add(12)
	s.runAll(ids, func(c *simdev.Config) {
		c.Timing.Watchdog, c.Timing.Fallback.After = time.Minute, time.Minute // patient enough for all of this
		c.Timing.BackoffCap = time.Second
	})
	image := s.release("1.1.0", simdev.Good, 300_000)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	s.muster("rollout", "create", s.product+"-110", "--product", s.product, "--version", "1.1.0",
		"--stage", "1", "--stage", "25%", "--stage", "100%", "--max-in-flight", "2", "--verify-for", "0s", "--start")
	for range kills {
		s.letPass(rnd.IntN(30), time.Duration(rnd.IntN(700))*time.Millisecond)
		at := time.Now()
		if err := w.KillMusterd(); err != nil {
			t.Fatal(err)
		}
		if err := w.StartMusterd(s.ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("killed and back after %s; %d of %d devices are done", time.Since(at).Round(time.Millisecond), s.rollout(s.product + "-110").Counts["succeeded"], len(ids))
	}
	r := s.awaitRollout(s.product+"-110", api.RolloutStateCompleted)
	if r.Counts["succeeded"] != len(ids) || r.Failures != 0 {
		t.Errorf("counts %v, %d failures", r.Counts, r.Failures)
	}
	for _, id := range ids {
		if n := s.installs(id); n != 1 || s.did(0, id, simdev.RolledBack) > 0 {
			t.Errorf("%s installed %d times", id, n)
		}
		if d := s.device(id); d.Status.Image != string(image) {
			t.Errorf("%s runs %s %s", id, d.Status.Version, d.Status.Image)
		}
	}
	s.fsck(w)
}

// TestRenewalSurvivesKillsOfMusterd: whatever was on its way is brought to its end, and nobody is locked out.
func TestRenewalSurvivesKillsOfMusterd(t *testing.T) {
	w := theFragile(t)
	s := newScene(t, w, "persisting")
	ids := s.add(8)
	s.runAll(ids, func(c *simdev.Config) { c.Timing.Fallback.After, c.Timing.BackoffCap = time.Minute, time.Second })
	old := map[fleet.DeviceID]fleet.Serial{}
	for _, id := range ids {
		old[id] = s.devs.Get(id).Snapshot().Serial
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	mark := s.devs.Mark()
	args := []string{"certs", "renew", "--device"}
	for _, id := range ids {
		s.muster(append(args, string(id))...)
	}
	for range 3 {
		s.letPass(rnd.IntN(20), time.Duration(rnd.IntN(100))*time.Millisecond)
		if err := w.KillMusterd(); err != nil {
			t.Fatal(err)
		}
		if err := w.StartMusterd(s.ctx); err != nil {
			t.Fatal(err)
		}
	}
	s.awaitAll("connects with a new certificate", ids, func(id fleet.DeviceID) bool { return s.inFrontBy(id, old[id]) })
	for _, id := range ids {
		s.await(string(id)+": one certificate rules", func() bool {
			d, now := s.device(id), s.devs.Get(id).Snapshot().Serial
			var active int
			for _, c := range s.certificates(id) {
				if c.State == api.CertificateStateActive {
					active++
				}
			}
			return fleet.Serial(d.Current) == now && d.Next == "" && active == 1 && s.certificates(id)[old[id]].State == api.CertificateStateSuperseded
		})
		if n := s.did(mark, id, simdev.FallbackTaken); n > 0 {
			t.Errorf("%s had to take the fallback %d times", id, n)
		}
	}
	s.fsck(w)
	s.onRecord(ids)
}

// onRecord checks that the trail proves itself, and tells once of each certificate in use that it was issued and used.
func (s *scene) onRecord(ids []fleet.DeviceID) {
	s.Helper()
	if out := s.muster("audit", "verify"); !strings.Contains(out, "intact: entries 1 to") {
		s.Errorf("audit verify: %s", out)
	}
	lines := map[string]int{}
	for _, e := range read[[]api.AuditEntry](s, "audit", "--limit", "0") {
		word, _, _ := strings.Cut(strings.TrimPrefix(e.Details, "serial "), " ")
		lines[e.What+" "+e.On+" "+word]++
	}
	for _, id := range ids {
		for _, what := range []string{"certificate.issue", "certificate.activate"} {
			if n := lines[fmt.Sprintf("%s %s %s", what, id, s.device(id).Current)]; n != 1 {
				s.Errorf("%d lines %s of %s", n, what, id)
			}
		}
	}
}

// letPass waits until the devices have done n more things, at most for d.
func (s *scene) letPass(n int, d time.Duration) {
	ctx, cancel := context.WithTimeout(s.ctx, d)
	defer cancel()
	mark := s.devs.Mark()
	_ = s.devs.Await(ctx, "", func() bool { return s.devs.Mark() >= mark+n })
}

// fsck stops musterd, checks its store and starts it again.
func (s *scene) fsck(w *world.World) {
	s.Helper()
	if err := w.StopMusterd(s.ctx); err != nil {
		s.Fatal(err)
	}
	out, err := exec.CommandContext(s.ctx, fragile.Binary, "fsck", "--config", filepath.Join(w.Config.DataDir, app.FileConfig)).CombinedOutput()
	if err != nil {
		s.Errorf("fsck: %v: %s", err, out)
	}
	if err := w.StartMusterd(s.ctx); err != nil {
		s.Fatal(err)
	}
	log, err := os.ReadFile(w.LogFile())
	if err != nil {
		s.Fatal(err)
	}
	if strings.Contains(string(log), "WARNING: DATA RACE") {
		s.Error("the race detector spoke in musterd's log")
	}
}

// reporter is a device that reports its state one number after the other, and keeps a ledger of what was acknowledged.
type reporter struct {
	id     fleet.DeviceID
	addr   string
	tls    *tls.Config
	mu     sync.Mutex
	acked  []int
	losses int
	why    []string // of each loss, and of each acknowledgement that was not a plain one
}

// run reports until ctx ends, and connects again when the connection is lost.
func (r *reporter) run(ctx context.Context) {
	for n := 0; ctx.Err() == nil; {
		n = r.session(ctx, n)
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// session reports from n on and returns the number to go on with. A number whose acknowledgement did not come is never
// used again: it may have been stored or not.
func (r *reporter) session(ctx context.Context, n int) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := (&tls.Dialer{Config: r.tls}).DialContext(ctx, "tcp", r.addr)
	if err != nil {
		return n
	}
	defer conn.Close()
	// Paho writes a packet in pieces: without the lock a ping lands in the middle of a report, which then is another one.
	c := paho.NewClient(paho.ClientConfig{Conn: packets.NewThreadSafeConn(conn), PacketTimeout: 5 * time.Second, OnClientError: func(error) { cancel() }, OnServerDisconnect: func(*paho.Disconnect) { cancel() }})
	if _, err := c.Connect(ctx, &paho.Connect{ClientID: string(r.id), CleanStart: true, KeepAlive: 10}); err != nil {
		return n
	}
	for ; ctx.Err() == nil; n++ {
		limit, done := context.WithTimeout(ctx, 5*time.Second)
		res, err := c.Publish(limit, &paho.Publish{Topic: "d/" + string(r.id) + "/up/state", QoS: 1, Payload: fmt.Appendf(nil, `{"n%d":%d}`, n, n)})
		done()
		r.mu.Lock()
		if err == nil {
			r.acked = append(r.acked, n)
			if res.ReasonCode != 0 {
				r.why = append(r.why, fmt.Sprintf("%s n%d: acknowledged with reason %#x", time.Now().Format("15:04:05.000"), n, res.ReasonCode))
			}
		} else {
			r.losses++
			r.why = append(r.why, fmt.Sprintf("%s n%d: %v", time.Now().Format("15:04:05.000"), n, err))
		}
		r.mu.Unlock()
		if err != nil {
			return n + 1
		}
		select { // a device's flash is not larger: the document that muster keeps has an end
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	_ = c.Disconnect(&paho.Disconnect{})
	<-c.Done()
	return n
}

func (r *reporter) ledger() ([]int, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]int(nil), r.acked...), r.losses
}

func TestAcknowledgedReportsSurviveAKillOfTheBroker(t *testing.T) {
	w := theFragile(t)
	s := newScene(t, w, "ledger")
	ids := s.add(3)
	var rs []*reporter
	ctx, stop := context.WithCancel(s.ctx)
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	t.Cleanup(stop)
	for _, id := range ids {
		cert, err := tls.LoadX509KeyPair(filepath.Join(s.kit(id), simdev.CertFile), filepath.Join(s.kit(id), simdev.KeyFile))
		if err != nil {
			t.Fatal(err)
		}
		r := &reporter{id: id, addr: w.Config.Public.MQTT, tls: &tls.Config{RootCAs: w.Trust, Certificates: []tls.Certificate{cert}}}
		rs = append(rs, r)
		running.Go(func() { r.run(ctx) })
	}
	atLeast := func(n []int) func() bool {
		return func() bool {
			for i, r := range rs {
				if acked, _ := r.ledger(); len(acked) < n[i] {
					return false
				}
			}
			return true
		}
	}
	s.await("reports before", atLeast([]int{100, 100, 100}))
	if err := w.Broker.Kill(s.ctx); err != nil {
		t.Fatal(err)
	}
	var more []int
	for _, r := range rs {
		acked, _ := r.ledger()
		more = append(more, len(acked)+50)
	}
	if err := w.Broker.Boot(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.await("reports after", atLeast(more))
	stop()
	running.Wait()
	for _, r := range rs {
		acked, losses := r.ledger()
		t.Logf("%s: %d acknowledged, %d not", r.id, len(acked), losses)
		var missing []int
		if err := s.devs.Await(s.ctx, "stored", func() bool { missing = s.missing(r.id, acked); return len(missing) == 0 }); err != nil {
			t.Errorf("%s: %d of %d acknowledged reports are lost: %v\n%s\n%s", r.id, len(missing), len(acked), missing, strings.Join(r.why, "\n"), s.stayed(r.id))
		}
	}
}

// stayed says what musterd's log has of a device and of the broker, and what it set aside.
func (s *scene) stayed(id fleet.DeviceID) string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := s.w.Muster(ctx, "quarantine", "list")
	if err != nil {
		out = err.Error()
	}
	log, err := os.ReadFile(s.w.LogFile())
	if err != nil {
		return out
	}
	var b strings.Builder
	b.WriteString(out)
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, string(id)) || strings.Contains(line, "broker") || strings.Contains(line, "stored") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// missing returns which numbers are not in the state that muster keeps.
func (s *scene) missing(id fleet.DeviceID, acked []int) (out []int) {
	s.Helper()
	state := map[string]int{}
	if doc := s.device(id).Status.State; len(doc) > 0 {
		if err := json.Unmarshal(doc, &state); err != nil {
			s.Fatal(err)
		}
	}
	for _, n := range acked {
		if v, ok := state[fmt.Sprint("n", n)]; !ok || v != n {
			out = append(out, n)
		}
	}
	return out
}
