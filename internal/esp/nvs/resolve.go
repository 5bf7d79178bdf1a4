package nvs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"muster/internal/esp"
)

// place is where a value lives: one key has one value.
type place struct {
	ns  byte
	key string
}

// held is what was found for a place. Numbers count records, that is the order of writing.
type held struct {
	values  []int         // records of whole values
	indexes []int         // records of blob indexes
	chunks  map[byte]int  // the latest record of each chunk of a blob
	used    map[byte]bool // chunks that belong to the blob
}

// candidate is a value that a place could have.
type candidate struct {
	at    int // record that makes it count: of two, the later one wins
	first int // record that it starts with
	entry Entry
}

// resolve turns records into items: it names namespaces, joins chunks, and lets the last write of a key win.
func (r *reader) resolve() []Item {
	names := r.namespaces()
	places := map[place]*held{}
	var order []place
	for i, rec := range r.records {
		if rec.ns() == 0 {
			continue
		}
		pl := place{rec.ns(), rec.key()}
		h := places[pl]
		if h == nil {
			h = &held{chunks: map[byte]int{}, used: map[byte]bool{}}
			places[pl] = h
			order = append(order, pl)
			r.checkPlace(rec, names)
		}
		switch rec.code() {
		case codeBlobData:
			h.chunks[rec.chunk()] = i
		case codeBlobIdx:
			h.indexes = append(h.indexes, i)
		default:
			h.values = append(h.values, i)
		}
	}
	type ordered struct {
		first int
		item  Item
	}
	var all []ordered
	for i, rec := range r.records {
		if rec.ns() == 0 && rec.code() == codeU8 {
			all = append(all, ordered{i, Item{Entry: NewNamespace(rec.key()), Offset: rec.offset, Index: byte(rec.value())}})
		}
	}
	for _, pl := range order {
		c, ok := r.latest(places[pl])
		if !ok {
			continue
		}
		c.entry.Namespace, c.entry.Key = names[pl.ns], pl.key
		all = append(all, ordered{c.first, Item{Entry: c.entry, Offset: r.records[c.first].offset, Index: pl.ns}})
	}
	slices.SortStableFunc(all, func(a, b ordered) int { return cmp.Compare(a.first, b.first) })
	items := make([]Item, len(all))
	for i, o := range all {
		items[i] = o.item
	}
	return items
}

// namespaces reads the entries of namespace 0, which name the others.
func (r *reader) namespaces() map[byte]string {
	names, indexes := map[byte]string{}, map[string]byte{}
	for _, rec := range r.records {
		if rec.ns() != 0 {
			continue
		}
		index := byte(rec.value())
		doubt := ""
		switch {
		case rec.code() != codeU8 || index == 0 || index > maxNamespaces:
			doubt = "not a namespace, where only those can be"
		case indexes[rec.key()] != 0:
			doubt = "a namespace is there twice"
		case names[index] != "":
			doubt = "two namespaces have the same number"
		case rec.badKey():
			doubt = "a namespace has a name that no program can ask for"
		}
		if doubt != "" {
			r.findings.add(esp.Warning, CodeNamespace, rec.offset, doubt, "some of its values may be out of a device's reach")
		}
		if rec.code() == codeU8 {
			if names[index] == "" {
				names[index] = rec.key()
			}
			indexes[rec.key()] = index
		}
	}
	return names
}

func (r *reader) checkPlace(rec record, names map[byte]string) {
	if _, ok := names[rec.ns()]; !ok {
		r.findings.add(esp.Warning, CodeNamespace, rec.offset, fmt.Sprintf("namespace number %d has no name", rec.ns()), "no program can read what is in it")
	}
	if rec.badKey() {
		r.findings.add(esp.Warning, CodeKey, rec.offset, "the key is one that no program can ask for", "no program can read the value")
	}
}

// badKey reports whether the key field is not a text with NULs behind it.
func (r record) badKey() bool {
	key := r.key()
	return key == "" || len(key) > MaxKey || strings.Trim(string(r.header[8+len(key):24]), "\x00") != ""
}

// latest returns the value that counts, and reports the others.
func (r *reader) latest(h *held) (candidate, bool) {
	var best candidate
	found := false
	offer := func(c candidate) {
		if found {
			older := min(best.at, c.at)
			r.findings.add(esp.Warning, CodeDuplicate, r.records[older].offset, "an older value of a key that was written again", "a device erases it when it starts")
		}
		if !found || c.at > best.at {
			best, found = c, true
		}
	}
	for _, i := range h.values {
		if e, ok := r.whole(r.records[i]); ok {
			offer(candidate{i, i, e})
		}
	}
	if c, ok := r.blob(h); ok {
		offer(c)
	}
	r.leftOver(h)
	return best, found
}

// whole returns the value of a record that is complete in itself.
func (r *reader) whole(rec record) (Entry, bool) {
	switch rec.code() {
	case codeString:
		text, ok := strings.CutSuffix(string(rec.data), "\x00")
		if !ok || strings.Contains(text, "\x00") {
			r.findings.add(esp.Warning, CodeData, rec.offset, "the string has no NUL, or more than one", "a program reads another text, or an error")
		}
		return Entry{Type: String, Data: []byte(text)}, true
	case codeBlobV1:
		return Entry{Type: Blob, Data: slices.Concat(rec.data)}, true
	}
	t := numberTypes[rec.code()]
	return Entry{Type: t, Number: numbers[t].extend(rec.value())}, true
}

// blob joins the chunks that the latest sound index names.
func (r *reader) blob(h *held) (candidate, bool) {
	for _, i := range slices.Backward(h.indexes) {
		idx := r.records[i]
		size := binary.LittleEndian.Uint32(idx.header[24:])
		count, start := int(idx.header[28]), int(idx.header[29])
		first, data, ok := r.join(h, start, count, size)
		if !ok {
			r.findings.add(esp.Error, CodeBlob, idx.offset, "chunks of the blob are missing, or their sizes do not add up", "a device cannot read it")
			continue
		}
		for c := range count {
			h.used[byte(start+c)] = true
		}
		for _, older := range h.indexes {
			if older < i {
				r.findings.add(esp.Warning, CodeDuplicate, r.records[older].offset, "an older version of a blob that was written again", "a device erases it when it starts")
			}
		}
		if count == 0 {
			first = i
		}
		return candidate{at: i, first: first, entry: Entry{Type: Blob, Data: data}}, true
	}
	return candidate{}, false
}

func (r *reader) join(h *held, start, count int, size uint32) (first int, data []byte, ok bool) {
	if start != 0 && start != 0x80 || count > maxChunks || int64(size) > int64(len(r.image)) {
		return 0, nil, false
	}
	first = len(r.records)
	data = []byte{}
	for c := range count {
		i, have := h.chunks[byte(start+c)]
		if !have || len(data)+len(r.records[i].data) > int(size) {
			return 0, nil, false
		}
		first = min(first, i)
		data = append(data, r.records[i].data...)
	}
	return first, data, len(data) == int(size)
}

// leftOver reports chunks that belong to no blob.
func (r *reader) leftOver(h *held) {
	lost := []int{}
	for c, i := range h.chunks {
		if !h.used[c] {
			lost = append(lost, i)
		}
	}
	if len(lost) > 0 {
		r.findings.add(esp.Warning, CodeBlob, r.records[slices.Min(lost)].offset, fmt.Sprintf("%d chunks belong to no blob", len(lost)), "a device erases them when it starts")
	}
}
