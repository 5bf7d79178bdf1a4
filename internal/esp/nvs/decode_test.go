package nvs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// partition is an image under construction, to be damaged.
type partition struct{ image []byte }

func (p partition) page(i int) page { return page(p.image[i*PageSize : (i+1)*PageSize]) }

// reseal makes the checksum of an entry right again after f has changed it.
func (p partition) change(pg, entry int, f func(h *header)) {
	h := header(p.page(pg).entry(entry))
	f(&h)
	h.seal()
	copy(p.page(pg).entry(entry), h[:])
}

func (p partition) erase(pg int, entries ...int) {
	for _, e := range entries {
		p.page(pg)[bitmapOffset+e/4] &^= 3 << (e % 4 * 2)
	}
}

func sample(t testing.TB) partition {
	// Page 0: namespace, u8 at 1, string at 2 to 4, blob data at 5 to 7, index at 8, i32 at 9.
	return partition{encode(t, []Entry{
		NewNumber("cfg", "port", uint8(42)),
		NewString("cfg", "host", strings.Repeat("h", 40)),
		NewBlob("cfg", "cert", bytes.Repeat([]byte{0xCE}, 64)),
		NewNumber("cfg", "level", int32(-7)),
	}, Options{Size: 0x4000})}
}

// keysOf lists what can be read.
func keysOf(p *Partition) string {
	var out []string
	for _, it := range p.Items {
		if it.Type != Namespace {
			out = append(out, it.Key)
		}
	}
	return strings.Join(out, " ")
}

