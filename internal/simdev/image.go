package simdev

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// Behaviours of a simulated image. It is the image's content alone that decides what the device does with it.
const (
	Good       = "good"         // says hello, and stays
	BootLoop   = "boot-loop"    // restarts before it reaches the network, until the bootloader goes back
	BootLoops  = "boot-loop="   // followed by a number: so many boots fail before one reaches the network
	Mute       = "mute"         // connects, but never says hello
	NoMQTT     = "no-mqtt"      // runs, but never connects; its watchdog goes back
	Dark       = "dark"         // confirms itself before it has reached anybody, and never connects: only a technician helps
	NoMTLS     = "no-mtls"      // confirms itself at once, and presents a certificate that nobody signed: only the fallback lets it in
	NoReports  = "no-reports"   // works, but reports nothing on up/ota: its hello is all there is
	LowHeap    = "low-heap"     // works, but its state tells of a heap that shrinks
	CrashAfter = "crash-after=" // followed by a duration: says hello, and restarts after it, again and again
	Flaky      = "flaky="       // followed by a duration: loses its connection at random, on average so often
)

// Behaviours lists them for people.
const Behaviours = "good, boot-loop[=BOOTS], mute, no-mqtt, dark, no-mtls, no-reports, low-heap, crash-after=DURATION or flaky=DURATION"

// magic is the first line of every simulated image.
const magic = "MUSTERSIM1\n"

// MaxImage is the size of a firmware slot of a simulated device, in bytes.
const MaxImage = 16 << 20

// Firmware is what a simulated image says of itself: the JSON of its second line.
type Firmware struct {
	Version       string `json:"version"`
	Behaviour     string `json:"behaviour"`
	SecureVersion uint32 `json:"secure_version,omitzero"` // a device whose eFuses count higher does not start it
	Needs         string `json:"needs,omitzero"`          // the floor: it starts only over this version or a later one
}

// MakeImage returns the image of a Firmware that is a version and a behaviour alone.
func MakeImage(version, behaviour string, size int, seed uint64) []byte {
	return Firmware{Version: version, Behaviour: behaviour}.Image(size, seed)
}

// Image returns an image of at least size bytes (more only if its two lines need it): the magic line, a line of JSON, and
// bytes that follow from seed. The same arguments always give the same image. It panics where Check finds fault with f:
// that is a fault of the caller.
func (f Firmware) Image(size int, seed uint64) []byte {
	line, err := json.Marshal(f, json.Deterministic(true))
	if err != nil {
		panic("simdev: " + err.Error())
	}
	head := magic + string(line) + "\n"
	b := make([]byte, max(size, len(head)))
	r := rand.NewPCG(seed, uint64(len(head)))
	n := copy(b, head)
	for n < len(b) {
		v := r.Uint64()
		for i := 0; i < 8 && n < len(b); i++ {
			b[n] = byte(v >> (8 * i))
			n++
		}
	}
	if _, err := ParseImage(b); err != nil {
		panic("simdev: " + err.Error())
	}
	return b
}

// ParseImage reads the head of an image; it does for a simulated device what the bootloader's check of the image does for
// a real one. The error is of kind Invalid.
func ParseImage(b []byte) (Firmware, error) {
	rest, ok := bytes.CutPrefix(b, []byte(magic))
	if !ok {
		return Firmware{}, fleet.Errorf(fleet.Invalid, "image: the first line is not %q", strings.TrimSpace(magic))
	}
	line, _, ok := bytes.Cut(rest[:min(len(rest), 512)], []byte("\n"))
	if !ok {
		return Firmware{}, fleet.Errorf(fleet.Invalid, "image: no second line within 512 bytes")
	}
	var f Firmware
	if err := json.Unmarshal(line, &f, json.RejectUnknownMembers(true)); err != nil {
		return Firmware{}, fleet.Wrap(fleet.Invalid, err, `image: the second line is not {"version":…,"behaviour":…}`)
	}
	if err := f.Check(); err != nil {
		return Firmware{}, err
	}
	return f, nil
}

// Check returns an Invalid error where there is no version, or one that no hello could carry, or an unknown behaviour.
func (f Firmware) Check() error {
	if f.Version == "" || len(f.Version) > 32 || strings.ContainsFunc(f.Version, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fleet.Errorf(fleet.Invalid, "image: the version is not 1 to 32 printable characters")
	}
	if f.Needs != "" {
		if _, err := numbers(f.Needs); err != nil {
			return err
		}
	}
	_, err := f.conduct()
	return err
}

// conduct is a behaviour, read.
type conduct struct {
	failedBoots int           // before one reaches the network
	crashAfter  time.Duration // 0: never
	dropEvery   time.Duration // 0: never
}

// conduct refuses unknown behaviours.
func (f Firmware) conduct() (c conduct, err error) {
	name, value, has := strings.Cut(f.Behaviour, "=")
	if has {
		name += "="
	}
	switch name {
	case Good, Mute, NoMQTT, Dark, NoMTLS, NoReports, LowHeap:
	case BootLoop:
		c.failedBoots = math.MaxInt
	case BootLoops:
		c.failedBoots, err = positive(value)
	case CrashAfter:
		c.crashAfter, err = positiveDuration(value)
	case Flaky:
		c.dropEvery, err = positiveDuration(value)
	default:
		err = fmt.Errorf("unknown")
	}
	if err != nil {
		return conduct{}, fleet.Wrap(fleet.Invalid, err, "image: behaviour is none of %s", Behaviours)
	}
	return c, nil
}

// numbers reads a version of the form that floors have: 1 to 4 numbers with dots between. What follows a - or + counts for
// nothing.
func numbers(version string) ([]int, error) {
	version, _, _ = strings.Cut(version, "+")
	version, _, _ = strings.Cut(version, "-")
	parts := strings.Split(version, ".")
	out := make([]int, len(parts))
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 0 || len(parts) > 4 {
			return nil, fleet.Errorf(fleet.Invalid, "image: a version that is compared has 1 to 4 numbers with dots between, such as 1.5.0")
		}
		out[i] = n
	}
	return out, nil
}

// startsOver reports whether the image can take over the data of one of version before. A version that is no numbers is
// below every floor.
func (f Firmware) startsOver(before string) bool {
	if f.Needs == "" {
		return true
	}
	floor, err := numbers(f.Needs)
	have, err2 := numbers(before)
	return err == nil && err2 == nil && slices.Compare(have, floor) >= 0
}

func (f Firmware) String() string { return fmt.Sprintf("%s (%s)", f.Version, f.Behaviour) }
