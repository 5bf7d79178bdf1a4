package wire_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// sampleFile is one file of api/samples: payloads of one message, byte for byte as they cross the wire. They are for
// whoever writes firmware as much as for these tests.
type sampleFile struct {
	Message string   `json:"message"`
	Topic   string   `json:"topic"`
	About   string   `json:"about"`
	Cases   []sample `json:"cases"`
}

type sample struct {
	Name         string `json:"name"`
	Payload      string `json:"payload"`
	Refused      string `json:"refused"`       // part of the reason; empty: a good message
	BeyondSchema bool   `json:"beyond_schema"` // only the code can refuse it
}

// codecs decode and encode again what each file of samples holds.
var codecs = map[string]func([]byte) ([]byte, error){
	"hello":      again(wire.DecodeHello),
	"ota":        again(wire.DecodeOTA),
	"cert":       again(wire.DecodeCert),
	"offer":      again(wire.DecodeOffer),
	"cert-order": again(wire.DecodeCertOrder),
	"cmd":        again(wire.DecodeCmd),
	"state":      func(b []byte) ([]byte, error) { v, err := wire.DecodeState(b); return v, err },
}

func again[T wire.Hello | wire.OTAReport | wire.CertReport | wire.OTAOffer | wire.CertOrder | wire.Cmd](decode func([]byte) (T, error)) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		v, err := decode(b)
		if err != nil {
			return nil, err
		}
		return wire.Encode(v), nil
	}
}

func samples(t testing.TB) []sampleFile {
	t.Helper()
	names, err := filepath.Glob("../../api/samples/*.json")
	if err != nil || len(names) != len(codecs) {
		t.Fatalf("%d files of samples for %d messages: %v", len(names), len(codecs), err)
	}
	var all []sampleFile
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		var f sampleFile
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatalf("%s: %v", n, err)
		}
		if f.Message+".json" != filepath.Base(n) {
			t.Fatalf("%s describes %q", n, f.Message)
		}
		all = append(all, f)
	}
	return all
}

func TestSamplesAreReadAndWrittenByteForByte(t *testing.T) {
	for _, f := range samples(t) {
		for _, s := range f.Cases {
			t.Run(f.Message+"/"+s.Name, func(t *testing.T) {
				out, err := codecs[f.Message]([]byte(s.Payload))
				if s.Refused == "" {
					if err != nil {
						t.Fatal(err)
					}
					if string(out) != s.Payload {
						t.Fatalf("written again as %s", out)
					}
					return
				}
				if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), s.Refused) {
					t.Fatalf("error %v, want an invalid one that says %q", err, s.Refused)
				}
			})
		}
	}
}
