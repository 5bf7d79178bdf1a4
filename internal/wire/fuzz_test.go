package wire_test

import (
	"bytes"
	"testing"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// fuzzCodec holds a codec to two rules: nothing panics, and what was accepted is written in one form that is accepted
// again and means the same.
func fuzzCodec(f *testing.F, message string) {
	for _, file := range samples(f) {
		for _, s := range file.Cases {
			f.Add([]byte(s.Payload))
		}
	}
	codec := codecs[message]
	f.Fuzz(func(t *testing.T, b []byte) {
		once, err := codec(b)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) {
				t.Fatalf("%v", err)
			}
			return
		}
		twice, err := codec(once)
		if err != nil {
			t.Fatalf("%s became %s: %v", b, once, err)
		}
		if !bytes.Equal(once, twice) {
			t.Fatalf("%s became %s, then %s", b, once, twice)
		}
	})
}

func FuzzDecodeHello(f *testing.F)     { fuzzCodec(f, "hello") }
func FuzzDecodeState(f *testing.F)     { fuzzCodec(f, "state") }
func FuzzDecodeOTA(f *testing.F)       { fuzzCodec(f, "ota") }
func FuzzDecodeCert(f *testing.F)      { fuzzCodec(f, "cert") }
func FuzzDecodeOffer(f *testing.F)     { fuzzCodec(f, "offer") }
func FuzzDecodeCertOrder(f *testing.F) { fuzzCodec(f, "cert-order") }
func FuzzDecodeCmd(f *testing.F)       { fuzzCodec(f, "cmd") }

func FuzzParseUpKey(f *testing.F) {
	for _, s := range []string{"d.dev-1.up.hello", "d.dev-1.up.tm.x", "d.*.up.hello", "d.a/b.up.ota", "", "....", "d.\xff.up.cert"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		id, w, err := wire.ParseUpKey(key)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) || id != "" || w != "" {
				t.Fatalf("%q %q %v", id, w, err)
			}
			return
		}
		if key != "d."+string(id)+".up."+string(w) || !id.Valid() {
			t.Fatalf("%q read as %q and %q", key, id, w)
		}
	})
}

func FuzzParseCertUser(f *testing.F) {
	for _, s := range []string{"urn:muster:device:dev-1:5b1e", "urn:muster:device:dev-1:05", "dev-1", "urn:muster:device:a:b:c", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, user string) {
		id, s, err := wire.ParseCertUser(user)
		if err != nil {
			return
		}
		if wire.CertUser(id, s) != user || !id.Valid() {
			t.Fatalf("%q read as %q and %q", user, id, s)
		}
	})
}

// FuzzAssembler feeds slices in the order that the input says, from two messages, with changed bytes: what comes out whole
// is always one of the two.
func FuzzAssembler(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, byte(150))
	f.Add([]byte{0x80, 0, 0x81, 1, 0xff, 3}, byte(200))
	f.Fuzz(func(t *testing.T, order []byte, budget byte) {
		var pool []wire.CertOrder
		for fill := range byte(2) {
			payloads, err := wire.SplitCert(push(fill), max(int(budget), 120))
			if err != nil {
				t.Fatal(err)
			}
			pool = append(pool, partsOf(t, payloads)...)
		}
		var a wire.Assembler
		for i, n := range order {
			p := pool[int(n)%len(pool)]
			if n == 0xff {
				p.Data = append([]byte{n}, p.Data...)
			}
			whole, done, err := a.Add(p)
			if err != nil && !fleet.Is(err, fleet.Invalid) {
				t.Fatal(err)
			}
			if done && whole.Password != push(0).Password && whole.Password != push(1).Password {
				t.Fatalf("slice %d: a message that nobody sent: %+v", i, whole)
			}
		}
	})
}

// FuzzSplitCert: whatever the budget, each payload fits it, or there is an error.
func FuzzSplitCert(f *testing.F) {
	f.Add([]byte("leaf"), []byte("intermediate"), 256-9-34)
	f.Add(bytes.Repeat([]byte{0x30}, 700), bytes.Repeat([]byte{0x31}, 500), 256-9-34)
	f.Add(bytes.Repeat([]byte{0x30}, 700), []byte{}, 80)
	f.Add([]byte{1}, []byte{2}, -1)
	f.Fuzz(func(t *testing.T, leaf, intermediate []byte, budget int) {
		if len(leaf)+len(intermediate) > 8<<10 {
			return
		}
		payloads, err := wire.SplitCert(wire.CertOrder{Op: wire.CertPush, Serial: "5b", Chain: [][]byte{leaf, intermediate}}, budget)
		if err != nil {
			if !fleet.Is(err, fleet.Unprocessable) {
				t.Fatal(err)
			}
			return
		}
		for _, b := range payloads {
			if len(b) > budget {
				t.Fatalf("%d bytes over a budget of %d", len(b), budget)
			}
		}
	})
}
