package nvs

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"muster/internal/esp"
)

// Partition is what Decode found.
type Partition struct {
	Pages    []Page       // in flash order
	Items    []Item       // in the order of writing: what a device would read
	Findings esp.Findings // what is damaged or doubtful, at most MaxFindings
}

// Page is one page of flash.
type Page struct {
	Offset  int64   `json:"offset"`
	State   State   `json:"state"`
	Seq     uint32  `json:"seq"`     // pages were opened in this order
	Version Version `json:"version"` // 0 if the page cannot be read
	Written int     `json:"written"` // entries
	Erased  int     `json:"erased"`
}

// Item is an entry with its place. Of an item whose namespace is missing, Namespace is empty. Key and Namespace may hold
// any bytes but NUL: quote them before showing.
type Item struct {
	Entry
	Offset int64 // of its first entry in flash; of a blob that of its first chunk
	Index  uint8 // of its namespace
}

// Entries returns the items as Encode takes them.
func (p *Partition) Entries() []Entry {
	out := make([]Entry, len(p.Items))
	for i, it := range p.Items {
		out[i] = it.Entry
	}
	return out
}

// Find returns the value of a key.
func (p *Partition) Find(namespace, key string) (Item, bool) {
	i := slices.IndexFunc(p.Items, func(it Item) bool {
		return it.Namespace == namespace && it.Key == key && it.Type != Namespace
	})
	if i < 0 {
		return Item{}, false
	}
	return p.Items[i], true
}

// Decode reads the image of a partition, decrypting it first if keys is not nil. Damage is not an error: findings say
// where it is, and the items are what a device would still read. Only an image that is no partition in size is an error,
// and Invalid. The result is at most a few times as large as the image.
func Decode(image []byte, keys *Keys) (*Partition, error) {
	if err := checkImage(image); err != nil {
		return nil, err
	}
	if keys != nil {
		clear, err := Decrypt(image, *keys)
		if err != nil {
			return nil, err
		}
		image = clear
	}
	r := &reader{image: image}
	for _, i := range r.readPages() {
		r.scan(i)
	}
	r.unreadable(keys != nil)
	items := r.resolve()
	return &Partition{Pages: r.pages, Items: items, Findings: r.findings.list()}, nil
}

// reader holds what was read so far.
type reader struct {
	image    []byte
	pages    []Page
	findings findings
	records  []record // in the order of writing
	written  int      // entries that the bitmaps call written
}

// record is an item as it stands on a page.
type record struct {
	offset int64
	header header
	data   []byte // of strings and blobs, within the image
}

func (r record) ns() byte      { return r.header[0] }
func (r record) code() byte    { return r.header[1] }
func (r record) chunk() byte   { return r.header[3] }
func (r record) key() string   { k, _, _ := bytes.Cut(r.header[8:24], []byte{0}); return string(k) }
func (r record) value() uint64 { return binary.LittleEndian.Uint64(r.header[24:]) }

func (r *reader) page(i int) page { return page(r.image[i*PageSize : (i+1)*PageSize]) }

// readPages reads the headers and returns the readable pages by sequence number.
func (r *reader) readPages() []int {
	var readable []int
	for i := range len(r.image) / PageSize {
		info, ok := r.readHeader(i)
		r.pages = append(r.pages, info)
		if ok {
			readable = append(readable, i)
		}
	}
	slices.SortStableFunc(readable, func(a, b int) int { return cmp.Compare(r.pages[a].Seq, r.pages[b].Seq) })
	r.checkOrder(readable)
	return r.dropUnfinishedMove(readable)
}

func (r *reader) readHeader(i int) (Page, bool) {
	p := r.page(i)
	info := Page{Offset: int64(i) * PageSize, Seq: p.seq()}
	damaged := func(severity esp.Severity, code, message, hint string) (Page, bool) {
		r.findings.add(severity, code, info.Offset, message, hint)
		return info, false
	}
	state, known := states[p.state()]
	info.State = state
	switch {
	case state == Empty && allFF(p):
		info.Seq = 0
		return info, false
	case state == Empty, !known:
		info.State = Corrupt
		return damaged(esp.Error, CodePage, "the page's state is damaged", "a device discards the page")
	case state == Corrupt, state == Invalid:
		return damaged(esp.Warning, CodePage, "a device has marked the page as "+string(state), "it no longer reads it")
	case !p.headerOK():
		info.State = Corrupt
		return damaged(esp.Error, CodePage, "the checksum of the page's header is wrong", "a device discards the page")
	}
	switch p.version() {
	case V1.code():
		info.Version = V1
	case V2.code():
		info.Version = V2
	default:
		return damaged(esp.Error, CodeVersion, "the page has a format newer than 2", "ESP-IDF refuses the partition, and most firmware then erases it")
	}
	for e := range pageEntries {
		switch p.slot(e) {
		case slotWritten:
			info.Written++
		case slotErased, slotIllegal:
			info.Erased++
		}
	}
	r.written += info.Written
	return info, true
}

