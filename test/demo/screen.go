package main

import (
	"fmt"
	"time"
	"unicode/utf8"
)

// screen prints aligned lines; colour and the running line only on a terminal.
type screen struct{ color bool }

const column = 50 // where the time stands

func (s screen) paint(code, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s screen) title(format string, a ...any) {
	fmt.Printf("%s\n\n", s.paint("1", fmt.Sprintf(format, a...)))
}

func (s screen) begin(what string) {
	if s.color {
		fmt.Printf("  … %s\r", what)
	}
}

func (s screen) note(text string) {
	s.clear()
	fmt.Printf("    %s\n", s.paint("2", text))
}

func (s screen) done(what string, took time.Duration, detail string) {
	s.clear()
	pad := max(1, column-utf8.RuneCountInString(what))
	fmt.Printf("  %s %s%*s%7.1f s   %s\n", s.paint("32", "✓"), what, pad, "", took.Seconds(), s.paint("2", detail))
}

func (s screen) failed(what string) {
	s.clear()
	fmt.Printf("  %s %s\n", s.paint("31", "✗"), what)
}

// clear removes the running line.
func (s screen) clear() {
	if s.color {
		fmt.Print("\x1b[K")
	}
}
