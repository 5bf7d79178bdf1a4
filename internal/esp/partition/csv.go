package partition

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"muster/internal/fleet"
)

// maxCSV is how large a CSV file may be, in bytes.
const maxCSV = 64 << 10

// ParseCSV reads a table as gen_esp32part.py does, fills in offsets that are left out, and turns sizes that name an end
// (negative ones) into sizes. What it cannot read is an Invalid error that names the line. Table.Check says whether the
// table is good.
func ParseCSV(b []byte, l Layout) (Table, error) {
	if len(b) > maxCSV {
		return Table{}, fleet.Coded(fleet.TooLarge, "esp_partition_csv", "a partition table has at most %d bytes of CSV", maxCSV)
	}
	if !utf8.Valid(b) {
		return Table{}, fleet.Coded(fleet.Invalid, "esp_partition_csv", "the file is not UTF-8")
	}
	text := strings.TrimPrefix(string(b), "\ufeff")
	text = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(text)
	var rows []row
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if len(rows) == maxRows {
			return Table{}, lineError(i+1, "a table has at most %d partitions", maxRows)
		}
		r, err := parseRow(i+1, line, l)
		if err != nil {
			return Table{}, err
		}
		rows = append(rows, r)
	}
	return place(rows, l)
}

// row is a line of CSV before offsets are filled in.
type row struct {
	line      int
	p         Partition
	offset    int64
	hasOffset bool
	size      int64 // negative: the end
}

func lineError(line int, format string, a ...any) error {
	return fleet.Coded(fleet.Invalid, "esp_partition_csv", "line %d: %s", line, fmt.Sprintf(format, a...))
}

func parseRow(line int, text string, l Layout) (row, error) {
	f := strings.Split(text+",,,,,", ",")
	for i := range f {
		f[i] = strings.TrimSpace(f[i])
	}
	r := row{line: line, p: Partition{Name: f[0]}}
	if err := checkName(f[0]); err != nil {
		return row{}, lineError(line, "%s", err.Msg)
	}
	typ, why := number8(f[1], typeWords)
	if why != "" {
		return row{}, lineError(line, "type %s", why)
	}
	r.p.Type = Type(typ)
	if f[2] == "" && r.p.Type == App {
		return row{}, lineError(line, "an app needs a subtype: one of %s", known(subtypeWords[App]))
	}
	sub := uint8(Undefined)
	if f[2] != "" {
		if sub, why = number8(f[2], subtypeWords[r.p.Type]); why != "" {
			return row{}, lineError(line, "subtype %s", why)
		}
	}
	r.p.Subtype = Subtype(sub)
	for _, flag := range strings.Split(f[5], ":") {
		switch flag {
		case "":
		case "encrypted":
			r.p.Flags |= Encrypted
		case "readonly":
			r.p.Flags |= ReadOnly
		default:
			return row{}, lineError(line, "flag %.32q is not known: use encrypted, readonly, or both with a colon between", flag)
		}
	}
	return r, r.parseExtent(f[3], f[4], l)
}

// parseExtent reads offset and size. Bootloaders and tables have theirs from the layout, whatever the columns say.
func (r *row) parseExtent(offset, size string, l Layout) error {
	switch {
	case r.p.Is(Bootloader, Primary):
		r.offset, r.hasOffset = int64(l.Bootloader), true
	case r.p.Is(Bootloader, Recovery):
		if l.Recovery == 0 {
			return lineError(r.line, "the layout names no offset for a recovery bootloader")
		}
		r.offset, r.hasOffset = int64(l.Recovery), true
	case r.p.Is(PartitionTable, Primary):
		r.offset, r.hasOffset = int64(l.Table), true
	case offset != "":
		n, ok := parseNumber(offset)
		if !ok || n < 0 {
			return lineError(r.line, "offset %.32q is no number: write 0x9000, 36K, or nothing to have it filled in", offset)
		}
		r.offset, r.hasOffset = n, true
	}
	switch {
	case r.p.Type == Bootloader:
		r.size = int64(l.Table) - int64(l.Bootloader)
		if r.size <= 0 {
			return lineError(r.line, "the bootloader at 0x%x must come before the table at 0x%x", l.Bootloader, l.Table)
		}
	case r.p.Type == PartitionTable:
		r.size = Size
	case size == "":
		return lineError(r.line, "the size is missing")
	default:
		n, ok := parseNumber(size)
		if !ok {
			return lineError(r.line, "size %.32q is no number: write 0x5000, 20K or 1M", size)
		}
		r.size = n
	}
	return nil
}

