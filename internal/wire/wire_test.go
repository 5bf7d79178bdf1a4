package wire_test

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"muster/internal/fleet"
	"muster/internal/wire"
)

func TestUpKeys(t *testing.T) {
	long := strings.Repeat("a", 40)
	for _, c := range []struct {
		key  string
		id   fleet.DeviceID
		word wire.Up
	}{
		{"d.dev-1.up.hello", "dev-1", wire.UpHello},
		{"d." + long + ".up.cert", fleet.DeviceID(long), wire.UpCert},
		{"d.0.up.ota", "0", wire.UpOTA},
		{"d.x.up.state", "x", wire.UpState},
	} {
		id, w, err := wire.ParseUpKey(c.key)
		if err != nil || id != c.id || w != c.word {
			t.Errorf("%s: %q %q %v", c.key, id, w, err)
		}
		if got := strings.ReplaceAll(wire.UpTopic(c.id, c.word), "/", "."); got != c.key {
			t.Errorf("topic of %s is %s", c.key, got)
		}
	}
	for _, bad := range []string{
		"", "d", "d.dev-1.up", "d.dev-1.up.", "d.dev-1.up.tm", "d.dev-1.up.tm.x", "d.dev-1.dn.cmd", "d.dev-1.up.hello.x", "x.dev-1.up.hello",
		"d..up.hello", "d.-a.up.hello", "d.a-.up.hello", "d.A.up.hello", "d.*.up.hello", "d.#.up.hello", "d.a/b.up.hello", "d.a b.up.hello",
		"d.\x00.up.hello", "d.\xff.up.hello", "d.ä.up.hello", "d.dev-1.up.HELLO", "D.dev-1.up.hello", " d.dev-1.up.hello", "d.dev-1.up.hello\n",
		"d." + long + "a.up.hello", strings.Repeat("d.", 200),
	} {
		_, _, err := wire.ParseUpKey(bad)
		if !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
		if len(bad) > 2 && err != nil && strings.Contains(err.Error(), bad) {
			t.Errorf("%q is echoed: %v", bad, err)
		}
	}
}

func TestCertUsers(t *testing.T) {
	id, s, err := wire.ParseCertUser("urn:muster:device:dev-1:5b1e")
	if err != nil || id != "dev-1" || s != "5b1e" || wire.CertUser(id, s) != "urn:muster:device:dev-1:5b1e" {
		t.Fatalf("%q %q %v", id, s, err)
	}
	for _, bad := range []string{
		"", "dev-1", "urn:muster:device:", "urn:muster:device:dev-1", "urn:muster:device:dev-1:", "urn:muster:device::5b", "urn:muster:device:dev-1:0b",
		"urn:muster:device:dev-1:5B", "urn:muster:device:dev-1:5b:5c", "URN:muster:device:dev-1:5b", "xurn:muster:device:dev-1:5b", "urn:muster:device:dev_1:5b",
		"urn:muster:device:dev-1:5b\n", "urn:muster:device:dev-1:" + strings.Repeat("a", 41), "urn:muster:operator:dev-1:5b",
	} {
		if _, _, err := wire.ParseCertUser(bad); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestMessagesOverTheirLimitAreRefusedBeforeParsing(t *testing.T) {
	big := []byte(`{"a":"` + strings.Repeat("x", wire.MaxPayload) + `"}`)
	for name, decode := range codecs {
		if _, err := decode(big); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "longer than") {
			t.Errorf("%s: %v", name, err)
		}
	}
	deep := []byte(strings.Repeat(`{"a":`, 3000) + "1" + strings.Repeat("}", 1000))
	if _, err := wire.DecodeState(deep); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("deep: %v", err)
	}
}

func TestOfferFitsTheSmallestClient(t *testing.T) {
	sum := sha256.Sum256([]byte("image"))
	job := fleet.RolloutID(strings.Repeat("r", fleet.MaxRolloutIDLen))
	for _, b := range [][]byte{
		wire.OTAOffer{Job: job, Version: "12.34.56", Size: 16 << 20, SHA256: sum[:], Path: "/fw/9f86d081884c7d65", Spread: wire.MaxSpread}.Within(wire.QuietBudget),
		wire.Encode(wire.Cmd{Op: wire.CmdPrevious, Job: job, Image: sum[:]}),
	} {
		if len(b) > wire.QuietBudget {
			t.Errorf("%d bytes: %s", len(b), b)
		}
		t.Logf("%d of %d bytes", len(b), wire.QuietBudget)
	}
}

