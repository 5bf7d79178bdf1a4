package wire_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"slices"
	"testing"

	"muster/internal/fleet"
	"muster/internal/wire"
)

var rewrite = flag.Bool("rewrite", false, "write api/samples/slices afresh: firmware is tested with it, so only if the protocol changed")

// sliceSample is a certificate on its way to a device with a small receive buffer, packet by packet.
type sliceSample struct {
	About    string         `json:"about"`
	Device   fleet.DeviceID `json:"device"`
	Buffer   int            `json:"buffer"`   // as hello said, in bytes
	Whole    string         `json:"whole"`    // what the slices are of
	Payloads []string       `json:"payloads"` // as muster sends them
	Longest  int            `json:"longest"`  // packet, in bytes on the wire
}

const sliceFile = "../../api/samples/slices/256.json"

// The certificate of a real size, with a password, for the longest device id: every packet fits 256 bytes, to the byte as
// the file has it, and the device gets the same again in any order, with repeats and with another transmission between.
func TestSlicesOfTheSamples(t *testing.T) {
	id := fleet.DeviceID("device-with-an-id-of-the-longest-form-40")
	der := func(n int, seed byte) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i)*7 + seed
		}
		return b
	}
	order := wire.CertOrder{
		Op: wire.CertPush, Serial: "5b1e9fd8a4c3720e11d46a90c37b2f58", Chain: [][]byte{der(560, 1), der(480, 2)},
		Password: "bm90LWEtcGFzc3dvcmQtb25seS1pdHMtbGVuZ3RoLW9rIQ",
	}
	const buffer = 256
	topic := wire.DownTopic(id, wire.DownCert)
	payloads, err := wire.SplitCert(order, wire.Budget(topic, buffer))
	if err != nil {
		t.Fatal(err)
	}
	got := sliceSample{
		About:  "a certificate with a new password for a device whose receive buffer has 256 bytes; join d by i, SHA-256 begins with t",
		Device: id, Buffer: buffer, Whole: string(wire.Encode(order)),
	}
	for _, p := range payloads {
		got.Payloads = append(got.Payloads, string(p))
		got.Longest = max(got.Longest, publishSize(topic, p))
	}
	if got.Longest > buffer || got.Longest < buffer-12 {
		t.Errorf("the longest packet has %d bytes", got.Longest)
	}
	text, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if *rewrite {
		if err := os.WriteFile(sliceFile, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(sliceFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytes.TrimSpace(have), text) {
		t.Errorf("%s is not what muster sends", sliceFile)
	}
	joins(t, "as sent", payloads, order)
	backwards := slices.Clone(payloads)
	slices.Reverse(backwards)
	joins(t, "backwards", backwards, order)
	var twice [][]byte
	for _, p := range payloads {
		twice = append(twice, p, p)
	}
	joins(t, "twice", twice[:len(twice)-1], order)

	// One is lost: nothing comes of it, and the next transmission, with another password, is whole.
	again := order
	again.Password = "YW5vdGhlci1wYXNzd29yZC1vZi10aGUtc2FtZS1sZW5ndA"
	second, err := wire.SplitCert(again, wire.Budget(topic, buffer))
	if err != nil {
		t.Fatal(err)
	}
	joins(t, "after a loss", append(slices.Delete(slices.Clone(payloads), 2, 3), second...), again)
}

// publishSize is the length of a PUBLISH of QoS 1 without properties (MQTT 5 §3.3): the fixed header with its variable
// length, topic, packet id, an empty list of properties, payload.
func publishSize(topic string, payload []byte) int {
	rest := 2 + len(topic) + 2 + 1 + len(payload)
	n := 1 + rest
	for l := rest; ; l >>= 7 {
		n++
		if l < 128 {
			return n
		}
	}
}

// joins demands that the payloads, in this order, give exactly one message.
func joins(t *testing.T, how string, payloads [][]byte, want wire.CertOrder) {
	t.Helper()
	var a wire.Assembler
	found := 0
	for _, p := range payloads {
		o, err := wire.DecodeCertOrder(p)
		if err != nil {
			t.Fatal(err)
		}
		whole, done, err := a.Add(o)
		if err != nil {
			t.Errorf("%s: %v", how, err)
		}
		if done {
			found++
			if !bytes.Equal(wire.Encode(whole), wire.Encode(want)) {
				t.Errorf("%s: another message", how)
			}
		}
	}
	if found != 1 {
		t.Errorf("%s: %d messages", how, found)
	}
}
