package simdev_test

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"muster/internal/simdev"
	"muster/internal/wire"
)

// running reports whether the device is connected with the version.
func running(d *simdev.Device, version string) func() bool {
	return func() bool { s := d.Snapshot(); return s.Connected && s.Version == version }
}

// ready starts a device that has said hello.
func ready(w *world, change func(*simdev.Config)) *simdev.Device {
	w.t.Helper()
	d, _ := w.device(change)
	w.eventually(time.Minute, "an answered hello", func() bool { return w.saw(simdev.Answered, "") >= 1 })
	return d
}

func TestUpdate(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		image := simdev.MakeImage("1.1.0", simdev.Good, 200_000, 7)
		w.offerImage("r1", image)
		w.offerImage("r1", image) // twice: messages come at least once
		w.eventually(time.Minute, "the new version, confirmed", func() bool { return running(d, "1.1.0")() && w.saw(simdev.Confirmed, "1.1.0") == 1 })
		want := []wire.OTAStep{wire.StepAccepted, wire.StepDownloading, wire.StepDownloaded, wire.StepInstalled, wire.StepRebooting, wire.StepVerifying}
		if got := w.steps("r1"); !slices.Equal(got, want) {
			t.Errorf("steps %v, want %v", got, want)
		}
		h := get(w, func() wire.Hello { return w.hellos[len(w.hellos)-1] })
		if h.Version != "1.1.0" || h.Boot != "update" || string(h.Image) != fmt.Sprintf("%x", sha256.Sum256(image)) {
			t.Errorf("hello %+v", h)
		}
		time.Sleep(time.Minute) // past the watchdog
		w.set(func() { w.offer = nil })
		w.tell(wire.DownCmd, wire.Encode(wire.Cmd{Op: wire.CmdPrevious}))
		w.eventually(time.Minute, "the old version on command", running(d, "1.0.0"))
		if c := d.Counts(); c.Rollbacks != 0 || c.Downloaded < 1 || c.Bytes < 200_000 {
			t.Errorf("%+v", c)
		}
	})
}

// An image that does not work: the device comes back with the old one and says so, once; and it does not take the same
// image again.
func TestBadImages(t *testing.T) {
	for _, c := range []struct {
		behaviour, because string
		fault              func(*simdev.Faults)
	}{
		{simdev.BootLoop, "3 boots failed", nil},
		{simdev.Mute, "no answer from muster", nil},
		{simdev.NoMQTT, "no answer from muster", nil},
		{simdev.Good, "3 boots failed", func(f *simdev.Faults) { f.BootLoop = true }},
	} {
		t.Run(c.behaviour, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				d := ready(w, func(cfg *simdev.Config) {
					if c.fault != nil {
						c.fault(&cfg.Faults)
					}
				})
				image := simdev.MakeImage("1.1.0", c.behaviour, 5000, 1)
				w.offerImage("r1", image)
				w.eventually(2*time.Minute, "rolled back and reported", func() bool {
					return running(d, "1.0.0")() && slices.Contains(w.steps("r1"), wire.StepRolledBack)
				})
				undone := func() []wire.OTAReport {
					return slices.DeleteFunc(get(w, func() []wire.OTAReport { return slices.Clone(w.reports) }), func(r wire.OTAReport) bool { return r.Step != wire.StepRolledBack })
				}
				if r := undone(); r[0].Error != c.because {
					t.Errorf("reported %+v", r)
				}
				d.Reboot()
				w.eventually(time.Minute, "another hello", func() bool { return w.saw(simdev.Booted, "button") == 1 && d.Snapshot().Connected })
				w.offerImage("r2", image)
				w.eventually(time.Minute, "rejected", func() bool { return slices.Equal(w.steps("r2"), []wire.OTAStep{wire.StepRejected}) })
				if n := d.Counts().Rollbacks; n != 1 {
					t.Errorf("%d rollbacks", n)
				}
				if r := undone(); len(r) != 1 {
					t.Errorf("rollback reported %d times", len(r))
				}
			})
		})
	}
}

