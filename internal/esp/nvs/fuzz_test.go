package nvs

import (
	"bytes"
	"encoding/binary"
	"io"
	"slices"
	"strings"
	"testing"

	"muster/internal/fleet"
)

// script is fuzz input read as instructions, so that checksums can be right where nothing else is.
type script []byte

func (s *script) next() int {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return int(b)
}

func pick[T any](s *script, from []T) T { return from[s.next()%len(from)] }

// fuzzImage makes an image from a golden one, or from erased flash, by carrying out a script.
func fuzzImage(f testing.TB, start uint8, s script) []byte {
	image := bytes.Repeat(ff, 4)
	if int(start) < len(goldens) {
		image = file(f, goldens[start].image)
	}
	p := partition{image}
	for len(s) > 0 {
		op, pg := s.next(), s.next()%(len(image)/PageSize)
		e := s.next() % pageEntries
		switch op % 6 {
		case 0:
			p.page(pg).format(uint32(s.next()), pick(&s, []byte{0xFE, 0xFF, 0xFE, 0xFD}))
			p.page(pg).setState(pick(&s, []uint32{wordActive, wordFull, wordFreeing, wordCorrupt, wordInvalid, wordEmpty}))
		case 1:
			putFuzz(p.page(pg), e, &s)
		case 2:
			p.erase(pg, e)
		case 3:
			p.page(pg).markWritten(e)
		case 4:
			p.change(pg, e, func(h *header) { h[s.next()%entrySize] = byte(s.next()) })
		case 5:
			image[(pg*PageSize+s.next()*16+s.next())%len(image)] ^= byte(s.next())
		}
	}
	return image
}

// putFuzz writes an item whose checksums are right, and perhaps little else.
func putFuzz(p page, e int, s *script) {
	code := pick(s, []byte{codeBlobData, codeBlobIdx, codeString, codeU8, codeBlobV1, 0x14, 0x18, 0x99})
	h := newHeader(pick(s, []byte{1, 0, 2}), code, 1, anyChunk, pick(s, []string{"a", "b", "ns", ""}))
	size := 0
	switch code {
	case codeBlobData:
		h[3] = pick(s, []byte{0, 1, 0x80, 0x81, 126, 0xFF})
		size = s.next() * 16
	case codeString, codeBlobV1:
		size = s.next() * 16
	case codeBlobIdx:
		binary.LittleEndian.PutUint32(h[24:], uint32(s.next()*16))
		h[28], h[29] = byte(s.next()), pick(s, []byte{0, 0x80, 1})
	default:
		binary.LittleEndian.PutUint64(h[24:], uint64(s.next()))
	}
	size = min(size, (pageEntries-e-1)*entrySize)
	h[2] = byte(spanOf(size))
	if code == codeString || code == codeBlobV1 || code == codeBlobData {
		data := bytes.Repeat([]byte{byte(s.next())}, size)
		if code == codeString && size > 0 {
			data[size-1] = 0
		}
		copy(p.payload(e, (pageEntries-e)*entrySize)[entrySize:], data)
		h.setData(data)
	}
	h.seal()
	copy(p.entry(e), h[:])
	for i := range int(h[2]) {
		p.markWritten(e + i)
	}
}

// Anything decodes without a panic; what was read can be written again unless NVS cannot hold it, and is then the same.
func FuzzDecode(f *testing.F) {
	for i := range goldens {
		f.Add(uint8(i), false, []byte{2, 0, 1})
		f.Add(uint8(i), true, []byte{5, 0, 0, 3, 3, 3})
	}
	f.Add(uint8(255), false, []byte("\x00\x00\x00\x00\x00\x00\x01\x00\x00\x03\x01\x02\x01\x01\x00\x01\x00\x00\x00\x00\x03\x41\x01\x00\x0a\x01\x00\x00\x03\x01\x00"))
	f.Fuzz(func(t *testing.T, start uint8, encrypted bool, s []byte) {
		if len(s) > 4000 {
			return
		}
		image := fuzzImage(t, start, s)
		var k *Keys
		if encrypted {
			keys, err := ParseKeys(bytes.Repeat([]byte("fuzz"), 16))
			if err != nil {
				t.Fatal(err)
			}
			k = &keys
		}
		p, err := Decode(image, k)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) {
				t.Fatal(err)
			}
			return
		}
		if len(p.Findings) > MaxFindings {
			t.Fatalf("%d findings", len(p.Findings))
		}
		total := 0
		for _, it := range p.Items {
			total += len(it.Data)
		}
		if total > len(image) {
			t.Fatalf("%d bytes of values from %d bytes", total, len(image))
		}
		o := Options{Size: 16 * PageSize, Version: V2, Keys: k, AsGenerator: true}
		again, err := Encode(p.Entries(), o)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) && !fleet.Is(err, fleet.TooLarge) {
				t.Fatal(err)
			}
			return
		}
		q, err := Decode(again, k)
		if err != nil {
			t.Fatal(err)
		}
		want := oneNamespaceEach(p.Entries())
		if keysTwice(want) {
			return // in two namespaces of the same name: one of the values is lost
		}
		if !slices.EqualFunc(want, q.Entries(), equal) {
			t.Fatalf("read %v, after writing %v", want, q.Entries())
		}
		if third, err := Encode(q.Entries(), o); err != nil || !bytes.Equal(third, again) {
			t.Fatalf("not stable: %v", err)
		}
	})
}

