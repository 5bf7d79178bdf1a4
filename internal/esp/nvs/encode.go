package nvs

import (
	"encoding/binary"
	"fmt"
	"slices"

	"muster/internal/fleet"
)

// Version is the format of an NVS partition. ESP-IDF reads both since 3.2.
type Version int

// Versions. In format 1 a blob must fit a page.
const (
	V1 Version = 1
	V2 Version = 2
)

func (v Version) code() byte {
	if v == V1 {
		return 0xFF
	}
	return 0xFE
}

// Options say what partition Encode makes.
type Options struct {
	Size    int     // of the partition, bytes: a multiple of PageSize
	Version Version // V2 if 0

	// ReadOnly is for a partition with that flag in the partition table: it may be smaller than MinSize, and all its
	// pages may be used. Else the last one stays free, which a device needs in order to write.
	ReadOnly bool

	// Keys, if not nil, encrypt the partition.
	Keys *Keys

	// AsGenerator makes what Espressif's generator makes even where that is doubtful: a key that is there twice is
	// written twice, and a read-only partition smaller than MinSize ends after its last used page.
	AsGenerator bool
}

func (o Options) check() error {
	switch {
	case o.Size <= 0 || o.Size%PageSize != 0 || o.Size > MaxSize:
		return fleet.Coded(fleet.Invalid, CodeSize, "an NVS partition of 0x%x bytes: use a multiple of 0x%x, at most 0x%x", o.Size, PageSize, MaxSize)
	case o.Size < MinSize && !o.ReadOnly:
		return fleet.Coded(fleet.Invalid, CodeSize, "an NVS partition of 0x%x bytes: a device needs 0x%x to write to it; a smaller one must have the flag readonly in the partition table", o.Size, MinSize)
	case o.Version != 0 && o.Version != V1 && o.Version != V2:
		return fleet.Coded(fleet.Invalid, CodeVersion, "NVS format %d: use 1 or 2", o.Version)
	}
	return nil
}

// Encode returns the image of a partition with the entries in the given order. A namespace comes into being with the
// first entry that names it. An entry that NVS cannot hold is Invalid or TooLarge; a key twice in a namespace is Invalid;
// entries that do not fit the partition are Unprocessable, and the message says what size would do.
func Encode(entries []Entry, o Options) ([]byte, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	l, err := lay(entries, o)
	if err != nil {
		return nil, err
	}
	used, usable := len(l.image)/PageSize, o.Size/PageSize
	if !o.ReadOnly {
		usable--
	}
	if used > usable {
		return nil, fleet.Coded(fleet.Unprocessable, CodeFull, "the entries need %d pages of NVS, but a partition of 0x%x bytes has %d for them: make it 0x%x",
			used, o.Size, usable, l.size(o.ReadOnly))
	}
	if !o.AsGenerator || !o.ReadOnly || o.Size >= MinSize {
		l.erase(o.Size - len(l.image))
	}
	if o.Keys != nil {
		if err := crypt(l.image, *o.Keys, false); err != nil {
			return nil, err
		}
	}
	return l.image, nil
}

// SizeFor returns the size of the smallest writable partition that holds the entries, bytes. Errors are those of Encode.
func SizeFor(entries []Entry, v Version) (int, error) {
	o := Options{Size: MaxSize, Version: v}
	if err := o.check(); err != nil {
		return 0, err
	}
	l, err := lay(entries, o)
	if err != nil {
		return 0, err
	}
	return l.size(false), nil
}

// lay writes the entries to as many pages as they need.
func lay(entries []Entry, o Options) (*layout, error) {
	v := o.Version
	if v == 0 {
		v = V2
	}
	l := &layout{version: v, image: make([]byte, 0, min(o.Size, 1<<20))}
	if err := l.newPage(); err != nil {
		return nil, err
	}
	namespaces := map[string]byte{}
	type name struct{ namespace, key string }
	seen := map[name]Entry{}
	for _, e := range entries {
		if err := e.check(v); err != nil {
			return nil, err
		}
		ns, ok := namespaces[e.Namespace]
		if !ok {
			if len(namespaces) == maxNamespaces {
				return nil, fleet.Coded(fleet.Invalid, CodeNamespace, "%s: NVS has at most %d namespaces", e.where(), maxNamespaces)
			}
			ns = byte(len(namespaces) + 1)
			namespaces[e.Namespace] = ns
			if err := l.number(0, e.Namespace, U8, uint64(ns)); err != nil {
				return nil, err
			}
		}
		if e.Type == Namespace {
			continue
		}
		at := name{e.Namespace, e.Key}
		if first, twice := seen[at]; twice && !o.AsGenerator {
			return nil, fleet.Coded(fleet.Invalid, CodeDuplicate, "%s is there twice%s: a device keeps one of them; take one away", e.where(), first.firstLine())
		}
		seen[at] = e
		if err := l.add(ns, e); err != nil {
			return nil, e.locate(err)
		}
	}
	return l, nil
}

