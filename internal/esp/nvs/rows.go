package nvs

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// csvParser turns rows into entries.
type csvParser struct {
	options  CSVOptions
	entries  []Entry
	findings findings

	opened  []string // namespaces in the order in which they came up
	current string
	held    int // bytes of values so far
	wifi    wifiKeys
}

func (p *csvParser) row(row csvRow) error {
	if row.kind == "namespace" {
		return p.namespace(row)
	}
	if row.kind != "data" && row.kind != "file" {
		return fleet.Coded(fleet.Invalid, CodeCSV, "the type is not one of namespace, data and file")
	}
	if err := checkName("key", row.key); err != nil {
		return err
	}
	if p.current == "" {
		return fleet.Coded(fleet.Invalid, CodeCSV, "key %q comes before any namespace: put a line NAME,namespace,, above it", row.key)
	}
	if !row.hasValue {
		return fleet.Coded(fleet.Invalid, CodeCSV, "key %q has no value: a line is key,type,encoding,value", row.key)
	}
	return p.value(row)
}

func (p *csvParser) namespace(row csvRow) error {
	if err := checkName("namespace", row.key); err != nil {
		return err
	}
	for _, name := range p.opened {
		if name != row.key {
			continue
		}
		if last := p.opened[len(p.opened)-1]; last != name {
			p.reopened(row, last)
		}
		return nil
	}
	if len(p.opened) == maxNamespaces {
		return fleet.Coded(fleet.Invalid, CodeNamespace, "namespace %q: NVS has at most %d namespaces", row.key, maxNamespaces)
	}
	p.opened = append(p.opened, row.key)
	p.current = row.key
	p.entries = append(p.entries, Entry{Namespace: row.key, Type: Namespace, Line: row.line})
	return nil
}

// reopened is about a namespace that is opened again below another one. The generator writes no second entry for it, and
// then numbers what follows with the count of namespaces (esp32.md §4.4).
func (p *csvParser) reopened(row csvRow, last string) {
	if p.options.AsGenerator {
		p.current = last
		p.findings.add(esp.Warning, CodeGenerator, row.offset,
			fmt.Sprintf("line %d: namespace %q is opened again: as Espressif's generator has it, what follows goes into %q", row.line, row.key, last),
			"put all keys of a namespace below one line")
		return
	}
	p.current = row.key
	p.findings.add(esp.Warning, CodeGenerator, row.offset,
		fmt.Sprintf("line %d: namespace %q is opened again: what follows goes there, where Espressif's generator puts it into %q", row.line, row.key, last),
		"put all keys of a namespace below one line")
}

func (p *csvParser) value(row csvRow) error {
	var before, after []Entry
	var err error
	if p.options.AsGenerator {
		before, after, err = p.wifi.companions(row)
		if err != nil {
			return err
		}
	} else if isWifiKey(row.key) {
		p.findings.add(esp.Info, CodeGenerator, row.offset,
			fmt.Sprintf("line %d: Espressif's generator may add entries of its own for the Wi-Fi key %q; they are left out", row.line, row.key),
			"write them into the file if the firmware needs them")
	}
	raw := []byte(row.value)
	if row.kind == "file" {
		if raw, err = p.file(row); err != nil {
			return err
		}
	}
	e, err := decodeValue(row, raw)
	if err != nil {
		return err
	}
	for _, c := range before {
		p.append(c, row)
	}
	p.append(e, row)
	for _, c := range after {
		p.append(c, row)
	}
	if p.held > MaxSize {
		return fleet.Coded(fleet.TooLarge, CodeFull, "the values are longer than 0x%x bytes together, more than a partition can hold", MaxSize)
	}
	return nil
}

func (p *csvParser) append(e Entry, row csvRow) {
	e.Namespace, e.Line = p.current, row.line
	p.held += entrySize + len(e.Data)
	p.entries = append(p.entries, e)
}

