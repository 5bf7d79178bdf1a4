package simdev

import (
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// Whatever is torn, a twin reads as the value before or after the torn write, and never as anything else.
func TestTwinSurvivesTornWrites(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		flash := &cutFlash{Flash: &MemFlash{}}
		tw := twin[int]{records{flash}, "x"}
		want := 0
		for i := range rapid.IntRange(1, 30).Draw(r, "writes") {
			cut := rapid.SampledFrom([]CutPoint{"", CutBefore, CutMiddle, CutAfter}).Draw(r, "cut")
			if cut != "" {
				flash.set(Cut{flash.count() + 1, cut})
			}
			err := tw.write(i + 1)
			if _, is := errors.AsType[errPowerCut](err); is != (cut != "") || err != nil && !is {
				r.Fatalf("cut %q: %v", cut, err)
			}
			if cut == "" || cut == CutAfter {
				want = i + 1
			}
			flash.powerOn()
			if got, _, err := tw.read(); err != nil || got != want {
				r.Fatalf("after a cut %q: %d, %v, want %d", cut, got, err, want)
			}
		}
	})
}

// A device without power writes nothing, whoever in it still tries.
func TestNothingIsWrittenWithoutPower(t *testing.T) {
	f := &cutFlash{Flash: &MemFlash{}, cut: Cut{1, CutBefore}}
	for range 2 {
		if _, is := errors.AsType[errPowerCut](f.Write("a", []byte("x"))); !is {
			t.Fatal("no power cut")
		}
	}
	f.powerOn()
	if _, err := f.Read("a"); err == nil {
		t.Fatal("written without power")
	}
	if err := f.Write("a", []byte("x")); err != nil {
		t.Fatal(err)
	}
}

func TestBackoffHasFullJitterAndACap(t *testing.T) {
	d, err := New(Config{Credentials: Credentials{Password: "x", Trust: [][]byte{testRoot(t)}, Endpoints: Endpoints{"dev-1", "a:1", "a:2", "a:3", "a:4"}}})
	if err != nil {
		t.Fatal(err)
	}
	timing := d.c.Timing
	for n := range 200 {
		top := min(timing.BackoffCap, timing.BackoffBase<<min(n, 20))
		low, high := 0, 0
		for range 200 {
			b := d.backoff(n)
			if b < 0 || b >= top {
				t.Fatalf("failure %d: %s, cap %s", n, b, top)
			}
			if b < top/4 {
				low++
			}
			if b > top*3/4 {
				high++
			}
		}
		if low < 15 || high < 15 { // 50 each expected
			t.Fatalf("failure %d: %d low and %d high of 200", n, low, high)
		}
	}
}