// An image that crashes after it was confirmed stays, and shows by its boots.
func TestCrashAfterConfirmation(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.CrashAfter+"30s", 5000, 1))
		w.eventually(5*time.Minute, "three crashes", func() bool { return w.saw(simdev.Rebooting, "panic") == 3 })
		w.eventually(time.Minute, "a hello that says so", func() bool {
			return running(d, "1.1.0")() && get(w, func() bool { return w.hellos[len(w.hellos)-1].Boot == "panic" })
		})
	})
}

func TestMuteForEverWithoutAWatchdog(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) { c.Timing.Watchdog = -1 })
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Mute, 5000, 1))
		w.eventually(time.Minute, "connected with the mute image", running(d, "1.1.0"))
		time.Sleep(30 * time.Minute)
		if n := get(w, func() int { return len(w.hellos) }); n != 1 || !running(d, "1.1.0")() {
			t.Errorf("%d hellos, %+v", n, d.Snapshot())
		}
	})
}

func TestCorruptDownloads(t *testing.T) {
	for _, c := range []struct {
		flips int
		want  wire.OTAStep
	}{{1, wire.StepInstalled}, {2, wire.StepInstalled}, {-1, wire.StepFailed}} {
		t.Run(strconv.Itoa(c.flips), func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				d := ready(w, func(cfg *simdev.Config) { cfg.Faults.CorruptDownloads = c.flips })
				w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Good, 50_000, 1))
				w.eventually(time.Minute, "an end", func() bool { return slices.Contains(w.steps("r1"), c.want) })
				time.Sleep(10 * time.Second)
				if installed := d.Snapshot().Version == "1.1.0"; installed != (c.want == wire.StepInstalled) {
					t.Errorf("runs %s", d.Snapshot().Version)
				}
			})
		})
	}
}

// The line breaks again and again: the device goes on where it was.
func TestDownloadResumes(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		image := simdev.MakeImage("1.1.0", simdev.Good, 300_000, 1)
		var ranges []string
		w.set(func() {
			w.serve = func(rw http.ResponseWriter, r *http.Request) bool {
				from := 0
				if h := r.Header.Get("Range"); h != "" {
					if _, err := fmt.Sscanf(h, "bytes=%d-", &from); err != nil {
						t.Errorf("%q: %v", h, err)
					}
					rw.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(image)-1, len(image)))
				}
				w.set(func() { ranges = append(ranges, r.Header.Get("Range")) })
				rw.Header().Set("Content-Length", strconv.Itoa(len(image)-from))
				if from > 0 {
					rw.WriteHeader(http.StatusPartialContent)
				}
				rest := image[from:]
				if len(rest) > 70_000 {
					rw.Write(rest[:70_000])
					rw.(http.Flusher).Flush()
					panic(http.ErrAbortHandler)
				}
				rw.Write(rest)
				return true
			}
		})
		w.offerImage("r1", image)
		w.eventually(time.Minute, "the new version", running(d, "1.1.0"))
		if got := get(w, func() []string { return slices.Clone(ranges) }); !slices.Equal(got, []string{"", "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"}) {
			t.Errorf("asked for %q", got)
		}
	})
}

// The session is lost in the middle of a download: the next one goes on with what is there.
func TestDownloadOutlivesTheSession(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		image := simdev.MakeImage("1.1.0", simdev.Good, 300_000, 1)
		var ranges []string
		w.set(func() {
			w.serve = func(rw http.ResponseWriter, r *http.Request) bool {
				first := false
				w.set(func() { ranges = append(ranges, r.Header.Get("Range")); first = len(ranges) == 1 })
				if !first {
					return false
				}
				rw.Header().Set("Content-Length", strconv.Itoa(len(image)))
				rw.Write(image[:100_000])
				rw.(http.Flusher).Flush()
				<-r.Context().Done() // no more comes
				return true
			}
		})
		w.offerImage("r1", image)
		time.Sleep(5 * time.Second)
		w.kick()
		w.eventually(time.Minute, "the new version", running(d, "1.1.0"))
		got := get(w, func() []string { return slices.Clone(ranges) })
		if len(got) != 2 || got[1] != "bytes=100000-" {
			t.Errorf("asked for %q", got)
		}
	})
}

