package esp32client

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/partition"
)

// What cannot be built without Espressif's tools is compiled against declarations, in the words of both generations of ESP-IDF.
func TestSourcesCompile(t *testing.T) {
	sources, err := filepath.Glob(filepath.Join(example, "src/*.cpp"))
	if err != nil || len(sources) < 5 {
		t.Fatalf("%d sources: %v", len(sources), err)
	}
	for _, flags := range [][]string{{"-DESP_IDF_VERSION_MAJOR=4"}, {"-DESP_IDF_VERSION_MAJOR=5", "-DCONFIG_BOOTLOADER_APP_ANTI_ROLLBACK=1"}} {
		t.Run(flags[0], func(t *testing.T) {
			t.Parallel()
			args := append([]string{"-fsyntax-only", "-I" + example + "/src", "-Ideclarations"}, flags...)
			if err := gxx(append(args, sources...)...); err != nil {
				t.Error(err)
			}
		})
	}
}

// The partition table fits the chip and the bootloader's place, has two slots of one size, and its keys are encrypted.
func TestPartitions(t *testing.T) {
	csv := read(t, "partitions.csv")
	l := partition.Layout{Bootloader: 0x1000, Table: 0x10000, FlashSize: 4 << 20}
	table, err := partition.ParseCSV([]byte(csv), l)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range table.Check(l) {
		if f.Severity >= esp.Warning {
			t.Errorf("%s: %s", f.Code, f.Message)
		}
	}
	size := map[string]uint32{}
	for _, p := range table.Partitions {
		size[p.Name] = p.Size
		if (p.Flags&partition.Encrypted != 0) != (p.Name == "nvs_keys" || p.Name == "coredump") {
			t.Errorf("%s: flags %#x", p.Name, p.Flags)
		}
	}
	if size["app0"] == 0 || size["app0"] != size["app1"] || size["nvs"] < 0xC000 || size["nvs_keys"] != 0x1000 {
		t.Errorf("sizes %v", size)
	}
	if !strings.Contains(read(t, "sdkconfig.defaults"), "CONFIG_PARTITION_TABLE_OFFSET=0x10000\n") {
		t.Error("sdkconfig.defaults has another place for the table")
	}
}

// docs/esp32.md tells the factory which keys to write: those that the client reads, and no others.
func TestNamesInNVS(t *testing.T) {
	page, err := os.ReadFile("../../docs/esp32.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(page), "## What is in NVS\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !ok {
		t.Fatal("docs/esp32.md has no section on NVS")
	}
	inDocs := map[string]bool{}
	for line := range strings.Lines(section) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for i, word := range strings.Split(cells[1], "`") {
				if i%2 == 1 {
					inDocs[word] = true
				}
			}
		}
	}
	sources := read(t, "lib/muster_core/src/muster/vault.h") + read(t, "src/main.cpp")
	inCode := map[string]bool{}
	_, names, _ := strings.Cut(sources, "namespace names {")
	names, rest, _ := strings.Cut(names, "}  // namespace names")
	for i, word := range strings.Split(names, `"`) {
		if i%2 == 1 {
			inCode[word] = true
		}
	}
	for _, piece := range strings.Split(rest, `store.text("`)[1:] {
		word, _, _ := strings.Cut(piece, `"`)
		inCode[word] = true
	}
	for name := range inCode {
		if !inDocs[name] {
			t.Errorf("the client uses %s, which docs/esp32.md does not name", name)
		}
		if len(name) > 15 {
			t.Errorf("%s is too long for NVS", name)
		}
	}
	for name := range inDocs {
		if !inCode[name] {
			t.Errorf("docs/esp32.md names %s, which the client does not use", name)
		}
	}
	if len(inCode) < 20 {
		t.Errorf("found %d names only", len(inCode))
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(example, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
