package nvs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// device writes to NVS as ESP-IDF does: each write appends, then erases what it replaces; a full partition frees the
// page with the most erased entries by moving the rest. It can lose power between any two of its writes to flash.
type device struct {
	image []byte
	order []int // pages by sequence number, the active one last
	next  int   // free entry of the active page
	seq   uint32
	power int // writes to flash until power fails; negative for never
}

// powerCut is what the device panics with when its power fails.
type powerCut struct{}

func newDevice(pages, power int) *device {
	d := &device{image: bytes.Repeat(ff, pages), power: -1}
	d.activate()
	d.append(header(sealed(newHeader(0, codeU8, 1, anyChunk, "ns"), 1)), nil)
	d.power = power
	return d
}

func sealed(h header, first byte) header {
	h[24] = first
	h.seal()
	return h
}

func (d *device) page(i int) page { return page(d.image[i*PageSize : (i+1)*PageSize]) }
func (d *device) active() page    { return d.page(d.order[len(d.order)-1]) }

// flash is one write to flash; power fails before it.
func (d *device) flash(write func()) {
	if d.power == 0 {
		panic(powerCut{})
	}
	d.power--
	write()
}

func (d *device) free() []int {
	var free []int
	for i := range len(d.image) / PageSize {
		if !slices.Contains(d.order, i) {
			free = append(free, i)
		}
	}
	return free
}

func (d *device) activate() {
	i := d.free()[0]
	d.flash(func() { d.page(i).format(d.seq, 0xFE) })
	d.order = append(d.order, i)
	d.seq++
	d.next = 0
}

// room makes sure that the active page has n entries left, or reports that the partition is full.
func (d *device) room(n int) bool {
	if d.next+n <= pageEntries {
		return true
	}
	d.flash(func() { d.active().setState(wordFull) })
	if len(d.free()) >= 2 {
		d.activate()
		return true
	}
	most, victim := 0, -1
	for _, i := range d.order {
		if unused := pageEntries - d.count(i, slotWritten); unused > most {
			most, victim = unused, i
		}
	}
	if most < n {
		return false
	}
	d.flash(func() { d.page(victim).setState(wordFreeing) })
	d.activate()
	for e := 0; e < pageEntries; {
		h := header(d.page(victim).entry(e))
		if d.page(victim).slot(e) != slotWritten {
			e++
			continue
		}
		span := int(h[2])
		d.append(h, bytes.Clone(d.page(victim).payload(e+1, (span-1)*entrySize)))
		e += span
	}
	d.flash(func() { copy(d.page(victim), ff) })
	d.order = slices.DeleteFunc(d.order, func(i int) bool { return i == victim })
	return d.next+n <= pageEntries
}

func (d *device) count(i int, s slot) int {
	n := 0
	for e := range pageEntries {
		if d.page(i).slot(e) == s {
			n++
		}
	}
	return n
}

// append writes an item to the active page, the header last, as ESP-IDF's order of writes has it in effect: a torn value is
// never taken for a whole one.
func (d *device) append(h header, data []byte) {
	p := d.active()
	at := d.next
	d.flash(func() { copy(p.entry(at), h[:]) })
	d.flash(func() { p.markWritten(at) })
	for i := 1; i < int(h[2]); i++ {
		d.flash(func() { copy(p.entry(at+i), ff[:entrySize]); copy(p.entry(at+i), data[(i-1)*entrySize:]) })
		d.flash(func() { p.markWritten(at + i) })
	}
	d.next += int(h[2])
}

// erase erases the items that match, but not those from entry keep of the active page on.
func (d *device) erase(match func(h header) bool, keepPage, keep int) {
	for _, i := range d.order {
		for e := 0; e < pageEntries; {
			if d.page(i).slot(e) != slotWritten {
				e++
				continue
			}
			h := header(d.page(i).entry(e))
			if match(h) && (i != keepPage || e < keep) {
				for n := range int(h[2]) {
					d.flash(func() { d.page(i)[bitmapOffset+(e+n)/4] &^= 3 << ((e + n) % 4 * 2) })
				}
			}
			e += max(1, int(h[2]))
		}
	}
}

func keyOf(h header) string { k, _, _ := bytes.Cut(h[8:24], []byte{0}); return string(k) }

// set writes a value and reports whether there was room for it.
func (d *device) set(e Entry) bool {
	if e.Type == Blob {
		return d.setBlob(e)
	}
	h, data := newHeader(1, codeString, 1, anyChunk, e.Key), append(bytes.Clone(e.Data), 0)
	if n, isNumber := numbers[e.Type]; isNumber {
		h, data = newHeader(1, n.code, 1, anyChunk, e.Key), nil
		binary.LittleEndian.PutUint64(h[24:], e.Number)
	} else {
		h[2] = byte(spanOf(len(data)))
		h.setData(data)
	}
	h.seal()
	if !d.room(int(h[2])) {
		return false
	}
	d.append(h, data)
	d.eraseOlder(e.Key, d.next-int(h[2]))
	return true
}

