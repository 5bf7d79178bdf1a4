package nvs

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

func fillEntries(n int) []Entry {
	out := []Entry{NewNamespace("ns")} // takes entry 0
	for i := range n - 1 {
		out = append(out, NewNumber("ns", fmt.Sprintf("k%d", i), uint8(i)))
	}
	return out
}

func encode(t testing.TB, entries []Entry, o Options) []byte {
	t.Helper()
	image, err := Encode(entries, o)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// usage returns what each page holds as STATE written.
func usage(t testing.TB, image []byte) string {
	t.Helper()
	p, err := Decode(image, nil)
	if err != nil || len(p.Findings) > 0 {
		t.Fatal(err, p.Findings)
	}
	var out []string
	for _, pg := range p.Pages {
		if pg.State != Empty {
			out = append(out, fmt.Sprintf("%s %d", pg.State, pg.Written))
		}
	}
	return strings.Join(out, ", ")
}

// The rules of esp32.md §4.3 at their edges.
func TestHowPagesFill(t *testing.T) {
	str := func(entries int) Entry { return NewString("ns", "s", strings.Repeat("A", entries*32-1)) }
	blob := func(n int) Entry { return NewBlob("ns", "b", bytes.Repeat([]byte{0x5A}, n)) }
	tail := NewNumber("ns", "tail", int64(-1))
	for _, v := range []struct {
		name   string
		before int // entries of the first page in use
		add    []Entry
		o      Options
		want   string
	}{
		{"numbers fill a page", 126, nil, Options{Size: 0x5000}, "active 126"},
		{"the next number opens a page", 126, []Entry{tail}, Options{Size: 0x5000}, "full 126, active 1"},
		{"a string that leaves an entry stays", 100, []Entry{str(24)}, Options{Size: 0x5000}, "active 125"},
		{"a string that would fill the page moves on", 100, []Entry{str(25)}, Options{Size: 0x5000}, "full 100, active 26"},
		{"the longest string", 1, []Entry{str(124)}, Options{Size: 0x5000}, "full 1, active 125"},
		{"a blob that leaves an entry has its index there", 100, []Entry{blob(24 * 32)}, Options{Size: 0x5000}, "active 126"},
		{"a blob that fills the page has its index on the next", 100, []Entry{blob(25 * 32)}, Options{Size: 0x5000}, "full 126, active 1"},
		{"a blob is split", 100, []Entry{blob(25*32 + 1)}, Options{Size: 0x5000}, "full 126, active 3"},
		{"one entry left makes a chunk of nothing", 125, []Entry{blob(40)}, Options{Size: 0x5000}, "full 126, active 4"},
		{"an empty blob with one entry left", 125, []Entry{blob(0)}, Options{Size: 0x5000}, "full 126, active 1"},
		{"an empty blob", 1, []Entry{blob(0)}, Options{Size: 0x5000}, "active 3"},
		{"a full page and a blob", 126, []Entry{blob(32)}, Options{Size: 0x5000}, "full 126, active 3"},
		{"format 1: a blob that would fill the page moves on", 100, []Entry{blob(25 * 32)}, Options{Size: 0x5000, Version: V1}, "full 100, active 26"},
		{"format 1: the longest blob", 1, []Entry{blob(MaxBlobV1)}, Options{Size: 0x5000, Version: V1}, "active 64"},
		{"all pages of a read-only partition", 126, []Entry{tail}, Options{Size: 0x2000, ReadOnly: true}, "full 126, active 1"},
	} {
		image := encode(t, append(fillEntries(v.before), v.add...), v.o)
		if got := usage(t, image); got != v.want {
			t.Errorf("%s: %s, want %s", v.name, got, v.want)
		}
	}
	if got := usage(t, encode(t, nil, Options{Size: 0x3000})); got != "active 0" {
		t.Errorf("no entries: %s", got)
	}
}

func TestFormat1(t *testing.T) {
	image := encode(t, []Entry{NewBlob("ns", "b", []byte("hello"))}, Options{Size: 0x3000, Version: V1})
	if image[8] != 0xFF {
		t.Errorf("version byte %#x", image[8])
	}
	h := header(page(image[:PageSize]).entry(1))
	if h[1] != 0x41 || h[2] != 2 || h[3] != 0xFF {
		t.Errorf("header % x", h[:4])
	}
	p, err := Decode(image, nil)
	if err != nil || p.Pages[0].Version != V1 {
		t.Errorf("%v, %v", p, err)
	}
	same(t, "format 1", p.Entries()[1:], []Entry{NewBlob("ns", "b", []byte("hello"))})
}

func TestWhatEncodeRefuses(t *testing.T) {
	long := strings.Repeat("k", MaxKey+1)
	rw := Options{Size: 0x6000}
	var many []Entry
	for i := range maxNamespaces + 1 {
		many = append(many, NewNamespace(fmt.Sprintf("n%d", i)))
	}
	for _, v := range []struct {
		name    string
		entries []Entry
		o       Options
		kind    fleet.Kind
		code    string
		says    string
	}{
		{"no size", nil, Options{}, fleet.Invalid, CodeSize, "0x1000"},
		{"negative size", nil, Options{Size: -PageSize}, fleet.Invalid, CodeSize, "0x1000"},
		{"not whole pages", nil, Options{Size: 0x3001}, fleet.Invalid, CodeSize, "0x1000"},
		{"too large", nil, Options{Size: MaxSize + PageSize}, fleet.Invalid, CodeSize, "at most"},
		{"too small to write", nil, Options{Size: 0x2000}, fleet.Invalid, CodeSize, "readonly"},
		{"format 3", nil, Options{Size: 0x3000, Version: 3}, fleet.Invalid, CodeVersion, "1 or 2"},
		{"no key", []Entry{NewNumber("ns", "", uint8(1))}, rw, fleet.Invalid, CodeKey, "empty"},
		{"no namespace", []Entry{NewNumber("", "k", uint8(1))}, rw, fleet.Invalid, CodeKey, "namespace is empty"},
		{"long key", []Entry{NewNumber("ns", long, uint8(1))}, rw, fleet.Invalid, CodeKey, "16 bytes"},
		{"long namespace", []Entry{NewNamespace(long)}, rw, fleet.Invalid, CodeKey, "16 bytes"},
		{"a key of 15 bytes in 8 runes", []Entry{NewNumber("ns", "üüüüüüüü", uint8(1))}, rw, fleet.Invalid, CodeKey, "16 bytes"},
		{"NUL in a key", []Entry{NewNumber("ns", "a\x00b", uint8(1))}, rw, fleet.Invalid, CodeKey, "printable"},
		{"no UTF-8 in a key", []Entry{NewNumber("ns", "a\xff", uint8(1))}, rw, fleet.Invalid, CodeKey, "printable"},
		{"space before a key", []Entry{NewNumber("ns", " a", uint8(1))}, rw, fleet.Invalid, CodeKey, "spaces"},
		{"unknown type", []Entry{{Namespace: "ns", Key: "k", Type: "f32"}}, rw, fleet.Invalid, CodeType, "u8"},
		{"number too large", []Entry{{Namespace: "ns", Key: "k", Type: U8, Number: 256}}, rw, fleet.Invalid, CodeValue, "fit"},
		{"sign not extended", []Entry{{Namespace: "ns", Key: "k", Type: I8, Number: 0xFF}}, rw, fleet.Invalid, CodeValue, "fit"},
		{"NUL in a string", []Entry{NewString("ns", "k", "a\x00")}, rw, fleet.Invalid, CodeValue, "blob"},
		{"string too long", []Entry{NewString("ns", "k", strings.Repeat("x", MaxString+1))}, rw, fleet.TooLarge, CodeValue, "3967"},
		{"string too long for format 1", []Entry{NewString("ns", "k", strings.Repeat("x", MaxStringV1+1))}, Options{Size: 0x6000, Version: V1}, fleet.TooLarge, CodeValue, "1983"},
		{"blob too long for format 1", []Entry{NewBlob("ns", "k", make([]byte, MaxBlobV1+1))}, Options{Size: 0x6000, Version: V1}, fleet.TooLarge, CodeValue, "1984"},
		{"blob too long", []Entry{NewBlob("ns", "k", make([]byte, MaxBlob+1))}, rw, fleet.TooLarge, CodeValue, "508000"},
		{"too many chunks", append(fillEntries(60), NewBlob("ns", "k", make([]byte, MaxBlob))), Options{Size: MaxSize}, fleet.TooLarge, CodeValue, "127 chunks"},
		{"twice", []Entry{NewNumber("ns", "k", uint8(1)), {Namespace: "ns", Key: "k", Type: U16, Line: 9}}, rw, fleet.Invalid, CodeDuplicate, "line 9"},
		{"too many namespaces", many, rw, fleet.Invalid, CodeNamespace, "254"},
		{"too much", []Entry{NewBlob("ns", "k", make([]byte, 20000))}, rw, fleet.Unprocessable, CodeFull, "make it 0x7000"},
		{"too much for a read-only one", fillEntries(127), Options{Size: 0x1000, ReadOnly: true}, fleet.Unprocessable, CodeFull, "make it 0x2000"},
	} {
		_, err := Encode(v.entries, v.o)
		e, ok := errors.AsType[*fleet.Error](err)
		if !ok || e.Kind != v.kind || e.Code != v.code || !strings.Contains(e.Msg, v.says) {
			t.Errorf("%s: got %v", v.name, err)
		}
	}
	if _, err := Encode(many[:maxNamespaces], rw); err != nil {
		t.Errorf("%d namespaces: %v", maxNamespaces, err)
	}
}

// More than any partition holds is refused while it is laid out, not after.
func TestEntriesBeyondAllBounds(t *testing.T) {
	blob := make([]byte, MaxBlob)
	var entries []Entry
	for i := range 20 {
		entries = append(entries, NewBlob("ns", fmt.Sprint(i), blob[:400000]))
	}
	if _, err := Encode(entries, Options{Size: 0x6000}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("got %v", err)
	}
}

func TestAKeyThatIsThereTwiceAsTheGeneratorHasIt(t *testing.T) {
	entries := []Entry{NewNumber("ns", "k", uint8(1)), NewString("ns", "x", "y"), NewNumber("ns", "k", uint8(2))}
	p, err := Decode(encode(t, entries, Options{Size: 0x3000, AsGenerator: true}), nil)
	if err != nil {
		t.Fatal(err)
	}
	if it, _ := p.Find("ns", "k"); it.Number != 2 {
		t.Errorf("the older value won: %s", it.Text())
	}
	if len(p.Findings) != 1 || p.Findings[0].Code != CodeDuplicate || p.Findings[0].Offset != 64+32 {
		t.Errorf("findings: %v", p.Findings)
	}
}

func TestASmallReadOnlyPartitionAsTheGeneratorHasIt(t *testing.T) {
	entries := []Entry{NewNumber("ns", "k", uint8(1))}
	short := encode(t, entries, Options{Size: 0x2000, ReadOnly: true, AsGenerator: true})
	whole := encode(t, entries, Options{Size: 0x2000, ReadOnly: true})
	if len(short) != 0x1000 || len(whole) != 0x2000 || !bytes.Equal(short, whole[:0x1000]) || !allFF(whole[0x1000:]) {
		t.Errorf("%d and %d bytes", len(short), len(whole))
	}
}

func TestNumbersKeepTheirTypes(t *testing.T) {
	entries := []Entry{
		NewNumber("n", "a", uint8(math.MaxUint8)), NewNumber("n", "b", int8(math.MinInt8)),
		NewNumber("n", "c", uint16(math.MaxUint16)), NewNumber("n", "d", int16(math.MinInt16)),
		NewNumber("n", "e", uint32(math.MaxUint32)), NewNumber("n", "f", int32(math.MinInt32)),
		NewNumber("n", "g", uint64(math.MaxUint64)), NewNumber("n", "h", int64(math.MinInt64)),
	}
	want := []string{"255", "-128", "65535", "-32768", "4294967295", "-2147483648", "18446744073709551615", "-9223372036854775808"}
	p, err := Decode(encode(t, entries, Options{Size: 0x3000}), nil)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "numbers", p.Entries()[1:], entries)
	for i, it := range p.Items[1:] {
		if it.Text() != want[i] {
			t.Errorf("%v is %s, want %s", it, it.Text(), want[i])
		}
	}
}

