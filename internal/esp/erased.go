package esp

// Erased reports whether b is all 0xFF, as erased flash is.
func Erased(b []byte) bool {
	for _, c := range b {
		if c != 0xFF {
			return false
		}
	}
	return true
}
