// Package partition reads, checks and writes partition tables, as CSV and as flash holds them, and otadata, which says
// what boots (esp32.md §5; ESP-IDF's gen_esp32part.py, esp_flash_partitions.h and esp_ota_ops.c). It does no I/O.
package partition

import (
	"cmp"
	"slices"

	"muster/internal/esp"
)

// Sizes of the format, in bytes.
const (
	Size      = 0x1000 // of flash that a table takes
	written   = 0xC00  // of a table as gen_esp32part writes it
	entrySize = 32
	nameSize  = 16
	maxRows   = written/entrySize - 1 // with the row for the MD5; one more must stay empty
	sector    = 0x1000
	appAlign  = 0x10000
	minRWNVS  = 0x3000
	otaSize   = 0x2000
)

// Flags of a partition.
const (
	Encrypted uint32 = 1 << 0
	ReadOnly  uint32 = 1 << 1
)

// Partition is a row of a table.
type Partition struct {
	Name    string  `json:"name"` // 16 bytes at most; the table has room for no more
	Type    Type    `json:"type"`
	Subtype Subtype `json:"subtype"`
	Offset  uint32  `json:"offset"` // in flash
	Size    uint32  `json:"size"`   // bytes
	Flags   uint32  `json:"flags"`
}

// End returns the offset of the first byte after the partition.
func (p Partition) End() int64 { return int64(p.Offset) + int64(p.Size) }

// Is reports whether the partition is of that type and subtype.
func (p Partition) Is(t Type, s Subtype) bool { return p.Type == t && p.Subtype == s }

// MustEncrypt reports whether flash encryption covers the partition: what boots, what says what boots, NVS keys, and
// whatever has the flag; never NVS, which has an encryption of its own (esp32.md §3.3).
func (p Partition) MustEncrypt() bool {
	switch {
	case p.Is(Data, NVS):
		return false
	case p.Type == App, p.Type == Bootloader, p.Type == PartitionTable, p.Is(Data, OTAData), p.Is(Data, NVSKeys):
		return true
	default:
		return p.Flags&Encrypted != 0
	}
}

// anchored reports whether the partition stands where the layout says, before the table's end.
func (p Partition) anchored() bool { return p.Is(Bootloader, Primary) || p.Is(PartitionTable, Primary) }

// Table is a partition table.
type Table struct {
	Partitions []Partition `json:"partitions"` // in the order of the file
	NoMD5      bool        `json:"no_md5"`     // written without checksum, for bootloaders of ESP-IDF before 3.1
}

// Find returns the partition of that name.
func (t Table) Find(name string) (Partition, bool) {
	return t.first(func(p Partition) bool { return p.Name == name })
}

// FindType returns the first partition of that type and subtype.
func (t Table) FindType(typ Type, sub Subtype) (Partition, bool) {
	return t.first(func(p Partition) bool { return p.Is(typ, sub) })
}

func (t Table) first(is func(Partition) bool) (Partition, bool) {
	if i := slices.IndexFunc(t.Partitions, is); i >= 0 {
		return t.Partitions[i], true
	}
	return Partition{}, false
}

// OTASlots returns the slots that a device counts: ota_0, ota_1 and so on up to the first that is missing.
func (t Table) OTASlots() []Partition {
	var slots []Partition
	for i := range MaxOTA {
		p, ok := t.FindType(App, OTA0+Subtype(i))
		if !ok {
			break
		}
		slots = append(slots, p)
	}
	return slots
}

// OTASize returns the size of the smallest OTA slot: what an image for over-the-air updates must fit. 0: no slots.
func (t Table) OTASize() uint32 {
	slots := t.OTASlots()
	if len(slots) == 0 {
		return 0
	}
	return slices.MinFunc(slots, func(a, b Partition) int { return cmp.Compare(a.Size, b.Size) }).Size
}

// FirstApp returns the partition that a device boots while otadata is blank: factory, otherwise ota_0.
func (t Table) FirstApp() (Partition, bool) {
	if p, ok := t.FindType(App, Factory); ok {
		return p, true
	}
	return t.FindType(App, OTA0)
}

// FlashSize returns the size of flash that the partitions need, in bytes.
func (t Table) FlashSize() int64 {
	var end int64
	for _, p := range t.Partitions {
		end = max(end, p.End())
	}
	return end
}

// Layout is what stands in flash before the partitions, and what flash can take.
type Layout struct {
	Bootloader   uint32 // flash offset of the second-stage bootloader
	Table        uint32 // flash offset of the partition table
	Recovery     uint32 // flash offset of a recovery bootloader; 0: there is none
	FlashSize    int64  // bytes; 0: not checked
	SecureBootV1 bool   // sizes of apps are multiples of 64 KiB
}

// DefaultTable is where ESP-IDF, Arduino and PlatformIO put the table, and DefaultApp where the latter two put the
// first application.
const (
	DefaultTable = 0x8000
	DefaultApp   = 0x10000
)

// LayoutOf returns the default layout of a chip: for the ESP32, bootloader at 0x1000 and table at 0x8000.
func LayoutOf(c esp.Chip) Layout { return Layout{Bootloader: c.Bootloader, Table: DefaultTable} }
