package firmware

import (
	"testing"

	"pgregory.net/rapid"
)

func TestFit(t *testing.T) {
	release := Manifest{Product: "sensor", Version: "2.0.0", Chip: "esp32s3", SecureVersion: 2, MinVersion: "1.5.0"}
	device := Device{Product: "sensor", Chip: "esp32s3", Version: "1.6.0", SecureVersion: 2}
	with := func(f func(*Device)) Device { d := device; f(&d); return d }
	for name, c := range map[string]struct {
		d         Device
		downgrade bool
		want      Misfit
	}{
		"fits":                          {d: device},
		"chip in esptool's words":       {d: with(func(d *Device) { d.Chip = "ESP32-S3" })},
		"version in a build's words":    {d: with(func(d *Device) { d.Version = "v1.6.0+g38eeba2" })},
		"same version again":            {d: with(func(d *Device) { d.Version = "2.0.0" })},
		"lower counter":                 {d: with(func(d *Device) { d.SecureVersion = 0 })},
		"another product":               {d: with(func(d *Device) { d.Product = "lamp" }), want: WrongProduct},
		"no product":                    {d: with(func(d *Device) { d.Product = "" }), want: WrongProduct},
		"another chip":                  {d: with(func(d *Device) { d.Chip = "esp32" }), want: WrongChip},
		"chip not told":                 {d: with(func(d *Device) { d.Chip = "" }), want: ChipUnknown},
		"counter above":                 {d: with(func(d *Device) { d.SecureVersion = 3 }), want: SecureTooLow},
		"counter above, downgrade":      {d: with(func(d *Device) { d.SecureVersion = 3 }), downgrade: true, want: SecureTooLow},
		"below the minimum":             {d: with(func(d *Device) { d.Version = "1.4.9" }), want: BelowMinimum},
		"prerelease below the minimum":  {d: with(func(d *Device) { d.Version = "1.5.0-rc.1" }), want: BelowMinimum},
		"no order, minimum":             {d: with(func(d *Device) { d.Version = "dev" }), want: VersionUnknown},
		"not told, minimum":             {d: with(func(d *Device) { d.Version = "" }), want: VersionUnknown},
		"newer runs":                    {d: with(func(d *Device) { d.Version = "2.0.1" }), want: Downgrade},
		"newer runs, downgrade allowed": {d: with(func(d *Device) { d.Version = "2.0.1" }), downgrade: true},
	} {
		got, why := release.Fit(c.d, c.downgrade)
		if got != c.want || (got == Fits) != (why == "") {
			t.Errorf("%s: %q (%s), want %q", name, got, why, c.want)
		}
	}
	silicon := Manifest{Product: "sensor", Version: "2.0.0", MinChipRevision: 100, MaxChipRevision: 301}
	for rev, want := range map[int]Misfit{0: NoRevision, 1: WrongRevision, 99: WrongRevision, 100: Fits, 301: Fits, 302: WrongRevision} {
		if got, why := silicon.Fit(Device{Product: "sensor", ChipRevision: rev}, false); got != want || (got == Fits) != (why == "") {
			t.Errorf("revision %d: %q (%s), want %q", rev, got, why, want)
		}
	}
	open := Manifest{Product: "sensor", Version: "2.0.0"}
	for _, v := range []string{"", "dev", "esp-idf: v4.4.7 38eeba213a"} {
		if got, why := open.Fit(Device{Product: "sensor", Version: v}, false); got != Fits {
			t.Errorf("a device that runs %q may take a release that demands nothing: %q (%s)", v, got, why)
		}
	}
}

// Whatever else holds, no offer crosses products or lowers a secure version, and allowing downgrades lifts no other bar.
func TestFitNever(t *testing.T) {
	version := rapid.SampledFrom([]string{"", "dev", "1.0.0", "1.5.0", "2.0.0", "3.0.0-rc.1", "v2.0.0"})
	rapid.Check(t, func(t *rapid.T) {
		m := Manifest{
			Product: "a", Version: "2.0.0", Chip: rapid.SampledFrom([]string{"", "esp32"}).Draw(t, "for"),
			SecureVersion: rapid.Uint32Range(0, 3).Draw(t, "release counter"),
			MinVersion:    Version(rapid.SampledFrom([]string{"", "1.5.0"}).Draw(t, "min")),
		}
		d := Device{
			Product: "a", Chip: rapid.SampledFrom([]string{"", "esp32", "esp32c3"}).Draw(t, "chip"),
			Version: version.Draw(t, "version"), SecureVersion: rapid.Uint32Range(0, 3).Draw(t, "counter"),
		}
		if rapid.Bool().Draw(t, "foreign") {
			d.Product = "b"
		}
		strict, _ := m.Fit(d, false)
		lenient, _ := m.Fit(d, true)
		if lenient == Fits && (d.Product != m.Product || d.SecureVersion > m.SecureVersion || m.Chip != "" && d.Chip != m.Chip) {
			t.Fatalf("%+v fits %+v", m, d)
		}
		if strict != lenient && strict != Downgrade {
			t.Fatalf("allowing downgrades turned %q into %q", strict, lenient)
		}
	})
}
