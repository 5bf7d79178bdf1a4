package cli

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// All wording for the terminal is made here or passes through here. The rules:
//   - results go to standard output, everything else to standard error;
//   - lower case, no period at the end, except what is quoted from elsewhere;
//   - a failure is one line "error: …" that says what was wrong, then "hint: …" lines that say what to do;
//   - what a device or another person wrote is never printed as it came: see clean;
//   - colour carries no meaning of its own and appears only on a terminal without NO_COLOR.

// ui is where a command talks to a person or a program.
type ui struct {
	out, err io.Writer
	tty      bool // standard output is a terminal
	errTTY   bool // standard error is a terminal
	colour   bool
	json     bool // --output json
	width    int  // of the terminal, columns
	size     func() (width, height int)
	now      func() time.Time
}

func (u *ui) printf(format string, a ...any) { _, _ = fmt.Fprintf(u.out, format, a...) }

// note says something that is no result.
func (u *ui) note(format string, a ...any) { _, _ = fmt.Fprintf(u.err, format+"\n", a...) }

// fail prints an error and its hints.
func (u *ui) fail(err error, hints []string) {
	_, _ = fmt.Fprintf(u.err, "%s %s\n", u.paintErr("error:", red), clean(err.Error()))
	for _, h := range hints {
		_, _ = fmt.Fprintf(u.err, "%s %s\n", u.paintErr("hint:", cyan), h)
	}
}

type shade string

const (
	plain  shade = ""
	red    shade = "\x1b[31m"
	green  shade = "\x1b[32m"
	yellow shade = "\x1b[33m"
	cyan   shade = "\x1b[36m"
	dim    shade = "\x1b[2m"
	bold   shade = "\x1b[1m"
	reset        = "\x1b[0m"
)

func (u *ui) paint(s string, c shade) string {
	if !u.colour || !u.tty || c == plain || s == "" {
		return s
	}
	return string(c) + s + reset
}

func (u *ui) paintErr(s string, c shade) string {
	if !u.colour || !u.errTTY {
		return s
	}
	return string(c) + s + reset
}

// stateShade colours the words by which things stand.
func stateShade(state string) shade {
	switch state {
	case "online", "active", "running", "succeeded", "completed", "approved", "clean":
		return green
	case "failed", "rejected", "rolled-back", "timed-out", "went-dark", "halted", "aborted", "revoked", "disabled", "expired", "denied":
		return red
	case "halting", "rolling-back", "paused", "scheduled", "waiting", "cancelled", "superseded":
		return yellow
	case "offline", "pending", "skipped", "draft", "intended":
		return dim
	}
	return plain
}

// clean makes text of others safe to print: whatever is not printable, escape sequences and changes of direction
// included, is shown as an escape.
func clean(s string) string {
	if !strings.ContainsFunc(s, unprintable) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unprintable(r) && r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		case unprintable(r):
			fmt.Fprintf(&b, `\U%08x`, r)
		default:
			b.WriteRune(r)
		}
		i += n
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// cell is a field of a table.
type cell struct {
	text  string
	shade shade
}

// table prints rows under a header, aligned; the last column is not padded.
type table struct {
	u    *ui
	head []string
	rows [][]cell
}

func (u *ui) table(head ...string) *table { return &table{u: u, head: head} }

// row adds a line. Strings are cleaned; a cell is printed in its shade.
func (t *table) row(fields ...any) {
	row := make([]cell, len(fields))
	for i, f := range fields {
		switch f := f.(type) {
		case cell:
			row[i] = cell{clean(f.text), f.shade}
		case string:
			row[i] = cell{text: clean(f)}
		default:
			row[i] = cell{text: clean(fmt.Sprint(f))}
		}
		if row[i].text == "" {
			row[i].text = "-"
		}
	}
	t.rows = append(t.rows, row)
}

