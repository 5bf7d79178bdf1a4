package config

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
)

// line is a setting in the commented example: indent, key, value, comment.
var line = regexp.MustCompile(`^( *)([a-z_]+):( +)(.*?)( +#.*)?$`)

// Render returns the commented example template with the values of c in place of those that differ.
func (c *Config) Render(template string) string {
	v := reflect.ValueOf(*c)
	paths := keys()
	var out strings.Builder
	section := ""
	for l := range strings.Lines(template) {
		l = strings.TrimSuffix(l, "\n")
		if name, ok := strings.CutSuffix(l, ":"); ok && !strings.HasPrefix(l, " ") {
			section = name + "."
		}
		m := line.FindStringSubmatch(l)
		if m == nil || strings.HasPrefix(strings.TrimSpace(l), "#") {
			fmt.Fprintln(&out, l)
			continue
		}
		key := m[2]
		if m[1] != "" {
			key = section + key
		}
		path, ok := paths[key]
		if !ok || same(m[4], v.FieldByIndex(path)) {
			fmt.Fprintln(&out, l)
			continue
		}
		fmt.Fprintf(&out, "%s%s:%s%s%s\n", m[1], m[2], m[3], show(v.FieldByIndex(path)), m[5])
	}
	return out.String()
}

// same reports whether the text of a value in YAML already says v.
func same(text string, v reflect.Value) bool {
	return strings.Trim(text, `"`) == strings.Trim(show(v), `"`)
}
