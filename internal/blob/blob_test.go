package blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"

	"muster/internal/fleet"
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func hashOf(b []byte) fleet.Hash { return fleet.HashOf(sha256.Sum256(b)) }

// files returns all names in dir, whatever they are.
func files(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func read(t testing.TB, s *Store, h fleet.Hash) []byte {
	t.Helper()
	f, size, err := s.Open(h)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil || int64(len(b)) != size {
		t.Fatalf("%d of %d bytes, %v", len(b), size, err)
	}
	return b
}

func TestPutOpenRemove(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	image := bytes.Repeat([]byte("muster"), 200_000) // several chunks
	for range 2 {                                    // the second time the store has it already
		h, size, err := s.Put(t.Context(), iotest.HalfReader(bytes.NewReader(image)), int64(len(image)))
		if err != nil || h != hashOf(image) || size != int64(len(image)) {
			t.Fatalf("%s, %d, %v", h, size, err)
		}
	}
	h := hashOf(image)
	if !bytes.Equal(read(t, s, h), image) {
		t.Error("other bytes came back")
	}
	if err := s.Verify(t.Context(), h); err != nil {
		t.Error(err)
	}
	if got := files(t, dir); !slices.Equal(got, []string{string(h)}) {
		t.Errorf("files: %q", got)
	}
	if err := s.Remove(h); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Open(h); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("open: %v", err)
	}
	if err := s.Remove(h); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("remove: %v", err)
	}
}

// Before accept has agreed, the file is neither listed nor opened; after a refusal it is gone.
func TestPutIf(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	refusal := errors.New("not this one")
	put := func(answer error) error {
		return s.PutIf(t.Context(), strings.NewReader("image"), 5, func(h fleet.Hash, size int64, f io.ReaderAt) error {
			if b, err := io.ReadAll(io.NewSectionReader(f, 0, size+1)); err != nil || string(b) != "image" {
				t.Errorf("it holds %q, %v", b, err)
			}
			if h != hashOf([]byte("image")) || size != 5 {
				t.Errorf("asked about %s, %d bytes", h, size)
			}
			if all, err := s.List(); err != nil || len(all) != 0 {
				t.Errorf("listed %v, %v", all, err)
			}
			if _, _, err := s.Open(h); !fleet.Is(err, fleet.NotFound) {
				t.Errorf("open: %v", err)
			}
			return answer
		})
	}
	if err := put(refusal); err != refusal {
		t.Errorf("%v", err)
	}
	if got := files(t, dir); len(got) != 0 {
		t.Errorf("a refused image left %q", got)
	}
	if err := put(nil); err != nil {
		t.Error(err)
	}
	if all, err := s.List(); err != nil || !slices.Equal(all, []fleet.Hash{hashOf([]byte("image"))}) {
		t.Errorf("listed %v, %v", all, err)
	}
}

// fullFile is a file on a disk that has room for left bytes.
type fullFile struct {
	file
	left     int
	syncFail error
}

func (f *fullFile) Write(b []byte) (int, error) {
	if len(b) > f.left {
		return 0, &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}
	}
	f.left -= len(b)
	return f.file.Write(b)
}

func (f *fullFile) Sync() error {
	if f.syncFail != nil {
		return f.syncFail
	}
	return f.file.Sync()
}

