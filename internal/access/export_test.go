package access

// RememberedPeers returns how many addresses the limiter remembers.
func (a *Access) RememberedPeers() int {
	a.fail.mu.Lock()
	defer a.fail.mu.Unlock()
	return len(a.fail.until)
}