// place fills in offsets, each after the partition before it.
func place(rows []row, l Layout) (Table, error) {
	var t Table
	end := int64(l.Table) + Size
	for i, r := range rows {
		if !r.p.anchored() {
			if r.hasOffset && r.offset < end {
				if i == 0 {
					return Table{}, lineError(r.line, "offset 0x%x is inside the partition table, which takes 0x%x to 0x%x: use 0x%x or higher", r.offset, l.Table, end, end)
				}
				return Table{}, lineError(r.line, "offset 0x%x overlaps the partition before, which ends at 0x%x", r.offset, end)
			}
			if !r.hasOffset {
				align := offsetAlign(r.p.Type)
				r.offset = (end + align - 1) / align * align
			}
			if r.size < 0 {
				r.size = -r.size - r.offset
				if r.size < 0 {
					return Table{}, lineError(r.line, "the partition would end before it begins at 0x%x", r.offset)
				}
			}
			end = r.offset + r.size
		}
		if r.offset+r.size >= 1<<32 {
			return Table{}, lineError(r.line, "the partition ends at 0x%x, beyond any flash", r.offset+r.size)
		}
		r.p.Offset, r.p.Size = uint32(r.offset), uint32(r.size)
		t.Partitions = append(t.Partitions, r.p)
	}
	return t, nil
}

func offsetAlign(t Type) int64 {
	if t == App {
		return appAlign
	}
	return sector
}

// parseNumber reads a number as Python's int(v, 0) does, with K or M behind it. Numbers beyond 40 bits are none.
func parseNumber(s string) (int64, bool) {
	scale := int64(1)
	if n := len(s); n > 0 {
		switch s[n-1] {
		case 'k', 'K':
			scale = 1 << 10
		case 'm', 'M':
			scale = 1 << 20
		}
		if scale > 1 {
			s = strings.TrimSpace(s[:n-1])
		}
	}
	digits := strings.TrimLeft(s, "+-")
	if len(digits) > 1 && digits[0] == '0' && (unicode.IsDigit(rune(digits[1])) || digits[1] == '_') && strings.Trim(digits, "0_") != "" {
		return 0, false // 010 is eight to some and ten to others
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil || n > 1<<40 || n < -1<<40 {
		return 0, false
	}
	return n * scale, true
}

// number8 reads a number of a byte or one of words; otherwise it says what is wrong.
func number8(s string, words []word) (uint8, string) {
	if s == "" {
		return 0, "is missing"
	}
	if n, ok := parseNumber(s); ok {
		if n < 0 || n > 255 {
			return 0, fmt.Sprintf("%d does not fit a byte", n)
		}
		return uint8(n), ""
	}
	if v, ok := valueIn(words, s); ok {
		return v, ""
	}
	if len(words) == 0 {
		return 0, fmt.Sprintf("%.32q is no number", s)
	}
	return 0, fmt.Sprintf("%.32q is not known: use a number or one of %s", s, known(words))
}

// checkName refuses what neither a table nor CSV could hold.
func checkName(s string) *fleet.Error {
	bad := !utf8.ValidString(s) || !utf8.ValidString(stored(s)) ||
		strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
	if !bad {
		return nil
	}
	return &fleet.Error{Kind: fleet.Invalid, Code: "esp_partition_name", Msg: fmt.Sprintf("the name %.48q cannot be stored: use up to %d printable ASCII characters", s, nameSize)}
}

// stored returns what the table has room for of a name.
func stored(name string) string { return name[:min(len(name), nameSize)] }

// CSV returns the table as gen_esp32part.py writes it. A name that would be read back as something else is an Invalid
// error. Flags that have no name are left out.
func (t Table) CSV() ([]byte, error) {
	var out bytes.Buffer
	out.WriteString("# ESP-IDF Partition Table\n# Name, Type, SubType, Offset, Size, Flags\n")
	for _, p := range t.Partitions {
		if err := checkName(p.Name); err != nil {
			return nil, err
		}
		if strings.Contains(p.Name, ",") || strings.HasPrefix(p.Name, "#") || strings.TrimSpace(p.Name) != p.Name {
			return nil, fleet.Coded(fleet.Invalid, "esp_partition_name", "the name %.48q cannot stand in CSV: rename the partition", p.Name)
		}
		var flags []string
		if p.Flags&Encrypted != 0 {
			flags = append(flags, "encrypted")
		}
		if p.Flags&ReadOnly != 0 {
			flags = append(flags, "readonly")
		}
		fmt.Fprintf(&out, "%s,%s,%s,0x%x,%s,%s\n", p.Name, p.Type, p.Type.SubtypeName(p.Subtype), p.Offset, sizeText(p.Size), strings.Join(flags, ":"))
	}
	return out.Bytes(), nil
}

func sizeText(n uint32) string {
	switch {
	case n%(1<<20) == 0:
		return fmt.Sprintf("%dM", n>>20)
	case n%(1<<10) == 0:
		return fmt.Sprintf("%dK", n>>10)
	default:
		return fmt.Sprintf("0x%x", n)
	}
}
