package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// Parse reads an image of the wanted kind. What a device would refuse is an Unprocessable error, the first that a
// strict reader comes upon; the report comes with it. Any other error is r's own.
func Parse(r io.Reader, want Kind) (*Report, error) {
	rep, err := Inspect(r, want)
	if err != nil {
		return rep, err
	}
	return rep, rep.Err()
}

// Inspect reads a file in one pass and reports what it finds. It reads MaxSize bytes and one more at most. Its error is
// r's own; a file that ends early is a finding.
func Inspect(r io.Reader, want Kind) (*Report, error) {
	s := &scanner{
		r:   io.LimitReader(r, MaxSize+1),
		sum: sha256.New(),
		buf: make([]byte, 64<<10),
		rep: &Report{},
	}
	s.image(want)
	s.finish()
	if s.err != nil {
		return s.rep, s.err
	}
	return s.rep, nil
}

// scanner reads a file from front to end and hashes all of it.
type scanner struct {
	r    io.Reader
	sum  hash.Hash // of everything up to pos
	buf  []byte
	pos  int64
	err  error // of r
	rep  *Report
	desc []byte // the first bytes of the first segment
}

// read fills p and returns how much of it there was.
func (s *scanner) read(p []byte) int {
	if s.err != nil {
		return 0
	}
	n, err := io.ReadFull(s.r, p)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		s.err = err
	}
	s.sum.Write(p[:n])
	s.pos += int64(n)
	return n
}

// stream passes the next n bytes to f in pieces and returns how many there were.
func (s *scanner) stream(n int64, f func([]byte)) int64 {
	for left := n; left > 0; {
		p := s.buf[:min(left, int64(len(s.buf)))]
		got := s.read(p)
		f(p[:got])
		left -= int64(got)
		if got < len(p) {
			return n - left
		}
	}
	return n
}

// finish reads what is left and closes the report.
func (s *scanner) finish() {
	s.stream(MaxSize+1, func([]byte) {})
	s.rep.Size = s.pos
	if s.pos > MaxSize {
		after := s.rep.Findings // which may only say that the end was not seen
		s.rep.Findings = nil
		s.rep.add(esp.Error, "esp_too_large", MaxSize, "no ESP32 boots an image of this size", "the file has more than %d bytes", MaxSize)
		s.rep.Findings = append(s.rep.Findings, after...)
		return
	}
	if s.err == nil {
		s.rep.SHA256 = fleet.HashOf([HashSize]byte(s.sum.Sum(nil)))
	}
}

// image reads the image and what follows it, in the order of esp32.md §1.5.
func (s *scanner) image(want Kind) {
	count, ok := s.header()
	if !ok {
		return
	}
	chip, known := esp.ChipByID(s.rep.Header.Chip)
	whole := s.segments(chip, count, want) && s.checksum() && s.appended()
	if whole {
		s.trailer()
	}
	if s.err != nil {
		return
	}
	s.chip(chip, known)
	s.descriptor(want)
	s.mapping()
	s.app(chip)
}

// header reads the header and returns the number of segments; false if nothing more can be read.
func (s *scanner) header() (count int, ok bool) {
	b := s.buf[:HeaderSize]
	n := s.read(b)
	if s.err != nil {
		return 0, false
	}
	if n == 0 {
		s.rep.add(esp.Error, "esp_empty", 0, "take the .bin as the build made it", "the file is empty")
		return 0, false
	}
	if b[0] != magic {
		s.rep.add(esp.Error, "esp_magic", 0, guess(b[:n]), "the first byte is 0x%02x, an image begins with 0xe9", b[0])
		return 0, false
	}
	if n < HeaderSize {
		s.truncated("the header has %d bytes", HeaderSize)
		return 0, false
	}
	h := readHeader(b)
	s.rep.Header = &h
	s.rep.Chip = h.Chip.String()
	count = int(b[1])
	if count == 0 || count > MaxSegments {
		s.rep.add(esp.Error, "esp_segment_count", 1, "a linker script may be at fault", "the image has %d segments, 1 to %d are allowed", count, MaxSegments)
		return 0, false
	}
	return count, true
}

