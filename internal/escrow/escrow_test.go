package escrow_test

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"muster/internal/escrow"
	"muster/internal/fleet"
	"muster/internal/provision"
)

func identity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

var record = provision.Record{
	Version: provision.RecordVersion, Device: "lamp-1", Product: "lamp", Chip: "esp32s3", MadeAt: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC),
	FlashCipher: "xts-256", FlashKey: bytes.Repeat([]byte{0xA5}, 64), NVSScheme: provision.KeyPartition, NVSKeys: bytes.Repeat([]byte{0x5A}, 64),
	Table: []byte("table"), TableOffset: 0x8000, NVSPartition: "nvs",
}

func sealed(t testing.TB, to string) []byte {
	t.Helper()
	rs, err := escrow.ParseRecipients(to)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := escrow.Seal(&out, rs, record); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func ids(t testing.TB, text string) escrow.Identities {
	t.Helper()
	out, err := escrow.ParseIdentities([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestEachRecipientOpens has two operators, each of whom can read a record alone, and a stranger who cannot.
func TestEachRecipientOpens(t *testing.T) {
	a, b, c := identity(t), identity(t), identity(t)
	file := sealed(t, "# operators\n"+a.Recipient().String()+"\n"+b.Recipient().String()+"\n")
	for _, secret := range [][]byte{record.FlashKey, record.NVSKeys, []byte("lamp-1")} {
		if bytes.Contains(file, secret) {
			t.Error("the sealed file holds something in the clear")
		}
	}
	for _, who := range []*age.X25519Identity{a, b} {
		got, err := escrow.Open(bytes.NewReader(file), ids(t, "# made by age-keygen\n"+who.String()+"\n"))
		if err != nil || !reflect.DeepEqual(got, record) {
			t.Errorf("opened %#v, %v", got, err)
		}
	}
	if _, err := escrow.Open(bytes.NewReader(file), ids(t, c.String())); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("a stranger got %v", err)
	}
}

// TestDamage flips a bit at every place of a sealed record: none is read as something else.
func TestDamage(t *testing.T) {
	who := identity(t)
	file := sealed(t, who.Recipient().String())
	secrets := ids(t, who.String())
	for i := 0; i < len(file); i += 7 {
		bad := bytes.Clone(file)
		bad[i] ^= 1
		if got, err := escrow.Open(bytes.NewReader(bad), secrets); err == nil {
			t.Errorf("byte %d: opened %v", i, got)
		}
	}
	for _, n := range []int{0, 10, len(file) / 2, len(file) - 1} {
		if _, err := escrow.Open(bytes.NewReader(file[:n]), secrets); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("cut after %d: %v", n, err)
		}
	}
}

// TestWrongKeys refuses what is no key of that kind, and repeats nothing of it.
func TestWrongKeys(t *testing.T) {
	who := identity(t)
	for _, text := range []string{"", "# nobody\n", "age1nonsense", "ssh-ed25519 AAAA", who.String(), strings.ToLower(who.String()), strings.Repeat("#", 70000)} {
		if _, err := escrow.ParseRecipients(text); err == nil {
			t.Errorf("%.20q is a recipient", text)
		} else if strings.Contains(strings.ToUpper(err.Error()), who.String()[15:]) {
			t.Error("the error holds the identity")
		}
	}
	for _, text := range []string{"", "AGE-SECRET-KEY-1NONSENSE", who.Recipient().String(), "age-encryption.org/v1\n-> scrypt"} {
		if _, err := escrow.ParseIdentities([]byte(text)); err == nil {
			t.Errorf("%.20q is an identity", text)
		}
	}
	if err := escrow.Seal(&bytes.Buffer{}, nil, record); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("sealed to nobody: %v", err)
	}
}

// TestNothingPrints has a record say nothing of its keys in any print.
func TestNothingPrints(t *testing.T) {
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, record); strings.Contains(s, "a5") || strings.Contains(s, "165") || strings.Contains(s, "0xa5") {
			t.Errorf("%s prints %s", verb, s)
		}
	}
}
