package simdev

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// Behaviours of a simulated image. It is the image's content alone that decides what the device does with it.
const (
	Good       = "good"         // says hello, and stays
	BootLoop   = "boot-loop"    // restarts before it reaches the network, until the bootloader goes back
	Mute       = "mute"         // connects, but never says hello
	NoMQTT     = "no-mqtt"      // runs, but never connects
	CrashAfter = "crash-after=" // followed by a duration: says hello, and restarts after it, again and again
)

// magic is the first line of every simulated image.
const magic = "MUSTERSIM1\n"

// MaxImage is the size of a firmware slot of a simulated device, in bytes.
const MaxImage = 16 << 20

// Firmware is what a simulated image says of itself: the JSON of its second line.
type Firmware struct {
	Version   string `json:"version"`
	Behaviour string `json:"behaviour"`
}

// MakeImage returns an image of at least size bytes (more only if its two lines need it): the magic line, a line of
// JSON, and bytes that follow from seed. The same arguments always give the same image. It panics where behaviour is not
// one of the constants: that is a fault of the caller.
func MakeImage(version, behaviour string, size int, seed uint64) []byte {
	line, err := json.Marshal(Firmware{Version: version, Behaviour: behaviour}, json.Deterministic(true))
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
	_, err := f.crashAfter()
	return err
}

// crashAfter returns how long the image runs before it crashes, 0 if it does not. It refuses unknown behaviours.
func (f Firmware) crashAfter() (time.Duration, error) {
	switch f.Behaviour {
	case Good, BootLoop, Mute, NoMQTT:
		return 0, nil
	}
	text, ok := strings.CutPrefix(f.Behaviour, CrashAfter)
	d, err := time.ParseDuration(text)
	if !ok || err != nil || d <= 0 {
		return 0, fleet.Errorf(fleet.Invalid, "image: behaviour is none of %s", strings.Join([]string{Good, BootLoop, Mute, NoMQTT, CrashAfter + "<duration>"}, ", "))
	}
	return d, nil
}

func (f Firmware) String() string { return fmt.Sprintf("%s (%s)", f.Version, f.Behaviour) }
