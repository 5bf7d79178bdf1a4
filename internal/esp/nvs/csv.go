package nvs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// Limits of CSV input, bytes.
const (
	MaxCSV  = 4 << 20 // of a CSV file
	MaxFile = 2 << 20 // of a file that it names
)

// CSVOptions say how ParseCSV reads.
type CSVOptions struct {
	// Open opens a file that a line of type file names. If it is nil, such lines are refused. The caller decides which
	// names it allows, and what they are relative to.
	Open func(name string) (io.ReadCloser, error)

	// AsGenerator reads the file as Espressif's generator does even where that is doubtful: what follows a namespace that
	// is opened again goes into the namespace opened last, and the keys of Wi-Fi settings that the generator knows bring
	// further entries. Without it both are as the file says, and a finding tells. Encode has the same option.
	AsGenerator bool
}

// CSV is what ParseCSV read.
type CSV struct {
	Entries  []Entry      // in the order of the file, namespaces included
	Findings esp.Findings // where the generator and the file disagree, with the offset of the line
}

// ParseCSV reads entries from the input of Espressif's nvs_partition_gen: a first line key,type,encoding,value, then a
// line an entry. The type is namespace, data or file; the encoding u8 to u64, i8 to i64, string, hex2bin, base64,
// binary, blob_fill(length;0xNN) or blob_sz_fill(length;0xNN). Lines that start with # are left out. Quoting is that
// of Python's csv. Errors are Invalid or TooLarge, name the line, and hold no value.
//
// The parser is stricter than the generator where a mistake would go unnoticed: fields too many, a key before any
// namespace, spaces around a key, an unknown type, base64 with characters of no meaning, a quote that is never closed.
func ParseCSV(r io.Reader, o CSVOptions) (*CSV, error) {
	records, err := readRecords(r)
	if err != nil {
		return nil, err
	}
	head, err := records.next()
	if errors.Is(err, io.EOF) {
		return nil, badLine(1, "the file is empty: it starts with key,type,encoding,value")
	} else if err != nil {
		return nil, err
	}
	columns, err := parseHead(head)
	if err != nil {
		return nil, err
	}
	p := &csvParser{options: o}
	for {
		rec, err := records.next()
		if errors.Is(err, io.EOF) {
			return &CSV{Entries: p.entries, Findings: p.findings.list()}, nil
		}
		if err != nil {
			return nil, err
		}
		row, err := columns.row(rec)
		if err != nil {
			return nil, err
		}
		if err := p.row(row); err != nil {
			return nil, atLine(rec.line, err)
		}
	}
}

// byteOrderMark is what spreadsheets put in front of UTF-8.
const byteOrderMark = "\xEF\xBB\xBF"

func readRecords(r io.Reader) (*csvRecords, error) {
	b, err := readLimited(r, MaxCSV, "the CSV file")
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(b) || bytes.IndexByte(b, 0) >= 0 {
		return nil, fleet.Coded(fleet.Invalid, CodeCSV, "the CSV file is not UTF-8 text")
	}
	c := &csvRecords{text: string(b)}
	if strings.HasPrefix(c.text, byteOrderMark) {
		c.off = len(byteOrderMark)
	}
	return c, nil
}

func readLimited(r io.Reader, most int64, what string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return nil, &fleet.Error{Kind: fleet.Invalid, Code: CodeFile, Msg: "cannot read " + what, Err: err}
	}
	if int64(len(b)) > most {
		return nil, fleet.Coded(fleet.TooLarge, CodeFile, "%s is longer than %d bytes", what, most)
	}
	return b, nil
}

func badLine(line int, format string, a ...any) error {
	return fleet.Coded(fleet.Invalid, CodeCSV, "line %d: %s", line, fmt.Sprintf(format, a...))
}

// atLine puts the line before the message of a fleet.Error.
func atLine(line int, err error) error {
	e, ok := errors.AsType[*fleet.Error](err)
	prefix := fmt.Sprintf("line %d: ", line)
	if !ok || strings.HasPrefix(e.Msg, prefix) {
		return err
	}
	located := *e
	located.Msg = prefix + e.Msg
	return &located
}

// csvRecord is the fields of a record with the place where it starts.
type csvRecord struct {
	fields []string
	line   int
	offset int64
}

