package config

import (
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// Show prints the effective settings as YAML that Load reads back. Secrets are files: their paths are shown, their
// content never.
func (c *Config) Show(w io.Writer) {
	v := reflect.ValueOf(*c)
	paths := keys()
	names := make([]string, 0, len(paths))
	for k := range paths {
		names = append(names, k)
	}
	slices.SortFunc(names, func(a, b string) int { return slices.Compare(paths[a], paths[b]) })
	group := ""
	for _, name := range names {
		g, key, nested := strings.Cut(name, ".")
		if !nested {
			fmt.Fprintf(w, "%s: %s\n", name, show(v.FieldByIndex(paths[name])))
			continue
		}
		if g != group {
			fmt.Fprintf(w, "%s:\n", g)
			group = g
		}
		note := ""
		if strings.HasSuffix(key, "_file") && key != "ca_file" {
			note = "  # a secret: not shown"
		}
		fmt.Fprintf(w, "  %s: %s%s\n", key, pins.ReplaceAllString(show(v.FieldByIndex(paths[name])), "${1}***"), note)
	}
}

func show(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case string:
		return fmt.Sprintf("%q", x)
	case fmt.Stringer: // a duration
		return x.String()
	default:
		return fmt.Sprint(x)
	}
}

// pins are secrets in the URI of a key.
var pins = regexp.MustCompile(`(?i)((?:pin-value|secret|password)=)[^;?&"]+`)
