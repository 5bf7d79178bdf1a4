//go:build unix

package cli

import (
	"fmt"
	"os"
	"syscall"
)

// lockDir takes a lock that ends with the process at the latest: two runs in one folder would make two keys for one device.
func lockDir(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("another muster provision works in this folder")
	}
	return func() { _ = f.Close() }, nil
}
