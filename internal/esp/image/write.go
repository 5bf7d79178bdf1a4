package image

import (
	"crypto/sha256"
	"encoding/binary"
	"io"

	"muster/internal/fleet"
)

// Part is a segment to write.
type Part struct {
	Load uint32
	Data []byte // a multiple of 4 bytes, fewer than MaxSegment
}

// Write writes an image of these segments, with checksum and, if the header says so, SHA-256, byte for byte as esptool
// does (esp32.md §1.3). It aligns nothing: a caller who wants segments mapped from flash places them. What is no legal
// image is an Invalid error, before a byte is written; other errors are w's own.
func Write(w io.Writer, h Header, parts []Part) error {
	if err := checkParts(h, parts); err != nil {
		return err
	}
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	head := h.bytes(len(parts))
	if _, err := out.Write(head[:]); err != nil {
		return err
	}
	at := int64(HeaderSize)
	x := byte(checksumSeed)
	for _, p := range parts {
		var b [SegmentHeader]byte
		binary.LittleEndian.PutUint32(b[:], p.Load)
		binary.LittleEndian.PutUint32(b[4:], uint32(len(p.Data)))
		if _, err := out.Write(b[:]); err != nil {
			return err
		}
		if _, err := out.Write(p.Data); err != nil {
			return err
		}
		for _, c := range p.Data {
			x ^= c
		}
		at += SegmentHeader + int64(len(p.Data))
	}
	pad := make([]byte, 16-at%16)
	pad[len(pad)-1] = x
	if _, err := out.Write(pad); err != nil {
		return err
	}
	if h.HashPresent == 0 {
		return nil
	}
	_, err := w.Write(sum.Sum(nil))
	return err
}

func checkParts(h Header, parts []Part) error {
	if len(parts) == 0 || len(parts) > MaxSegments {
		return fleet.Errorf(fleet.Invalid, "an image has 1 to %d segments, not %d", MaxSegments, len(parts))
	}
	if h.HashPresent > 1 {
		return fleet.Errorf(fleet.Invalid, "the flag for the appended SHA-256 must be 0 or 1")
	}
	if h.SPISpeed > 0xF || h.SPISize > 0xF {
		return fleet.Errorf(fleet.Invalid, "flash speed and size have four bits each")
	}
	total := int64(HeaderSize)
	for i, p := range parts {
		if len(p.Data)%4 != 0 || len(p.Data) >= MaxSegment {
			return fleet.Errorf(fleet.Invalid, "segment %d has %d bytes: it must be a multiple of 4 below %d", i, len(p.Data), MaxSegment)
		}
		total += SegmentHeader + int64(len(p.Data))
	}
	if total+16+HashSize > MaxSize {
		return fleet.Errorf(fleet.Invalid, "the image would have more than %d bytes", MaxSize)
	}
	return nil
}

// SecurePad returns the segment to append so that an image of these segments, with checksum and SHA-256, ends at a page
// of 64 KiB, as esptool's --secure-pad-v2 does: otherwise the tail of the last mapped page is not signed (esp32.md §2).
func SecurePad(parts []Part) Part {
	at := int64(HeaderSize)
	for _, p := range parts {
		at += SegmentHeader + int64(len(p.Data))
	}
	used := (at + SegmentHeader) % PageSize
	return Part{Data: make([]byte, (2*PageSize-used-16-HashSize)%PageSize)}
}
