package esp_test

import (
	"slices"
	"testing"

	"muster/internal/esp"
	"muster/internal/fleet"
)

func TestChips(t *testing.T) {
	want := map[string]struct {
		id         esp.ChipID
		bootloader uint32
		steps      int
		slots      int
	}{
		"esp32": {0, 0x1000, 32, 1}, "esp32s2": {2, 0x1000, 16, 3}, "esp32c3": {5, 0, 16, 3}, "esp32s3": {9, 0, 16, 3},
		"esp32c2": {0xC, 0, 4, 1}, "esp32c6": {0xD, 0, 16, 3}, "esp32h2": {0x10, 0, 16, 3}, "esp32p4": {0x12, 0x2000, 16, 3},
		"esp32c61": {0x14, 0, 16, 3}, "esp32c5": {0x17, 0x2000, 9, 3},
		"esp32h21": {0x19, 0, 0, 0}, "esp32h4": {0x1C, 0x2000, 0, 0}, "esp32s31": {0x20, 0x2000, 0, 0},
	}
	all := esp.Chips()
	if len(all) != len(want) || !slices.IsSortedFunc(all, func(a, b esp.Chip) int { return int(a.ID) - int(b.ID) }) {
		t.Fatalf("%d chips, want %d in the order of their ids", len(all), len(want))
	}
	for name, w := range want {
		c, ok := esp.ChipByName(name)
		if !ok || c.ID != w.id || c.Bootloader != w.bootloader || c.SecureSteps != w.steps || c.KeySlots != w.slots {
			t.Errorf("%s is %+v", name, c)
		}
		if c.ID.String() != name {
			t.Errorf("%s is shown as %s", name, c.ID)
		}
		for _, s := range c.Insecure {
			if !c.Signs(s) {
				t.Errorf("%s: %s is insecure but not known", name, s)
			}
		}
	}
	if _, ok := esp.ChipByName("ESP32"); ok {
		t.Error("names are taken in any case")
	}
	if got := esp.ChipID(0x7777).String(); got != "chip-0x7777" {
		t.Errorf("an unknown chip is shown as %s", got)
	}
	if got := esp.Revision(301).String(); got != "v3.1" {
		t.Errorf("revision 301 is shown as %s", got)
	}
}

func TestFindings(t *testing.T) {
	fs := esp.Findings{
		{Severity: esp.Warning, Code: "a", Message: "odd"},
		{Severity: esp.Error, Code: "b", Offset: 16, Message: "wrong", Hint: "mend it"},
		{Severity: esp.Error, Code: "c", Message: "worse"},
	}
	err := fs.Err()
	if !fleet.Is(err, fleet.Unprocessable) || err.Error() != "at offset 0x10: wrong: mend it" {
		t.Errorf("%v", err)
	}
	if fs[:1].Err() != nil || !fs.Has("c") || fs.Has("d") {
		t.Error("a warning is an error, or a code is not found")
	}
	if got := fs[1].String(); got != "error at 0x10: wrong: mend it" {
		t.Error(got)
	}
}

func TestErased(t *testing.T) {
	b := []byte{0xFF, 0xFF, 0xFF}
	if !esp.Erased(nil) || !esp.Erased(b) {
		t.Error("0xFF is not erased")
	}
	for c := range 255 {
		for i := range b {
			b[i] = byte(c)
			if esp.Erased(b) {
				t.Errorf("0x%02x is erased", c)
			}
			b[i] = 0xFF
		}
	}
}