func TestSizeFor(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := rapid.SampledFrom([]Version{V1, V2}).Draw(t, "version")
		entries := drawEntries(t, v)
		size, err := SizeFor(entries, v)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Encode(entries, Options{Size: size, Version: v}); err != nil {
			t.Fatalf("0x%x: %v", size, err)
		}
		if size == MinSize {
			return
		}
		if _, err := Encode(entries, Options{Size: size - PageSize, Version: v}); !fleet.Is(err, fleet.Unprocessable) {
			t.Fatalf("0x%x would do as well: %v", size-PageSize, err)
		}
	})
	if _, err := SizeFor(nil, 7); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("format 7: %v", err)
	}
	if _, err := SizeFor([]Entry{{}}, V2); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("an empty entry: %v", err)
	}
}

// drawEntries draws entries with each key once, and each namespace written where it comes up first.
func drawEntries(t *rapid.T, v Version) []Entry {
	name := rapid.StringMatching(`[a-z][a-z0-9._:-]{0,14}`)
	longest := MaxString
	blobs := 12000
	if v == V1 {
		longest, blobs = MaxStringV1, MaxBlobV1
	}
	var out []Entry
	namespaces, keys := map[string]bool{}, map[string]bool{}
	for range rapid.IntRange(0, 40).Draw(t, "entries") {
		e := Entry{Namespace: rapid.SampledFrom([]string{"cfg", "tls", "wifi", name.Draw(t, "ns")}).Draw(t, "namespace")}
		if !namespaces[e.Namespace] {
			namespaces[e.Namespace] = true
			out = append(out, NewNamespace(e.Namespace))
		}
		if e.Key = name.Draw(t, "key"); keys[e.Namespace+"\x00"+e.Key] {
			continue
		}
		keys[e.Namespace+"\x00"+e.Key] = true
		e.Type = rapid.SampledFrom([]Type{U8, I8, U16, I16, U32, I32, U64, I64, String, Blob}).Draw(t, "type")
		switch n, isNumber := numbers[e.Type]; {
		case isNumber:
			e.Number = n.extend(rapid.Uint64().Draw(t, "number"))
		case e.Type == String:
			e.Data = bytes.Repeat([]byte(rapid.StringMatching(`[ -~]`).Draw(t, "letter")), lengths(longest).Draw(t, "length"))
		default:
			e.Data = bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte")}, lengths(blobs).Draw(t, "length"))
		}
		out = append(out, e)
	}
	return out
}

