// Package blob keeps files by the SHA-256 of what they hold, in one directory. A file appears under its hash only when
// it is whole and on disk; what an upload left behind when it broke off is never listed and goes at the next start.
package blob

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"muster/internal/fleet"
)

// tempPrefix starts the name of a file that is still being written. No hash starts so.
const tempPrefix = "tmp-"

// chunk is how much is copied between two looks at the context, in bytes.
const chunk = 256 << 10

// Store is a directory of files. Its methods may be called from any goroutine. One process may use a directory.
type Store struct {
	root   *os.Root
	create func(name string) (file, error) // replaced by tests that let a disk fill up
}

// file is what an upload needs of a new file.
type file interface {
	io.WriteCloser
	Sync() error
}

// New opens the store in dir, which is created if missing, and removes what broken uploads left there. Nothing outside
// dir can be reached through it, not even by a symbolic link.
func New(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, storeError(err, "make the directory for images")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, storeError(err, "open the directory for images")
	}
	s := &Store{root: root}
	s.create = func(name string) (file, error) {
		return root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	}
	if err := s.sweep(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return s, nil
}

// Close releases the directory. Files that Open returned stay readable.
func (s *Store) Close() error { return s.root.Close() }

// staged is a file that has been received whole but is not in the store yet.
type staged struct {
	hash fleet.Hash // SHA-256 of what was received
	size int64      // bytes

	store *Store
	temp  string
}

// Put writes r to disk, at most max bytes, and keeps it under the SHA-256 of what came. That the store has it already is
// no error: it holds the same. Nothing is left behind on an error: TooLarge over max, Full when the disk is, the
// context's own, Invalid when r breaks off.
func (s *Store) Put(ctx context.Context, r io.Reader, max int64) (fleet.Hash, int64, error) {
	st, err := s.stage(ctx, r, max)
	if err != nil {
		return "", 0, err
	}
	return st.hash, st.size, st.commit()
}

// PutIf is Put for a caller who knows what should come: the file is kept only if accept, given its hash, its size in
// bytes and the file itself, returns nil. accept must not use the file afterwards.
func (s *Store) PutIf(ctx context.Context, r io.Reader, max int64, accept func(fleet.Hash, int64, io.ReaderAt) error) error {
	st, err := s.stage(ctx, r, max)
	if err != nil {
		return err
	}
	if err := st.ask(accept); err != nil {
		if e := st.discard(); e != nil {
			return errors.Join(err, e)
		}
		return err
	}
	return st.commit()
}

// stage receives r into a temporary file and makes it last.
func (s *Store) stage(ctx context.Context, r io.Reader, max int64) (*staged, error) {
	st := &staged{store: s, temp: tempPrefix + rand.Text()}
	f, err := s.create(st.temp)
	if err != nil {
		return nil, storeError(err, "store the image")
	}
	sum := sha256.New()
	st.size, err = receive(ctx, f, r, sum, max)
	if err == nil {
		err = wrap(f.Sync(), "store the image")
	}
	if e := f.Close(); err == nil {
		err = wrap(e, "store the image")
	}
	if err != nil {
		if e := st.discard(); e != nil {
			return nil, errors.Join(err, e)
		}
		return nil, err
	}
	st.hash = fleet.HashOf([32]byte(sum.Sum(nil)))
	return st, nil
}

// ask lets accept look at the file.
func (st *staged) ask(accept func(fleet.Hash, int64, io.ReaderAt) error) error {
	f, err := st.store.root.Open(st.temp)
	if err != nil {
		return storeError(err, "read the image")
	}
	err = accept(st.hash, st.size, f)
	_ = f.Close() // only read
	return err
}

// commit puts the file into the store under its hash.
func (st *staged) commit() error {
	if err := st.store.root.Rename(st.temp, string(st.hash)); err != nil {
		err = storeError(err, "store the image")
		if e := st.discard(); e != nil {
			return errors.Join(err, e)
		}
		return err
	}
	return st.store.syncDir()
}

// discard removes the temporary file.
func (st *staged) discard() error {
	return wrap(st.store.root.Remove(st.temp), "remove a broken upload")
}

