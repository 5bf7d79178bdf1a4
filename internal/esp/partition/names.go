package partition

import (
	"fmt"
	"strings"
)

// Type is what a partition holds.
type Type uint8

// Types that have a name (gen_esp32part.py). Others are an application's own.
const (
	App            Type = 0
	Data           Type = 1
	Bootloader     Type = 2
	PartitionTable Type = 3
)

// Subtype says more about a partition; what it means depends on the Type.
type Subtype uint8

// Subtypes that rules depend on.
const (
	Factory   Subtype = 0x00 // of App
	OTA0      Subtype = 0x10 // of App: the first of MaxOTA slots
	OTAData   Subtype = 0x00 // of Data
	NVS       Subtype = 0x02 // of Data
	CoreDump  Subtype = 0x03 // of Data
	NVSKeys   Subtype = 0x04 // of Data
	Undefined Subtype = 0x06 // of Data: what an empty field means
	TEEOTA    Subtype = 0x90 // of Data
	Primary   Subtype = 0x00 // of Bootloader and PartitionTable
	Recovery  Subtype = 0x02 // of Bootloader
)

// MaxOTA is how many OTA slots a table can have.
const MaxOTA = 16

// word is a name in a CSV file and its number.
type word struct {
	name  string
	value uint8
}

var typeWords = []word{{"app", 0}, {"data", 1}, {"bootloader", 2}, {"partition_table", 3}}

var subtypeWords = map[Type][]word{
	App: appWords(),
	Data: {
		{"ota", 0x00}, {"phy", 0x01}, {"nvs", 0x02}, {"coredump", 0x03}, {"nvs_keys", 0x04}, {"efuse", 0x05}, {"undefined", 0x06},
		{"esphttpd", 0x80}, {"fat", 0x81}, {"spiffs", 0x82}, {"littlefs", 0x83}, {"tee_ota", 0x90}, {"tee_sec_stg", 0x91},
	},
	Bootloader:     {{"primary", 0}, {"ota", 1}, {"recovery", 2}},
	PartitionTable: {{"primary", 0}, {"ota", 1}},
}

func appWords() []word {
	all := []word{{"factory", 0x00}, {"test", 0x20}, {"tee_0", 0x30}, {"tee_1", 0x31}}
	for i := range MaxOTA {
		all = append(all, word{fmt.Sprintf("ota_%d", i), uint8(OTA0) + uint8(i)})
	}
	return all
}

func nameIn(words []word, value uint8) (string, bool) {
	for _, w := range words {
		if w.value == value {
			return w.name, true
		}
	}
	return "", false
}

func valueIn(words []word, name string) (uint8, bool) {
	for _, w := range words {
		if strings.EqualFold(w.name, name) {
			return w.value, true
		}
	}
	return 0, false
}

// String returns the type as it stands in CSV: its name, and the number of a type that has none.
func (t Type) String() string {
	if name, ok := nameIn(typeWords, uint8(t)); ok {
		return name
	}
	return fmt.Sprint(uint8(t))
}

// SubtypeName returns the subtype of a partition of this type as it stands in CSV.
func (t Type) SubtypeName(s Subtype) string {
	if name, ok := nameIn(subtypeWords[t], uint8(s)); ok {
		return name
	}
	return fmt.Sprint(uint8(s))
}

// known lists words for a message.
func known(words []word) string {
	var all []string
	for _, w := range words {
		all = append(all, w.name)
	}
	return strings.Join(all, ", ")
}