// guess says what a file may be that does not begin like an image.
func guess(b []byte) string {
	known := []struct {
		prefix string
		hint   string
	}{
		{"\x7fELF", "this is the ELF: make the .bin from it with esptool elf2image"},
		{"\xea", "this is an ESP8266 image"},
		{":", "this is Intel HEX: convert it with esptool"},
		{"\xaaP", "this is a partition table: take the application's .bin"},
		{"\x1f\x8b", "this is gzip: unpack it"},
		{"PK\x03\x04", "this is a zip archive: unpack it"},
		{"\xff\xff\xff\xff", "this is erased flash, or a dump that does not begin with an image"},
	}
	for _, k := range known {
		if bytes.HasPrefix(b, []byte(k.prefix)) {
			return k.hint
		}
	}
	return "take the application's .bin as the build made it, neither encrypted nor with a signature in front"
}

func (s *scanner) truncated(format string, a ...any) {
	if s.pos > MaxSize {
		return // it goes on, but nobody reads it
	}
	s.rep.add(esp.Error, "esp_truncated", s.pos, "copy the file again", "the file ends after %d bytes, but %s", s.pos, fmt.Sprintf(format, a...))
}

// segments reads all segments and computes the checksum over their data; false if the image ends before they do.
func (s *scanner) segments(chip esp.Chip, count int, want Kind) bool {
	xor := uint64(0)
	tail := byte(checksumSeed)
	add := func(p []byte) {
		for ; len(p) >= 32; p = p[32:] {
			xor ^= binary.LittleEndian.Uint64(p) ^ binary.LittleEndian.Uint64(p[8:]) ^
				binary.LittleEndian.Uint64(p[16:]) ^ binary.LittleEndian.Uint64(p[24:])
		}
		for _, c := range p {
			tail ^= c
		}
	}
	for i := range count {
		if !s.segment(chip, i, count, add) {
			return false
		}
		if first := s.rep.Segments[0]; i == 0 && want == App && first.Length < AppDescSize {
			s.rep.add(esp.Error, "esp_descriptor_short", first.Offset-4, "an application's descriptor must be the first thing in the first segment",
				"segment 0 has %d bytes, the descriptor alone has %d", first.Length, AppDescSize)
		}
	}
	for ; xor != 0; xor >>= 8 {
		tail ^= byte(xor)
	}
	s.rep.ComputedChecksum = tail
	return true
}

// segment reads segment i and passes its data to add.
func (s *scanner) segment(chip esp.Chip, i, count int, add func([]byte)) bool {
	at := s.pos
	b := s.buf[:SegmentHeader]
	if s.read(b) < SegmentHeader {
		s.truncated("segment %d of %d begins at 0x%x", i, count, at)
		return false
	}
	seg := Segment{Load: binary.LittleEndian.Uint32(b), Length: binary.LittleEndian.Uint32(b[4:]), Offset: s.pos}
	seg.Use = useOf(chip, seg.Load)
	s.rep.Segments = append(s.rep.Segments, seg)
	if seg.Length >= MaxSegment {
		s.rep.add(esp.Error, "esp_segment_length", at+4, "", "segment %d has %d bytes, the limit is %d", i, seg.Length, MaxSegment-1)
		return false
	}
	if seg.Length%4 != 0 {
		s.rep.add(esp.Error, "esp_segment_length", at+4, "", "segment %d has %d bytes, which is no multiple of 4", i, seg.Length)
	}
	left := int64(seg.Length)
	if i == 0 {
		s.desc = make([]byte, min(left, AppDescSize))
		s.desc = s.desc[:s.read(s.desc)]
		add(s.desc)
		left -= int64(len(s.desc))
	}
	left -= s.stream(left, add)
	if left > 0 {
		s.truncated("segment %d of %d has its %d bytes from 0x%x to 0x%x", i, count, seg.Length, seg.Offset, seg.Offset+int64(seg.Length))
		return false
	}
	return true
}