func TestDownloadsThatFail(t *testing.T) {
	image := simdev.MakeImage("1.1.0", simdev.Good, 40_000, 1)
	for name, c := range map[string]struct {
		serve func(http.ResponseWriter, *http.Request) bool
		why   string
	}{
		"not granted": {func(rw http.ResponseWriter, _ *http.Request) bool { rw.WriteHeader(404); return true }, "404"},
		"redirect": {func(rw http.ResponseWriter, _ *http.Request) bool {
			rw.Header().Set("Location", "/elsewhere")
			rw.WriteHeader(302)
			return true
		}, "redirects are not followed"},
		"another length": {func(rw http.ResponseWriter, _ *http.Request) bool { rw.Write([]byte("short")); return true }, "5 bytes more"},
		"other bytes": {func(rw http.ResponseWriter, _ *http.Request) bool {
			rw.Header().Set("Content-Length", "40000")
			rw.Write(make([]byte, 40_000))
			return true
		}, "SHA-256 differs"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				d := ready(w, nil)
				w.set(func() { w.serve = c.serve })
				w.offerImage("r1", image)
				w.eventually(time.Minute, "failed", func() bool { return slices.Contains(w.steps("r1"), wire.StepFailed) })
				last := get(w, func() wire.OTAReport { return w.reports[len(w.reports)-1] })
				if !strings.Contains(last.Error, c.why) || !running(d, "1.0.0")() {
					t.Errorf("%+v, %+v", last, d.Snapshot())
				}
			})
		})
	}
}

func TestFileThatIsNoImage(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, nil)
		w.offerImage("r1", []byte(strings.Repeat("not an image", 100)))
		w.eventually(time.Minute, "failed", func() bool { return slices.Contains(w.steps("r1"), wire.StepFailed) })
		if !running(d, "1.0.0")() {
			t.Errorf("%+v", d.Snapshot())
		}
	})
}

// The power goes at every write of an update: in the end the new version runs, or the old one and the device said so.
func TestPowerCutInEveryWriteOfAnUpdate(t *testing.T) {
	atEveryWrite(t, func(t *testing.T, w *world, cut simdev.Cut) bool {
		d := ready(w, func(c *simdev.Config) { c.Faults.PowerCut = cut })
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Good, 20_000, 1))
		w.eventually(2*time.Minute, "the new version", running(d, "1.1.0"))
		time.Sleep(time.Minute)
		if !running(d, "1.1.0")() || d.Counts().Rollbacks != 0 {
			t.Errorf("%+v %+v", d.Snapshot(), d.Counts())
		}
		return d.Counts().PowerCuts == 1
	})
}

// A device that only the fallback lets in is offered an image there, and fetches it with its password.
func TestUpdateOverTheFallback(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.set(func() { w.life, w.wait = time.Minute, 1000 })
		d := ready(w, nil)
		w.expire()
		w.eventually(time.Minute, "on the fallback", func() bool { s := d.Snapshot(); return s.Connected && s.Door == wire.VhostFallback })
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Good, 50_000, 1))
		w.eventually(time.Minute, "the new version on the fallback", func() bool { return w.saw(simdev.Booted, "1.1.0") == 1 })
		if n := len(w.steps("r1")); n != 0 {
			t.Errorf("%d reports: the fallback carries hello and cert alone", n)
		}
	})
}

