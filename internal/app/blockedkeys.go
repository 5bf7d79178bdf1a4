package app

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// blocklist is the file of certificates.blocked_keys, read again when it changes.
type blocklist struct {
	path string // empty: there is none
	keys atomic.Pointer[map[fleet.Hash]bool]
	seen os.FileInfo // of what was read; touched by load alone
}

// blocked reports whether a key is on the list.
func (b *blocklist) blocked(h fleet.Hash) bool {
	keys := b.keys.Load()
	return keys != nil && (*keys)[h]
}

// load reads the file if it is another one than before. With an error the list stays as it was.
func (b *blocklist) load() (keys int, fresh bool, err error) {
	if b.path == "" {
		return 0, false, nil
	}
	info, err := os.Stat(b.path)
	if err != nil {
		return 0, false, fmt.Errorf("certificates.blocked_keys: %w", err)
	}
	if b.seen != nil && os.SameFile(info, b.seen) && info.ModTime().Equal(b.seen.ModTime()) && info.Size() == b.seen.Size() {
		return 0, false, nil
	}
	if info.Size() > pki.MaxBlocklist {
		return 0, false, fmt.Errorf("certificates.blocked_keys: %s is larger than %d bytes", b.path, pki.MaxBlocklist)
	}
	text, err := os.ReadFile(b.path)
	if err != nil {
		return 0, false, fmt.Errorf("certificates.blocked_keys: %w", err)
	}
	list, err := pki.ParseBlocklist(string(text))
	if err != nil {
		return 0, false, fmt.Errorf("certificates.blocked_keys: %s: %w", b.path, err)
	}
	b.keys.Store(&list)
	b.seen = info
	return len(list), true, nil
}

// blocklistCheck is how often the file is looked at.
const blocklistCheck = 5 * time.Second

// runBlocklist follows the file.
func (a *App) runBlocklist(ctx context.Context) error {
	ticker := time.NewTicker(blocklistCheck)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		n, fresh, err := a.blocklist.load()
		a.health.Set("blocked-keys", err)
		if fresh {
			a.log.Info("the list of blocked keys was read again", "keys", n)
		}
	}
}
