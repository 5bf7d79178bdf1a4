package simdev

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
)

// Flash keeps what must survive a reboot, by name. Write replaces whole contents. One device uses it at a time.
type Flash interface {
	Read(name string) ([]byte, error) // fs.ErrNotExist if there is none
	Write(name string, b []byte) error
	Remove(name string) error // no error if there is none
}

// MemFlash is a Flash in memory. The zero value is empty and ready.
type MemFlash struct {
	mu sync.Mutex
	m  map[string][]byte
}

// Read implements Flash.
func (f *MemFlash) Read(name string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.m[name]
	if !ok {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return slices.Clone(b), nil
}

// Write implements Flash.
func (f *MemFlash) Write(name string, b []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.m == nil {
		f.m = map[string][]byte{}
	}
	f.m[name] = slices.Clone(b)
	return nil
}

// Remove implements Flash.
func (f *MemFlash) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.m, name)
	return nil
}

// Clone returns an independent copy: a test that starts many devices from the same moment needs one.
func (f *MemFlash) Clone() *MemFlash {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &MemFlash{m: maps.Clone(f.m)}
}

// DirFlash is a Flash in a directory, a file of mode 0600 each. Write is a rename, so the old content or the new one is
// there after a crash of the program. It does not sync: the machine's own power is not what is simulated.
type DirFlash struct{ dir string }

// NewDirFlash returns the flash in dir, which it makes if need be.
func NewDirFlash(dir string) (*DirFlash, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &DirFlash{dir}, nil
}

// Read implements Flash.
func (f *DirFlash) Read(name string) ([]byte, error) { return os.ReadFile(filepath.Join(f.dir, name)) }

// Write implements Flash.
func (f *DirFlash) Write(name string, b []byte) error {
	tmp, err := os.CreateTemp(f.dir, name+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // gone already when all went well
	if _, err := tmp.Write(b); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), filepath.Join(f.dir, name))
}

// Remove implements Flash.
func (f *DirFlash) Remove(name string) error {
	err := os.Remove(filepath.Join(f.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// CutPoint is where in a write the power goes.
type CutPoint string

// Points of a write.
const (
	CutBefore CutPoint = "before" // nothing is written
	CutMiddle CutPoint = "middle" // the first half is there, the rest is not: flash without a rename
	CutAfter  CutPoint = "after"  // all is written, and nothing that follows
)

// Cut is a power cut at the Nth write of a device's flash, counted from 1 since the program started. The zero Cut never
// happens.
type Cut struct {
	Write uint64
	Point CutPoint
}

// errPowerCut ends a life: the device starts again from what its flash holds.
type errPowerCut struct {
	write uint64
	name  string
	point CutPoint
}

func (e errPowerCut) Error() string {
	return fmt.Sprintf("power cut %s write %d (%s)", e.point, e.write, e.name)
}

// cutFlash counts the writes of a device and cuts the power in one of them.
type cutFlash struct {
	Flash
	mu     sync.Mutex
	cut    Cut
	writes uint64
	off    error // set from the cut on until power returns: a device without power writes nothing
}

func (f *cutFlash) set(c Cut) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut = c
}

// powerOn lets a device write again.
func (f *cutFlash) powerOn() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.off = nil
}

func (f *cutFlash) count() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.writes
}

// Write implements Flash.
func (f *cutFlash) Write(name string, b []byte) error {
	return f.act(name, func() error { return f.Flash.Write(name, b[:len(b)/2]) }, func() error { return f.Flash.Write(name, b) })
}

// Remove implements Flash.
func (f *cutFlash) Remove(name string) error {
	return f.act(name, func() error { return nil }, func() error { return f.Flash.Remove(name) })
}

func (f *cutFlash) act(name string, half, whole func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.off != nil {
		return f.off
	}
	f.writes++
	if f.cut.Write == 0 || f.writes != f.cut.Write {
		return whole()
	}
	var err error
	switch f.cut.Point {
	case CutMiddle:
		err = half()
	case CutAfter:
		err = whole()
	}
	if err != nil {
		return err
	}
	f.off = errPowerCut{f.writes, name, f.cut.Point}
	return f.off
}
