package pki

import (
	"strings"
	"testing"

	"muster/internal/fleet"
)

func TestParseBlocklist(t *testing.T) {
	a, b := strings.Repeat("ab", 32), strings.Repeat("01", 32)
	got, err := ParseBlocklist("# leaked 2030\n\n " + strings.ToUpper(a) + "\t# pump\r\n" + b)
	if err != nil || len(got) != 2 || !got[fleet.Hash(a)] || !got[fleet.Hash(b)] {
		t.Fatal(got, err)
	}
	for _, in := range []string{a + " " + b, a[1:], a + "\nnonsense", "zz" + a[2:], strings.Repeat("\n", MaxBlocklist+1)} {
		if _, err := ParseBlocklist(in); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%.80q: %v", in, err)
		}
	}
}

// Whatever is in the file: no panic, and nothing but hashes.
func FuzzParseBlocklist(f *testing.F) {
	f.Add(strings.Repeat("ab", 32) + "\n#x\n")
	f.Add("\r\n\x00")
	f.Fuzz(func(t *testing.T, in string) {
		list, err := ParseBlocklist(in)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) {
				t.Fatal(err)
			}
			return
		}
		for h := range list {
			if _, err := fleet.ParseHash(string(h)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
