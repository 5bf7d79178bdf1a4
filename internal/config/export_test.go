package config

import (
	"os"

	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/rawbytes"
	"github.com/knadh/koanf/v2"
)

// KeysMissingIn returns the settings that a file does not set.
func KeysMissingIn(file string) (missing []string) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return []string{err.Error()}
	}
	k := koanf.New(".")
	if err := k.Load(rawbytes.Provider(raw), yaml.Parser()); err != nil {
		return []string{err.Error()}
	}
	for key := range keys() {
		if !k.Exists(key) {
			missing = append(missing, key)
		}
	}
	return missing
}
