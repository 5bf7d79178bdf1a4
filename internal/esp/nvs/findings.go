package nvs

import (
	"fmt"
	"slices"

	"muster/internal/esp"
)

// MaxFindings is how many findings Decode and ParseCSV keep.
const MaxFindings = 500

// findings collects up to MaxFindings.
type findings struct {
	all  esp.Findings
	more int
}

func (f *findings) add(severity esp.Severity, code string, offset int64, message, hint string) {
	if len(f.all) == MaxFindings-1 {
		f.more++
		return
	}
	f.all = append(f.all, esp.Finding{Severity: severity, Code: code, Offset: offset, Message: message, Hint: hint})
}

func (f *findings) drop(code string) {
	f.all = slices.DeleteFunc(f.all, func(x esp.Finding) bool { return x.Code == code })
	f.more = 0
}

func (f *findings) list() esp.Findings {
	if f.more > 0 {
		f.all = append(f.all, esp.Finding{Severity: esp.Error, Code: CodeMore, Message: fmt.Sprintf("there are %d more findings", f.more)})
	}
	return f.all
}

// run joins neighbouring bad entries into one finding: a long value whose header is damaged is one fault, not a hundred.
type run struct {
	at       func(entry int) int64
	findings *findings
	from, n  int
}

func (r *run) add(entry int) {
	if r.n > 0 && entry == r.from+r.n {
		r.n++
		return
	}
	r.flush()
	r.from, r.n = entry, 1
}

func (r *run) flush() {
	switch {
	case r.n == 1:
		r.findings.add(esp.Error, CodeEntry, r.at(r.from), "the entry's checksum is wrong", "a device discards it")
	case r.n > 1:
		r.findings.add(esp.Error, CodeEntry, r.at(r.from), fmt.Sprintf("the checksums of %d entries are wrong", r.n), "a device discards them")
	}
	r.n = 0
}
