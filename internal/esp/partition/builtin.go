package partition

import (
	"maps"
	"slices"
)

// builtins are the tables that come with Arduino (and so with PlatformIO) and ESP-IDF, by muster's names for them.
var builtins = map[string]string{
	"arduino-default": `# Name, Type, SubType, Offset, Size, Flags
nvs,      data, nvs,      0x9000,   0x5000,
otadata,  data, ota,      0xe000,   0x2000,
app0,     app,  ota_0,    0x10000,  0x140000,
app1,     app,  ota_1,    0x150000, 0x140000,
spiffs,   data, spiffs,   0x290000, 0x160000,
coredump, data, coredump, 0x3f0000, 0x10000,
`,
	"arduino-min-spiffs": `# Name, Type, SubType, Offset, Size, Flags
nvs,      data, nvs,      0x9000,   0x5000,
otadata,  data, ota,      0xe000,   0x2000,
app0,     app,  ota_0,    0x10000,  0x1E0000,
app1,     app,  ota_1,    0x1F0000, 0x1E0000,
spiffs,   data, spiffs,   0x3D0000, 0x20000,
coredump, data, coredump, 0x3F0000, 0x10000,
`,
	"esp-idf-two-ota": `# Name, Type, SubType, Offset, Size, Flags
nvs,      data, nvs,     , 0x4000,
otadata,  data, ota,     , 0x2000,
phy_init, data, phy,     , 0x1000,
factory,  app,  factory, , 1M,
ota_0,    app,  ota_0,   , 1M,
ota_1,    app,  ota_1,   , 1M,
`,
}

// Builtins returns the names of the built-in tables.
func Builtins() []string { return slices.Sorted(maps.Keys(builtins)) }

// Builtin returns the built-in table of that name as CSV.
func Builtin(name string) (csv []byte, ok bool) {
	text, ok := builtins[name]
	return []byte(text), ok
}
