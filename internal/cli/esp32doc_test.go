package cli_test

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"

	"muster/internal/cli"
)

var inCode = regexp.MustCompile("`(muster [^`]+)`")

// Every muster command that docs/esp32.md and the example's README show exists, with its flags; so do the files of the example.
func TestCommandsOfESP32Page(t *testing.T) {
	seen := 0
	for _, page := range []string{"../../docs/esp32.md", "../../docs/examples/platformio/README.md"} {
		text := read(t, page)
		var commands []string
		for _, m := range inCode.FindAllStringSubmatch(text, -1) {
			commands = append(commands, m[1])
		}
		joined := strings.ReplaceAll(text, "\\\n", " ")
		for line := range strings.Lines(joined) {
			if c, ok := strings.CutPrefix(strings.TrimSpace(line), "muster "); ok && strings.HasPrefix(line, "    ") {
				c, _, _ = strings.Cut(c, " #")
				c, _, _ = strings.Cut(c, " || ")
				commands = append(commands, "muster "+strings.TrimSpace(c))
			}
		}
		for _, c := range commands {
			seen++
			checkCommand(t, page, c)
		}
	}
	if seen < 15 {
		t.Errorf("found %d commands only", seen)
	}
	for _, name := range []string{"platformio.ini", "partitions.csv", "sdkconfig.defaults", "sdkconfig.fleet", "README.md", "src/main.cpp", "src/product.h"} {
		if _, err := os.Stat("../../docs/examples/platformio/" + name); err != nil {
			t.Error(err)
		}
	}
}

// checkCommand asks the longest command that the words name for its help, and looks for the flags in it.
func checkCommand(t *testing.T, page, command string) {
	t.Helper()
	var path, flags []string
	for _, w := range strings.Fields(command)[1:] {
		switch {
		case strings.HasPrefix(w, "--"):
			name, _, _ := strings.Cut(w, "=")
			flags = append(flags, name)
		case len(flags) == 0 && regexp.MustCompile(`^[a-z][a-z0-9-]+$`).MatchString(w):
			path = append(path, w)
		}
	}
	help := func(path []string) (string, bool) {
		var out bytes.Buffer
		code := cli.Run(t.Context(), cli.Env{Args: append(append([]string{}, path...), "--help"), Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out, Getenv: func(string) string { return "" }})
		return out.String(), code == 0 && strings.Contains(out.String(), "muster "+strings.Join(path, " "))
	}
	for ; len(path) > 0; path = path[:len(path)-1] { // the last words may be arguments
		text, ok := help(path)
		if !ok {
			continue
		}
		rest := strings.Fields(command)[1+len(path):]
		if strings.Contains(text, "Available Commands:") && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
			t.Errorf("%s: %s: there is no such command", page, command)
		}
		for _, f := range flags {
			if !strings.Contains(text, f+" ") && !strings.Contains(text, f+"\n") {
				t.Errorf("%s: %s has no flag %s", page, command, f)
			}
		}
		return
	}
	t.Errorf("%s: %s: there is no such command", page, command)
}