// Each kind of damage is found where it is, and costs no more than it must.
func TestDamage(t *testing.T) {
	const e1 = entriesOffset + entrySize
	for _, v := range []struct {
		name     string
		damage   func(p partition)
		severity esp.Severity
		code     string
		offset   int64
		keys     string
	}{
		{"a bit of a number", func(p partition) { p.page(0).entry(1)[24] ^= 1 }, esp.Error, CodeEntry, e1, "host cert level"},
		{"a bit of a string's text", func(p partition) { p.page(0).entry(3)[0] ^= 1 }, esp.Error, CodeData, e1 + 32, "port cert level"},
		{"a bit of a string's header", func(p partition) { p.page(0).entry(2)[9] ^= 1 }, esp.Error, CodeEntry, e1 + 32, "port cert level"},
		{"a bit of a chunk", func(p partition) { p.page(0).entry(6)[0] ^= 1 }, esp.Error, CodeData, e1 + 4*32, "port host level"},
		{"a chunk erased", func(p partition) { p.erase(0, 5, 6, 7) }, esp.Error, CodeBlob, e1 + 7*32, "port host level"},
		{"a part of a chunk erased", func(p partition) { p.erase(0, 7) }, esp.Error, CodeTorn, e1 + 4*32, "port host level"},
		{"a blob's index erased", func(p partition) { p.erase(0, 8) }, esp.Warning, CodeBlob, e1 + 4*32, "port host level"},
		{"a value erased as a whole", func(p partition) { p.erase(0, 1) }, "", "", 0, "host cert level"},
		{"span 0", func(p partition) { p.change(0, 1, func(h *header) { h[2] = 0 }) }, esp.Error, CodeEntry, e1, "host cert level"},
		{"a number over two entries", func(p partition) { p.change(0, 9, func(h *header) { h[2] = 2 }) }, esp.Error, CodeEntry, e1 + 8*32, "port host cert"},
		{"a string beyond the page", func(p partition) { p.change(0, 2, func(h *header) { h[2] = 125 }) }, esp.Error, CodeEntry, e1 + 32, "port cert level"},
		{"a string longer than its entries", func(p partition) {
			p.change(0, 2, func(h *header) { binary.LittleEndian.PutUint16(h[24:], 65) })
		}, esp.Error, CodeEntry, e1 + 32, "port cert level"},
		{"an unknown type", func(p partition) { p.change(0, 1, func(h *header) { h[1] = 0x99 }) }, esp.Error, CodeType, e1, "host cert level"},
		{"a blob of the wrong size", func(p partition) { p.change(0, 8, func(h *header) { h[24] = 65 }) }, esp.Error, CodeBlob, e1 + 7*32, "port host level"},
		{"a blob of a huge size", func(p partition) {
			p.change(0, 8, func(h *header) { binary.LittleEndian.PutUint32(h[24:], 0xFFFFFFF0) })
		}, esp.Error, CodeBlob, e1 + 7*32, "port host level"},
		{"a blob from chunk 5 on", func(p partition) { p.change(0, 8, func(h *header) { h[29] = 5 }) }, esp.Error, CodeBlob, e1 + 7*32, "port host level"},
		{"a blob of 255 chunks", func(p partition) { p.change(0, 8, func(h *header) { h[28] = 255 }) }, esp.Error, CodeBlob, e1 + 7*32, "port host level"},
		{"a string without NUL", func(p partition) {
			data := bytes.Repeat([]byte("h"), 41)
			copy(p.page(0).payload(3, 41), data)
			p.change(0, 2, func(h *header) { h.setData(data) })
		}, esp.Warning, CodeData, e1 + 32, "port host cert level"},
		{"no namespace", func(p partition) { p.erase(0, 0) }, esp.Warning, CodeNamespace, e1, "port host cert level"},
		{"a namespace of no number", func(p partition) { p.change(0, 0, func(h *header) { h[24] = 0 }) }, esp.Warning, CodeNamespace, entriesOffset, "port host cert level"},
		{"a string where namespaces are", func(p partition) { p.change(0, 9, func(h *header) { h[0] = 0 }) }, esp.Warning, CodeNamespace, e1 + 8*32, "port host cert"},
		{"a key of 16 bytes", func(p partition) { p.change(0, 1, func(h *header) { copy(h[8:24], "0123456789abcdef") }) }, esp.Warning, CodeKey, e1, "0123456789abcdef host cert level"},
		{"no key", func(p partition) { p.change(0, 1, func(h *header) { clear(h[8:24]) }) }, esp.Warning, CodeKey, e1, " host cert level"},
		{"something behind the key's end", func(p partition) { p.change(0, 1, func(h *header) { h[20] = 'x' }) }, esp.Warning, CodeKey, e1, "port host cert level"},
		{"power lost while an entry was written", func(p partition) { copy(p.page(0).entry(10), "\x01\x01\x01\xFF") }, esp.Warning, CodeTorn, e1 + 9*32, "port host cert level"},
		{"entries behind the end", func(p partition) { p.page(0).markWritten(50) }, esp.Error, CodeEntry, e1 + 49*32, "port host cert level"},
		{"an impossible state of an entry", func(p partition) { p.page(0)[bitmapOffset] ^= 0b1100 }, esp.Error, CodeEntry, e1, "host cert level"},
		{"the header's checksum", func(p partition) { p.page(0)[28] ^= 1 }, esp.Error, CodePage, 0, ""},
		{"the page's number", func(p partition) { p.page(0)[4] ^= 1 }, esp.Error, CodePage, 0, ""},
		{"the page's state", func(p partition) { p.page(0).setState(0x12345678) }, esp.Error, CodePage, 0, ""},
		{"state empty, but it is not", func(p partition) { p.page(0).setState(wordEmpty) }, esp.Error, CodePage, 0, ""},
		{"marked corrupt", func(p partition) { p.page(0).setState(wordCorrupt) }, esp.Warning, CodePage, 0, ""},
		{"marked invalid", func(p partition) { p.page(0).setState(wordInvalid) }, esp.Warning, CodePage, 0, ""},
		{"a later format", func(p partition) { p.page(0).setState(wordEmpty); p.page(0).format(0, 0xFD) }, esp.Error, CodeVersion, 0, ""},
		{"an empty page with data", func(p partition) { p.page(2)[1000] = 0 }, esp.Error, CodePage, 2 * PageSize, "port host cert level"},
		{"two active pages", func(p partition) { p.page(2).format(1, 0xFE) }, esp.Warning, CodePage, 2 * PageSize, "port host cert level"},
		{"no free page", func(p partition) {
			for i := range 4 {
				p.page(i).setState(wordActive)
				p.page(i).format(uint32(i), 0xFE)
				p.page(i).setState(wordFull)
			}
		}, esp.Warning, CodeNoFreePage, 0, "port host cert level"},
		{"the same number twice", func(p partition) { p.page(0).setState(wordFull); p.page(1).format(0, 0xFE) }, esp.Warning, CodePage, PageSize, "port host cert level"},
	} {
		p := sample(t)
		v.damage(p)
		got, err := Decode(p.image, nil)
		if err != nil {
			t.Errorf("%s: %v", v.name, err)
			continue
		}
		if k := keysOf(got); k != v.keys {
			t.Errorf("%s: read %q, want %q", v.name, k, v.keys)
		}
		found := slices.ContainsFunc(got.Findings, func(f esp.Finding) bool {
			return f.Code == v.code && f.Severity == v.severity && f.Offset == v.offset
		})
		if v.code == "" && len(got.Findings) > 0 || v.code != "" && !found {
			t.Errorf("%s: findings %v", v.name, got.Findings)
		}
	}
}

func TestOneFindingForALongDamage(t *testing.T) {
	p := partition{encode(t, []Entry{NewString("n", "long", strings.Repeat("x", 3000)), NewNumber("n", "k", uint8(1))}, Options{Size: 0x4000})}
	p.page(0).entry(1)[9] ^= 1
	got, err := Decode(p.image, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Findings) != 1 || got.Findings[0].Code != CodeEntry || !strings.Contains(got.Findings[0].Message, "95 entries") || keysOf(got) != "k" {
		t.Errorf("read %q, findings %v", keysOf(got), got.Findings)
	}
}