// checksum reads the padding and the checksum behind the segments.
func (s *scanner) checksum() bool {
	at := s.pos
	pad := s.buf[:16-at%16]
	if s.read(pad) < len(pad) {
		s.truncated("the checksum is at 0x%x", at+int64(len(pad))-1)
		return false
	}
	last := len(pad) - 1
	s.rep.Checksum = pad[last]
	s.rep.BodyLen = s.pos
	if len(bytes.TrimLeft(pad[:last], "\x00")) > 0 {
		s.rep.add(esp.Warning, "esp_padding", at, "", "the bytes between the last segment and the checksum are not all zero")
	}
	if s.rep.Checksum != s.rep.ComputedChecksum {
		s.rep.add(esp.Error, "esp_checksum", s.pos-1, "the file was damaged or changed after the build: take it from the build again",
			"the checksum is 0x%02x, the segments give 0x%02x", s.rep.Checksum, s.rep.ComputedChecksum)
	}
	return true
}

// appended reads and checks the appended hash and computes the message of Secure Boot.
func (s *scanner) appended() bool {
	body := [HashSize]byte(s.sum.Sum(nil))
	s.rep.ImageHash = fleet.HashOf(body)
	if flag := s.rep.Header.HashPresent; flag > 1 {
		s.rep.add(esp.Error, "esp_hash_flag", HeaderSize-1, "", "the flag for the appended SHA-256 is %d, it must be 0 or 1", flag)
	}
	if s.rep.Header.HashPresent != 0 {
		at := s.pos
		var stored [HashSize]byte
		if n := s.read(stored[:]); n < HashSize {
			s.truncated("the appended SHA-256 has %d bytes from 0x%x", HashSize, at)
			return false
		}
		s.rep.Appended = fleet.HashOf(stored)
		if stored != body {
			s.rep.add(esp.Error, "esp_image_hash", at, "header or segments were changed after the build (esptool write-flash patches the header too): take the file from the build again",
				"the appended SHA-256 is %.16s…, the image gives %.16s…", s.rep.Appended, s.rep.ImageHash)
		}
	} else {
		s.rep.add(esp.Info, "esp_no_hash", HeaderSize-1, "", "no SHA-256 is appended: only the checksum tells whether the image is whole")
	}
	s.rep.Len = s.pos
	s.rep.message = s.padded()
	return true
}

// padded returns the SHA-256 of everything so far with 0xFF up to the next sector.
func (s *scanner) padded() [HashSize]byte {
	state, _ := s.sum.(hash.Cloner).Clone() // SHA-256 of the standard library never fails to
	state.Write(bytes.Repeat([]byte{0xFF}, int(s.rep.MessageLen()-s.rep.Len)))
	return [HashSize]byte(state.Sum(nil))
}

// trailer reads all that follows the image.
func (s *scanner) trailer() {
	t := rest{start: s.pos, rounded: s.rep.MessageLen(), gapFF: true, allFF: true}
	gap := s.stream(t.rounded-t.start, func(p []byte) {
		t.gapFF = t.gapFF && esp.Erased(p)
		t.head = append(t.head, p[:min(len(p), arduinoLength-len(t.head))]...)
	})
	t.sector = make([]byte, SectorSize)
	t.sector = t.sector[:s.read(t.sector)]
	t.head = append(t.head, t.sector[:min(len(t.sector), arduinoLength-len(t.head))]...)
	t.allFF = t.gapFF && esp.Erased(t.sector)
	t.table = tableIn(t.sector, s.pos)
	more := s.stream(MaxSize, func(p []byte) {
		t.allFF = t.allFF && esp.Erased(p)
		t.table = t.table || tableIn(p, s.pos)
	})
	t.length = gap + int64(len(t.sector)) + more
	kind, code, what, hint := t.kind()
	s.rep.Trailer = Trailer{Kind: kind, Offset: t.start, Length: t.length}
	if kind == Signature {
		s.rep.Trailer.sector = t.sector
	}
	if code != "" {
		s.rep.add(esp.Error, code, t.start, hint, "%s (%d bytes)", what, t.length)
	}
}