func TestPutLeavesNothingBehind(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		r    io.Reader
		disk *fullFile
		kind fleet.Kind
		is   error
	}{
		"one byte too many":   {r: strings.NewReader("12345678901"), kind: fleet.TooLarge},
		"endless":             {r: endless{}, kind: fleet.TooLarge},
		"breaks off":          {r: io.MultiReader(strings.NewReader("12"), iotest.ErrReader(io.ErrUnexpectedEOF)), kind: fleet.Invalid},
		"reader knows better": {r: iotest.ErrReader(fleet.Errorf(fleet.TooLarge, "body")), kind: fleet.TooLarge},
		"disk full":           {r: strings.NewReader("1234567"), disk: &fullFile{left: 3}, kind: fleet.Full},
		"disk full at fsync":  {r: strings.NewReader("1234567"), disk: &fullFile{left: 30, syncFail: syscall.ENOSPC}, kind: fleet.Full},
		"quota":               {r: strings.NewReader("1234567"), disk: &fullFile{left: 30, syncFail: syscall.EDQUOT}, kind: fleet.Full},
		"disk broken":         {r: strings.NewReader("1234567"), disk: &fullFile{left: 30, syncFail: syscall.EIO}, kind: fleet.Internal},
		"caller gone":         {ctx: ended, r: endless{}, kind: fleet.Internal, is: context.Canceled},
	} {
		dir := t.TempDir()
		s := open(t, dir)
		if c.disk != nil {
			create := s.create
			s.create = func(name string) (file, error) {
				f, err := create(name)
				c.disk.file = f
				return c.disk, err
			}
		}
		if c.ctx == nil {
			c.ctx = t.Context()
		}
		_, _, err := s.Put(c.ctx, c.r, 10)
		if !fleet.Is(err, c.kind) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: %v", name, err)
		}
		if got := files(t, dir); len(got) != 0 {
			t.Errorf("%s: left %q", name, got)
		}
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// A process that died in the middle of an upload leaves a temporary file; the next start removes it and nothing else.
func TestStartSweeps(t *testing.T) {
	dir := t.TempDir()
	first, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	h, _, err := first.Put(t.Context(), strings.NewReader("whole"), 10)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.stage(t.Context(), strings.NewReader("half"), 10); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "README"), []byte("the operator's own"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := len(files(t, dir)); got != 3 {
		t.Fatalf("%d files before", got)
	}
	second := open(t, dir)
	want := []string{"README", string(h)}
	slices.Sort(want)
	if got := files(t, dir); !slices.Equal(got, want) {
		t.Errorf("after the start: %q", got)
	}
	if all, err := second.List(); err != nil || !slices.Equal(all, []fleet.Hash{h}) {
		t.Errorf("listed %v, %v", all, err)
	}
}

func TestVerifyFindsDamage(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	h, _, err := s.Put(t.Context(), strings.NewReader("image"), 10)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, string(h)), []byte("imagE"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), h); !fleet.Is(err, fleet.Internal) || !strings.Contains(err.Error(), "damaged") {
		t.Error(err)
	}
}

func TestNamesThatAreNoHash(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, filepath.Join(dir, "blobs"))
	for _, h := range []fleet.Hash{"", "../secret", "/etc/passwd", ".", "a\x00b", fleet.Hash(strings.Repeat("A", 64)), fleet.Hash(strings.Repeat("/", 64))} {
		if _, _, err := s.Open(h); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("Open(%q): %v", h, err)
		}
		if err := s.Remove(h); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("Remove(%q): %v", h, err)
		}
	}
	link := fleet.Hash(strings.Repeat("a", 64))
	if err := os.Symlink(filepath.Join(dir, "secret"), filepath.Join(dir, "blobs", string(link))); err != nil {
		t.Fatal(err)
	}
	if f, _, err := s.Open(link); err == nil {
		f.Close()
		t.Error("followed a link out of the directory")
	}
	sub := fleet.Hash(strings.Repeat("b", 64))
	if err := os.Mkdir(filepath.Join(dir, "blobs", string(sub)), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Open(sub); !fleet.Is(err, fleet.Internal) {
		t.Errorf("opened a directory: %v", err)
	}
}

// Many upload the same and other images at once: each comes back whole.
func TestConcurrentPut(t *testing.T) {
	s := open(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			image := []byte(fmt.Sprintf("image %d", i%4))
			h, _, err := s.Put(t.Context(), bytes.NewReader(image), 100)
			if err != nil || h != hashOf(image) {
				t.Errorf("%s, %v", h, err)
				return
			}
			if err := s.Verify(t.Context(), h); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if all, err := s.List(); err != nil || len(all) != 4 {
		t.Errorf("%d images, %v", len(all), err)
	}
}

func TestPutAnything(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	rapid.Check(t, func(rt *rapid.T) {
		image := rapid.SliceOfN(rapid.Byte(), 0, 2000).Draw(rt, "image")
		max := int64(rapid.IntRange(0, 2000).Draw(rt, "max"))
		h, size, err := s.Put(t.Context(), iotest.OneByteReader(bytes.NewReader(image)), max)
		if int64(len(image)) > max {
			if !fleet.Is(err, fleet.TooLarge) {
				rt.Fatalf("%d bytes over a limit of %d: %v", len(image), max, err)
			}
			return
		}
		if err != nil || h != hashOf(image) || size != int64(len(image)) || !bytes.Equal(read(t, s, h), image) {
			rt.Fatalf("%s, %d, %v", h, size, err)
		}
	})
}