func (e Entry) firstLine() string {
	if e.Line == 0 {
		return ""
	}
	return fmt.Sprintf(", first in line %d", e.Line)
}

// layout places items as Espressif's generator does (esp32.md §4.3).
type layout struct {
	version Version
	image   []byte
	next    int // free entry of the last page
}

func (l *layout) size(readOnly bool) int {
	if readOnly {
		return len(l.image)
	}
	return max(len(l.image)+PageSize, MinSize)
}

func (l *layout) erase(n int) {
	for l.image = slices.Grow(l.image, n); n > 0; n -= PageSize {
		l.image = append(l.image, ff...)
	}
}

func (l *layout) page() page { return page(l.image[len(l.image)-PageSize:]) }

func (l *layout) newPage() error {
	if len(l.image) >= MaxSize {
		return fleet.Coded(fleet.TooLarge, CodeFull, "the entries need more than 0x%x bytes of NVS", MaxSize)
	}
	if len(l.image) > 0 {
		l.page().setState(wordFull)
	}
	seq := uint32(len(l.image) / PageSize)
	l.erase(PageSize)
	l.page().format(seq, l.version.code())
	l.next = 0
	return nil
}

// put writes whole entries and what is left of the last one stays 0xFF.
func (l *layout) put(data []byte) {
	p := l.page()
	copy(p[entriesOffset+l.next*entrySize:], data)
	for range spanOf(len(data)) - 1 {
		p.markWritten(l.next)
		l.next++
	}
}

func (l *layout) add(ns byte, e Entry) error {
	switch {
	case e.Type == String:
		return l.onePage(ns, codeString, e.Key, append(slices.Clip(e.Data), 0))
	case e.Type == Blob && l.version == V1:
		return l.onePage(ns, codeBlobV1, e.Key, e.Data)
	case e.Type == Blob:
		return l.blob(ns, e.Key, e.Data)
	}
	return l.number(ns, e.Key, e.Type, e.Number)
}

func (l *layout) number(ns byte, key string, t Type, v uint64) error {
	if l.next >= pageEntries {
		if err := l.newPage(); err != nil {
			return err
		}
	}
	n := numbers[t]
	h := newHeader(ns, n.code, 1, anyChunk, key)
	var all [8]byte
	binary.LittleEndian.PutUint64(all[:], v)
	copy(h[24:], all[:n.bytes])
	h.seal()
	l.put(h[:])
	return nil
}

// onePage writes a value that must not be split. The generator never fills a page's last entry with it.
func (l *layout) onePage(ns, code byte, key string, data []byte) error {
	span := spanOf(len(data))
	if l.next+span >= pageEntries {
		if err := l.newPage(); err != nil {
			return err
		}
	}
	h := newHeader(ns, code, span, anyChunk, key)
	h.setData(data)
	h.seal()
	l.put(h[:])
	l.put(data)
	return nil
}

// blob writes chunks that each fill what is left of a page, then the index. On a page with one entry left that makes a
// chunk of no bytes, which devices accept.
func (l *layout) blob(ns byte, key string, data []byte) error {
	if l.next >= pageEntries {
		if err := l.newPage(); err != nil {
			return err
		}
	}
	chunks, rest := 0, data
	for {
		if chunks == maxChunks {
			return fleet.Coded(fleet.TooLarge, CodeValue, "blob %q: %d bytes need more than %d chunks here: put it first, or make it shorter", key, len(data), maxChunks)
		}
		room := (pageEntries - l.next - 1) * entrySize
		n := min(room, len(rest))
		h := newHeader(ns, codeBlobData, spanOf(n), byte(chunks), key)
		h.setData(rest[:n])
		h.seal()
		l.put(h[:])
		l.put(rest[:n])
		chunks++
		rest = rest[n:]
		if len(rest) > 0 || room-n < entrySize {
			if err := l.newPage(); err != nil {
				return err
			}
		}
		if len(rest) == 0 {
			break
		}
	}
	h := newHeader(ns, codeBlobIdx, 1, anyChunk, key)
	binary.LittleEndian.PutUint32(h[24:], uint32(len(data)))
	h[28], h[29] = byte(chunks), 0
	h.seal()
	l.put(h[:])
	return nil
}
