package firmware

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

func TestParseVersion(t *testing.T) {
	for s, ok := range map[string]bool{
		"0.0.0": true, "1.2.3": true, "1.2.3-rc.1": true, "1.2.3-0a": true, "10.20.30": true,
		"1.0.0-" + strings.Repeat("x", 26): true,
		"1.0.0-" + strings.Repeat("x", 27): false, // 33 bytes
		"":                                 false, "1": false, "1.2": false, "v1.2.3": false, "v1..2": false, "1.2.3.4": false,
		"01.2.3": false, "1.02.3": false, "1.2.3-": false, "1.2.3-01": false, "1.2.3-a..b": false, "1.2.3+b": false,
		"1.2.3 ": false, " 1.2.3": false, "1.2.٣": false, "1.2.3\x00": false, "-1.2.3": false, "1.2.3-ä": false, "latest": false,
	} {
		v, err := ParseVersion(s)
		if (err == nil) != ok || ok && string(v) != s {
			t.Errorf("ParseVersion(%q) = %q, %v", s, v, err)
		}
		if err != nil && !fleet.Is(err, fleet.Invalid) {
			t.Errorf("ParseVersion(%q): kind %v", s, fleet.KindOf(err))
		}
	}
}

// The order is the example of semver.org §11 and what lies around it.
func TestVersionOrder(t *testing.T) {
	rising := []Version{
		"0.0.0", "0.0.1", "0.9.9", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
		"1.0.0-rc.1", "1.0.0", "1.0.1", "1.9.0", "1.10.0", "2.0.0", "10.0.0",
	}
	for i, a := range rising {
		for j, b := range rising {
			if got := a.Compare(b); got != cmp.Compare(i, j) {
				t.Errorf("%s.Compare(%s) = %d", a, b, got)
			}
		}
	}
}

// slowCompare is semver §11 written out for versions of small numbers.
func slowCompare(a, b string) int {
	ac, ap, aPre := strings.Cut(a, "-")
	bc, bp, bPre := strings.Cut(b, "-")
	if c := slices.Compare(numbers(ac), numbers(bc)); c != 0 {
		return c
	}
	switch { // a prerelease is below its release
	case !aPre && !bPre:
		return 0
	case !aPre:
		return 1
	case !bPre:
		return -1
	}
	x, y := strings.Split(ap, "."), strings.Split(bp, ".")
	for i := range min(len(x), len(y)) {
		m, errM := strconv.Atoi(x[i])
		n, errN := strconv.Atoi(y[i])
		switch {
		case errM == nil && errN == nil && m != n:
			return cmp.Compare(m, n)
		case errM == nil && errN != nil:
			return -1
		case errM != nil && errN == nil:
			return 1
		case errM != nil && x[i] != y[i]:
			return cmp.Compare(x[i], y[i])
		}
	}
	return cmp.Compare(len(x), len(y))
}

func numbers(s string) []int {
	var n []int
	for p := range strings.SplitSeq(s, ".") {
		i, err := strconv.Atoi(p)
		if err != nil {
			panic(err)
		}
		n = append(n, i)
	}
	return n
}

func TestVersionOrderAgainstSlowTwin(t *testing.T) {
	gen := rapid.StringMatching(`(0|[1-9][0-9]?)\.(0|[1-9])\.(0|[1-9])(-(a|b|rc|0|1|[1-9][0-9])(\.(0|2|11|x))?)?`)
	rapid.Check(t, func(t *rapid.T) {
		a, b := gen.Draw(t, "a"), gen.Draw(t, "b")
		v, err := ParseVersion(a)
		if err != nil {
			t.Fatal(err)
		}
		w, err := ParseVersion(b)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := v.Compare(w), slowCompare(a, b); got != want {
			t.Fatalf("%s.Compare(%s) = %d, want %d", a, b, got, want)
		}
		if v.Compare(w) != -w.Compare(v) {
			t.Fatal("not antisymmetric")
		}
	})
}

func FuzzParseVersion(f *testing.F) {
	for _, s := range []string{"1.2.3", "1.2.3-rc.1", "v1.2.3", "1.2", "1.2.3+4", "99999999999999999999.0.0", "1.2.3-00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseVersion(s)
		if err != nil {
			return
		}
		if string(v) != s || len(s) > MaxVersionLen || v.Compare(v) != 0 || v.Compare("0.0.0-0") < 0 {
			t.Fatalf("%q parsed as %q", s, v)
		}
		if strings.Trim(s, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-") != "" {
			t.Fatalf("%q holds what a version cannot", s)
		}
	})
}
