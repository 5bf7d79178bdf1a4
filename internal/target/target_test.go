package target

import (
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"muster/internal/fleet"
)

var now = time.Date(2030, 1, 2, 0, 0, 0, 0, time.UTC)

var lamp = fleet.Device{
	ID: "lamp-1", Product: "lamp", Hardware: "rev-a", Labels: map[string]string{"site": "berlin", "ring": "1"}, Groups: []string{"early", "lab"},
	CreatedAt: now.Add(-48 * time.Hour), Disabled: true,
}

var said = fleet.Status{
	Online: true, Vhost: "devices", LastSeen: now.Add(-time.Hour), Version: "1.4.2", Image: "ab", Hardware: "rev-c", Chip: "esp32s3", ChipRevision: 301,
	SecureVersion: 2, Boot: "panic", State: []byte(`{"heap": 1000, "door": {"open": true}, "name": "x"}`),
}

// Every field, by an expression that chooses the device and one that does not.
func TestEveryField(t *testing.T) {
	for field, exprs := range map[string][2]string{
		"id":             {`id == "lamp-1" && id.startsWith("lamp-")`, `id == "lamp-2"`},
		"product":        {`product == "lamp"`, `product == "boiler"`},
		"hardware":       {`hardware == "rev-c"`, `hardware == "rev-a"`},
		"labels":         {`labels.site == "berlin" && labels["ring"] in ["1", "2"] && has(labels.site) && "site" in labels`, `labels.site != "berlin"`},
		"groups":         {`"lab" in groups && groups.exists(g, g.startsWith("ear"))`, `"field" in groups`},
		"version":        {`version == "1.4.2" && version_less(version, "1.10.0") && version_at_least(version, "1.4.2")`, `version_less(version, "1.4.2")`},
		"image":          {`image == "ab"`, `image == ""`},
		"chip":           {`chip.matches("^esp32")`, `chip == "esp32"`},
		"chip_revision":  {`chip_revision >= 300`, `chip_revision == 0`},
		"secure_version": {`secure_version == 2`, `secure_version > 2`},
		"boot":           {`boot == "panic"`, `boot == "sw"`},
		"online":         {`online`, `!online`},
		"disabled":       {`disabled`, `!disabled`},
		"last_seen":      {`now - last_seen < duration("2h")`, `now - last_seen > duration("2h")`},
		"created":        {`created < timestamp("2030-01-01T00:00:00Z")`, `now - created < duration("24h")`},
		"now":            {`now.getHours("UTC") == 0`, `now < created`},
		"state":          {`state.heap < 2000 && state.heap > 999.5 && state.door.open && state.name == "x"`, `state.heap > 2000.0`},
	} {
		for i, text := range exprs {
			e, err := Compile(text)
			if err != nil {
				t.Errorf("%s: %s: %v", field, text, err)
				continue
			}
			if got, err := e.Match(Facts(lamp, said, now)); err != nil || got != (i == 0) {
				t.Errorf("%s: %s is %v, %v", field, text, got, err)
			}
			if e.String() != text {
				t.Errorf("%q came back as %q", text, e)
			}
		}
	}
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	names, meanings := Fields()
	for i, n := range names {
		if !strings.Contains(string(doc), "| `"+n+"` | "+meanings[i]+" |\n") {
			t.Errorf("docs/operations.md does not explain %s as %q", n, meanings[i])
		}
	}
	if len(names) != 17 || len(meanings) != 17 {
		t.Errorf("%d fields", len(names))
	}
}

// What a device does not have does not choose it, whichever way the question is put; what it must not have can be asked.
func TestWhatADeviceLacks(t *testing.T) {
	bare := Facts(fleet.Device{ID: "d1", Product: "lamp"}, fleet.Status{}, now)
	for text, want := range map[string]bool{
		`labels.site == "berlin"`:             false,
		`labels.site != "berlin"`:             false,
		`!("site" in labels)`:                 true,
		`!has(labels.site)`:                   true,
		`state.heap < 5`:                      false,
		`has(state.heap) && state.heap < 5`:   false,
		`!has(state.heap)`:                    true,
		`version_less(version, "1.0.0")`:      false,
		`version_at_least(version, "0.0.1")`:  false,
		`version == ""`:                       true,
		`chip_revision == 0`:                  true,
		`now - last_seen > duration("1000h")`: true,
		`size(groups) == 0`:                   true,
		`labels.site == "x" || id == "d1"`:    true,
	} {
		e, err := Compile(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, _ := e.Match(bare); got != want {
			t.Errorf("%s is %v", text, got)
		}
	}
}

func TestWhatIsNoExpression(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "is empty",
		"labels.site ==":          "line 1, column",
		`lables.site == "x"`:      `"lables" is no field; there are boot, chip`,
		`id + 1 == 2`:             "no matching overload",
		`id`:                      "gives a string; it must be true or false",
		`size(labels)`:            "gives a int",
		`online &&` + "\n" + ` ?`: "line 2, column",
		`version_less(1, "2")`:    "no matching overload",
		strings.Repeat("!", 3000): "at most 2048 bytes",
		`id.matches("(")`:         "",
	} {
		_, err := Compile(text)
		if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", text, err, want)
		}
	}
}

// What is no bool is an answer for nobody, and says so.
func TestAnExpressionThatForgotItsComparison(t *testing.T) {
	e, err := Compile("state.heap")
	if err != nil {
		return // refused at once is as good
	}
	if got, err := e.Match(Facts(lamp, said, now)); got || err == nil || !strings.Contains(err.Error(), "neither true nor false") {
		t.Errorf("%v, %v", got, err)
	}
}

// An expression that would run for long is cut off: then it chooses nobody.
func TestCostIsBounded(t *testing.T) {
	e, err := Compile(`[1,2,3,4,5,6,7,8,9].all(a, [1,2,3,4,5,6,7,8,9].all(b, [1,2,3,4,5,6,7,8,9].all(c, [1,2,3,4,5,6,7,8,9].all(d, [1,2,3,4,5,6,7,8,9].all(f, [1,2,3,4,5,6,7,8,9].all(g, a+b+c+d+f+g > 0))))))`)
	if err != nil {
		return // refused at once is as good
	}
	if got, err := e.Match(Facts(lamp, said, now)); got || err == nil {
		t.Errorf("%v, %v", got, err)
	}
}

func TestManyAtOnce(t *testing.T) {
	e, err := Compile(`labels.site == "berlin" && state.heap < 2000`)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				if ok, err := e.Match(Facts(lamp, said, now)); !ok || err != nil {
					t.Errorf("%v, %v", ok, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// Whatever is written, compiling and matching end, and neither panics.
func FuzzExpression(f *testing.F) {
	for _, s := range []string{`labels.site == "x"`, `state.a.b[0] > 1`, `groups.all(g, g != "")`, `((((`, `"\u0000"`, `id.matches("a*")`, `now - last_seen < duration("1h")`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := Compile(text)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		_, _ = e.Match(Facts(lamp, said, now))
		_, _ = e.Match(Facts(fleet.Device{}, fleet.Status{}, now))
	})
}

func BenchmarkMatch(b *testing.B) {
	e, err := Compile(`labels.site == "berlin" && version != ""`)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if ok, err := e.Match(Facts(lamp, said, now)); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "matches/s")
}
