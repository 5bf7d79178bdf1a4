// Package configs holds the commented example of musterd's settings, from which init writes a machine's own file.
package configs

import _ "embed"

// Musterd is configs/musterd.yaml: every setting with its default and what it means.
//
//go:embed musterd.yaml
var Musterd string