func (p *csvParser) file(row csvRow) ([]byte, error) {
	if p.options.Open == nil {
		return nil, fleet.Coded(fleet.Invalid, CodeFile, "key %q: a line of type file, and files are not allowed here: put the value into the line", row.key)
	}
	f, err := p.options.Open(row.value)
	if err != nil {
		return nil, &fleet.Error{Kind: fleet.Invalid, Code: CodeFile, Msg: fmt.Sprintf("key %q: cannot open its file", row.key), Err: err}
	}
	defer f.Close()
	return readLimited(f, MaxFile, fmt.Sprintf("the file of key %q", row.key))
}

// fill matches the encodings that make a blob of a given length.
var fill = regexp.MustCompile(`^(blob_fill|blob_sz_fill)\((\d{1,7});0x([0-9a-f]{2})\)$`)

// decodeValue returns the entry of a line, without its namespace. raw is the value or the file's contents.
func decodeValue(row csvRow, raw []byte) (Entry, error) {
	encoding := strings.ToLower(row.encoding)
	e := Entry{Key: row.key, Type: Blob}
	bad := func(format string, a ...any) (Entry, error) {
		return Entry{}, fleet.Coded(fleet.Invalid, CodeValue, "key %q: %s", row.key, fmt.Sprintf(format, a...))
	}
	if t, ok := numbers[Type(encoding)]; ok {
		v, ok := parseNumber(string(raw), t)
		if !ok {
			return bad("not a number, or not one of %s: write it in decimal", encoding)
		}
		e.Type, e.Number = Type(encoding), v
		return e, nil
	}
	if m := fill.FindStringSubmatch(encoding); m != nil {
		length, err := strconv.Atoi(m[2])
		if err != nil || length > MaxBlob-4 {
			return bad("a blob has at most %d bytes", MaxBlob)
		}
		if len(raw) > length {
			return bad("the value is longer than the %d bytes to fill", length)
		}
		e.Data = filled(m[1], m[3], raw, length)
		return e, nil
	}
	var err error
	switch encoding {
	case "string":
		if !utf8.Valid(raw) {
			return bad("the string is not UTF-8: use binary")
		}
		e.Type, e.Data = String, raw
	case "binary":
		e.Data = raw
	case "hex2bin":
		if e.Data, err = hex.DecodeString(strings.TrimSpace(string(raw))); err != nil {
			return bad("not hex: use pairs of 0-9 and a-f")
		}
	case "base64":
		if e.Data, err = base64.StdEncoding.Strict().DecodeString(strings.Join(strings.Fields(string(raw)), "")); err != nil {
			return bad("not base64: use A-Z, a-z, 0-9, + and /, with = at the end")
		}
	default:
		return Entry{}, fleet.Coded(fleet.Invalid, CodeCSV,
			"key %q: unknown encoding: use u8 to u64, i8 to i64, string, hex2bin, base64, binary, blob_fill(n;0xNN) or blob_sz_fill(n;0xNN)", row.key)
	}
	return e, nil
}

// filled returns the value with padding up to length, for blob_sz_fill behind its own length.
func filled(how, padding string, raw []byte, length int) []byte {
	var out []byte
	if how == "blob_sz_fill" {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(raw)))
	}
	out = append(out, raw...)
	pad, _ := strconv.ParseUint(padding, 16, 8) // two hex digits by the expression
	for range length - len(raw) {
		out = append(out, byte(pad))
	}
	return out
}

// parseNumber reads a decimal number as Python's int does: spaces around it, a sign, and single underscores between digits.
func parseNumber(s string, t number) (uint64, bool) {
	s = strings.TrimSpace(s)
	digits := strings.TrimLeft(s, "+-")
	sign := s[:len(s)-len(digits)]
	if len(sign) > 1 || strings.HasPrefix(digits, "_") || strings.HasSuffix(digits, "_") || strings.Contains(digits, "__") {
		return 0, false
	}
	v, err := strconv.ParseUint(strings.ReplaceAll(digits, "_", ""), 10, 64)
	if err != nil {
		return 0, false
	}
	if sign == "-" {
		if v > 1<<63 || v > 0 && !t.signed {
			return 0, false
		}
		v = -v
	} else if t.signed && v > math.MaxInt64 {
		return 0, false
	}
	return v, t.holds(v)
}
