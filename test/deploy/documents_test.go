package deploy_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/modfile"

	"muster/test/world"
)

// Every direct requirement and every tool has a row in the document of dependencies, and every row is required.
func TestEveryDependencyHasItsReason(t *testing.T) {
	mod, err := modfile.Parse("go.mod", []byte(read(t, "go.mod")), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	for _, r := range mod.Require {
		tool := slices.ContainsFunc(mod.Tool, func(x *modfile.Tool) bool {
			return x.Path == r.Mod.Path || strings.HasPrefix(x.Path, r.Mod.Path+"/")
		})
		if !r.Indirect || tool {
			want[r.Mod.Path] = true
		}
	}
	if len(want) < 20 {
		t.Fatalf("go.mod names %d modules", len(want))
	}
	rows := map[string]bool{}
	for line := range strings.Lines(read(t, "docs/dependencies.md")) {
		cells := strings.Split(line, "|")
		if len(cells) != 6 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			continue
		}
		path := strings.Trim(cells[1], " `")
		rows[path] = true
		for i, cell := range cells[2:5] {
			if strings.TrimSpace(cell) == "" {
				t.Errorf("%s: cell %d is empty", path, i+2)
			}
		}
		if !want[path] {
			t.Errorf("%s has a row, but go.mod does not require it directly", path)
		}
	}
	for path := range want {
		if !rows[path] {
			t.Errorf("%s has no row: why is it here, under which licence, what would it cost to drop?", path)
		}
	}
}

// The operators' page lists what a musterd with its broker really shows, and the health check says what it should.
func TestOperationsNamesEveryMetricAndEveryPart(t *testing.T) {
	page := read(t, "docs/operations.md")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	w, err := world.Start(ctx, world.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	var missing []string
	shown := 0
	for line := range strings.Lines(get(t, w, "/metrics")) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == "HELP" && strings.HasPrefix(f[2], "muster_") {
			shown++
			if !strings.Contains(page, "`"+f[2]+"`") {
				missing = append(missing, line)
			}
		}
	}
	if shown < 5 || len(missing) > 0 {
		t.Errorf("%d metrics; docs/operations.md lacks\n%s", shown, strings.Join(missing, ""))
	}
	var ready struct {
		Parts []struct {
			Part string `json:"part"`
		} `json:"parts"`
	}
	if err := json.Unmarshal([]byte(get(t, w, "/readyz")), &ready); err != nil || len(ready.Parts) < 3 {
		t.Fatalf("%+v, %v", ready, err)
	}
	for _, p := range ready.Parts {
		if !strings.Contains(page, "`"+p.Part+"`") {
			t.Errorf("docs/operations.md does not explain the part %s", p.Part)
		}
	}
	checkHealth(ctx, t, w)
}

func get(t *testing.T, w *world.World, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+w.Token)
	res, err := w.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// checkHealth asks as the compose file's health check does: yes while musterd is there, no after.
func checkHealth(ctx context.Context, t *testing.T, w *world.World) {
	t.Helper()
	musterd := filepath.Join(t.TempDir(), "musterd")
	build := exec.CommandContext(ctx, "go", "build", "-o", musterd, "./cmd/musterd")
	build.Dir, build.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ask := func(args ...string) (string, error) {
		all := append([]string{"health", "--config", filepath.Join(w.Config.DataDir, "musterd.yaml")}, args...)
		out, err := exec.CommandContext(ctx, musterd, all...).CombinedOutput()
		return string(out), err
	}
	if out, err := ask(); err != nil || !strings.Contains(out, `"ready":true`) {
		t.Errorf("ready: %v, %s", err, out)
	}
	if out, err := ask("--live"); err != nil || out != "ok\n" {
		t.Errorf("live: %v, %s", err, out)
	}
	if err := w.StopMusterd(ctx); err != nil {
		t.Fatal(err)
	}
	if out, err := ask("--live"); err == nil || !strings.Contains(out, "does not answer") {
		t.Errorf("stopped: %v, %s", err, out)
	}
}

var testName = regexp.MustCompile("Test[A-Z][A-Za-z0-9]+")

// The tests that the security page names exist, so each of its claims can be tried.
func TestSecurityNamesTestsThatExist(t *testing.T) {
	var source strings.Builder
	for _, pattern := range []string{"test/contract/*_test.go", "test/e2e/*_test.go"} {
		files, err := filepath.Glob(repo + pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			source.WriteString(read(t, strings.TrimPrefix(f, repo)))
		}
	}
	names := testName.FindAllString(read(t, "docs/security.md"), -1)
	if len(names) < 20 {
		t.Errorf("only %d tests are named", len(names))
	}
	for _, name := range names {
		if !strings.Contains(source.String(), "func "+name+"(t *testing.T)") {
			t.Errorf("%s does not exist", name)
		}
	}
}