func keysTwice(entries []Entry) bool {
	seen := map[place]bool{}
	for _, e := range entries {
		at := place{key: e.Namespace + "\x00" + e.Key}
		if seen[at] {
			return true
		}
		seen[at] = true
	}
	return false
}

// oneNamespaceEach puts each namespace once, where it comes up first, as Encode writes them.
func oneNamespaceEach(entries []Entry) []Entry {
	seen := map[string]bool{}
	var out []Entry
	for _, e := range entries {
		if !seen[e.Namespace] {
			seen[e.Namespace] = true
			out = append(out, NewNamespace(e.Namespace))
		}
		if e.Type != Namespace {
			out = append(out, e)
		}
	}
	return out
}

// Encryption is undone by decryption on anything, and the other way round.
func FuzzCrypt(f *testing.F) {
	f.Add(uint8(0), []byte{5, 0, 0, 3, 3, 3}, byte(7))
	f.Add(uint8(255), []byte{1, 0, 0, 0, 0, 0, 4, 4, 2, 0, 0}, byte(0))
	f.Fuzz(func(t *testing.T, start uint8, s []byte, key byte) {
		if len(s) > 4000 {
			return
		}
		image := fuzzImage(t, start, s)
		k, err := ParseKeys(bytes.Repeat([]byte{key, key + 1}, 32))
		if err != nil {
			t.Fatal(err)
		}
		for _, way := range [][2]func([]byte, Keys) ([]byte, error){{Encrypt, Decrypt}, {Decrypt, Encrypt}} {
			there, err := way[0](image, k)
			if err != nil {
				t.Fatal(err)
			}
			if back, err := way[1](there, k); err != nil || !bytes.Equal(back, image) {
				t.Fatalf("not the same again: %v", err)
			}
		}
	})
}

// Any text parses or is refused with a line; what parses is within bounds, and its entries are ones that Encode takes or
// refuses in words.
func FuzzParseCSV(f *testing.F) {
	for _, name := range []string{"basic.csv", "ro.csv", "blob_fit.csv"} {
		f.Add(string(file(f, name)), true)
	}
	f.Add(head+"k,data,blob_sz_fill(4;0xFF),\"a\r\nb\"\n#\nsta.ssid,data,string,x\nap.ssid,file,hex2bin,0\n", false)
	f.Fuzz(func(t *testing.T, text string, as bool) {
		if len(text) > 1<<16 {
			return
		}
		open := func(name string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(name)), nil }
		c, err := ParseCSV(strings.NewReader(text), CSVOptions{Open: open, AsGenerator: as})
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) && !fleet.Is(err, fleet.TooLarge) {
				t.Fatal(err)
			}
			return
		}
		image, err := Encode(c.Entries, Options{Size: MinSize, AsGenerator: true})
		if fleet.Is(err, fleet.Unprocessable) {
			image, err = Encode(c.Entries, Options{Size: MaxSize, AsGenerator: true})
		}
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) && !fleet.Is(err, fleet.TooLarge) {
				t.Fatal(err)
			}
			return
		}
		p, err := Decode(image, nil)
		if err != nil {
			t.Fatal(err)
		}
		latest := map[[2]string]Entry{}
		for _, e := range c.Entries {
			if e.Type != Namespace {
				latest[[2]string{e.Namespace, e.Key}] = e
			}
		}
		for at, want := range latest {
			if it, ok := p.Find(at[0], at[1]); !ok || !equal(it.Entry, want) {
				t.Fatalf("%v became %v", want, it)
			}
		}
	})
}
