package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

type pkg struct {
	ImportPath string
	Doc        string
	GoFiles    []string
	Imports    []string
	Deps       []string
	Module     *struct{ Main bool }
}

const module = "muster"

func list(t *testing.T) map[string]pkg {
	t.Helper()
	readAll(t)
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,GoFiles,Imports,Module", module+"/...")
	out, err := cmd.Output()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("%v: %s", err, e.Stderr)
		}
		t.Fatal(err)
	}
	all := map[string]pkg{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module+"/")] = p
	}
}

// readAll opens every source file, so that go test does not show a result of yesterday's imports from its cache.
func readAll(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		_, err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// isStd tells the standard library from modules by the dot of a domain name.
func isStd(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

func TestEveryPackageImportsWhatItsRowAllows(t *testing.T) {
	all := list(t)
	for path, p := range all {
		if len(p.GoFiles) == 0 {
			continue // tests only: they may import anything
		}
		if strings.HasPrefix(path, "cmd/") || strings.HasPrefix(path, "test/") || path == "internal/app" {
			continue // the outermost ring; what it may not do is below
		}
		row, ok := Table[path]
		if !ok {
			t.Errorf("%s has no row in Table: decide which layer it belongs to, and what it may import", path)
			continue
		}
		for _, imp := range p.Imports {
			if ours, is := strings.CutPrefix(imp, module+"/"); is && !slices.Contains(row.May, ours) {
				t.Errorf("%s (%s) must not import %s", path, row.Layer, ours)
			}
		}
		if row.Layer != Core && row.Layer != Words {
			continue
		}
		for _, imp := range p.Imports {
			if slices.Contains(CoreBans, imp) {
				t.Errorf("%s is core and must not import %s", path, imp)
			}
			if !isStd(imp) && !strings.HasPrefix(imp, module+"/") && !pure(imp) {
				t.Errorf("%s is core and must not import %s: add it to Pure with a reason if it does no I/O", path, imp)
			}
		}
	}
}

func pure(imp string) bool {
	for m := range Pure {
		if imp == m || strings.HasPrefix(imp, m+"/") {
			return true
		}
	}
	return false
}

// The direction of DESIGN §3 holds in the table itself: cmd → app → adapters → use cases → core → fleet.
func TestTheTableKeepsTheDirection(t *testing.T) {
	inner := map[Layer][]Layer{
		Words: {}, Core: {Words, Core}, UseCase: {Words, Core, UseCase}, Adapter: {Words, Core, UseCase},
		Edge: {Words, Core, Edge},
	}
	// Each exception is one sentence.
	except := map[string]string{
		"internal/store/storetest internal/store/bolt":  "it is that adapter's test helper",
		"internal/ca internal/ca/ceremony":              "one way to make CA certificates, online and offline",
		"internal/ca internal/ca/keystore":              "one way to open CA keys, online and offline",
		"internal/httpapi api":                          "the generated types of the contract",
		"internal/devbroker internal/broker/brokerconf": "the development broker runs the production configuration",
	}
	for path, row := range Table {
		if row.Why == "" {
			t.Errorf("%s: a row needs a reason", path)
		}
		for _, may := range row.May {
			to, ok := Table[may]
			if !ok {
				t.Errorf("%s may import %s, which has no row", path, may)
				continue
			}
			if !slices.Contains(inner[row.Layer], to.Layer) && except[path+" "+may] == "" {
				t.Errorf("%s (%s) may import %s (%s): against the direction", path, row.Layer, may, to.Layer)
			}
		}
	}
}

// Programs stay thin, and only app wires: the CLI and the simulator must not reach into the service.
func TestProgramsStayOutsideTheService(t *testing.T) {
	only := map[string][]string{
		"cmd/muster":    {"internal/cli"},
		"cmd/devicesim": {"internal/simdev", "internal/fleet", "internal/wire"},
		"cmd/musterd":   {"internal/app", "internal/config", "internal/fleet", "internal/obs"},
	}
	for path, p := range list(t) {
		allowed, ok := only[path]
		if !ok {
			continue
		}
		for _, imp := range p.Imports {
			if ours, is := strings.CutPrefix(imp, module+"/"); is && !slices.Contains(allowed, ours) {
				t.Errorf("%s must not import %s", path, ours)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for path, p := range list(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", path)
		}
		name := path[strings.LastIndex(path, "/")+1:]
		if slices.Contains([]string{"util", "utils", "common", "helpers", "models", "service", "manager"}, name) {
			t.Errorf("%s: name the package for what it is", path)
		}
	}
}