func (r *reader) checkOrder(readable []int) {
	active, free := 0, len(r.pages)-len(readable)
	for n, i := range readable {
		if n > 0 && r.pages[i].Seq == r.pages[readable[n-1]].Seq {
			r.findings.add(esp.Warning, CodePage, r.pages[i].Offset, "two pages have the same sequence number", "which value is the latest is not sure")
		}
		if r.pages[i].State == Active {
			active++
		}
	}
	if active > 1 {
		r.findings.add(esp.Warning, CodePage, r.pages[readable[len(readable)-1]].Offset, "more than one page is active", "a device goes on with the last one")
	}
	if free == 0 && len(r.image) >= MinSize {
		r.findings.add(esp.Warning, CodeNoFreePage, 0, "no page is free", "a device cannot write to the partition, and refuses it unless it is read-only")
	}
}

// dropUnfinishedMove does what a device does that lost power while it moved entries from a page: the move starts again,
// so the page that they were moved to does not count (esp-idf: PageManager::load).
func (r *reader) dropUnfinishedMove(readable []int) []int {
	if len(readable) < 2 {
		return readable
	}
	last := readable[len(readable)-1]
	moving := slices.ContainsFunc(readable[:len(readable)-1], func(i int) bool { return r.pages[i].State == Freeing })
	if !moving || r.pages[last].State != Active {
		return readable
	}
	r.findings.add(esp.Info, CodeTorn, r.pages[last].Offset, "the device lost power while it moved entries to this page", "nothing is lost: they are still where they were")
	return readable[:len(readable)-1]
}

// scan reads the items of a page as a device does at start (esp-idf: Page::mLoadEntryTable).
func (r *reader) scan(i int) {
	p := r.page(i)
	base := r.pages[i].Offset
	at := func(e int) int64 { return base + entriesOffset + int64(e)*entrySize }
	end := pageEntries
	if r.pages[i].State == Active {
		end = r.activeEnd(p, at)
	}
	bad := run{at: at, findings: &r.findings}
	for e := 0; e < end; {
		if s := p.slot(e); s != slotWritten {
			if s == slotIllegal {
				r.findings.add(esp.Error, CodeEntry, at(e), "the entry's state is one that no device writes", "a device does not read it")
			}
			e++
			continue
		}
		h := header(p.entry(e))
		if !h.sealed() {
			bad.add(e)
			e++
			continue
		}
		bad.flush()
		e += r.item(p, h, e, at(e))
	}
	bad.flush()
}

// activeEnd returns the entry at which the active page's use ends. What lies behind was being written when power failed.
func (r *reader) activeEnd(p page, at func(int) int64) int {
	end := 0
	for end < pageEntries && p.slot(end) != slotEmpty {
		end++
	}
	torn := end
	for torn < pageEntries && binary.LittleEndian.Uint32(p.entry(torn)) != 0xFFFFFFFF {
		torn++
	}
	if torn > end {
		r.findings.add(esp.Warning, CodeTorn, at(end), "the device lost power while it wrote here", "what it wrote last is lost, what stood there before is not")
	}
	for e := torn; e < pageEntries; e++ {
		if p.slot(e) == slotWritten {
			r.findings.add(esp.Error, CodeEntry, at(e), "entries behind the end of the active page", "a device does not read them")
			break
		}
	}
	return end
}

// item reads one item whose header is sound and returns how many entries it takes.
func (r *reader) item(p page, h header, e int, offset int64) int {
	rec := record{offset: offset, header: h}
	span := int(h[2])
	fail := func(code, message string) { r.findings.add(esp.Error, code, offset, message, "a device discards it") }
	_, isNumber := numberTypes[h[1]]
	hasData := h[1] == codeString || h[1] == codeBlobV1 || h[1] == codeBlobData
	switch {
	case span == 0 || e+span > pageEntries || !hasData && span != 1:
		fail(CodeEntry, "the entry's length is wrong")
		return 1
	case !isNumber && !hasData && h[1] != codeBlobIdx:
		fail(CodeType, "the entry has a type that muster does not know")
		return 1
	case hasData:
		size := int(binary.LittleEndian.Uint16(h[24:]))
		if spanOf(size) != span {
			fail(CodeEntry, "the value's length and the entry's do not agree")
			return span
		}
		for i := 1; i < span; i++ {
			if p.slot(e+i) != slotWritten {
				fail(CodeTorn, "only a part of the value was written")
				return span
			}
		}
		rec.data = p.payload(e+1, size)
		if binary.LittleEndian.Uint32(h[28:]) != checksum(rec.data) {
			fail(CodeData, "the checksum of the value is wrong")
			return span
		}
	}
	r.records = append(r.records, rec)
	return span
}

// unreadable says that the partition as a whole is noise, instead of listing its entries.
func (r *reader) unreadable(hadKeys bool) {
	if r.written == 0 || len(r.records) > 0 {
		return
	}
	message, hint := "no entry can be read: the partition is encrypted", "give its keys"
	if hadKeys {
		message, hint = "no entry can be read: the partition is in the clear, or has other keys", "read it without keys, or give the right ones"
	}
	r.findings.drop(CodeEntry)
	r.findings.add(esp.Error, CodeUnreadable, 0, message, hint)
}