func (d *device) eraseOlder(key string, keep int) {
	last := d.order[len(d.order)-1]
	d.erase(func(h header) bool { return h[0] == 1 && keyOf(h) == key }, last, keep)
}

// setBlob writes the new version's chunks and index, then erases the old version.
func (d *device) setBlob(e Entry) bool {
	start := byte(0)
	for _, i := range d.order {
		for n := range pageEntries {
			h := header(d.page(i).entry(n))
			if d.page(i).slot(n) == slotWritten && h.sealed() && h[0] == 1 && h[1] == codeBlobIdx && keyOf(h) == e.Key {
				start = h[29] ^ 0x80
			}
		}
	}
	chunks := byte(0)
	for rest := e.Data; ; {
		if !d.room(2) {
			return false
		}
		n := min(len(rest), (pageEntries-d.next-1)*entrySize)
		h := newHeader(1, codeBlobData, spanOf(n), start+chunks, e.Key)
		h.setData(rest[:n])
		h.seal()
		d.append(h, rest[:n])
		chunks++
		if rest = rest[n:]; len(rest) == 0 {
			break
		}
	}
	if !d.room(1) {
		return false
	}
	h := newHeader(1, codeBlobIdx, 1, anyChunk, e.Key)
	binary.LittleEndian.PutUint32(h[24:], uint32(len(e.Data)))
	h[28], h[29] = chunks, start
	h.seal()
	d.append(h, nil)
	d.erase(func(h header) bool {
		mine := h[1] == codeBlobIdx && h[29] == start || h[1] == codeBlobData && h[3]&0x80 == start
		return h[0] == 1 && keyOf(h) == e.Key && !mine
	}, -1, 0)
	return true
}

func drawValue(t *rapid.T) Entry {
	e := Entry{Namespace: "ns", Key: rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "key")}
	switch e.Type = rapid.SampledFrom([]Type{U32, I16, String, Blob}).Draw(t, "type"); e.Type {
	case U32, I16:
		e.Number = numbers[e.Type].extend(rapid.Uint64().Draw(t, "number"))
	default:
		e.Data = bytes.Repeat([]byte{rapid.ByteRange('A', 'z').Draw(t, "letter")}, rapid.IntRange(0, 600).Draw(t, "length"))
		if e.Type == Blob {
			e.Data = bytes.Repeat(e.Data, rapid.IntRange(0, 4).Draw(t, "times"))
		}
	}
	return e
}

// Whatever a device writes, and whenever its power fails: each key has the value that was written last, or, of the write
// that power cut, the one before. Nothing else is lost.
func TestWhatADeviceWrites(t *testing.T) {
	cuts, moves := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		power := rapid.SampledFrom([]int{-1, 0, 2000, 6000, 9000}).Draw(t, "power")
		if power >= 0 {
			power += rapid.IntRange(0, 3000).Draw(t, "more power")
		}
		d := newDevice(6, power)
		want := map[string]Entry{}
		var cut *Entry
		for range rapid.SampledFrom([]int{3, 40, 200, 400}).Draw(t, "writes") {
			e := drawValue(t)
			alive, fits := write(d, e)
			if !alive {
				cut = &e
				cuts++
				break
			}
			if !fits {
				return // the device would report that the partition is full, with the value half written
			}
			want[e.Key] = e
		}
		if d.seq > 6 {
			moves++
		}
		p, err := Decode(d.image, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]Entry{}
		for _, it := range p.Items {
			if it.Type != Namespace {
				got[it.Key] = it.Entry
			}
		}
		if cut != nil {
			if g, ok := got[cut.Key]; ok && equal(g, *cut) {
				want[cut.Key] = *cut
			}
		} else if len(p.Findings) > 0 {
			t.Fatalf("findings: %v", p.Findings)
		}
		if !maps.EqualFunc(got, want, equal) {
			t.Fatalf("read %s, want %s; cut in %v; findings %v", describe(got), describe(want), cut, p.Findings)
		}
	})
	t.Logf("%d power cuts, %d runs with pages moved", cuts, moves)
	if cuts == 0 || moves == 0 {
		t.Errorf("%d power cuts, %d runs with pages moved: the test tests nothing", cuts, moves)
	}
}

func write(d *device, e Entry) (alive, fits bool) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case powerCut:
			alive = false
		default:
			panic(r)
		}
	}()
	return true, d.set(e)
}

func describe(m map[string]Entry) string {
	s := ""
	for _, k := range slices.Sorted(maps.Keys(m)) {
		s += fmt.Sprintf("%v=%.8s(%d) ", m[k], m[k].Text(), len(m[k].Data))
	}
	return s
}
