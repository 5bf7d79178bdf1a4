package tlsfiles

// ReplaceUntil is Replace that ends after a step as a crash would.
func (p Pair) ReplaceUntil(name string, chain, key []byte, after func(step string) error) error {
	return p.replace(name, chain, key, after)
}