// csvRecords splits text as Python's csv does in its default dialect, after lines that start with # were left out: there
// a quote counts only at the start of a field, and what follows a closing quote is taken as it is. encoding/csv does
// neither. Lines end with \n, \r or both.
type csvRecords struct {
	text  string
	off   int // of the next line
	line  int // number of the latest line, from 1
	start int // its offset
}

// nextLine returns the next line without its end, leaving out comments.
func (c *csvRecords) nextLine() (string, bool) {
	for c.off < len(c.text) {
		c.start, c.line = c.off, c.line+1
		line := c.text[c.off:]
		if i := strings.IndexAny(line, "\r\n"); i >= 0 {
			line = line[:i]
			c.off++
			if strings.HasPrefix(c.text[c.start+i:], "\r\n") {
				c.off++
			}
		}
		c.off += len(line)
		if !strings.HasPrefix(line, "#") {
			return line, true
		}
	}
	return "", false
}

// next returns the next record that is not blank, or io.EOF.
func (c *csvRecords) next() (csvRecord, error) {
	for {
		line, ok := c.nextLine()
		if !ok {
			return csvRecord{}, io.EOF
		}
		if strings.TrimSpace(line) == "" {
			continue
		}
		rec := csvRecord{line: c.line, offset: int64(c.start)}
		err := c.split(&rec, line)
		return rec, err
	}
}

func (c *csvRecords) split(rec *csvRecord, line string) error {
	for {
		field, rest, more, err := c.field(line, rec.line)
		if err != nil {
			return err
		}
		if rec.fields = append(rec.fields, field); len(rec.fields) > 64 {
			return badLine(rec.line, "more than 64 fields")
		}
		if !more {
			return nil
		}
		line = rest
	}
}

// field returns the first field of line, what follows its comma, and whether there was one.
func (c *csvRecords) field(line string, start int) (field, rest string, more bool, err error) {
	if !strings.HasPrefix(line, `"`) {
		field, rest, more = strings.Cut(line, ",")
		return field, rest, more, nil
	}
	var b strings.Builder
	for line = line[1:]; ; {
		part, after, closed := strings.Cut(line, `"`)
		b.WriteString(part)
		switch {
		case !closed:
			next, ok := c.nextLine()
			if !ok {
				return "", "", false, badLine(start, "a quote is opened and never closed")
			}
			b.WriteByte('\n')
			line = next
		case strings.HasPrefix(after, `"`):
			b.WriteByte('"')
			line = after[1:]
		default:
			part, rest, more = strings.Cut(after, ",")
			b.WriteString(part)
			return b.String(), rest, more, nil
		}
	}
}

// csvColumns says in which field each column is.
type csvColumns struct {
	key, kind, encoding, value, n int
}

func parseHead(rec csvRecord) (csvColumns, error) {
	at := map[string]int{}
	for i, name := range rec.fields {
		at[strings.TrimSpace(name)] = i
	}
	for _, name := range []string{"key", "type", "encoding", "value"} {
		if _, ok := at[name]; !ok {
			return csvColumns{}, badLine(rec.line, "no column %s: the file starts with key,type,encoding,value", name)
		}
	}
	return csvColumns{at["key"], at["type"], at["encoding"], at["value"], len(rec.fields)}, nil
}

// csvRow is one line by column.
type csvRow struct {
	key, kind, encoding, value string
	hasValue                   bool
	line                       int
	offset                     int64
}

func (c csvColumns) row(rec csvRecord) (csvRow, error) {
	get := func(i int) string {
		if i < len(rec.fields) {
			return rec.fields[i]
		}
		return ""
	}
	for i := c.n; i < len(rec.fields); i++ {
		if rec.fields[i] != "" {
			return csvRow{}, badLine(rec.line, "%d fields, but the first line has %d: put a value that holds a comma in quotes", len(rec.fields), c.n)
		}
	}
	return csvRow{
		key: get(c.key), kind: strings.TrimSpace(get(c.kind)), encoding: strings.TrimSpace(get(c.encoding)), value: get(c.value),
		hasValue: c.value < len(rec.fields), line: rec.line, offset: rec.offset,
	}, nil
}
