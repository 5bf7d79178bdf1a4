package nvs

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// State is what the first word of a page says.
type State string

// States. A device treats Corrupt and Invalid pages as free.
const (
	Empty   State = "empty"
	Active  State = "active"
	Full    State = "full"
	Freeing State = "freeing" // its entries are being moved to the active page
	Corrupt State = "corrupt"
	Invalid State = "invalid"
)

const (
	wordEmpty   = 0xFFFFFFFF
	wordActive  = 0xFFFFFFFE
	wordFull    = 0xFFFFFFFC
	wordFreeing = 0xFFFFFFF8
	wordCorrupt = 0xFFFFFFF0
	wordInvalid = 0
)

var states = map[uint32]State{
	wordEmpty: Empty, wordActive: Active, wordFull: Full, wordFreeing: Freeing, wordCorrupt: Corrupt, wordInvalid: Invalid,
}

// slot is what a page's bitmap says of an entry.
type slot byte

const (
	slotErased  slot = 0b00
	slotIllegal slot = 0b01 // no device writes it
	slotWritten slot = 0b10
	slotEmpty   slot = 0b11
)

// checksum is the CRC-32 of NVS: the usual polynomial, but from the other start value (esp32.md §4.1).
func checksum(parts ...[]byte) uint32 {
	crc := uint32(0xFFFFFFFF)
	for _, p := range parts {
		crc = crc32.Update(crc, crc32.IEEETable, p)
	}
	return crc
}

// page is the bytes of one page, PageSize long.
type page []byte

func (p page) state() uint32           { return binary.LittleEndian.Uint32(p) }
func (p page) setState(s uint32)       { binary.LittleEndian.PutUint32(p, s) }
func (p page) seq() uint32             { return binary.LittleEndian.Uint32(p[4:]) }
func (p page) version() byte           { return p[8] }
func (p page) headerOK() bool          { return binary.LittleEndian.Uint32(p[28:]) == checksum(p[4:28]) }
func (p page) entry(i int) []byte      { return p[entriesOffset+i*entrySize:][:entrySize] }
func (p page) slot(i int) slot         { return slot(p[bitmapOffset+i/4] >> (i % 4 * 2) & 3) }
func (p page) markWritten(i int)       { p[bitmapOffset+i/4] &^= 1 << (i % 4 * 2) }
func (p page) erased(i int) bool       { return allFF(p.entry(i)) }
func (p page) payload(i, n int) []byte { return p[entriesOffset+i*entrySize:][:n] }

// format makes an erased page an active one.
func (p page) format(seq uint32, version byte) {
	p.setState(wordActive)
	binary.LittleEndian.PutUint32(p[4:], seq)
	p[8] = version
	binary.LittleEndian.PutUint32(p[28:], checksum(p[4:28]))
}

var ff = bytes.Repeat([]byte{0xFF}, PageSize)

// allFF reports whether b, at most a page, is erased flash.
func allFF(b []byte) bool { return bytes.Equal(b, ff[:len(b)]) }

// spanOf returns how many entries a value of n bytes takes, with its header.
func spanOf(n int) int { return 1 + (n+entrySize-1)/entrySize }

// header is the first entry of an item.
type header [entrySize]byte

func newHeader(ns, code byte, span int, chunk byte, key string) header {
	var h header
	h[0], h[1], h[2], h[3] = ns, code, byte(span), chunk
	copy(h[8:24], key)
	copy(h[24:], ff[:8])
	return h
}

// setData makes h the header of a value that follows it.
func (h *header) setData(data []byte) {
	binary.LittleEndian.PutUint16(h[24:], uint16(len(data)))
	binary.LittleEndian.PutUint32(h[28:], checksum(data))
}

func (h *header) seal()            { binary.LittleEndian.PutUint32(h[4:], h.checksum()) }
func (h *header) sealed() bool     { return binary.LittleEndian.Uint32(h[4:]) == h.checksum() }
func (h *header) checksum() uint32 { return checksum(h[:4], h[8:]) }
