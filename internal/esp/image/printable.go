package image

import "unicode"

// hidden reports whether r must not reach a terminal or a log: what is not printable could forge or hide text.
func hidden(r rune) bool { return !unicode.IsPrint(r) }