// Open returns the file with that hash for reading, and its size in bytes; NotFound if there is none.
func (s *Store) Open(h fleet.Hash) (io.ReadSeekCloser, int64, error) {
	if _, err := fleet.ParseHash(string(h)); err != nil {
		return nil, 0, err
	}
	f, err := s.root.Open(string(h))
	if err != nil {
		return nil, 0, storeError(err, "open the image")
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fleet.Errorf(fleet.Internal, "image %s is not a regular file", h)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// Verify reads the file with that hash again and returns an Internal error if it does not hold what its name says.
func (s *Store) Verify(ctx context.Context, h fleet.Hash) error {
	f, size, err := s.Open(h)
	if err != nil {
		return err
	}
	sum := sha256.New()
	_, err = receive(ctx, io.Discard, f, sum, size)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if got := fleet.HashOf([32]byte(sum.Sum(nil))); got != h {
		return fleet.Errorf(fleet.Internal, "image %s is damaged on disk: its bytes have SHA-256 %s; upload it again", h, got)
	}
	return nil
}

// Remove removes the file with that hash; NotFound if there is none.
func (s *Store) Remove(h fleet.Hash) error {
	if _, err := fleet.ParseHash(string(h)); err != nil {
		return err
	}
	if err := s.root.Remove(string(h)); err != nil {
		return storeError(err, "remove the image")
	}
	return s.syncDir()
}

// List returns the hashes of all files, in order.
func (s *Store) List() ([]fleet.Hash, error) {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return nil, storeError(err, "list the images")
	}
	var all []fleet.Hash
	for _, e := range entries {
		if h, err := fleet.ParseHash(e.Name()); err == nil {
			all = append(all, h)
		}
	}
	return all, nil
}

// sweep removes what uploads that broke off left behind.
func (s *Store) sweep() error {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return storeError(err, "list the images")
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		if err := s.root.Remove(e.Name()); err != nil {
			return storeError(err, "remove a broken upload")
		}
	}
	return nil
}

// syncDir makes a rename or removal last (fsync of the directory; see open(2), rename(2)).
func (s *Store) syncDir() error {
	d, err := s.root.Open(".")
	if err != nil {
		return storeError(err, "store the image")
	}
	err = d.Sync()
	if e := d.Close(); err == nil {
		err = e
	}
	return wrap(err, "store the image")
}

// receive copies at most max bytes of r to w and sum.
func receive(ctx context.Context, w io.Writer, r io.Reader, sum hash.Hash, max int64) (int64, error) {
	buf := make([]byte, chunk)
	var size int64
	for {
		if err := ctx.Err(); err != nil {
			return size, err
		}
		n, readErr := r.Read(buf)
		size += int64(n)
		if size > max {
			return size, fleet.Errorf(fleet.TooLarge, "the image is larger than %d bytes", max)
		}
		sum.Write(buf[:n]) // never fails (hash.Hash)
		if _, err := w.Write(buf[:n]); err != nil {
			return size, storeError(err, "store the image")
		}
		if readErr == io.EOF { // alone it is the end; wrapped, it is somebody's trouble
			return size, nil
		}
		if readErr != nil {
			return size, uploadError(readErr)
		}
	}
}

// uploadError keeps an Error of whoever made the reader: it knows better what was wrong.
func uploadError(err error) error {
	if _, ok := errors.AsType[*fleet.Error](err); ok {
		return err
	}
	return fleet.Wrap(fleet.Invalid, err, "the upload broke off before its end; send it again")
}

func wrap(err error, doing string) error {
	if err == nil {
		return nil
	}
	return storeError(err, doing)
}

// storeError says what an operating system's error means to the caller.
func storeError(err error, doing string) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fleet.Wrap(fleet.Full, err, "%s: the disk is full; free some room or remove old releases", doing)
	case errors.Is(err, fs.ErrNotExist):
		return fleet.Wrap(fleet.NotFound, err, "%s: there is no such file", doing)
	}
	return fleet.Wrap(fleet.Internal, err, "%s", doing)
}
