package cli_test

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"muster/internal/access"
	"muster/internal/cli"
	"muster/internal/httpapi"
	"muster/test/apirig"
)

// desk is a person at a keyboard in front of a real musterd API.
type desk struct {
	*apirig.Rig
	t   testing.TB
	dir string
	env map[string]string
	in  string // standard input of the next command
	tty int
	ctx context.Context
}

// sit starts the API; through, if not nil, stands in front of it.
func sit(t testing.TB, through func(http.Handler) http.Handler) *desk {
	t.Helper()
	r := apirig.New(t)
	r.AddTokens(t, time.Now().Add(-time.Minute))
	srv, err := httpapi.New(r.Config)
	if err != nil {
		t.Fatal(err)
	}
	var h http.Handler = srv
	if through != nil {
		h = through(srv)
	}
	url, ca := apirig.Serve(t, h, slog.New(slog.DiscardHandler))
	dir := t.TempDir()
	return &desk{Rig: r, t: t, dir: dir, ctx: t.Context(), env: map[string]string{
		"MUSTER_URL": url, "MUSTER_CA": ca, "MUSTER_TOKEN": r.Tokens[access.Admin], "HOME": dir, "NO_COLOR": "1",
	}}
}

// said is what a command left behind.
type said struct {
	code     int
	out, err string
}

func (d *desk) try(args ...string) said {
	d.t.Helper()
	var out, errs bytes.Buffer
	code := cli.Run(d.ctx, cli.Env{
		Args: args, Stdin: strings.NewReader(d.in), Stdout: &out, Stderr: &errs, Getenv: func(k string) string { return d.env[k] }, Terminal: d.tty,
	})
	d.in = ""
	return said{code, out.String(), errs.String()}
}

// run is try for what must succeed; it returns standard output.
func (d *desk) run(args ...string) string {
	d.t.Helper()
	s := d.try(args...)
	if s.code != 0 {
		d.t.Fatalf("muster %s: exit %d\n%s%s", strings.Join(args, " "), s.code, s.out, s.err)
	}
	return s.out
}

// fails is try for what must end with that code and words on standard error.
func (d *desk) fails(code int, words string, args ...string) {
	d.t.Helper()
	s := d.try(args...)
	if s.code != code || !strings.Contains(s.err, words) || !strings.HasPrefix(lastError(s.err), "error: ") {
		d.t.Errorf("muster %s: exit %d, want %d and %q\n%s%s", strings.Join(args, " "), s.code, code, words, s.out, s.err)
	}
}

func lastError(s string) string {
	if i := strings.LastIndex(s, "error: "); i >= 0 {
		return s[i:]
	}
	return s
}

// decode runs a command with --output json.
func decode[T any](d *desk, args ...string) T {
	d.t.Helper()
	var v T
	if out := d.run(append(args, "--output", "json")...); json.Unmarshal([]byte(out), &v) != nil {
		d.t.Fatalf("muster %s: not JSON: %s", strings.Join(args, " "), out)
	}
	return v
}

func (d *desk) file(name, content string) string {
	d.t.Helper()
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		d.t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