func TestFindingsAreBounded(t *testing.T) {
	image := bytes.Repeat(ff, 300)
	for i := range 300 {
		p := page(image[i*PageSize : (i+1)*PageSize])
		p.format(uint32(i), 0xFE)
		for e := 0; e < 120; e += 2 {
			p.markWritten(e)
		}
	}
	p := partition{image}
	h := newHeader(0, codeU8, 1, anyChunk, "n")
	h[24] = 1
	h.seal()
	copy(p.page(0).entry(0), h[:]) // one entry is sound, so that it does not count as encrypted
	got, err := Decode(image, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Findings) != MaxFindings || !got.Findings.Has(CodeMore) {
		t.Errorf("%d findings", len(got.Findings))
	}
}

func TestAnEncryptedPartitionWithoutItsKeys(t *testing.T) {
	image := file(t, "basic_enc_fixed.bin")
	for name, v := range map[string]struct {
		image []byte
		keys  *Keys
	}{
		"without keys":              {image, nil},
		"other keys":                {image, partitionKeys(t, "nvs_keys_hmac.bin")},
		"keys, but in the clear":    {file(t, "basic_plain.bin"), partitionKeys(t, "nvs_keys_hmac.bin")},
		"long, with too much noise": {bytes.Repeat(image, 40), nil},
	} {
		p, err := Decode(v.image, v.keys)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Findings.Err()
		if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Code != CodeUnreadable || len(p.Items) > 0 || p.Findings.Has(CodeEntry) {
			t.Errorf("%s: %v, %v", name, err, p.Findings)
		}
	}
}

