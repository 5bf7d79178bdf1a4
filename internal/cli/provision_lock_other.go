//go:build !unix

package cli

import (
	"fmt"
	"os"
)

// lockDir takes a lock: two runs in one folder would make two keys for one device. After a crash the file has to be removed by
// hand.
func lockDir(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("another muster provision works in this folder; if not, remove %s", path)
	}
	return func() { _, _ = f.Close(), os.Remove(path) }, nil
}