func TestFaultsOfTheWord(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) {
			c.Faults = simdev.Faults{LieInstalled: true, ClaimID: "dev-2", Duplicates: true}
		})
		w.offerImage("r1", simdev.MakeImage("1.1.0", simdev.Good, 5000, 1))
		w.eventually(time.Minute, "says installed", func() bool { return slices.Contains(w.steps("r1"), wire.StepInstalled) })
		time.Sleep(time.Minute)
		if !running(d, "1.0.0")() {
			t.Error("it did install the image")
		}
		w.set(func() {
			if len(w.hellos) != 2 || w.bad != 2 { // each twice
				t.Errorf("%d hellos, %d claims of another id", len(w.hellos), w.bad)
			}
		})
		d.SetFaults(simdev.Faults{Silent: true})
		w.kick()
		w.eventually(time.Minute, "connected again", func() bool { return d.Counts().Connects == 2 })
		time.Sleep(10 * time.Minute)
		if n := get(w, func() int { return len(w.hellos) }); n != 2 {
			t.Errorf("%d hellos of a silent device", n)
		}
		if c := d.Counts(); c.Telemetry < 9 {
			t.Errorf("%+v", c)
		}
	})
}

func TestFaultsOfTheLine(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) {
			c.Timing.TelemetryEvery = time.Second
			c.Faults = simdev.Faults{DropEvery: 20 * time.Second, FloodPerSecond: 50}
		})
		time.Sleep(10 * time.Minute)
		c := d.Counts()
		if c.Connects < 10 || c.Telemetry < 300 || c.Published < 20_000 {
			t.Errorf("%+v", c)
		}
		if lost := w.missing(d); len(lost) != 0 {
			t.Errorf("acknowledged and lost: %v", lost)
		}
	})
}

func TestSmallReceiveBuffer(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		d := ready(w, func(c *simdev.Config) { c.Faults.Buffer = 256 })
		if h := get(w, func() wire.Hello { return w.hellos[0] }); h.Buffer != 256 {
			t.Errorf("%+v", h)
		}
		w.tell(wire.DownCmd, fmt.Appendf(nil, `{"op":%q}`, strings.Repeat("x", 240)))
		w.eventually(time.Minute, "dropped", func() bool { return w.saw(simdev.Dropped, "receive buffer") == 1 })
		w.set(func() { w.renew = true }) // in slices for 256 bytes
		w.tell(wire.DownCert, wire.Encode(wire.CertOrder{Op: wire.CertRenew}))
		w.eventually(time.Minute, "a promotion", func() bool { return w.saw(simdev.Promoted, "") == 1 })
		if w.saw(simdev.Dropped, "") != 1 || !d.Snapshot().Connected {
			t.Errorf("%+v", d.Counts())
		}
	})
}

// An image that cannot do mutual TLS sends the device to the fallback, where it gets a good one, however the power goes.
func TestNoMutualTLSIsRepairedOverTheFallback(t *testing.T) {
	atEveryWrite(t, func(t *testing.T, w *world, cut simdev.Cut) bool {
		good := simdev.MakeImage("2.0.1", simdev.Good, 200_000, 5)
		d, _ := w.device(func(c *simdev.Config) {
			c.Firmware = simdev.MakeImage("2.0.0", simdev.NoMTLS, 1024, 1)
			c.Faults.PowerCut = cut
			c.Faults.SlowDownload = 100_000
			c.Faults.CutDownloads = 1
		})
		w.eventually(time.Minute, "on the fallback", func() bool { return w.saw(simdev.Connected, "fallback") > 0 })
		w.offerImage("repair-1", good)
		w.eventually(5*time.Minute, "at the front with the good image", func() bool {
			s := d.Snapshot()
			return s.Connected && s.Door == wire.VhostDevices && s.Version == "2.0.1"
		})
		if n := get(w, func() int { return w.dials[ends.HTTPS] }); n != 0 {
			t.Errorf("%d downloads from the front's port", n)
		}
		time.Sleep(time.Minute)
		if s := d.Snapshot(); !s.Connected || s.Version != "2.0.1" {
			t.Errorf("it did not stay: %+v", s)
		}
		return d.Counts().PowerCuts == 1
	})
}