// tableIn reports whether p, which ends at offset end of the file, shows a partition table at its usual place.
func tableIn(p []byte, end int64) bool {
	i := 0x8000 - (end - int64(len(p)))
	return i >= 0 && i+1 < int64(len(p)) && p[i] == 0xAA && p[i+1] == 0x50
}

// chip judges what the header says of chips.
func (s *scanner) chip(chip esp.Chip, known bool) {
	h := s.rep.Header
	if !known {
		s.rep.add(esp.Warning, "esp_chip_unknown", 12, "what depends on the chip was not checked", "muster does not know the chip with id 0x%04x", uint16(h.Chip))
	}
	if highest, limited := h.MaxRevision(); limited && highest < h.MinRev {
		s.rep.add(esp.Error, "esp_revision_range", 15, "", "the image is for chip revisions from %s up to %s: there is none", h.MinRev, highest)
	}
	if h.Reserved != [4]byte{} {
		s.rep.add(esp.Warning, "esp_reserved", 19, "", "reserved bytes of the header are not zero")
	}
}

// descriptor reads the descriptor and tells the kind of the image.
func (s *scanner) descriptor(want Kind) {
	if len(s.rep.Segments) == 0 {
		return
	}
	d := s.desc
	isApp := len(d) >= 4 && binary.LittleEndian.Uint32(d) == appDescMagic
	s.rep.Kind = Other
	if boot, ok := readBootDesc(d); ok {
		s.rep.Kind, s.rep.Bootloader = Bootloader, &boot
	}
	switch {
	case isApp && len(d) == AppDescSize:
		app, found := readAppDesc(d)
		s.rep.Kind, s.rep.App = App, &app
		s.rep.Findings = append(s.rep.Findings, found...)
	case want == App && len(d) == AppDescSize:
		s.rep.add(esp.Error, "esp_descriptor_magic", descOffset, "if this is a bootloader, it cannot be updated over the air",
			"the first segment does not begin with an application's descriptor (0x%08x)", uint32(appDescMagic))
	}
	if want == Bootloader && isApp {
		s.rep.add(esp.Error, "esp_not_bootloader", descOffset, "take bootloader.bin", "this is an application")
	}
}

// mapping checks that segments that are mapped from flash lie where the MMU can map them.
func (s *scanner) mapping() {
	page := int64(PageSize)
	if s.rep.App != nil {
		named, ok := s.rep.App.pageSize()
		if !ok {
			s.rep.add(esp.Error, "esp_page_size", descOffset+180, "", "the descriptor names an MMU page of 2^%d bytes, which no chip has", s.rep.App.PageSizeLog2)
		}
		page = named
	}
	for i, seg := range s.rep.Segments {
		if seg.Use == Mapped && seg.Offset%page != int64(seg.Load)%page {
			s.rep.add(esp.Error, "esp_segment_mapping", seg.Offset, "",
				"segment %d is mapped at 0x%08x, but its place in the file, 0x%x, differs from that in a page of %d bytes", i, seg.Load, seg.Offset, page)
		}
	}
}

// app judges what an application's descriptor says.
func (s *scanner) app(chip esp.Chip) {
	d := s.rep.App
	if d == nil {
		return
	}
	if chip.SecureSteps > 0 && int64(d.SecureVersion) > int64(chip.SecureSteps) {
		s.rep.add(esp.Error, "esp_secure_version", descOffset+4, "no device could ever boot it: lower the secure version",
			"the secure version is %d, the %s counts up to %d", d.SecureVersion, chip.Name, chip.SecureSteps)
	}
	if d.Constant {
		s.rep.add(esp.Info, "esp_arduino_descriptor", descOffset+48, "", "the descriptor is the constant one of Arduino's core: it does not name this firmware")
	}
}