func TestWhatIsNoPartition(t *testing.T) {
	k := partitionKeys(t, "nvs_keys_fixed.bin")
	for _, n := range []int{0, 1, 4095, 4097, MaxSize + PageSize} {
		image := make([]byte, n)
		_, dec := Decode(image, nil)
		_, e := Encrypt(image, *k)
		_, d := Decrypt(image, *k)
		for _, err := range []error{dec, e, d} {
			if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.Invalid || e.Code != CodeSize {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
	}
	for name, b := range map[string][]byte{"empty flash": bytes.Repeat(ff, 5), "one page": bytes.Clone(ff)} {
		p, err := Decode(b, nil)
		if err != nil || len(p.Items)+len(p.Findings) > 0 || p.Pages[0].State != Empty {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
}

func TestItemsSayWhereTheyAre(t *testing.T) {
	p := sample(t)
	got, err := Decode(p.image, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int64{"port": 1, "host": 2, "cert": 5, "level": 9}
	for _, it := range got.Items {
		if entry := (it.Offset - entriesOffset) / entrySize; entry != want[it.Key] || it.Index != 1 {
			t.Errorf("%v at entry %d of namespace %d", it, entry, it.Index)
		}
	}
	if pg := got.Pages[0]; pg.Written != 10 || pg.Erased != 0 || pg.State != Active || pg.Version != V2 {
		t.Errorf("page %+v", pg)
	}
}

func TestKeysThatAreRefused(t *testing.T) {
	good := partitionKeys(t, "nvs_keys_fixed.bin").Partition()
	bad := bytes.Clone(good)
	bad[3] ^= 1
	for name, v := range map[string]struct {
		err  error
		kind fleet.Kind
		code string
	}{
		"raw too short":       {second(ParseKeys(make([]byte, 63))), fleet.Invalid, CodeKeys},
		"raw too long":        {second(ParseKeys(make([]byte, 65))), fleet.Invalid, CodeKeys},
		"HMAC key too short":  {second(KeysFromHMAC(make([]byte, 31))), fleet.Invalid, CodeKeys},
		"partition too short": {second(ParseKeyPartition(good[:4095])), fleet.Invalid, CodeKeys},
		"no partition":        {second(ParseKeyPartition(nil)), fleet.Invalid, CodeKeys},
		"damaged":             {second(ParseKeyPartition(bad)), fleet.Unprocessable, CodeKeysCRC},
		"empty":               {second(ParseKeyPartition(ff)), fleet.Unprocessable, CodeKeysEmpty},
		"no randomness":       {second(GenerateKeys(bytes.NewReader(make([]byte, 63)))), fleet.Internal, CodeRandomness},
	} {
		if e, ok := errors.AsType[*fleet.Error](v.err); !ok || e.Kind != v.kind || e.Code != v.code {
			t.Errorf("%s: %v", name, v.err)
		}
	}
	if _, err := GenerateHMACKey(bytes.NewReader(make([]byte, 31))); !fleet.Is(err, fleet.Internal) {
		t.Errorf("HMAC key without randomness: %v", err)
	}
	if key, err := GenerateHMACKey(bytes.NewReader(bytes.Repeat([]byte{5}, 40))); err != nil || !bytes.Equal(key, bytes.Repeat([]byte{5}, 32)) {
		t.Errorf("HMAC key %x, %v", key, err)
	}
}

func second(_ Keys, err error) error { return err }

// freshPage makes page i an empty active one.
func (p partition) freshPage(i int, seq uint32) page {
	copy(p.page(i), ff)
	p.page(i).format(seq, 0xFE)
	return p.page(i)
}

// put writes an item at an entry of a page.
func (p partition) put(pg, entry int, h header, data []byte) {
	if data != nil {
		h.setData(data)
	}
	h.seal()
	copy(p.page(pg).entry(entry), h[:])
	copy(p.page(pg).payload(entry, entrySize+len(data))[entrySize:], data)
	for i := range int(h[2]) {
		p.page(pg).markWritten(entry + i)
	}
}

// Power was lost while the entries of page 0 were moved to page 1: a device starts the move again.
func TestAMoveThatPowerCut(t *testing.T) {
	p := sample(t)
	p.page(0).setState(wordFreeing)
	copy(p.freshPage(1, 1)[bitmapOffset:], p.page(0)[bitmapOffset:entriesOffset+3*entrySize])
	got, err := Decode(p.image, nil)
	if err != nil {
		t.Fatal(err)
	}
	if keysOf(got) != "port host cert level" || len(got.Findings) != 1 || got.Findings[0].Code != CodeTorn || got.Findings[0].Severity != esp.Info || got.Findings[0].Offset != PageSize {
		t.Errorf("read %q, findings %v", keysOf(got), got.Findings)
	}

	p.page(1).setState(wordFull) // then it is no such move, and the later page counts
	p.change(1, 1, func(h *header) { h[24] = 43 })
	got, err = Decode(p.image, nil)
	if err != nil {
		t.Fatal(err)
	}
	if it, _ := got.Find("cfg", "port"); it.Number != 43 {
		t.Errorf("port is %s", it.Text())
	}
}

// A device writes a blob again under the other half of the chunk numbers; the older one counts until the newer one is whole.
func TestABlobThatWasWrittenAgain(t *testing.T) {
	index := func(size, count, start byte) header {
		h := newHeader(1, codeBlobIdx, 1, anyChunk, "cert")
		h[24], h[25], h[26], h[27], h[28], h[29] = size, 0, 0, 0, count, start
		return h
	}
	newer := []byte("a newer certificate")
	p := sample(t)
	p.put(0, 10, newHeader(1, codeBlobData, 2, 0x80, "cert"), newer)
	for _, v := range []struct {
		name   string
		damage func()
		want   []byte
		code   string
	}{
		{"no index yet", func() {}, bytes.Repeat([]byte{0xCE}, 64), CodeBlob},
		{"an index, and the older one is there", func() { p.put(0, 12, index(byte(len(newer)), 1, 0x80), nil) }, newer, CodeDuplicate},
		{"an index that does not fit", func() { p.put(0, 12, index(99, 1, 0x80), nil) }, bytes.Repeat([]byte{0xCE}, 64), CodeBlob},
		{"an index of no chunks", func() { p.put(0, 12, index(0, 0, 0x80), nil) }, nil, CodeDuplicate},
	} {
		v.damage()
		got, err := Decode(p.image, nil)
		if err != nil {
			t.Fatal(err)
		}
		if it, ok := got.Find("cfg", "cert"); !ok || !bytes.Equal(it.Data, v.want) || !got.Findings.Has(v.code) {
			t.Errorf("%s: %d bytes, findings %v", v.name, len(it.Data), got.Findings)
		}
	}
}

func TestNamespacesThatAreNotClear(t *testing.T) {
	ns := func(name string, index byte) header {
		h := newHeader(0, codeU8, 1, anyChunk, name)
		h[24] = index
		return h
	}
	for name, h := range map[string]header{
		"the same name again": ns("cfg", 2), "the same number again": ns("other", 1), "no name": ns("", 3), "number 255": ns("x", 255),
	} {
		p := sample(t)
		p.put(0, 10, h, nil)
		got, err := Decode(p.image, nil)
		if err != nil {
			t.Fatal(err)
		}
		if keysOf(got) != "port host cert level" || len(got.Findings) != 1 || got.Findings[0].Code != CodeNamespace || got.Findings[0].Offset != entriesOffset+10*entrySize {
			t.Errorf("%s: read %q, findings %v", name, keysOf(got), got.Findings)
		}
		if it, ok := got.Find("cfg", "port"); !ok || it.Number != 42 {
			t.Errorf("%s: cfg:port is lost", name)
		}
	}
}
