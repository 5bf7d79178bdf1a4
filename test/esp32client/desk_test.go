package esp32client

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const example = "../../docs/examples/platformio"

// program is the example, compiled once for all tests of the package.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "esp32client-")
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "device"), compile(dir)
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := program(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// compile builds the portable part and the desk around it, with warnings as errors and the sanitizers on.
func compile(dir string) error {
	sources, err := filepath.Glob(filepath.Join(example, "lib/*/src/muster/*.cpp"))
	if err != nil || len(sources) < 8 {
		return fmt.Errorf("%d sources: %w", len(sources), err)
	}
	sources = append(sources, filepath.Join(example, "host/device.cpp"))
	objects := make([]string, len(sources))
	errs := make([]error, len(sources))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 2)
	for i, source := range sources {
		objects[i] = filepath.Join(dir, strings.TrimSuffix(filepath.Base(source), ".cpp")+".o")
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			errs[i] = gxx("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-c", source, "-o", objects[i])
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return gxx(append(objects, "-fsanitize=address,undefined", "-lmbedx509", "-lmbedcrypto", "-o", filepath.Join(dir, "device"))...)
}

// gxx runs the compiler as the firmware is compiled, warnings as errors.
func gxx(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	base := []string{"-std=c++17", "-Wall", "-Wextra", "-Werror", "-I" + example + "/lib/muster_core/src", "-I" + example + "/lib/muster_mbedtls/src"}
	out, err := exec.CommandContext(ctx, "g++", append(base, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("g++ %s: %w\n%s\n`make tools` installs the compiler and mbedTLS where they are missing", strings.Join(args, " "), err, out)
	}
	return nil
}

// desk is a running device.
type desk struct {
	testing.TB
	in  io.WriteCloser
	out *bufio.Scanner
	off bool // its power was cut
}

// start runs a device with empty flash; the end of the test ends it and looks whether a sanitizer found something.
func start(t testing.TB) *desk {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &desk{TB: t, in: in, out: bufio.NewScanner(out)}
	d.out.Buffer(nil, 1<<20)
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil || complaints.Len() > 0 {
			t.Errorf("the device ended with %v: %s", err, complaints.String())
		}
	})
	return d
}

// do sends one command and returns the lines of the answer.
func (d *desk) do(words ...string) (lines []string) {
	d.Helper()
	if _, err := io.WriteString(d.in, strings.Join(words, " ")+"\n"); err != nil {
		d.Fatalf("%v: %v", words[0], err)
	}
	for d.out.Scan() {
		switch line := d.out.Text(); line {
		case ".":
			return lines
		case "off":
			d.off = true
		case "what?":
			d.Fatalf("the device does not know %q", words[0])
		default:
			lines = append(lines, line)
		}
	}
	d.Fatalf("the device died at %q", words[0])
	return nil
}

// one is do for a command with one line of answer.
func (d *desk) one(words ...string) string {
	d.Helper()
	lines := d.do(words...)
	if len(lines) != 1 {
		d.Fatalf("%q: got %q", words, lines)
	}
	return lines[0]
}

func hexed(b []byte) string {
	if len(b) == 0 {
		return "-"
	}
	return hex.EncodeToString(b)
}

// published returns the payloads of the lines that publish to the last words of the topic.
func published(t testing.TB, lines []string, word string) (payloads [][]byte) {
	t.Helper()
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) != 3 || f[0] != "publish" || !strings.HasSuffix(f[1], "/up/"+word) {
			continue
		}
		b, err := hex.DecodeString(f[2])
		if err != nil {
			t.Fatal(err)
		}
		payloads = append(payloads, b)
	}
	return payloads
}

// says reports whether one of the lines is, or begins with, s.
func says(lines []string, s string) bool {
	for _, line := range lines {
		if strings.HasPrefix(line, s) {
			return true
		}
	}
	return false
}