func TestOfferGivesUpItsSpreadBeforeItsPlace(t *testing.T) {
	offer := wire.OTAOffer{Job: "r1", Version: "1.1.0", Size: 1 << 20, SHA256: make([]byte, 32), Path: "/fw/9f86d081884c7d65", Spread: 600}
	whole := len(wire.Encode(offer))
	for _, c := range []struct{ less, spread int }{{0, 600}, {1, 99}, {2, 9}, {3, 0}, {8, 0}} {
		b := offer.Within(whole - c.less)
		got, err := wire.DecodeOffer(b)
		if err != nil || got.Spread != c.spread || len(b) > whole-c.less {
			t.Errorf("%d bytes less: %d bytes, spread %d, %v; want %d", c.less, len(b), got.Spread, err, c.spread)
		}
		if got.Spread = offer.Spread; !reflect.DeepEqual(got, offer) {
			t.Errorf("%d bytes less: more than the spread was given up: %s", c.less, b)
		}
	}
	if b := offer.Within(50); !bytes.Equal(b, wire.Encode(wire.OTAOffer{Job: "r1", Version: "1.1.0", Size: 1 << 20, SHA256: make([]byte, 32), Path: "/fw/9f86d081884c7d65"})) {
		t.Errorf("%s", b)
	}
}

// PubSubClient 2.8 publishes what fits 7 bytes of header, topic and payload into its 256-byte buffer (esp32.md §7).
func TestHelloFitsPubSubClient(t *testing.T) {
	id := fleet.DeviceID(strings.Repeat("d", fleet.MaxDeviceIDLen))
	b := wire.Encode(wire.Hello{
		Version: "1.10.0", Image: fleet.HashOf(sha256.Sum256(nil)), Hardware: "rev-c", Chip: "esp32s3", SecureVersion: 3, Boot: "panic",
		Serial: fleet.Serial(strings.Repeat("f", 32)), Buffer: 256,
	})
	if n := 7 + len(wire.UpTopic(id, wire.UpHello)) + len(b); n > 256 {
		t.Fatalf("packet of %d bytes", n)
	}
}

func TestBudget(t *testing.T) {
	topic := wire.DownTopic("dev-1", wire.DownCert)
	for _, c := range []struct{ buffer, want int }{{0, 150}, {256, 256 - 9 - len(topic)}, {1024, 1024 - 9 - len(topic)}, {10, 0}} {
		if got := wire.Budget(topic, c.buffer); got != c.want {
			t.Errorf("buffer %d: %d, want %d", c.buffer, got, c.want)
		}
	}
}

func TestHelloAnswerTellsTheTime(t *testing.T) {
	at := time.Date(2026, 11, 1, 0, 0, 0, 5, time.UTC)
	c, err := wire.DecodeCmd(wire.HelloAnswer(at))
	if err != nil || c.Op != wire.CmdHello || c.Time != at.Unix() {
		t.Fatalf("%+v %v", c, err)
	}
}

// push is a message of the size of a real one: two P-256 certificates and a password.
func push(fill byte) wire.CertOrder {
	return wire.CertOrder{
		Op: wire.CertPush, Serial: "5b1e9fd8a4c3720e11d46a90c37b2f58", Password: strings.Repeat("p", 42) + string('a'+rune(fill%26)),
		Chain: [][]byte{bytes.Repeat([]byte{fill}, 640), bytes.Repeat([]byte{1}, 480)},
	}
}

// partsOf decodes payloads of a SplitCert.
func partsOf(t testing.TB, payloads [][]byte) []wire.CertOrder {
	t.Helper()
	out := make([]wire.CertOrder, len(payloads))
	for i, b := range payloads {
		var err error
		out[i], err = wire.DecodeCertOrder(b)
		if err != nil {
			t.Fatalf("slice %d: %v", i, err)
		}
	}
	return out
}

func TestCertificateReachesEveryBuffer(t *testing.T) {
	id := fleet.DeviceID(strings.Repeat("d", 24))
	for _, buffer := range []int{0, 128, 256, 1024, 4096} {
		topic := wire.DownTopic(id, wire.DownCert)
		budget := wire.Budget(topic, buffer)
		payloads, err := wire.SplitCert(push(7), budget)
		if err != nil {
			t.Fatalf("buffer %d: %v", buffer, err)
		}
		for _, p := range payloads {
			if len(p) > budget || (buffer > 0 && 7+len(topic)+len(p) > buffer) {
				t.Fatalf("buffer %d: payload of %d bytes, budget %d", buffer, len(p), budget)
			}
		}
		t.Logf("buffer %d: %d messages", buffer, len(payloads))
		if len(payloads) == 1 {
			continue
		}
		var a wire.Assembler
		parts := partsOf(t, payloads)
		rand.New(rand.NewPCG(1, uint64(buffer))).Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		for i, p := range append(parts[:1:1], parts...) { // the first one twice
			whole, done, err := a.Add(p)
			if err != nil {
				t.Fatal(err)
			}
			if done != (i == len(parts)) {
				t.Fatalf("buffer %d: done is %v at slice %d of %d", buffer, done, i, len(parts))
			}
			if done && !reflect.DeepEqual(whole, push(7)) {
				t.Fatalf("got %+v", whole)
			}
		}
	}
}