func lengths(most int) *rapid.Generator[int] {
	return rapid.OneOf(rapid.IntRange(0, 100), rapid.IntRange(0, most), rapid.Just(most))
}

func TestDecodeUndoesEncode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := Options{Version: rapid.SampledFrom([]Version{V1, V2}).Draw(t, "version")}
		entries := drawEntries(t, o.Version)
		size, err := SizeFor(entries, o.Version)
		if err != nil {
			t.Fatal(err)
		}
		o.Size = size + PageSize*rapid.IntRange(0, 3).Draw(t, "more pages")
		if rapid.Bool().Draw(t, "encrypted") {
			k, err := GenerateKeys(bytes.NewReader(rapid.SliceOfN(rapid.Byte(), 64, 64).Draw(t, "keys")))
			if err != nil {
				t.Fatal(err)
			}
			o.Keys = &k
		}
		image, err := Encode(entries, o)
		if err != nil || len(image) != o.Size {
			t.Fatalf("%d bytes, %v", len(image), err)
		}
		p, err := Decode(image, o.Keys)
		if err != nil || len(p.Findings) > 0 {
			t.Fatal(err, p.Findings)
		}
		got := p.Entries()
		if !slices.EqualFunc(got, entries, equal) {
			t.Fatalf("got %v, want %v", got, entries)
		}
		again, err := Encode(got, o)
		if err != nil || !bytes.Equal(again, image) {
			t.Fatalf("not the same again: %v", err)
		}
	})
}

