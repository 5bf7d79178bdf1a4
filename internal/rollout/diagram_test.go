package rollout

import (
	"encoding/json"
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the diagrams into docs/rollouts.md")

const document = "../../docs/rollouts.md"

// The document for operators shows the tables as they are. After a change of the tables: go test ./internal/rollout -run
// Diagrams -update.
func TestDiagramsInTheDocument(t *testing.T) {
	raw, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	rollouts, jobs := Diagram()
	for mark, want := range map[string]string{"rollout": rollouts, "device": jobs} {
		begin, end := "<!-- diagram "+mark+" -->\n", "<!-- end -->"
		_, rest, ok := strings.Cut(text, begin)
		have, _, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("no %q in the document", begin)
		}
		fresh := "```mermaid\n" + want + "```\n"
		if have == fresh {
			continue
		}
		if !*update {
			t.Errorf("the diagram of a %s is out of date: go test ./internal/rollout -run Diagrams -update", mark)
		}
		text = strings.Replace(text, begin+have, begin+fresh, 1)
	}
	if *update {
		if err := os.WriteFile(document, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Every plan in the document is one that muster takes, and every field is in its table.
func TestPlansInTheDocument(t *testing.T) {
	raw, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	plans := 0
	for _, block := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(string(raw), -1) {
		var known map[string]json.RawMessage
		if err := json.Unmarshal([]byte(block[1]), &known); err != nil {
			t.Errorf("%v in %s", err, block[1])
			continue
		}
		var p Plan
		if err := json.Unmarshal([]byte(block[1]), &p); err != nil {
			t.Errorf("%v in %s", err, block[1])
			continue
		}
		if err := p.WithDefaults().Validate(1000); err != nil {
			t.Errorf("%v in %s", err, block[1])
		}
		again, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var kept map[string]json.RawMessage
		if err := json.Unmarshal(again, &kept); err != nil {
			t.Fatal(err)
		}
		for name := range known {
			if _, ok := kept[name]; !ok {
				t.Errorf("%s is no field of a plan", name)
			}
		}
		plans++
	}
	if plans < 4 {
		t.Errorf("%d plans in the document", plans)
	}
	for _, name := range regexp.MustCompile(`json:"([a-z_]+)`).FindAllStringSubmatch(source(t, "planjson.go")+source(t, "plan.go"), -1) {
		if !strings.Contains(string(raw), "`"+name[1]+"`") {
			t.Errorf("the document does not explain %s", name[1])
		}
	}
}

func source(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