func TestSplitSaysWhenNothingFits(t *testing.T) {
	for _, budget := range []int{-5, 0, 60} {
		if _, err := wire.SplitCert(push(1), budget); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("budget %d: %v", budget, err)
		}
	}
	huge := push(1)
	huge.Chain[0] = make([]byte, 200<<10)
	if _, err := wire.SplitCert(huge, 150); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("huge: %v", err)
	}
}

// A certificate sent again with another password has the same serial and as many slices. Half of one joined to half of
// the other would be good JSON with a password that opens nothing.
func TestSlicesOfTwoMessagesAreNotMixed(t *testing.T) {
	one, err := wire.SplitCert(push(1), 200)
	if err != nil {
		t.Fatal(err)
	}
	two, err := wire.SplitCert(push(2), 200)
	if err != nil {
		t.Fatal(err)
	}
	first, second := partsOf(t, one), partsOf(t, two)
	if len(first) != len(second) || first[0].Tag == second[0].Tag {
		t.Fatalf("%d and %d slices, tags %q and %q", len(first), len(second), first[0].Tag, second[0].Tag)
	}
	var a wire.Assembler
	half := len(first) / 2
	for _, p := range append(first[:half:half], second[half:]...) {
		if _, done, err := a.Add(p); done || err != nil {
			t.Fatalf("done %v, %v", done, err)
		}
	}
	for i, p := range second[:half] {
		whole, done, err := a.Add(p)
		if err != nil {
			t.Fatal(err)
		}
		if done != (i == half-1) || done && whole.Password != push(2).Password {
			t.Fatalf("slice %d: done %v, %+v", i, done, whole)
		}
	}
	// The same with equal tags: only the digest can tell that what comes out, good JSON, was never sent.
	var last error
	for _, p := range append(slicesWithTag(first[:half], second[0].Tag), second[half:]...) {
		_, done, err := a.Add(p)
		if done {
			t.Fatal("halves of two messages were taken for one")
		}
		last = err
	}
	if !fleet.Is(last, fleet.Invalid) {
		t.Fatalf("halves of two messages: %v", last)
	}
}

func slicesWithTag(in []wire.CertOrder, tag string) []wire.CertOrder {
	out := append([]wire.CertOrder(nil), in...)
	for i := range out {
		out[i].Tag = tag
	}
	return out
}

func TestAssemblerHoldsNoMoreThanAMessage(t *testing.T) {
	var a wire.Assembler
	var last error
	for i := range 40 {
		_, _, last = a.Add(wire.CertOrder{Op: wire.CertPart, Tag: "01234567", Index: i, Count: 900, Data: make([]byte, 1000)})
		if last != nil {
			break
		}
	}
	if !fleet.Is(last, fleet.Invalid) {
		t.Fatalf("40 kB were kept: %v", last)
	}
}

func TestSplitAndAssembleAgree(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		order := wire.CertOrder{
			Op: wire.CertPush, Serial: fleet.Serial("1" + rapid.StringMatching(`[0-9a-f]{0,39}`).Draw(r, "serial")),
			Password: rapid.StringMatching(`[A-Za-z0-9_-]{0,43}`).Draw(r, "password"),
		}
		for range rapid.IntRange(1, 3).Draw(r, "certificates") {
			order.Chain = append(order.Chain, rapid.SliceOfN(rapid.Byte(), 1, 900).Draw(r, "der"))
		}
		budget := rapid.IntRange(76, 4096).Draw(r, "budget")
		payloads, err := wire.SplitCert(order, budget)
		if err != nil {
			r.Fatal(err)
		}
		var a wire.Assembler
		for i, b := range payloads {
			if len(b) > budget {
				r.Fatalf("%d bytes over a budget of %d", len(b), budget)
			}
			o, err := wire.DecodeCertOrder(b)
			if err != nil {
				r.Fatal(err)
			}
			done := o.Op == wire.CertPush
			if !done {
				o, done, err = a.Add(o)
			}
			if err != nil || done != (i == len(payloads)-1) {
				r.Fatalf("slice %d of %d: done %v, %v", i, len(payloads), done, err)
			}
			if done && !reflect.DeepEqual(o, order) {
				r.Fatalf("got %+v, want %+v", o, order)
			}
		}
	})
}