func equal(a, b Entry) bool {
	return a.Namespace == b.Namespace && a.Key == b.Key && a.Type == b.Type && a.Number == b.Number && bytes.Equal(a.Data, b.Data)
}

func TestEncodeLeavesItsInputAlone(t *testing.T) {
	data := append(make([]byte, 0, 100), "abc"...)
	if _, err := Encode([]Entry{{Namespace: "n", Key: "k", Type: String, Data: data}}, Options{Size: 0x3000}); err != nil {
		t.Fatal(err)
	}
	if rest := data[:100]; !bytes.Equal(rest[:3], []byte("abc")) || bytes.ContainsFunc(rest[3:], func(r rune) bool { return r != 0 }) {
		t.Error("the data behind the string was written to")
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	e := NewString("wifi", "psk", "hunter22")
	k, err := ParseKeys(bytes.Repeat([]byte("hunter22"), 8))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{e, &e, []Entry{e}, Item{Entry: e}, &Partition{Items: []Item{{Entry: e}}}, k, &k, Options{Keys: &k}} {
		for _, f := range []string{"%v", "%+v", "%s", "%#v"} {
			s := fmt.Sprintf(f, v)
			if strings.Contains(s, "hunter") || strings.Contains(s, "104") || strings.Contains(s, "0x68") {
				t.Errorf("%s of %T prints %s", f, v, s)
			}
		}
	}
}