func (t *table) print() {
	widths := make([]int, len(t.head))
	for i, h := range t.head {
		widths[i] = utf8.RuneCountInString(h)
	}
	for _, r := range t.rows {
		for i, c := range r {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	line := func(cells []cell) {
		var b strings.Builder
		for i, c := range cells {
			b.WriteString(t.u.paint(c.text, c.shade))
			if i < len(cells)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		t.u.printf("%s\n", b.String())
	}
	head := make([]cell, len(t.head))
	for i, h := range t.head {
		head[i] = cell{h, bold}
	}
	line(head)
	for _, r := range t.rows {
		line(r)
	}
}

// facts prints "name  value" lines; empty values are left out.
func (u *ui) facts(pairs ...any) {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		if text(pairs[i+1]) != "" {
			width = max(width, len(pairs[i].(string)))
		}
	}
	for i := 0; i < len(pairs); i += 2 {
		name, v := pairs[i].(string), text(pairs[i+1])
		if v == "" {
			continue
		}
		c, _ := pairs[i+1].(cell)
		u.printf("%s%s  %s\n", u.paint(name, dim), strings.Repeat(" ", width-len(name)), u.paint(clean(v), c.shade))
	}
}

func text(v any) string {
	switch v := v.(type) {
	case cell:
		return v.text
	case string:
		return v
	case time.Time:
		if v.IsZero() {
			return ""
		}
		return v.UTC().Format(time.RFC3339)
	}
	return fmt.Sprint(v)
}

// show prints v as JSON with --output json; else it calls people.
func (u *ui) show(v any, people func()) error {
	if !u.json {
		people()
		return nil
	}
	raw, err := json.Marshal(v, jsontext.WithIndent("  "), json.Deterministic(true))
	if err != nil {
		return err
	}
	u.printf("%s\n", cleanJSON(string(raw)))
	return nil
}

// cleanJSON escapes what a terminal might obey. The JSON means the same: such characters stand only inside its strings.
func cleanJSON(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n' || !unprintable(r):
			b.WriteRune(r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			hi, lo := (r-0x10000)>>10+0xd800, (r-0x10000)&0x3ff+0xdc00
			fmt.Fprintf(&b, `\u%04x\u%04x`, hi, lo)
		}
	}
	return b.String()
}

// ago tells how long ago t was, in one unit.
func (u *ui) ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := u.now().Sub(t)
	if d < 0 {
		return "in " + span(-d)
	}
	return span(d) + " ago"
}

// left tells how long until t, or that it is over.
func (u *ui) left(t time.Time) string {
	if d := t.Sub(u.now()); d > 0 {
		return span(d)
	}
	return "over"
}

func span(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func size(n int64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%d B", n)
	case n < 1<<20:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	if n < 10<<30 {
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}

// bar draws part of whole, width columns wide.
func bar(part, whole, width int) string {
	full := 0
	if whole > 0 {
		full = min(width, part*width/whole)
	}
	return strings.Repeat("█", full) + strings.Repeat("░", width-full)
}

// meter shows long work on standard error: a line that is redrawn on a terminal, else a line for each tenth.
type meter struct {
	u     *ui
	what  string
	whole int64
	unit  func(int64) string
	shown int64 // tenths
}

func (u *ui) meter(what string, whole int64, unit func(int64) string) *meter {
	return &meter{u: u, what: what, whole: whole, unit: unit, shown: -1}
}

func (m *meter) set(n int64) {
	if m.whole <= 0 || m.u.json && !m.u.errTTY {
		return
	}
	step := int64(10)
	if m.u.errTTY {
		step = 200
	}
	tenth := n * step / m.whole
	if tenth == m.shown {
		return
	}
	m.shown = tenth
	if m.u.errTTY {
		_, _ = fmt.Fprintf(m.u.err, "\r\x1b[K%s %s %s of %s", m.what, bar(int(n*1000/m.whole), 1000, 30), m.unit(n), m.unit(m.whole))
		return
	}
	m.u.note("%s %s of %s", m.what, m.unit(n), m.unit(m.whole))
}

// end leaves the line.
func (m *meter) end() {
	if m.u.errTTY && m.shown >= 0 {
		_, _ = fmt.Fprint(m.u.err, "\r\x1b[K")
	}
}
