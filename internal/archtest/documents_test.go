package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	testGroup = regexp.MustCompile("`((?:internal|test|cmd|api)[a-z0-9/]*) ((?:Test|Fuzz)[A-Z][A-Za-z0-9]+(?:, (?:Test|Fuzz)[A-Z][A-Za-z0-9]+)*)`")
	testWord  = regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z][A-Za-z0-9]+`)
)

// Each claim of the threat model can be tried: the tests that it names exist, in the package that it names.
func TestTheThreatModelNamesTestsThatExist(t *testing.T) {
	text, err := os.ReadFile("../../docs/threat-model.md")
	if err != nil {
		t.Fatal(err)
	}
	source := map[string]string{}
	named := 0
	for _, m := range testGroup.FindAllStringSubmatch(string(text), -1) {
		dir := m[1]
		if source[dir] == "" {
			files, err := filepath.Glob("../../" + dir + "/*_test.go")
			if err != nil || len(files) == 0 {
				t.Fatalf("%s: %v, %v", dir, files, err)
			}
			for _, f := range files {
				code, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				source[dir] += string(code)
			}
		}
		for _, name := range strings.Split(m[2], ", ") {
			named++
			if !strings.Contains(source[dir], "\nfunc "+name+"(") {
				t.Errorf("%s does not exist in %s", name, dir)
			}
		}
	}
	if all := len(testWord.FindAllString(string(text), -1)); named != all || named < 80 {
		t.Errorf("%d tests are named, %d of them with their package", all, named)
	}
	for _, part := range strings.Split(string(text), "\n## ") {
		if strings.Contains(part, "| attack |") && !strings.Contains(part, "**Remains.**") {
			t.Errorf("what remains is not said: %.40q", part)
		}
	}
}
