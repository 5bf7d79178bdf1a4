package partition

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"strings"

	"muster/internal/fleet"
)

var (
	entryMagic = []byte{0xAA, 0x50}
	md5Magic   = []byte{0xEB, 0xEB}
	emptyRow   = bytes.Repeat([]byte{0xFF}, entrySize)
)

// Parse reads a table, binary or CSV, whichever it is.
func Parse(b []byte, l Layout) (Table, error) {
	if bytes.HasPrefix(b, entryMagic) {
		return ParseBinary(b)
	}
	return ParseCSV(b, l)
}

// ParseBinary reads a table as flash holds it: rows, their MD5, an empty row. What follows is not looked at. What it
// cannot read is an Invalid error that names the offset in the table.
func ParseBinary(b []byte) (Table, error) {
	if len(b) > Size {
		return Table{}, fleet.Coded(fleet.TooLarge, "esp_partition_binary", "a partition table has at most %d bytes, not %d: cut it out of the dump", Size, len(b))
	}
	t := Table{NoMD5: true}
	for at := 0; at < len(b); at += entrySize {
		if len(b)-at < entrySize {
			return Table{}, rowError(at, "the row has %d bytes, not %d: the file is cut off", len(b)-at, entrySize)
		}
		raw := b[at : at+entrySize]
		switch {
		case bytes.Equal(raw, emptyRow):
			return t, nil
		case !t.NoMD5:
			return Table{}, rowError(at, "a row follows the MD5")
		case bytes.HasPrefix(raw, md5Magic):
			if sum := md5.Sum(b[:at]); !bytes.Equal(raw[md5.Size:], sum[:]) {
				return Table{}, rowError(at, "the MD5 of the rows is %x, not %x as stored: read the table again", sum, raw[md5.Size:])
			}
			t.NoMD5 = false
		default:
			p, err := readRow(at, raw)
			if err != nil {
				return Table{}, err
			}
			t.Partitions = append(t.Partitions, p)
		}
	}
	return Table{}, rowError(len(b), "the empty row that ends a table is missing")
}

func rowError(at int, format string, a ...any) error {
	return fleet.Coded(fleet.Invalid, "esp_partition_binary", "at offset 0x%x: "+format, append([]any{at}, a...)...)
}

func readRow(at int, raw []byte) (Partition, error) {
	if !bytes.HasPrefix(raw, entryMagic) {
		return Partition{}, rowError(at, "the row begins with %x, not aa50: the table is damaged, encrypted, or elsewhere", raw[:2])
	}
	name, rest, _ := strings.Cut(string(raw[12:28]), "\x00")
	if err := checkName(name); err != nil {
		return Partition{}, rowError(at, "%s", err.Msg)
	}
	if strings.Trim(rest, "\x00") != "" {
		return Partition{}, rowError(at, "bytes follow the end of the name %q", name)
	}
	return Partition{
		Name:    name,
		Type:    Type(raw[2]),
		Subtype: Subtype(raw[3]),
		Offset:  binary.LittleEndian.Uint32(raw[4:]),
		Size:    binary.LittleEndian.Uint32(raw[8:]),
		Flags:   binary.LittleEndian.Uint32(raw[28:]),
	}, nil
}

// Binary returns the table as gen_esp32part.py writes it, 3072 bytes. Names are cut after 16 bytes. Too many
// partitions, and names that cannot be stored, are Invalid errors.
func (t Table) Binary() ([]byte, error) {
	rows := len(t.Partitions)
	if !t.NoMD5 {
		rows++
	}
	if rows > maxRows {
		return nil, fleet.Coded(fleet.Invalid, "esp_partition_count", "%d partitions do not fit a table: %d do", len(t.Partitions), maxRows-rows+len(t.Partitions))
	}
	out := make([]byte, 0, written)
	for _, p := range t.Partitions {
		if err := checkName(p.Name); err != nil {
			return nil, err
		}
		raw := make([]byte, entrySize)
		copy(raw, entryMagic)
		raw[2], raw[3] = byte(p.Type), byte(p.Subtype)
		binary.LittleEndian.PutUint32(raw[4:], p.Offset)
		binary.LittleEndian.PutUint32(raw[8:], p.Size)
		copy(raw[12:28], p.Name)
		binary.LittleEndian.PutUint32(raw[28:], p.Flags)
		out = append(out, raw...)
	}
	if !t.NoMD5 {
		sum := md5.Sum(out)
		out = append(out, md5Magic...)
		out = append(out, emptyRow[:md5.Size-len(md5Magic)]...)
		out = append(out, sum[:]...)
	}
	return append(out, bytes.Repeat([]byte{0xFF}, written-len(out))...), nil
}
